"""ShardingSpec: which global coordinates each rank holds.

Every layout (even, uneven, replicated, nested, segmented, explicit) reduces to a *holding* per rank: for
each tensor dim an ordered tuple of half-open intervals of global coordinates. The shard is their product.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.dtype import ITEMSIZE, dtype_name
from tricomm.layout.intervals import Intervals, Region, merged, part_of_segments, region_shape, segments_of
from tricomm.layout.mesh import Mesh
from tricomm.layout.notation import describe_layout, from_notation, to_notation
from tricomm.layout.placement import Partial, Placement, Replicate, Shard

if TYPE_CHECKING:
    import torch

Holding = Region
"""What one rank holds: per tensor dim, ``((start, stop), ...)`` in local order."""


@dataclass(frozen=True, slots=True, init=False, repr=False)
class ShardingSpec:
    """Describe a tensor's layout on a mesh.

    Args:
        mesh: the ranks.
        placements: one per mesh axis: ``Shard``, ``Replicate`` or ``Partial``.
        shape: global shape. A destination may leave it out and takes the source's.
        dtype: element type, "bfloat16" or torch.bfloat16. A destination may leave it out; if it differs
            from the source's, elements are cast on the way with torch's rounding.
        axis_order: the mesh axes (names or indices) in the order in which they cut, first cut first.
            It matters where several axes cut one dim; by default the outer axis cuts first.
        holdings: what ``explicit`` gives; the placements are then ().

    Raises:
        SpecError: the placements do not fit the mesh or the shape; an ArgumentError where an argument is of the wrong
            kind.

    Example:
        >>> mesh = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
        >>> spec = ShardingSpec(mesh, [Replicate(), Shard(0)], shape=(8, 6), dtype="float32")
        >>> print(spec)
        float32[8/tp, 6] replicated over dp on (dp=2 tp=2: ranks 0-3)
        >>> spec.holding(3), spec.local_shape(3)
        ((((4, 8),), ((0, 6),)), (4, 6))
    """

    mesh: Mesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...] | None
    dtype: str | None
    axis_order: tuple[int, ...] | None
    holdings: tuple[Holding, ...] | None

    def __init__(
        self,
        mesh: Mesh,
        placements: Sequence[Placement],
        shape: Sequence[int] | None = None,
        dtype: "str | torch.dtype | None" = None,
        axis_order: Sequence[int | str] | None = None,
        *,
        holdings: tuple[Holding, ...] | None = None,
    ) -> None:
        if not isinstance(mesh, Mesh):
            raise ArgumentError(f'mesh={mesh!r} is not a Mesh; write Mesh([[0, 1], [2, 3]], ("dp", "tp"))')
        set_field = object.__setattr__
        set_field(self, "mesh", mesh)
        set_field(self, "shape", None if shape is None else _checked_shape(shape))
        set_field(self, "dtype", None if dtype is None else dtype_name(dtype))
        set_field(self, "holdings", None if holdings is None else _checked_holdings(mesh, holdings, self.global_shape))
        if holdings is not None:
            set_field(self, "placements", ())
            set_field(self, "axis_order", None)
            return
        set_field(self, "placements", _checked_placements(mesh, placements, self.shape))
        set_field(self, "axis_order", self._canonical_axis_order(axis_order))

    # ---- other ways to write a spec

    @classmethod
    def from_dims(
        cls,
        mesh: Mesh,
        dims: Sequence[str],
        shape: Sequence[int] | None = None,
        dtype: "str | torch.dtype | None" = None,
    ) -> "ShardingSpec":
        """Write a layout in the paper's notation: one entry per tensor dim, "R" or "S" with mesh axes, first cut first.

        Axes that no dim names replicate. (torch prints ``S(0)`` for tensor dim 0; here the digits are mesh axes.)

        Raises:
            SpecError: an entry that means nothing, or not one entry per dim.

        Example:
            >>> mesh = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
            >>> print(ShardingSpec.from_dims(mesh, ["S01", "R"], (8, 6), "float32"))
            float32[8/dp/tp, 6] on (dp=2 tp=2: ranks 0-3)
        """
        if not isinstance(mesh, Mesh):
            raise ArgumentError(f'mesh={mesh!r} is not a Mesh; write Mesh([[0, 1], [2, 3]], ("dp", "tp"))')
        placements, axis_order = from_notation(mesh, dims)
        shape = None if shape is None else _checked_shape(shape)
        if shape is not None and len(shape) != len(dims):
            raise SpecError(
                f"{tuple(dims)} describes {len(dims)} dims but shape={shape} has {len(shape)}; give one entry per dim"
            )
        return cls(mesh, placements, shape, dtype, axis_order)

    @classmethod
    def explicit(
        cls,
        holdings: Mapping[int, Sequence[Sequence[Sequence[int]]]],
        shape: Sequence[int],
        dtype: "str | torch.dtype | None" = None,
    ) -> "ShardingSpec":
        """Write a layout in its general form: ``{rank: holding}``, a holding being one tuple of (start, stop) per dim.

        Ranks may hold the same elements, and one rank may hold an element several times (an expert in two slots): as
        a destination it gets all of them, as a source the first is read. Elements that nobody holds are an error only
        if they are needed.

        Raises:
            SpecError: intervals outside of the shape; an ArgumentError where a holding is no nest of intervals.

        Example:
            >>> spec = ShardingSpec.explicit({0: [[(0, 4), (8, 12)], [(0, 16)]], 1: [[(4, 8)], [(0, 16)]]}, (12, 16))
            >>> spec.local_shape(0)  # rows 0-3 and 8-11, all 16 columns
            (8, 16)
        """
        global_shape = _checked_shape(shape)
        if not isinstance(holdings, Mapping):
            raise ArgumentError(
                f"holdings={holdings!r} is not a mapping; write {{rank: holding}}, such as {{0: (((0, 4),),)}}"
            )
        if not holdings:
            raise SpecError("explicit holdings are empty; name at least one rank")
        mesh = Mesh(list(holdings), ("rank",))
        ranks = sorted(mesh.ranks)
        given: Any = tuple(holdings[rank] for rank in ranks)
        return cls(Mesh(ranks, ("rank",)), (), global_shape, dtype, holdings=given)

    def resolved(self, source: "ShardingSpec") -> "ShardingSpec":
        """Take shape and dtype from ``source`` where this spec leaves them out.

        Example:
            >>> rows = ShardingSpec(Mesh([0, 1], ("x",)), [Shard(0)], (8, 4), "float32")
            >>> print(ShardingSpec(Mesh([2, 3], ("x",)), [Shard(1)]).resolved(rows))
            float32[8, 4/x] on (x=2: ranks 2-3)
        """
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
            raise self._incomplete()
        return self.shape

    @property
    def element_type(self) -> str:
        """The dtype name, which must be known by now."""
        if self.dtype is None:
            raise self._incomplete()
        return self.dtype

    def _incomplete(self) -> SpecError:
        """All that is missing, at once."""
        missing = [name for name in ("shape", "dtype") if getattr(self, name) is None]
        remedy = ", ".join(f"{name}=..." for name in missing)
        return SpecError(f"{self} has no {' and no '.join(missing)}; write ShardingSpec(mesh, placements, {remedy})")

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
            placement = self.placements[axis]
            if isinstance(placement, Shard) and placement.dim == dim:
                axes.append(axis)
        return tuple(axes)

    def _dim_intervals(self, dim: int, coordinate: Mapping[int, int]) -> Intervals:
        """What a rank at ``coordinate`` (mesh axis -> index) holds of a dim."""
        extent = self.global_shape[dim]
        held: Intervals = merged(((0, extent),))
        for axis in self.cutting_axes(dim):
            pieces = segments_of(held, self._segments(axis))
            held = part_of_segments(pieces, self.mesh.shape[axis], coordinate[axis])
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
        return tuple(self._dim_intervals(dim, coordinate) for dim in range(len(self.global_shape)))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard."""
        return region_shape(self.holding(rank))

    @property
    def exclusive(self) -> bool:
        """True if ranks provably hold disjoint elements (an explicit spec of several ranks never promises it)."""
        if self.holdings is not None:
            return self.mesh.size == 1
        return all(
            isinstance(placement, Shard) or extent == 1
            for placement, extent in zip(self.placements, self.mesh.shape, strict=True)
        )

    @property
    def notation(self) -> str:
        """The layout in the paper's letters, as ``from_dims`` reads them: digits are mesh axes, not tensor dims."""
        return to_notation(self.mesh, self.placements, self.cutting_axes, self.shape, self.holdings)

    def __repr__(self) -> str:
        if self.holdings is not None:
            held = dict(zip(self.mesh.ranks, self.holdings, strict=True))
            return f"ShardingSpec.explicit({held}, {self.shape}, {self.dtype!r})"
        order = "" if self.axis_order == tuple(range(self.mesh.ndim)) else f", {self.axis_order}"
        return f"ShardingSpec({self.mesh!r}, {self.placements}, {self.shape}, {self.dtype!r}{order})"

    def __str__(self) -> str:
        layout = describe_layout(self.mesh, self.placements, self.cutting_axes, self.shape, self.holdings is not None)
        return f"{self.dtype or 'any'}{layout} on {self.mesh}"

    # ---- checks, once, at construction

    def _canonical_axis_order(self, axis_order: Sequence[int | str] | None) -> tuple[int, ...]:
        """Keep of the order of cuts only what matters: which axis comes first among those that cut one dim."""
        ndim = self.mesh.ndim
        if axis_order is not None and (isinstance(axis_order, str) or not isinstance(axis_order, Sequence)):
            raise ArgumentError(
                f"axis_order={axis_order!r} is not a tuple of axes; list all of {self.mesh.axis_names}, first cut first"
            )
        given = range(ndim) if axis_order is None else [self.mesh.axis(key) for key in axis_order]
        if sorted(given) != list(range(ndim)):
            raise SpecError(
                f"axis_order={axis_order} must name each of the {ndim} axes {self.mesh.axis_names} once; "
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


def _checked_shape(shape: object) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(extent) for extent in shape)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"shape={shape!r} is not a sequence of integers; write (4096, 1024)") from None
    if any(extent < 0 for extent in checked):
        raise SpecError(f"shape={checked} has a negative extent; every extent must be at least 0, so give the sizes")
    return checked


