"""ShardingSpec: which global coordinates each rank holds.

Every layout (even, uneven, replicated, nested, segmented, explicit) reduces to a *holding* per rank: for
each tensor dim an ordered tuple of half-open intervals of global coordinates. The shard is their product.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from tricomm.errors import SpecError
from tricomm.layout.columns import IntervalLists
from tricomm.layout.dtype import ITEMSIZE, dtype_name
from tricomm.layout.intervals import Intervals, Region, chunk, clip, merged, region_shape
from tricomm.layout.mesh import Mesh
from tricomm.layout.notation import from_notation, to_notation
from tricomm.layout.placement import Partial, Placement, Replicate, Shard

Holding = Region
"""What one rank holds: per tensor dim, ``((start, stop), ...)`` in local order."""


@dataclass(frozen=True, slots=True)
class ShardingSpec:
    """A tensor's layout on a mesh.

    Args:
        mesh: the ranks.
        placements: one per mesh axis: ``Shard``, ``Replicate`` or ``Partial``.
        shape: global shape. A destination may leave it out and takes the source's.
        dtype: element type, "bfloat16" or torch.bfloat16. A destination may leave it out; if it differs
            from the source's, elements are cast on the way with torch's rounding.
        axis_order: the mesh axes (names or indices) in the order in which they cut, first cut first.
            It matters where several axes cut one dim; by default the outer axis cuts first.

    Raises:
        SpecError: the placements do not fit the mesh or the shape.
    """

    mesh: Mesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    axis_order: tuple[int | str, ...] | None = None
    holdings: tuple[Holding, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise SpecError(f'mesh={self.mesh!r} is not a Mesh; write Mesh([[0, 1], [2, 3]], ("dp", "tp"))')
        if self.shape is not None:
            object.__setattr__(self, "shape", _checked_shape(self.shape))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.holdings is None:
            object.__setattr__(self, "placements", self._checked_placements())
            object.__setattr__(self, "axis_order", self._canonical_axis_order())

    # ---- other ways to write a spec

    @classmethod
    def from_dims(
        cls,
        mesh: Mesh,
        dims: Sequence[str],
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> "ShardingSpec":
        """The paper's notation: one entry per tensor dim, "R" or "S" with mesh axes, major first.

        Example: ``("S01", "R")`` cuts dim 0 over axis 0 and then axis 1. Axes that no dim names replicate.
        """
        placements, axis_order = from_notation(mesh, dims)
        shape = None if shape is None else tuple(shape)
        if shape is not None and len(shape) != len(dims):
            raise SpecError(
                f"{tuple(dims)} describes {len(dims)} dims but shape={shape} has {len(shape)}; give one entry per dim"
            )
        return cls(mesh, placements, shape, dtype, axis_order)

    @classmethod
    def explicit(
        cls, holdings: Mapping[int, Holding], shape: Sequence[int], dtype: str | None = None
    ) -> "ShardingSpec":
        """The general form: ``{rank: holding}``, a holding being one tuple of (start, stop) per dim.

        Example: ``{0: (((0, 4), (8, 12)), ((0, 16),))}``: rank 0 holds rows 0-3 and 8-11, all 16 columns.
        Ranks may hold the same elements. Elements that nobody holds are an error only if they are needed.
        """
        global_shape = _checked_shape(shape)
        if not holdings:
            raise SpecError("explicit holdings are empty; name at least one rank")
        ranks = sorted(holdings)
        checked = tuple(_checked_holding(rank, holdings[rank], global_shape) for rank in ranks)
        return cls(Mesh(ranks, ("rank",)), (), global_shape, dtype, holdings=checked)

    def resolved(self, source: "ShardingSpec") -> "ShardingSpec":
        """This spec with shape and dtype taken from ``source`` where it leaves them out."""
        shape = source.shape if self.shape is None else self.shape
        dtype = source.dtype if self.dtype is None else self.dtype
        if (shape, dtype) == (self.shape, self.dtype):
            return self
        return replace(self, shape=shape, dtype=dtype)

    # ---- what it says

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape, which must be known by now."""
        if self.shape is None:
            raise SpecError(f"{self} has no shape; write ShardingSpec(mesh, placements, shape=...)")
        return self.shape

    @property
    def element_type(self) -> str:
        """The dtype name, which must be known by now."""
        if self.dtype is None:
            raise SpecError(f"{self} has no dtype; write ShardingSpec(mesh, placements, dtype=...)")
        return self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.element_type]

    @property
    def partial_axes(self) -> tuple[int, ...]:
        """The mesh axes that are Partial and have more than one rank."""
        return tuple(
            axis
            for axis, placement in enumerate(self.placements)
            if isinstance(placement, Partial) and self.mesh.shape[axis] > 1
        )

    def cutting_axes(self, dim: int) -> tuple[int, ...]:
        """The mesh axes that cut a dim, first cut first."""
        if self.holdings is not None:
            return ()
        axes: list[int] = []
        for axis in self.axis_order or ():
            assert isinstance(axis, int)
            placement = self.placements[axis]
            if isinstance(placement, Shard) and placement.dim == dim:
                axes.append(axis)
        return tuple(axes)

    def dim_intervals(self, dim: int, coordinate: Mapping[int, int]) -> Intervals:
        """What a rank at ``coordinate`` (mesh axis -> index) holds of a dim."""
        extent = self.global_shape[dim]
        held: Intervals = merged(((0, extent),))
        for axis in self.cutting_axes(dim):
            pieces = _segments_of(held, self._segments(axis))
            held = _part(pieces, self.mesh.shape[axis], coordinate[axis])
        return held

    def _segments(self, axis: int) -> tuple[int, ...] | None:
        """The segments that a mesh axis cuts each on its own."""
        placement = self.placements[axis]
        return placement.segments if isinstance(placement, Shard) else None

    def holding(self, rank: int) -> Holding:
        """The global intervals that a rank holds, per dim."""
        if self.holdings is not None:
            return self.holdings[self.mesh.position(rank)]
        coordinate = dict(enumerate(self.mesh.coordinate(rank)))
        return tuple(self.dim_intervals(dim, coordinate) for dim in range(len(self.global_shape)))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard."""
        return region_shape(self.holding(rank))

    @property
    def exclusive(self) -> bool:
        """Whether surely no two ranks hold the same element (an explicit spec never promises it)."""
        if self.holdings is not None:
            return self.mesh.size == 1
        return all(
            isinstance(placement, Shard) or extent == 1
            for placement, extent in zip(self.placements, self.mesh.shape, strict=True)
        )

    @property
    def notation(self) -> str:
        """The layout in the paper's letters, as ``from_dims`` reads them."""
        return to_notation(self.mesh, self.placements, self.cutting_axes, self.shape, self.holdings)

    def __repr__(self) -> str:
        if self.holdings is not None:
            held = dict(zip(self.mesh.ranks, self.holdings, strict=True))
            return f"ShardingSpec.explicit({held}, {self.shape}, {self.dtype!r})"
        order = "" if self.axis_order == tuple(range(self.mesh.ndim)) else f", {self.axis_order}"
        return f"ShardingSpec({self.mesh!r}, {self.placements}, {self.shape}, {self.dtype!r}{order})"

    def __str__(self) -> str:
        shape = "[?]" if self.shape is None else str(list(self.shape))
        return f"{self.dtype or 'any'}{shape} {self.notation} on {self.mesh}"

    # ---- checks, once, at construction

    def _checked_placements(self) -> tuple[Placement, ...]:
        if not isinstance(self.placements, Sequence):
            raise SpecError(
                f"placements={self.placements!r} is not a tuple of placements; write one per mesh axis: (Shard(0),)"
            )
        placements = tuple(self.placements)
        if len(placements) != self.mesh.ndim:
            raise SpecError(
                f"{len(placements)} placements {placements} for {self.mesh} with {self.mesh.ndim} axes; "
                "give one placement per mesh axis"
            )
        checked: list[Placement] = []
        for axis, placement in enumerate(placements):
            if not isinstance(placement, (Shard, Replicate, Partial)):
                raise SpecError(
                    f"placement {placement!r} of mesh axis {self.mesh.axis_names[axis]!r} is not one of tricomm's "
                    "Shard, Replicate, Partial; import them from tricomm"
                )
            if isinstance(placement, Shard) and self.shape is not None:
                placement = _checked_shard(placement, self.shape)
            checked.append(placement)
        ops = {placement.op for placement in checked if isinstance(placement, Partial)}
        if len(ops) > 1:
            raise SpecError(
                f"placements {placements} mix the reductions {sorted(ops)}, whose order would change the result; "
                "use one op"
            )
        return tuple(checked)

    def _canonical_axis_order(self) -> tuple[int, ...]:
        """The order of cuts with only what matters: which axis comes first among those that cut one dim."""
        ndim = self.mesh.ndim
        if self.axis_order is not None and not isinstance(self.axis_order, Sequence):
            raise SpecError(
                f"axis_order={self.axis_order!r} is not a tuple of axes; list all of {self.mesh.axis_names}, "
                "first cut first"
            )
        given = range(ndim) if self.axis_order is None else [self.mesh.axis(key) for key in self.axis_order]
        if sorted(given) != list(range(ndim)):
            raise SpecError(
                f"axis_order={self.axis_order} must name each of the {ndim} axes {self.mesh.axis_names} once; "
                "list them all, first cut first"
            )
        if self.shape is None:
            return tuple(given)  # which dims are the same, counted from the end, is known with the shape
        by_dim: dict[int | None, list[int]] = {}
        for axis in given:
            placement = self.placements[axis]
            by_dim.setdefault(placement.dim if isinstance(placement, Shard) else None, []).append(axis)
        order = [0] * ndim
        for dim, axes in by_dim.items():
            for slot, axis in zip(sorted(axes), sorted(axes) if dim is None else axes, strict=True):
                order[slot] = axis
        return tuple(order)


