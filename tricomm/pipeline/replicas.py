"""Whether ranks that are said to compute equal gradients do: looked at once, in the first step.

A stage whose ranks each compute a share of their input's gradient, and which does not say so, trains with a share taken
for the whole, and nothing else would show it.
"""

from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.placement import Replicate
from tricomm.sharding import ShardingSpec
from tricomm.transport.store import awaited_note, post_note

TOLERANCE = 0.1
"""Relative to the norm: far above what the order of additions changes, in bfloat16 too, and far below the difference of
two shares, which is about the norm itself."""

PROJECTIONS = 8
"""Two gradients that differ agree in one sum with random signs in some 6 % of all cases, and in all of these never."""


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
        self._noted: dict[str, tuple[int, int]] = {}

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
        post_note(self.store, self._key(label, self.rank), [*_projections(gradient), float(gradient.double().norm())])
        self._noted[label] = (ranks[0], self.rank)

    def compare(self) -> None:
        """Compare what was noted with the first of the ranks that hold the same.

        Raises:
            SpecError: they differ.
            TransportError: the other rank did not come so far within the timeout.
        """
        for label, ranks in self._noted.items():
            (*theirs, norm), (*ours, _) = (self._fetched(label, rank) for rank in ranks)
            gaps = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
            if max(gaps) > TOLERANCE * norm:
                worst = gaps.index(max(gaps))
                raise SpecError(
                    f"ranks {ranks[0]} and {ranks[1]} hold the same elements of the gradient of {label}, and computed "
                    f"different ones (sums with random signs {theirs[worst]:.6g} and {ours[worst]:.6g}); if each "
                    "computes a share, as a "
                    "column-parallel layer that does not reduce its input's gradient, declare "
                    "EdgeTensor(..., gradient=(Partial(),)) for that axis; if not, the ranks saw different data or "
                    "have different weights"
                )

    def _key(self, label: str, rank: int) -> str:
        return f"replicas/{self.name}/{label}/{rank}"

    def _fetched(self, label: str, rank: int) -> list[float]:
        absent = f"rank {rank} did not compute its gradient of {label} within the timeout"
        sums: list[float] = awaited_note(self.store, self._key(label, rank), self.timeout_seconds, absent)
        return sums


def _projections(gradient: torch.Tensor) -> list[float]:
    """Sums of the elements with random signs, the same on all ranks; plain sums of two shares may agree by chance."""
    flat = gradient.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(0)
    return [float(flat @ _signs(flat, generator)) for _ in range(PROJECTIONS)]


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, dtype=like.dtype) * 2 - 1


def same_elements(spec: ShardingSpec, rank: int) -> list[int]:
    """The ranks that hold the same elements (and not each a share of their sum), this one among them."""

    def place(other: int) -> object:
        if spec.holdings is not None:
            return spec.holding(other)
        pairs = zip(spec.placements, spec.mesh.coordinate(other), strict=True)
        return [index for placement, index in pairs if not isinstance(placement, Replicate)]

    mine = place(rank)
    return [other for other in spec.mesh.ranks if place(other) == mine]
