"""ShardingSpec: which global coordinates each rank holds.

Every layout (even, uneven, replicated, nested, segmented, explicit) reduces to a *holding* per rank: for
each tensor dim an ordered tuple of half-open intervals of global coordinates. The shard is their product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tricomm.errors import ArgumentError, SpecError
from tricomm.interop import TorchLayout, describe_dtensor, is_device_mesh, is_dtensor
from tricomm.kinds import explains_missing
from tricomm.layout.blocks import checked_inside, in_blocks, of_blocks, trimmed_region
from tricomm.layout.dtype import ITEMSIZE, dtype_name
from tricomm.layout.intervals import Intervals, Region, merged, part_of_segments, region_shape, segments_of
from tricomm.layout.mesh import Mesh
from tricomm.layout.notation import describe_layout, from_notation, to_notation
from tricomm.layout.placement import Partial, Placement, Shard
from tricomm.layout.spec_checks import (
    canonical_axis_order,
    check_mesh,
    checked_holders,
    checked_holdings,
    checked_placements,
    checked_shape,
    incomplete,
    no_such_dim,
)
from tricomm.layout.torch_layout import read_placements, write_placements

if TYPE_CHECKING:
    import torch

Holding = Region
"""What one rank holds: per tensor dim, ``((start, stop), ...)`` in local order."""


@explains_missing
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
        >>> from tricomm import Replicate, Shard
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
    _held: dict[int, Holding] | None = field(init=False, compare=False)  # by rank, of those that were asked about
    _hash: int = field(init=False, compare=False)

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
        check_mesh(mesh)
        set_field = object.__setattr__
        set_field(self, "mesh", mesh)
        set_field(self, "_held", None)
        set_field(self, "shape", None if shape is None else checked_shape(shape))
        set_field(self, "dtype", None if dtype is None else dtype_name(dtype))
        set_field(self, "holdings", None if holdings is None else checked_holdings(mesh, holdings, self.global_shape))
        placed: tuple[Placement, ...] = ()
        order = None
        if holdings is None:
            placed = checked_placements(mesh, placements, self.shape)
            order = canonical_axis_order(mesh, placed, self.shape is not None, axis_order)
        set_field(self, "placements", placed)
        set_field(self, "axis_order", order)
        # Once, and of numbers alone: texts have other hashes in another process, which may be sent this.
        dims = tuple(one.dim if isinstance(one, Shard) else -1 for one in placed)
        set_field(self, "_hash", hash((mesh, dims, self.shape or (), self.holdings or ())))

    def __hash__(self) -> int:
        return self._hash

    # ---- other ways to write a spec

    @classmethod
    @explains_missing
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
        check_mesh(mesh)
        placements, axis_order = from_notation(mesh, dims)
        shape = None if shape is None else checked_shape(shape)
        if shape is not None and len(shape) != len(dims):
            raise SpecError(
                f"{tuple(dims)} describes {len(dims)} dims but shape={shape} has {len(shape)}; give one entry per dim"
            )
        return cls(mesh, placements, shape, dtype, axis_order)

    @classmethod
    @explains_missing
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
        global_shape = checked_shape(shape)
        ranks, given = checked_holders(holdings)
        return cls(Mesh(ranks, ("rank",)), (), global_shape, dtype, holdings=given)

    @classmethod
    @explains_missing
    def from_placements(
        cls,
        mesh: Any,
        placements: Sequence[Any],
        shape: Sequence[int] | None = None,
        dtype: "str | torch.dtype | None" = None,
        *,
        group: Any = None,
        strided_as_order: bool = True,
    ) -> "ShardingSpec":
        """Write a layout in torch's words: a DeviceMesh (or a Mesh) with one of torch's placements per axis.

        Args:
            mesh, placements, shape, dtype: of the tensor.
            group: the process group whose ranks the spec is to name; a DeviceMesh names those of the whole job.
            strided_as_order: whether strided placements say in which order axes cut, as in what FSDP2 holds; otherwise
                they are taken word by word, as by torch's distribute_tensor. Uneven parts differ.

        Raises:
            SpecError: a placement without a counterpart, such as the partial norms of torch.

        Example:
            >>> from tricomm.layout.placement import Shard
            >>> print(ShardingSpec.from_placements(Mesh([0, 1], ("tp",)), (Shard(-1),), (8, 4), "float32"))
            float32[8, 4/tp] on (tp=2: ranks 0-1)
        """
        if not isinstance(strided_as_order, bool):
            raise ArgumentError(f"strided_as_order={strided_as_order!r} is no truth value; pass True or False")
        mesh = Mesh.of(mesh, group=group) if is_device_mesh(mesh) else mesh
        if not isinstance(mesh, Mesh):
            raise ArgumentError(f"mesh={mesh!r} is neither a DeviceMesh nor a Mesh; pass what init_device_mesh gave")
        shape = None if shape is None else checked_shape(shape)
        read = read_placements(mesh, placements, shape, strided_as_order)
        if read.holdings is not None and shape is not None:
            return cls.explicit(read.holdings, shape, dtype)
        return cls(mesh, read.placements, shape, dtype, read.axis_order)

    @classmethod
    @explains_missing
    def from_dtensor(cls, dtensor: Any, *, group: Any = None, strided_as_order: bool | None = None) -> "ShardingSpec":
        """The layout of a DTensor; see :meth:`from_placements`. By default its own spec says how strides are read.

        Example:
            >>> import torch
            >>> import torch.distributed as dist
            >>> from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
            >>> mesh = DeviceMesh("cpu", [0], mesh_dim_names=("dp",))
            >>> print(ShardingSpec.from_dtensor(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])))
            float32[4/dp, 2] on (dp=1: rank 0)
            >>> dist.destroy_process_group()
        """
        if not (isinstance(dtensor, TorchLayout) or is_dtensor(dtensor)):
            raise ArgumentError(f"{dtensor!r} is not a DTensor; write ShardingSpec(mesh, placements, shape, dtype)")
        layout = dtensor if isinstance(dtensor, TorchLayout) else describe_dtensor(dtensor)
        as_order = layout.is_ordered if strided_as_order is None else strided_as_order
        mesh, placements, shape, dtype, _, order = layout
        spec = cls.from_placements(mesh, placements, shape, dtype, group=group, strided_as_order=as_order)
        return spec if order is None else replace(spec, axis_order=order)

    def to_placements(self) -> tuple[Any, ...]:
        """The same in torch's placements, one per mesh axis, for a DeviceMesh with these ranks.

        Raises:
            SpecError: torch has no word for it: explicit holdings, or segments that are not those of torch.chunk.

        Example:
            >>> mesh = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
            >>> ShardingSpec(mesh, (Shard(0), Shard(0)), (8, 4), axis_order=("tp", "dp")).to_placements()
            (_StridedShard(dim=0, sf=2), Shard(dim=0))
        """
        if self.holdings is not None:
            raise SpecError(f"{self} is explicit, which torch has no placements for; keep the ShardingSpec")
        return write_placements(self.mesh, self.placements, self.cutting_axes, self.shape)

    @explains_missing
    def trimmed(self, shape: Sequence[int]) -> "ShardingSpec":
        """The layout of a smaller tensor that is cut as this padded one is: each rank keeps what is real of its part.

        Raises:
            SpecError: the shape is not inside of this one's.

        Example:
            >>> padded = ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(0),), (192, 8))  # a vocabulary of 130 tokens
            >>> [padded.trimmed((130, 8)).local_shape(rank) for rank in range(3)]
            [(64, 8), (64, 8), (2, 8)]
        """
        smaller = checked_inside(shape, self.global_shape)
        held = {rank: trimmed_region(self.holding(rank), smaller) for rank in self.mesh.ranks}
        return ShardingSpec.explicit(held, smaller, self.dtype)

    @explains_missing
    def on_blocks(self, blocks: Sequence[int]) -> "ShardingSpec":
        """The same layout with cuts on whole blocks, (128, 128) of a matrix, which are shared out as elements were.

        Raises:
            SpecError: a segment is no whole number of blocks, or the layout is Partial or explicit.

        Example:
            >>> rows = ShardingSpec(Mesh([0, 1], ("tp",)), (Shard(0),), (384, 256))
            >>> [rows.on_blocks((128, 128)).local_shape(rank) for rank in range(2)]
            [(256, 256), (128, 256)]
        """
        placements, shape, sizes = in_blocks(self.placements, self.global_shape, blocks, self.holdings is not None)
        coarse = ShardingSpec(self.mesh, placements, shape, axis_order=self.axis_order)
        held = {rank: of_blocks(coarse.holding(rank), sizes, self.global_shape) for rank in self.mesh.ranks}
        same = all(self.holding(rank) == one for rank, one in held.items())
        return self if same else ShardingSpec.explicit(held, self.global_shape, self.dtype)

    def resolved(self, source: "ShardingSpec") -> "ShardingSpec":
        """Take shape and dtype from ``source`` where this spec leaves them out.

        Example:
            >>> rows = ShardingSpec(Mesh([0, 1], ("x",)), [Shard(0)], (8, 4), "float32")
            >>> print(ShardingSpec(Mesh([2, 3], ("x",)), [Shard(1)]).resolved(rows))
            float32[8, 4/x] on (x=2: ranks 2-3)
        """
        if not isinstance(source, ShardingSpec):
            raise ArgumentError(f"source={source!r} is not a ShardingSpec; pass the layout of the source")
        shape = source.shape if self.shape is None else self.shape
        dtype = source.dtype if self.dtype is None else self.dtype
        if (shape, dtype) == (self.shape, self.dtype):
            return self
        return replace(self, shape=shape, dtype=dtype)

    # ---- what it says

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape, which must be known by now.

        >>> ShardingSpec.from_dims(Mesh([0, 1], ("tp",)), ["S0", "R"], (8, 6)).global_shape
        (8, 6)
        """
        if self.shape is None:
            raise incomplete(str(self), shape=self.shape, dtype=self.dtype)
        return self.shape

    @property
    def element_type(self) -> str:
        """The dtype name, which must be known by now.

        >>> ShardingSpec.from_dims(Mesh([0, 1], ("tp",)), ["S0"], (8,), "float16").element_type
        'float16'
        """
        if self.dtype is None:
            raise incomplete(str(self), shape=self.shape, dtype=self.dtype)
        return self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one element.

        >>> ShardingSpec.from_dims(Mesh([0, 1], ("tp",)), ["S0"], (8,), "float16").itemsize
        2
        """
        return ITEMSIZE[self.element_type]

    @property
    def partial_axes(self) -> tuple[int, ...]:
        """The mesh axes that are Partial and have more than one rank.

        >>> ShardingSpec(Mesh([[0, 1], [2, 3]], ("dp", "tp")), (Partial(), Shard(0)), (8,)).partial_axes
        (0,)
        """
        extents = self.mesh.shape
        return tuple(axis for axis, one in enumerate(self.placements) if isinstance(one, Partial) and extents[axis] > 1)

    def cutting_axes(self, dim: int) -> tuple[int, ...]:
        """The mesh axes that cut a dim, first cut first.

        >>> ShardingSpec.from_dims(Mesh([[0, 1], [2, 3]], ("dp", "tp")), ["S10", "R"]).cutting_axes(0)  # tp, then dp
        (1, 0)
        """
        if type(dim) is not int or (self.shape is not None and not 0 <= dim < len(self.shape)):
            raise no_such_dim(dim, str(self), self.global_shape)
        if self.holdings is not None:
            return ()
        placements, order = self.placements, self.axis_order or ()
        return tuple([axis for axis in order if isinstance(one := placements[axis], Shard) and one.dim == dim])

    def _dim_intervals(self, dim: int, coordinate: Mapping[int, int] | Sequence[int]) -> Intervals:
        """What a rank at ``coordinate`` (an index per mesh axis) holds of a dim."""
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
        """The global intervals that a rank holds, per dim.

        >>> ShardingSpec.from_dims(Mesh([4, 5], ("tp",)), ["S0", "R"], (8, 6)).holding(5)
        (((4, 8),), ((0, 6),))
        """
        if self.holdings is not None:
            return self.holdings[self.mesh.position(rank)]
        indices = self.mesh.coordinate(rank)  # which refuses what is no rank
        if self._held is None:
            object.__setattr__(self, "_held", {})  # tens of thousands of specs are never asked
        assert self._held is not None
        found = self._held.get(rank)
        if found is None:
            found = tuple(self._dim_intervals(dim, indices) for dim in range(len(self.global_shape)))
            self._held[rank] = found
        return found

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard.

        >>> spec = ShardingSpec.from_dims(Mesh([0, 1, 2], ("tp",)), ["S0", "R"], (8, 6))
        >>> [spec.local_shape(rank) for rank in spec.mesh.ranks]  # as torch.chunk cuts
        [(3, 6), (3, 6), (2, 6)]
        """
        return region_shape(self.holding(rank))

    @property
    def exclusive(self) -> bool:
        """True if ranks provably hold disjoint elements (an explicit spec of several ranks never promises it).

        >>> ShardingSpec.from_dims(Mesh([[0, 1], [2, 3]], ("dp", "tp")), ["S1", "R"], (8, 6)).exclusive  # dp replicates
        False
        """
        if self.holdings is not None:
            return self.mesh.size == 1
        parts = zip(self.placements, self.mesh.shape, strict=True)
        return all(isinstance(placement, Shard) or extent == 1 for placement, extent in parts)

    @property
    def notation(self) -> str:
        """The layout in the paper's letters, as ``from_dims`` reads them: digits are mesh axes, not tensor dims.

        >>> ShardingSpec(Mesh([[0, 1], [2, 3]], ("dp", "tp")), (Shard(1), Shard(0)), (8, 6)).notation
        'S1 S0'
        """
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
