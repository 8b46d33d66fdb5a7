"""Compare what ranks are said to compute equally, gradients and losses, once: in the first step.

A stage whose ranks each compute a share of their input's gradient, and which does not say so, trains with a share taken
for the whole, and nothing else would show it. So does one whose ranks each have the loss of a part of the batch.
"""

from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.transport.coordination.store import awaited_note, post_note

TOLERANCE = 0.05
"""Relative to the norm: far above what the order of additions changes, in bfloat16 too, and far below the difference of
two shares, which is about the norm itself."""

LOSS_TOLERANCE = 0.02
"""The same for losses, which ranks compute from the same numbers; for types with many digits it is the root of their
resolution."""

GRADIENT_REMEDY = (
    "if each computes a share, as a column-parallel layer that does not reduce its input's gradient, declare "
    "EdgeTensor(..., gradient=(Partial(),)) for that axis; if not, the ranks saw different data or have different "
    "weights"
)
LOSS_REMEDY = (
    'if each has the loss of its part of the batch, declare Stage(..., loss=(Partial("avg"),)) for that axis; if not, '
    "the ranks saw different data or have different weights"
)

PROJECTIONS = 8
"""Sums with random signs, one for each bit of a byte. Two gradients that differ agree in one of them in some percent
of all cases, and in all of them never."""


class ReplicaCheck:
    """Compare gradients and losses of one step between the ranks that hold the same elements.

    Args:
        store: that the ranks share.
        rank: this rank.
        name: never used before on this store.
        timeout_seconds: how long to wait for another rank.
    """

    def __init__(self, store: Any, rank: int, name: str, timeout_seconds: float) -> None:
        self.store = store
        self.rank = rank
        self.name = name
        self.timeout_seconds = timeout_seconds
        self._recorded: dict[str, tuple[int, int]] = {}
        self._rules: dict[str, tuple[float, str]] = {}

    def record_gradient(self, label: str, spec: ShardingSpec, gradient: torch.Tensor) -> None:
        """Record a gradient that this rank has computed.

        Args:
            label: says which, on all ranks alike.
            spec: its layout, as declared.
            gradient: this rank's shard.
        """
        self._record(f"the gradient of {label}", spec, gradient, TOLERANCE, GRADIENT_REMEDY)

    def record_losses(self, label: str, spec: ShardingSpec, losses: torch.Tensor) -> None:
        """Record the losses of all microbatches.

        Args:
            label: says of which stage, on all ranks alike.
            spec: the layout of the loss, as declared.
            losses: one a microbatch.
        """
        exact = torch.finfo(losses.dtype).eps ** 0.5 if losses.is_floating_point() else 0.0
        self._record(f"the loss of {label}", spec, losses, min(LOSS_TOLERANCE, max(1e-6, exact)), LOSS_REMEDY)

    def _record(self, label: str, spec: ShardingSpec, value: torch.Tensor, tolerance: float, remedy: str) -> None:
        ranks = same_elements(spec, self.rank)
        if len(ranks) < 2:
            return
        post_note(self.store, self._key(label, self.rank), _sums(value))
        self._recorded[label] = (ranks[0], self.rank)
        self._rules[label] = (tolerance, remedy)

    def compare(self) -> None:
        """Compare what was recorded with the first of the ranks that hold the same.

        Raises:
            SpecError: they differ.
            TransportError: the other rank did not come so far within the timeout.
        """
        for label, ranks in self._recorded.items():
            (*theirs, norm), (*ours, _) = (self._fetched(label, rank) for rank in ranks)
            gaps = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
            tolerance, remedy = self._rules[label]
            # A norm that is not finite compares as equal: the loss itself shows that.
            if max(gaps) > tolerance * norm:
                worst = gaps.index(max(gaps))
                raise SpecError(
                    f"ranks {ranks[0]} and {ranks[1]} hold the same elements of {label}, and computed different ones "
                    f"(sums with random signs {theirs[worst]:.6g} and {ours[worst]:.6g}); {remedy}"
                )

    def _key(self, label: str, rank: int) -> str:
        return f"replicas/{self.name}/{label}/{rank}"

    def _fetched(self, label: str, rank: int) -> list[float]:
        absent = f"rank {rank} did not compute {label} within the timeout"
        sums: list[float] = awaited_note(self.store, self._key(label, rank), self.timeout_seconds, absent)
        return sums


def _sums(gradient: torch.Tensor) -> list[float]:
    """Sum the elements with random signs, the same on all ranks, and last the norm.

    Plain sums of two shares often agree: those of elements that scatter around zero are near zero.
    """
    exact = gradient.detach().double().flatten()
    # Bit k of an element's byte is its sign in sum k.
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(1 << PROJECTIONS, exact.shape, generator=random, dtype=torch.uint8, device="cpu")
    signs = signs.to(exact.device)
    sums = [torch.where((signs & 1 << bit).bool(), exact, -exact).sum() for bit in range(PROJECTIONS)]
    return [float(one) for one in (*sums, exact.norm())]


def same_elements(spec: ShardingSpec, rank: int) -> list[int]:
    """Return the ranks that hold the same elements (and not each a share of their sum), this one among them."""

    def place(other: int) -> object:
        if spec.holdings is not None:
            return spec.holding(other)
        pairs = zip(spec.placements, spec.mesh.coordinate(other), strict=True)
        return [index for placement, index in pairs if not isinstance(placement, Replicate)]

    mine = place(rank)
    return [other for other in spec.mesh.ranks if place(other) == mine]
