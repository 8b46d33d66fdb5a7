"""Whether ranks that are said to compute equal gradients do: looked at once, in the first step.

A stage whose ranks each compute a share of their input's gradient, and which does not say so, trains with a share taken
for the whole, and nothing else would show it.
"""

from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.transport.store import awaited_note, post_note

TOLERANCE = 0.05
"""Relative to the norm: far above what the order of additions changes, in bfloat16 too, and far below the difference of
two shares, which is about the norm itself."""

PROJECTIONS = 8
"""Sums with random signs, one for each bit of a byte. Two gradients that differ agree in one of them in some percent
of all cases, and in all of them never."""


class ReplicaCheck:
    """Compares gradients of one step between the ranks that hold the same elements.

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

    def note(self, label: str, spec: ShardingSpec, gradient: torch.Tensor) -> None:
        """Take down a gradient that this rank has computed.

        Args:
            label: says which, on all ranks alike.
            spec: its layout, as declared.
            gradient: this rank's shard.
        """
        ranks = same_elements(spec, self.rank)
        if len(ranks) < 2:
            return
        post_note(self.store, self._key(label, self.rank), _sums(gradient))
        self._recorded[label] = (ranks[0], self.rank)

    def compare(self) -> None:
        """Compare what was noted with the first of the ranks that hold the same.

        Raises:
            SpecError: they differ.
            TransportError: the other rank did not come so far within the timeout.
        """
        for label, ranks in self._recorded.items():
            (*theirs, norm), (*ours, _) = (self._fetched(label, rank) for rank in ranks)
            gaps = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
            if max(gaps) > TOLERANCE * norm:
                worst = gaps.index(max(gaps))
                raise SpecError(
                    f"ranks {ranks[0]} and {ranks[1]} hold the same elements of the gradient of {label}, and computed "
                    f"different ones (sums with random signs {theirs[worst]:.6g} and {ours[worst]:.6g}); if each "
                    "computes a share, as a column-parallel layer that does not reduce its input's gradient, declare "
                    "EdgeTensor(..., gradient=(Partial(),)) for that axis; if not, the ranks saw different data or "
                    "have different weights"
                )

    def _key(self, label: str, rank: int) -> str:
        return f"replicas/{self.name}/{label}/{rank}"

    def _fetched(self, label: str, rank: int) -> list[float]:
        absent = f"rank {rank} did not compute its gradient of {label} within the timeout"
        sums: list[float] = awaited_note(self.store, self._key(label, rank), self.timeout_seconds, absent)
        return sums


def _sums(gradient: torch.Tensor) -> list[float]:
    """Sums of the elements with random signs, the same on all ranks, and last the norm.

    Plain sums of two shares often agree: those of elements that scatter around zero are near zero.
    """
    exact = gradient.detach().double().flatten()
    # Bit k of an element's byte is its sign in sum k.
    signs = torch.randint(1 << PROJECTIONS, exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    signs = signs.to(exact.device)
    sums = [torch.where((signs & 1 << bit).bool(), exact, -exact).sum() for bit in range(PROJECTIONS)]
    return [float(one) for one in (*sums, exact.norm())]


def same_elements(spec: ShardingSpec, rank: int) -> list[int]:
    """The ranks that hold the same elements (and not each a share of their sum), this one among them."""

    def place(other: int) -> object:
        if spec.holdings is not None:
            return spec.holding(other)
        pairs = zip(spec.placements, spec.mesh.coordinate(other), strict=True)
        return [index for placement, index in pairs if not isinstance(placement, Replicate)]

    mine = place(rank)
    return [other for other in spec.mesh.ranks if place(other) == mine]
