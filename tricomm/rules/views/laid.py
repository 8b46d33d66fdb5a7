"""The layout of one side of a piece: in placements where these say it, else what each rank holds."""

from itertools import accumulate, pairwise

import numpy as np

from tricomm.layout.intervals import Region
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.views.view import View


def laid(view: View, spec: ShardingSpec) -> ShardingSpec | None:
    """The layout of a box of a tensor that is laid out so; None if no rank holds any of it.

    Placements stay placements where they can, as formulas plan those at any size: a dim that the box walks through
    from end to end, or segment by segment, or in whole steps of its longest digit. Ranks of an axis that cuts a dim in
    which the box stands still are left out but for those that hold it.

    Args:
        view: settled.
        spec: of the tensor, with shape and dtype.

    Example:
        >>> from tricomm.rules import Rules, cat, source
        >>> both = Rules({"qk": cat([source("q", (8, 4)), source("k", (4, 4))])}).bind().tensors[0]
        >>> fused = ShardingSpec(Mesh([0, 1], ("tp",)), (Shard(0, segments=(8, 4)),), (12, 4), "float32")
        >>> print(laid(View.of(both.pieces[1], False), fused))
        float32[4/tp, 4] on (tp=2: ranks 0-1)
    """
    placed = None if spec.holdings is not None else _as_placements(view, spec)
    if placed is not None:
        return placed
    held: dict[int, Region] = {}
    for rank in spec.mesh.ranks:
        region = view.region(spec.holding(rank))
        if region is not None:
            held[rank] = region
    return ShardingSpec.explicit(held, view.shape, spec.dtype) if held else None


def _as_placements(view: View, spec: ShardingSpec) -> ShardingSpec | None:
    """The layout in placements; None if they cannot say it."""
    placements: list[Placement] = [one if isinstance(one, Partial) else Replicate() for one in spec.placements]
    fixed: dict[int, int] = {}
    for dim in range(len(spec.global_shape)):
        axes = spec.cutting_axes(dim)
        if not axes:
            if any(view.walks[index].is_copies for index in view.along(dim)):
                return None
            continue
        if not view.along(dim):
            fixed.update(_coordinates(spec, dim, view.start[dim]))
            continue
        found = _cut_alike(view, spec, dim)
        if found is None:
            return None
        for axis in axes:
            placements[axis] = found
    free = [axis for axis in range(spec.mesh.ndim) if axis not in fixed]
    if not free:
        only = _ranks(spec, fixed)
        return ShardingSpec(Mesh([int(only)], ("rank",)), (Replicate(),), view.shape, spec.dtype)
    mesh = spec.mesh if not fixed else Mesh(_ranks(spec, fixed).tolist(), [spec.mesh.axis_names[a] for a in free])
    order = tuple([free.index(axis) for axis in spec.axis_order or range(spec.mesh.ndim) if axis in free])
    return ShardingSpec(mesh, tuple([placements[axis] for axis in free]), view.shape, spec.dtype, order)


def _ranks(spec: ShardingSpec, fixed: dict[int, int]) -> np.ndarray:
    """The ranks of a mesh at some coordinates."""
    ranks = np.array(spec.mesh.ranks).reshape(spec.mesh.shape)
    at: np.ndarray = ranks[tuple([fixed.get(axis, slice(None)) for axis in range(spec.mesh.ndim)])]
    return at


def _coordinates(spec: ShardingSpec, dim: int, coordinate: int) -> dict[int, int]:
    """Where, on the axes that cut a dim, the ranks are that hold a coordinate of it."""
    axes = spec.cutting_axes(dim)
    extents = [spec.mesh.shape[axis] for axis in axes]
    for place in np.ndindex(*extents):
        at = dict(zip(axes, map(int, place), strict=True))
        if any(low <= coordinate < high for low, high in spec._dim_intervals(dim, at)):
            return at
    raise AssertionError(f"every coordinate of dim {dim} is held where axes cut it")


def _cut_alike(view: View, spec: ShardingSpec, dim: int) -> Shard | None:
    """How each axis that cuts a dim of the tensor cuts the box; None if one placement does not say it."""
    digits = sorted(view.along(dim), key=lambda index: -view.walks[index].step)
    if any(view.walks[index].is_copies for index in digits):
        return None
    walk = view.walks[digits[0]]
    extent, start = spec.global_shape[dim], view.start[dim]
    segments = {spec._segments(axis) for axis in spec.cutting_axes(dim)}
    if len(segments) != 1:
        return None
    of_axes = segments.pop()
    if len(digits) == 1 and walk.step == 1:
        edges = [0, *accumulate(of_axes or (extent,))]
        stop = start + walk.size
        if start in edges and stop in edges:
            inside = tuple([high - low for low, high in pairwise(edges) if start <= low < high <= stop])
            return Shard(digits[0], None if len(inside) == 1 else inside)
        return None
    rest = sum([(view.walks[index].size - 1) * view.walks[index].step for index in digits[1:]])
    if of_axes or start + rest >= walk.step or walk.size * walk.step != extent:
        return None
    size = extent
    for axis in spec.cutting_axes(dim):
        # Uneven parts are those of torch.chunk again only if steps are cut whole, and nothing is cut once more.
        if size % (spec.mesh.shape[axis] * walk.step):
            return None
        size //= spec.mesh.shape[axis]
    return Shard(digits[0])