@dataclass(frozen=True, slots=True, eq=False)
class PartTable:
    """A spec as tables: the distinct interval lists of each dim, and which of them each rank holds.

    Attributes:
        parts: per dim, the distinct interval lists.
        part_of: int array (ranks, dims): the index into ``parts[dim]`` of each rank in mesh order.
    """

    parts: tuple[IntervalLists, ...]
    part_of: np.ndarray


@lru_cache(maxsize=256)
def part_table(spec: ShardingSpec) -> PartTable:
    """The tables of a spec, whose size grows with ranks plus parts, never with their product."""
    shape, mesh = spec.global_shape, spec.mesh
    part_of = np.zeros((mesh.size, len(shape)), dtype=np.int64)
    parts: list[IntervalLists] = []
    coordinates = np.indices(mesh.shape).reshape(mesh.ndim, mesh.size)
    for dim in range(len(shape)):
        if spec.holdings is not None:
            index: dict[Intervals, int] = {}
            for position, holding in enumerate(spec.holdings):
                part_of[position, dim] = index.setdefault(holding[dim], len(index))
            parts.append(IntervalLists.of(tuple(index)))
            continue
        axes = spec.cutting_axes(dim)
        for axis in axes:
            part_of[:, dim] = part_of[:, dim] * mesh.shape[axis] + coordinates[axis]
        cuts = tuple((mesh.shape[axis], spec._segments(axis)) for axis in axes)
        parts.append(_parts(shape[dim], cuts))
    return PartTable(tuple(parts), part_of)


