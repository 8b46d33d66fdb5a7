"""The layouts of gradients: the gradient of a move is the move back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tricomm.errors import SpecError
from tricomm.layout.intervals import without_repeats
from tricomm.layout.placement import Partial, Placement, Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.torch_layout import read_placements
from tricomm.packing.copy_program import torch_dtype
from tricomm.plan import Plan


def gradient_specs(
    source: ShardingSpec, destination: ShardingSpec, grad_placements: Sequence[Any] | None = None
) -> tuple[ShardingSpec, ShardingSpec]:
    """(layout of the incoming gradient, layout of the outgoing one).

    The gradient of the result has the result's layout; replicas of the result have equal gradients, as in
    DTensor, unless ``grad_placements`` say that they are to be added up. The gradient of each contribution to a sum is
    the whole gradient, so Partial axes become replicated.

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
    incoming = destination if grad_placements is None else _incoming(destination, grad_placements)
    return incoming, replace(source, placements=tuple(placements))


def _incoming(destination: ShardingSpec, grad_placements: Sequence[Any]) -> ShardingSpec:
    """The layout of the gradient of a result, of which replicas may be contributions."""
    read = read_placements(destination.mesh, grad_placements, destination.shape)
    for axis, (one, of_result) in enumerate(zip(read.placements, destination.placements, strict=False)):
        is_sum = isinstance(one, Partial) and one.op in ("sum", "avg") and isinstance(of_result, Replicate)
        if one != of_result and not is_sum:
            raise SpecError(
                f"grad_placements={tuple(grad_placements)} have {one!r} on axis {destination.mesh.axis_names[axis]!r}, "
                f"where the result is {of_result!r}; a gradient lies as the result does, or is Partial() where that is "
                "replicated"
            )
    if len(read.placements) != len(destination.placements):
        raise SpecError(
            f"grad_placements={tuple(grad_placements)} cannot be those of {destination}; leave them out for a result "
            "with explicit holdings"
        )
    return replace(destination, placements=read.placements)


def check_differentiable_layouts(plan: Plan, grad_placements: Sequence[Any] | None) -> None:
    """Refuse at once what has no gradient.

    Raises:
        SpecError: many tensors at once, a dtype without derivatives, or see :func:`gradient_specs`.
    """
    if plan.is_mapping:
        raise SpecError(NO_GRADIENTS_OF_MANY)
    source, destination = plan.source, plan.destination
    for spec in (source, destination):
        if not torch_dtype(spec.element_type).is_floating_point and not torch_dtype(spec.element_type).is_complex:
            raise SpecError(
                f"differentiable=True for {spec}, and {spec.element_type} has no gradients; leave differentiable out, "
                "or move floating-point numbers"
            )
    gradient_specs(source, destination, grad_placements)


NO_GRADIENTS_OF_MANY = "gradients do not come back through a mapping; make a Resharder of each tensor"


def describe_undifferentiable(plan: Plan, has_out: bool) -> str | None:
    """Say why a tensor that requires grad cannot be moved; None if it can."""
    if plan.is_mapping:
        return NO_GRADIENTS_OF_MANY
    source, destination = plan.source, plan.destination
    if has_out:
        return "a tensor that requires grad cannot be moved into out; leave out=None or pass tensor.detach()"
    if set(source.mesh.ranks) != set(destination.mesh.ranks):
        return (
            f"the tensor requires grad, but {source.mesh} and {destination.mesh} are different ranks, so autograd on "
            "one rank cannot reach the other; pass differentiable=True on all ranks, or tensor.detach() and call "
            "Resharder.gradient() in the backward pass"
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
