"""What a ShardingSpec is made from, checked once: shapes, placements, explicit holdings."""

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.layout.intervals import Region, merged
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard


def checked_shape(shape: object) -> tuple[int, ...]:
    """A global shape in plain integers.

    Raises:
        SpecError: a negative extent; an ArgumentError where it is no sequence of integers.
    """
    try:
        # Integers of a set, a mapping or bytes have no order that somebody meant.
        extents: Any = None if isinstance(shape, bytes | Set | Mapping) else shape
        checked = tuple(operator.index(extent) for extent in extents)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"shape={shown(shape)} is not a sequence of integers; write (4096, 1024)") from None
    if any(extent < 0 for extent in checked):
        raise SpecError(f"shape={checked} has a negative extent; every extent must be at least 0, so give the sizes")
    return checked


def checked_holders(holdings: object) -> tuple[list[int], Any]:
    """The ranks of explicit holdings, sorted, and what each holds.

    Raises:
        SpecError: there are none; an ArgumentError where it is no mapping of ranks.
    """
    if not isinstance(holdings, Mapping):
        raise ArgumentError(
            f"holdings={shown(holdings)} is not a mapping; write {{rank: holding}}, such as {{0: (((0, 4),),)}}"
        )
    if not holdings:
        raise SpecError("explicit holdings are empty; name at least one rank")
    ranks = sorted(Mesh(list(holdings), ("rank",)).ranks)
    return ranks, tuple([holdings[rank] for rank in ranks])