def _checked_placements(mesh: Mesh, given: object, shape: tuple[int, ...] | None) -> tuple[Placement, ...]:
    if not isinstance(given, Sequence):
        raise ArgumentError(f"placements={given!r} is not a tuple of placements; write one per mesh axis: (Shard(0),)")
    placements = tuple(given)
    if len(placements) != mesh.ndim:
        raise SpecError(
            f"{len(placements)} placements {placements} for {mesh} with {mesh.ndim} axes; "
            "give one placement per mesh axis"
        )
    checked: list[Placement] = []
    for axis, placement in enumerate(placements):
        if not isinstance(placement, (Shard, Replicate, Partial)):
            raise ArgumentError(
                f"placement {placement!r} of mesh axis {mesh.axis_names[axis]!r} is not one of tricomm's "
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


def _checked_holdings(mesh: Mesh, holdings: object, shape: tuple[int, ...]) -> tuple[Holding, ...]:
    if not isinstance(holdings, tuple) or len(holdings) != mesh.size:
        raise ArgumentError(f"holdings={holdings!r} are not one per rank of {mesh}; write ShardingSpec.explicit(...)")
    return tuple(_checked_holding(rank, one, shape) for rank, one in zip(mesh.ranks, holdings, strict=True))


def _checked_holding(rank: int, holding: object, shape: tuple[int, ...]) -> Holding:
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
