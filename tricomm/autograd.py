"""Gradients through a reshard: the gradient of a move is the move back."""

from dataclasses import replace
from typing import Any, Protocol

import torch

from tricomm.errors import SpecError
from tricomm.layout.intervals import without_repeats
from tricomm.layout.placement import Partial, Placement, Replicate
from tricomm.layout.spec import ShardingSpec


class Mover(Protocol):
    """What gradients ask of a Resharder."""

    def __call__(self, tensor: torch.Tensor | None = None) -> torch.Tensor | None:
        """Move."""
        ...

    def forward(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Move what requires grad."""
        ...

    def gradient(self) -> "Mover":
        """The mover of the gradients."""
        ...

    @property
    def gradient_scale(self) -> float:
        """What the moved gradient is multiplied by."""
        ...


def gradient_specs(source: ShardingSpec, destination: ShardingSpec) -> tuple[ShardingSpec, ShardingSpec]:
    """(layout of the incoming gradient, layout of the outgoing one).

    The gradient of the result has the result's layout; replicas of the result have equal gradients, as in
    DTensor. The gradient of each contribution to a sum is the whole gradient, so Partial axes become replicated.

    Raises:
        SpecError: a maximum or minimum, whose gradient needs to know who won; a result that holds an element in two
            slots of a rank, whose gradients would have to be added.
    """
    for rank in destination.mesh.ranks if destination.holdings is not None else ():
        holding = destination.holding(rank)
        if holding != tuple(map(without_repeats, holding)):
            raise SpecError(
                f"rank {rank} of the destination holds {holding}, an element in two slots, and their gradients are not "
                "added up on the way back; move a detached tensor, or let each slot be a tensor of its own"
            )
    placements: list[Placement] = []
    for placement in source.placements:
        if isinstance(placement, Partial) and placement.op not in ("sum", "avg"):
            raise SpecError(
                f"{placement!r} has no gradient that its layout determines; reduce it yourself and detach the result"
            )
        placements.append(Replicate() if isinstance(placement, Partial) else placement)
    return destination, replace(source, placements=tuple(placements))


def describe_undifferentiable(source: ShardingSpec, destination: ShardingSpec, out: torch.Tensor | None) -> str | None:
    """Say why a tensor that requires grad cannot be moved; None if it can."""
    if out is not None:
        return "a tensor that requires grad cannot be moved into out; leave out=None or pass tensor.detach()"
    if set(source.mesh.ranks) != set(destination.mesh.ranks):
        return (
            f"the tensor requires grad, but {source.mesh} and {destination.mesh} are different ranks, so autograd on "
            "one rank cannot reach the other; pass tensor.detach(), and in the backward pass call "
            "Resharder.gradient() on all ranks"
        )
    return None


def gradient_scale(source: ShardingSpec) -> float:
    """By how much a contribution counts: 1, or 1/n for an average of n."""
    scale = 1.0
    for axis in source.partial_axes:
        placement = source.placements[axis]
        if isinstance(placement, Partial) and placement.op == "avg":
            scale /= source.mesh.shape[axis]
    return scale


class ReshardFunction(torch.autograd.Function):
    """A reshard of ranks that are all on both meshes, so that each of them takes part in both directions."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mover: Mover) -> torch.Tensor | None:
        """Move."""
        ctx.mover = mover
        return mover.forward(tensor.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, None]:
        """Move back."""
        moved = ctx.mover.gradient()(gradients[0])
        scale = ctx.mover.gradient_scale
        return (moved if scale == 1.0 or moved is None else moved * scale), None