def no_such_dim(dim: object, spec: str, shape: tuple[int, ...]) -> SpecError:
    """What is wrong with a dim of a spec."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        return ArgumentError(f"dim={shown(dim)} is not an integer; name one tensor dim")
    return SpecError(f"dim={dim} is no dim of {spec}; give one from 0 to {len(shape) - 1}")


def incomplete(spec: str, **fields: object) -> SpecError:
    """All that is missing of a spec, at once."""
    missing = [name for name, value in fields.items() if value is None]
    remedy = ", ".join(f"{name}=..." for name in missing)
    return SpecError(f"{spec} has no {' and no '.join(missing)}; write ShardingSpec(mesh, placements, {remedy})")


def check_mesh(mesh: object) -> None:
    """Refuse what is no mesh, with an ArgumentError."""
    if not isinstance(mesh, Mesh):
        raise ArgumentError(f'mesh={shown(mesh)} is not a Mesh; write Mesh([[0, 1], [2, 3]], ("dp", "tp"))')


def checked_placements(mesh: Mesh, given: object, shape: tuple[int, ...] | None) -> tuple[Placement, ...]:
    """One placement per mesh axis, that fits the shape if it is known.

    Raises:
        SpecError: one does not; an ArgumentError where one is none of ours.
    """
    if not isinstance(given, Sequence):
        raise ArgumentError(
            f"placements={shown(given)} is not a tuple of placements; write one per mesh axis: (Shard(0),)"
        )
    placements = tuple(given)
    if len(placements) != mesh.ndim:
        raise SpecError(
            f"{len(placements)} placements {shown(placements)} for {mesh} with {mesh.ndim} axes; "
            "give one placement per mesh axis"
        )
    checked: list[Placement] = []
    for axis, placement in enumerate(placements):
        if not isinstance(placement, (Shard, Replicate, Partial)):
            raise ArgumentError(
                f"placement {shown(placement)} of mesh axis {mesh.axis_names[axis]!r} is not one of tricomm's "
                "Shard, Replicate, Partial; import them from tricomm"
            )
        if isinstance(placement, Shard) and shape is not None:
            placement = _checked_shard(placement, shape)
        checked.append(placement)
    # An axis of one rank reduces nothing.
    ops = {p.op: mesh.axis_names[i] for i, p in enumerate(checked) if isinstance(p, Partial) and mesh.shape[i] > 1}
    if len(ops) > 1 and not ops.keys() <= {"sum", "avg"}:
        (one, axis_of_one), (other, axis_of_other) = list(ops.items())[:2]
        raise SpecError(
            f"placements {placements} mix {one} over {axis_of_one} and {other} over {axis_of_other}, and the result "
            "would depend on which comes first; use one op, or sums and averages, or reduce one of them before"
        )
    return tuple(checked)


def _checked_shard(placement: Shard, shape: tuple[int, ...]) -> Shard:
    ndim = len(shape)
    if not -ndim <= placement.dim < ndim:
        if ndim == 0:
            raise SpecError(f"{placement!r}: a 0-d tensor has no dim to cut; use Replicate()")
        raise SpecError(
            f"{placement!r}: dim {placement.dim} is out of range for shape {shape}; "
            f"use a dim from {-ndim} to {ndim - 1}"
        )
    dim = placement.dim % ndim
    if placement.segments is not None and sum(placement.segments) != shape[dim]:
        raise SpecError(
            f"{placement!r}: the segments add up to {sum(placement.segments)}, but dim {dim} of shape {shape} is "
            f"{shape[dim]}; give segments that add up to {shape[dim]}"
        )
    return placement if dim == placement.dim else Shard(dim, placement.segments)


def checked_holdings(mesh: Mesh, holdings: object, shape: tuple[int, ...]) -> tuple[Region, ...]:
    """What each rank of a mesh holds, within the shape.

    Raises:
        SpecError: an interval outside; an ArgumentError where a holding is no nest of intervals.
    """
    if not isinstance(holdings, tuple) or len(holdings) != mesh.size:
        raise ArgumentError(f"holdings={holdings!r} must be one per rank of {mesh}; write ShardingSpec.explicit(...)")
    return tuple(_checked_holding(rank, one, shape) for rank, one in zip(mesh.ranks, holdings, strict=True))


def _checked_holding(rank: int, holding: object, shape: tuple[int, ...]) -> Region:
    try:
        pairs = [
            [(operator.index(start), operator.index(stop)) for start, stop in intervals]
            for intervals in holding  # type: ignore[attr-defined]
        ]
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"the holding {holding!r} of rank {rank} is not one tuple of integer (start, stop) pairs per dim; write "
            "(((0, 4), (8, 12)), ((0, 16),))"
        ) from None
    if len(pairs) != len(shape):
        raise SpecError(
            f"the holding {holding} of rank {rank} has {len(pairs)} dims, but shape {shape} has {len(shape)}; "
            "give one tuple of (start, stop) per dim"
        )
    for dim, (intervals, extent) in enumerate(zip(pairs, shape, strict=True)):
        for start, stop in intervals:
            if not 0 <= start <= stop <= extent:
                raise SpecError(
                    f"interval ({start}, {stop}) of rank {rank} in dim {dim} does not lie in (0, {extent}); "
                    "intervals are half-open and within the global shape"
                )
    return tuple(merged(intervals) for intervals in pairs)


def canonical_axis_order(
    mesh: Mesh, placements: Sequence[Placement], has_shape: bool, axis_order: object
) -> tuple[int, ...]:
    """Keep of the order of cuts only what matters: which axis comes first among those that cut one dim."""
    ndim = mesh.ndim
    if axis_order is not None and (isinstance(axis_order, str) or not isinstance(axis_order, Sequence)):
        raise ArgumentError(
            f"axis_order={shown(axis_order)} is not a tuple of axes; list all of {mesh.axis_names}, first cut first"
        )
    given = range(ndim) if axis_order is None else [mesh.axis(key) for key in axis_order]
    if sorted(given) != list(range(ndim)):
        raise SpecError(
            f"axis_order={shown(axis_order)} must name each of the {ndim} axes {mesh.axis_names} once; "
            "list them all, first cut first"
        )
    if not has_shape:
        return tuple(given)  # which dims are the same, counted from the end, is known with the shape
    by_dim: dict[int | None, list[int]] = {}
    for axis in given:
        placement = placements[axis]
        by_dim.setdefault(placement.dim if isinstance(placement, Shard) else None, []).append(axis)
    order = [0] * ndim
    for dim, axes in by_dim.items():
        for slot, axis in zip(sorted(axes), sorted(axes) if dim is None else axes, strict=True):
            order[slot] = axis
    return tuple(order)