@lru_cache(maxsize=1024)
def _parts(extent: int, cuts: tuple[tuple[int, tuple[int, ...] | None], ...]) -> IntervalLists:
    """What a dim is cut into by axes one after the other, each (how many ranks, segments that it cuts each on its own).

    Tensors of a model share extents and axes: equal arguments give the same object.
    """
    parts = IntervalLists.of([merged(((0, extent),))])
    for ranks, segments in cuts:
        if parts.simple and not segments:
            parts = parts.chunks(ranks)
            continue
        cut: list[Intervals] = []
        for held in parts:
            pieces = _segments_of(held, segments)
            cut += [_part(pieces, ranks, index) for index in range(ranks)]
        parts = IntervalLists.of(cut)
    return parts


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(extent) for extent in shape)
    except TypeError:
        raise SpecError(f"shape={shape!r} is not a sequence of integers; write (4096, 1024)") from None
    if any(extent < 0 for extent in checked):
        raise SpecError(f"shape={checked} has a negative extent; every extent must be at least 0, so give the sizes")
    return checked


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


def _part(pieces: Sequence[Intervals], ranks: int, index: int) -> Intervals:
    """What rank ``index`` of so many gets of pieces that are cut each on its own."""
    return merged([interval for piece in pieces for interval in chunk(piece, ranks, index)])


def _segments_of(held: Intervals, segments: Sequence[int] | None) -> list[Intervals]:
    """What is held of each segment; all of it if there are none."""
    if not segments:
        return [held]
    edges = [0, *accumulate(segments)]
    return [clip(held, start, stop) for start, stop in pairwise(edges)]


def _checked_holding(rank: int, holding: Holding, shape: tuple[int, ...]) -> Holding:
    try:
        pairs = [[(operator.index(start), operator.index(stop)) for start, stop in intervals] for intervals in holding]
    except (TypeError, ValueError):
        raise SpecError(
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
        for (_, stop), (start, _) in pairwise(sorted((a, b) for a, b in intervals if a < b)):
            if start < stop:
                raise SpecError(
                    f"the intervals {tuple(intervals)} of rank {rank} in dim {dim} overlap at {start}; "
                    "a rank holds an element once, so cut one of them"
                )
    return tuple(merged(intervals) for intervals in pairs)
