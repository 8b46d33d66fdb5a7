"""torch's placements as tricomm's, and back. Arithmetic only: the types of torch are read and made in interop.

A plain ``Shard`` cuts what the axes before it left. torch's strided one has two readings, which differ where parts are
uneven: it says in which *order* the axes cut, so that a later axis came first; or, *word by word*, it cuts what is
there into ``split_factor`` pieces and each of these by the axis. FSDP2 keeps data in the first and distribute_tensor in
the second reading; a DTensor's spec says which one is meant.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from tricomm.errors import ArgumentError, SpecError
from tricomm.interop import TorchPlacement, make_placement, read_placement
from tricomm.layout.intervals import Intervals, chunk, length, merged, part_of_segments
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import REDUCTIONS, Partial, Placement, Replicate, Shard


class Read(NamedTuple):
    """A layout of torch in tricomm's words: placements with the order of cuts, or what each rank holds."""

    placements: tuple[Placement, ...]
    axis_order: tuple[int, ...] | None
    holdings: Mapping[int, tuple[Intervals, ...]] | None = None


def read_placements(
    mesh: Mesh, placements: Sequence[object], shape: tuple[int, ...] | None, is_ordered: bool = True
) -> Read:
    """Read placements, torch's or tricomm's.

    Args:
        mesh: the ranks.
        placements: one per mesh axis.
        shape: global; None where it is not known yet.
        is_ordered: the reading of strided placements, see above.

    Raises:
        SpecError: a placement that has no counterpart, or strided ones that need a shape; an ArgumentError where it is
            no placement.
    """
    if isinstance(placements, str) or not isinstance(placements, Sequence):
        raise ArgumentError(f"placements={placements!r} is not a sequence of placements; write one per mesh axis")
    if len(placements) != mesh.ndim:
        raise SpecError(
            f"{len(placements)} placements {tuple(placements)} for {mesh} with {mesh.ndim} axes; "
            "give one placement per mesh axis"
        )
    found = [_read(placement, shape) for placement in placements]
    if not any(isinstance(one, TorchPlacement) for one in found):
        return Read(tuple(one for one in found if not isinstance(one, TorchPlacement)), None)
    if is_ordered:
        order = _order_of_cuts(mesh, found)
        if order is not None:
            return Read(tuple(Shard(one.dim) if isinstance(one, TorchPlacement) else one for one in found), order)
    if shape is None:
        raise SpecError(
            f"the strided placements {tuple(placements)} on {mesh} can be read only with the tensor's shape; give the "
            "shape, as (mesh, placements, shape, dtype)"
        )
    return _word_by_word(mesh, found, shape)


def _read(placement: object, shape: tuple[int, ...] | None) -> Placement | TorchPlacement:
    """One placement: tricomm's, or a strided one of torch with its dim counted from the front."""
    if isinstance(placement, Shard | Replicate | Partial):
        return placement
    described = read_placement(placement)
    if described is None:
        raise ArgumentError(
            f"placement {placement!r} is neither torch's nor tricomm's; write Shard(dim), Replicate() or Partial(op)"
        )
    if described.kind == "replicate":
        return Replicate()
    if described.kind == "partial":
        if described.op not in REDUCTIONS:
            raise SpecError(
                f"{placement!r} reduces by {described.op!r}, and tricomm by one of {', '.join(REDUCTIONS)}; "
                "redistribute the DTensor to Replicate() on that axis first"
            )
        return Partial(described.op)
    dim = described.dim
    if shape is not None:
        if not -len(shape) <= dim < len(shape):
            raise SpecError(f"{placement!r} cuts dim {dim} of shape {shape}; use a dim of the tensor")
        dim %= len(shape)
    return Shard(dim) if described.kind == "shard" else described._replace(dim=dim)


def _order_of_cuts(mesh: Mesh, found: Sequence[Placement | TorchPlacement]) -> tuple[int, ...] | None:
    """The mesh axes in the order in which they cut, or None if strided placements describe no order.

    A split factor is how many parts the later axes have made that cut before this one. Axes are placed from the last to
    the first, each where those before it in the order make that many parts; a plain Shard comes before all of them.
    """
    by_dim: dict[int, list[int]] = {}
    for axis in reversed(range(mesh.ndim)):
        one = found[axis]
        if not isinstance(one, Shard | TorchPlacement):
            continue
        factor = one.split_factor if isinstance(one, TorchPlacement) else 1
        order = by_dim.setdefault(one.dim, [])
        parts = [prod(mesh.shape[other] for other in order[:place]) for place in range(len(order) + 1)]
        if factor not in parts:
            return None
        order.insert(parts.index(factor), axis)
    cutting = [axis for order in by_dim.values() for axis in order]
    return (*cutting, *(axis for axis in range(mesh.ndim) if axis not in cutting))


