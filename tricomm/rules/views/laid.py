"""The layout of one side of a piece: in placements where these say it, else what each rank holds."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from tricomm.layout.intervals import Region
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial, Placement, Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.views.view import View

Cuts = list[tuple[int, Placement]]
"""How a mesh axis, taken apart into axes of these extents, cuts a box."""


def laid(view: View, spec: ShardingSpec) -> ShardingSpec | None:
    """The layout of a box of a tensor that is laid out so; None if no rank holds any of it.

    Placements stay placements where they can, as formulas plan those at any size: a dim that the box walks through
    from end to end, or segment by segment, or evenly digit after digit, where an axis with more ranks than a digit has
    places is taken apart into two. Ranks of an axis that cuts a dim in which the box stands still are left out but for
    those that hold it.

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
    partial = [one if isinstance(one, Partial) else Replicate() for one in spec.placements]
    cuts: list[Cuts] = [[(extent, one)] for extent, one in zip(spec.mesh.shape, partial, strict=True)]
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
            cuts[axis] = found[axis]
    free = [axis for axis in range(spec.mesh.ndim) if axis not in fixed]
    if not free:
        only = _ranks(spec, fixed)
        return ShardingSpec(Mesh([int(only)], ("rank",)), (Replicate(),), view.shape, spec.dtype)
    order = [axis for axis in spec.axis_order or range(spec.mesh.ndim) if axis in free]
    return _on_parts_of_axes(_ranks(spec, fixed), spec, view.shape, {axis: cuts[axis] for axis in free}, order)


def _on_parts_of_axes(
    ranks: np.ndarray, spec: ShardingSpec, shape: tuple[int, ...], cuts: dict[int, Cuts], order: list[int]
) -> ShardingSpec:
    """A layout on a mesh of which each axis is as many as its cuts, the first of them slowest."""
    extents = [extent for parts in cuts.values() for extent, _ in parts]
    placements = [placement for parts in cuts.values() for _, placement in parts]
    names: list[str] = []
    numbers: dict[int, list[int]] = {}
    for axis, parts in cuts.items():
        name = spec.mesh.axis_names[axis]
        numbers[axis] = list(range(len(names), len(names) + len(parts)))
        names += [name] if len(parts) == 1 else [f"{name}_{part}" for part in range(len(parts))]
    mesh = spec.mesh if list(spec.mesh.axis_names) == names else Mesh(ranks.reshape(extents).tolist(), names)
    return ShardingSpec(
        mesh, tuple(placements), shape, spec.dtype, tuple([number for axis in order for number in numbers[axis]])
    )


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


def _cut_alike(view: View, spec: ShardingSpec, dim: int) -> dict[int, Cuts] | None:
    """How each axis that cuts a dim of the tensor cuts the box; None if placements do not say it."""
    digits = sorted(view.along(dim), key=lambda index: -view.walks[index].step)
    axes = spec.cutting_axes(dim)
    segments = {spec._segments(axis) for axis in axes}
    if len(segments) != 1:
        return None
    sizes = segments.pop() or (spec.global_shape[dim],)
    walk, start = view.walks[digits[0]], view.start[dim]
    if len(digits) == 1 and walk.step == 1 and not walk.is_copies:
        edges = [0, *accumulate(sizes)]
        stop = start + walk.size
        if start in edges and stop in edges:
            inside = tuple([high - low for low, high in pairwise(edges) if start <= low < high <= stop])
            placement = Shard(digits[0], None if len(inside) == 1 else inside)
            return {axis: [(spec.mesh.shape[axis], placement)] for axis in axes}
    block = _block(view, digits, start, sizes)
    return None if block is None else _cut_evenly(view, block, {axis: spec.mesh.shape[axis] for axis in axes})


class _Block(NamedTuple):
    """Coordinates of a dim that its axes cut evenly, and the digits that walk through them.

    Attributes:
        size: of the block.
        start: of the box in it.
        digits: longest step first.
    """

    size: int
    start: int
    digits: list[int]


def _block(view: View, digits: list[int], start: int, sizes: tuple[int, ...]) -> _Block | None:
    """The segment in which a box lies, or the first of equal ones if its longest digit walks from one to the next."""
    edges = [0, *accumulate(sizes)]
    number = next(at for at, stop in enumerate(edges[1:]) if start < stop)
    reach = start - edges[number] + sum([(view.walks[at].size - 1) * view.walks[at].step for at in digits])
    if reach < sizes[number]:
        return _Block(sizes[number], start - edges[number], digits)
    walk = view.walks[digits[0]]
    inside = reach - (walk.size - 1) * walk.step
    walked = sizes[number : number + walk.size]
    if walk.is_copies or inside >= walk.step or set(walked) != {walk.step} or len(walked) < walk.size:
        return None
    return _Block(walk.step, start - edges[number], digits[1:])


def _cut_evenly(view: View, block: _Block, extents: dict[int, int]) -> dict[int, Cuts] | None:
    """Cut digits by axes, both from the outside in: an axis that has more ranks than a digit has places goes on with
    the next digit. None where a part would be no box, or uneven: so it is that of torch.chunk, and cut once more it is
    still.
    """
    found: dict[int, Cuts] = {axis: [] for axis in extents}
    left = [[axis, extent] for axis, extent in extents.items() if extent > 1]
    size, start, digits = block
    for at, index in enumerate(digits):
        walk = view.walks[index]
        reach = start + sum([(view.walks[one].size - 1) * view.walks[one].step for one in digits[at + 1 :]])
        if not left and not walk.is_copies:
            continue
        if walk.size * walk.step != size or reach >= walk.step:
            return None
        places = walk.size
        while left and places > 1:
            axis, extent = left[0]
            part = min(extent, places)
            if extent % part or places % part:
                return None
            found[axis].append((part, Replicate() if walk.is_copies else Shard(index)))
            places //= part
            left[0][1] //= part
            left = left if left[0][1] > 1 else left[1:]
        if walk.is_copies and places > 1:
            return None  # a rank holds several copies
        size = walk.step
    return None if left else {axis: parts or [(1, Replicate())] for axis, parts in found.items()}
