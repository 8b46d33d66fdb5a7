"""Reduce Partial sources: reshard the stacked contributions, reduce them, then reshard the result.

A tensor that is Partial over n ranks is the same thing as a tensor with one more dim of size n in front, the
contributions, cut over those ranks. Bringing all n contributions of a part of the tensor to one rank is then an
ordinary reshard; the rank reduces what it has, and the reduced tensor, cut evenly over the ranks that took
part, is an ordinary source. Each element is reduced once, whoever needs it.
"""

from dataclasses import dataclass, replace

from tricomm.layout.dtype import check_reduction
from tricomm.layout.intervals import Region, clip, length
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard
from tricomm.layout.spec import ShardingSpec


@dataclass(frozen=True, slots=True)
class Reduction:
    """How a Partial source becomes a plain one.

    Attributes:
        op: sum, avg, max or min; sum where some axes are sums and others averages.
        divisor: what the sum is divided by: over how many ranks it is an average.
        stacked_source: the contributions, shape (n, *shape), as the source ranks hold them.
        stacked_destination: all n contributions of every part, where they are reduced.
        reduced: the spec after reducing, without Partial; the same ranks.
    """

    op: str
    divisor: int
    stacked_source: ShardingSpec
    stacked_destination: ShardingSpec
    reduced: ShardingSpec


def reduction_of(source: ShardingSpec, destination: ShardingSpec) -> Reduction | None:
    """Find the reduction that a source needs before it can be moved, or None if it is not Partial.

    Among the dims that the reduced tensor may be cut along, the one wins with which the ranks reduce most of
    what they need themselves: Partial to Shard on the same ranks is then exactly a reduce-scatter.
    """
    axes = source.partial_axes
    if not axes:
        return None
    ops: set[str] = set()
    contributions = divisor = 1
    for axis in axes:
        placement, extent = source.placements[axis], source.mesh.shape[axis]
        assert isinstance(placement, Partial)
        check_reduction(placement.op, source.element_type)
        ops.add(placement.op)
        contributions *= extent
        divisor *= extent if placement.op == "avg" else 1
    candidates = [_cut_along(source, dim) for dim in range(len(source.global_shape))]
    reduced = max(
        candidates,
        key=lambda spec: _kept_numel(spec, destination),
        default=_on_one_rank(source),
    )
    return Reduction(
        "sum" if len(ops) > 1 else ops.pop(),
        divisor,
        _stacked(source, contributions, axes),
        _stacked(reduced, contributions, ()),
        reduced,
    )


def phases(
    source: ShardingSpec, destination: ShardingSpec, reduction: Reduction | None
) -> list[tuple[ShardingSpec, ShardingSpec]]:
    """List the (source, destination) of each move: one, or for a Partial source before and after reducing."""
    if reduction is None:
        return [(source, destination)]
    return [(reduction.stacked_source, reduction.stacked_destination), (reduction.reduced, destination)]


def _cut_along(source: ShardingSpec, dim: int) -> ShardingSpec:
    """Cut the reduced tensor along ``dim`` among all ranks that hold contributions to the same elements."""
    placements: tuple[Placement, ...] = tuple(
        placement if isinstance(placement, Shard) else Shard(dim) for placement in source.placements
    )
    axis_order = source.axis_order or ()
    shards = [axis for axis in axis_order if isinstance(axis, int) and isinstance(source.placements[axis], Shard)]
    others = [axis for axis in range(source.mesh.ndim) if axis not in shards]
    return replace(source, placements=placements, axis_order=(*shards, *others))


def _on_one_rank(source: ShardingSpec) -> ShardingSpec:
    """Let the first rank reduce a 0-d tensor, which cannot be cut."""
    return ShardingSpec(Mesh([source.mesh.ranks[0]], ("rank",)), (Replicate(),), source.shape, source.dtype)


def _stacked(spec: ShardingSpec, contributions: int, axes: tuple[int, ...]) -> ShardingSpec:
    """Add the contributions as a new dim 0, cut over ``axes`` (whole where there are none)."""
    placements: list[Placement] = []
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            placements.append(Shard(placement.dim + 1, placement.segments))
        else:
            placements.append(Shard(0) if axis in axes else Replicate())
    return ShardingSpec(
        spec.mesh,
        tuple(placements),
        (contributions, *spec.global_shape),
        spec.dtype,
        spec.axis_order,
    )


def _kept_numel(reduced: ShardingSpec, destination: ShardingSpec) -> int:
    """Count the elements that ranks would reduce and need themselves."""
    kept = 0
    for rank in reduced.mesh.ranks:
        if rank in destination.mesh:
            kept += _common_numel(reduced.holding(rank), destination.holding(rank))
    return kept


def _common_numel(first: Region, second: Region) -> int:
    numel = 1
    for one, other in zip(first, second, strict=True):
        numel *= sum(length(clip(one, start, stop)) for start, stop in other)
    return numel