def _word_by_word(mesh: Mesh, found: Sequence[Placement | TorchPlacement], shape: tuple[int, ...]) -> Read:
    """Segments where each strided placement is the first to cut its dim; else what each rank holds."""
    placements: list[Placement] = []
    cut: set[int] = set()
    for one in found:
        if isinstance(one, TorchPlacement):
            if one.dim in cut:
                return _explicit(mesh, found, shape)
            placements.append(Shard(one.dim, chunk_sizes(shape[one.dim], one.split_factor)))
        else:
            placements.append(one)
        if isinstance(one, Shard | TorchPlacement):
            cut.add(one.dim)
    return Read(tuple(placements), None)


def _explicit(mesh: Mesh, found: Sequence[Placement | TorchPlacement], shape: tuple[int, ...]) -> Read:
    partial = next((one for one in found if isinstance(one, Partial)), None)
    if partial is not None:
        raise SpecError(
            f"{partial!r} beside strided placements that describe no order of cuts has no layout here; redistribute "
            "the DTensor to Replicate() on that axis first"
        )
    holdings: dict[int, tuple[Intervals, ...]] = {}
    for rank in mesh.ranks:
        held = [merged(((0, extent),)) for extent in shape]
        for axis, index in enumerate(mesh.coordinate(rank)):
            one = found[axis]
            if isinstance(one, Shard | TorchPlacement):
                before = held[one.dim]
                factor = one.split_factor if isinstance(one, TorchPlacement) else 1
                pieces = [chunk(before, factor, piece) for piece in range(factor)]
                held[one.dim] = part_of_segments(pieces, mesh.shape[axis], index)
        holdings[rank] = tuple(held)
    return Read((), None, holdings)


def chunk_sizes(extent: int, parts: int) -> tuple[int, ...]:
    """The sizes of a dim that is cut into so many parts as torch.chunk does.

    Example:
        >>> chunk_sizes(7, 4)
        (2, 2, 2, 1)
    """
    return tuple(length(chunk(((0, extent),), parts, part)) for part in range(parts))


def write_placements(
    mesh: Mesh,
    placements: Sequence[Placement],
    cutting_axes: Callable[[int], tuple[int, ...]],
    shape: tuple[int, ...] | None,
) -> tuple[Any, ...]:
    """The placements of torch that say the same.

    Args:
        mesh, placements, shape: of the spec.
        cutting_axes: the mesh axes that cut a dim, first cut first.

    Raises:
        SpecError: torch has no word for it.
    """
    described: list[TorchPlacement] = []
    for axis, one in enumerate(placements):
        if isinstance(one, Replicate):
            described.append(TorchPlacement("replicate"))
        elif isinstance(one, Partial):
            described.append(TorchPlacement("partial", op=one.op))
        else:
            order = cutting_axes(one.dim)
            before = [other for other in order[: order.index(axis)] if other > axis]
            described.append(_describe_shard(one, prod(mesh.shape[other] for other in before), order, shape))
    _check_segments(placements, described)
    return tuple(make_placement(one) for one in described)


def _describe_shard(
    shard: Shard, parts_before: int, order: tuple[int, ...], shape: tuple[int, ...] | None
) -> TorchPlacement:
    if shard.segments is None:
        kind = "shard" if parts_before == 1 else "strided"
        return TorchPlacement(kind, shard.dim, parts_before)
    factor = len(shard.segments)
    if shape is None or len(order) > 1 or shard.segments != chunk_sizes(shape[shard.dim], factor):
        raise SpecError(
            f"{shard!r} has segments that torch has no placement for; keep the ShardingSpec, or cut each part of the "
            "tensor on its own"
        )
    return TorchPlacement("shard" if factor == 1 else "strided", shard.dim, factor)


def _check_segments(placements: Sequence[Placement], described: Sequence[TorchPlacement]) -> None:
    """Refuse segments beside an order of cuts: torch reads all strided placements in one way or the other."""
    strided = [axis for axis, word in enumerate(described) if word.kind == "strided"]
    segmented = [axis for axis in strided if (one := placements[axis]) and isinstance(one, Shard) and one.segments]
    if not segmented:
        return
    if len(segmented) < len(strided):
        raise SpecError(
            f"placements {tuple(placements)} have segments, and torch would not tell them from an order of cuts; keep "
            "the ShardingSpec, or cut each part of the tensor on its own"
        )
