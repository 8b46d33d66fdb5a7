"""Gradients through a reshard: the gradient of a move is the move back."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NoReturn, Self

import torch

from tricomm.errors import SpecError, TricommError
from tricomm.layout.intervals import without_repeats
from tricomm.layout.placement import Partial, Placement, Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.tensor_checker import describe_transform
from tricomm.plan import Plan


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


class Gradients(ABC):
    """The half of a Resharder that is about gradients."""

    plan: Plan
    _gradient: Any = None

    @abstractmethod
    def _refuse(self, error: TricommError) -> NoReturn:
        """End a call that this rank does not make, and tell the others."""

    @abstractmethod
    def _mover_of_gradient(self, source: ShardingSpec, destination: ShardingSpec) -> Any:
        """Make the Resharder of the way back."""

    @abstractmethod
    def _move(self, tensor: torch.Tensor | None, out: torch.Tensor | None, *, requires_grad: bool) -> Any:
        """Move a tensor."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Reshard a detached tensor whose gradient is going to be asked for."""
        moved: torch.Tensor | None = self._move(tensor, None, requires_grad=True)
        return moved

    def gradient(self) -> Self:
        """The Resharder that brings the gradient of the result back to the layout of the source.

        Where a source is Partial its contributions all get the same gradient, which for an average is still to
        be multiplied by ``gradient_scale``. With ranks on one mesh only (a pipeline), call it yourself in the
        backward pass, with the gradient on the destination's ranks and None on the others.
        """
        if self._gradient is None:
            self._gradient = self._mover_of_gradient(*gradient_specs(self.plan.source, self.plan.destination))
        found: Self = self._gradient
        return found

    @property
    def gradient_scale(self) -> float:
        """What the result of ``gradient()`` is to be multiplied by: 1, or 1/n for a Partial("avg") over n ranks."""
        return gradient_scale(self.plan.source)

    def _differentiated(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor | None:
        """Reshard such that gradients come back."""
        source, destination = self.plan.source, self.plan.destination
        problem = describe_transform() or describe_undifferentiable(source, destination, out)
        if problem is not None:
            self._refuse(SpecError(problem))
        result: torch.Tensor | None = ReshardFunction.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result


class ReshardFunction(torch.autograd.Function):
    """A reshard of ranks that are all on both meshes, so that each of them takes part in both directions."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mover: "Gradients") -> torch.Tensor | None:
        """Move."""
        ctx.mover = mover
        return mover.forward(tensor.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, None]:
        """Move back."""
        moved = ctx.mover.gradient()(gradients[0])
        scale = ctx.mover.gradient_scale
        return (moved if scale == 1.0 or moved is None else moved * scale), None
