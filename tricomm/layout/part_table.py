"""What every rank of a layout holds, as tables whose size grows with ranks plus parts, never with their product."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tricomm.layout.columns import IntervalLists
from tricomm.layout.intervals import Intervals, merged, part_of_segments, segments_of, without_repeats
from tricomm.layout.mesh import Mesh
from tricomm.layout.spec import ShardingSpec


@dataclass(frozen=True, slots=True, eq=False)
class PartTable:
    """The distinct interval lists of each dim, and which of them each rank holds.

    What a rank holds several times stands in its list once: the planner moves it once.

    Attributes:
        parts: per dim, the distinct interval lists.
        part_of: int array (ranks, dims): the index into ``parts[dim]`` of each rank in mesh order.
    """

    parts: tuple[IntervalLists, ...]
    part_of: np.ndarray


@lru_cache(maxsize=256)
def part_table(spec: ShardingSpec) -> PartTable:
    """Make the tables of a spec."""
    shape, mesh = spec.global_shape, spec.mesh
    part_of = np.zeros((mesh.size, len(shape)), dtype=np.int64)
    parts: list[IntervalLists] = []
    coordinates = _coordinates(mesh)
    for dim in range(len(shape)):
        if spec.holdings is not None:
            index: dict[Intervals, int] = {}
            for position, holding in enumerate(spec.holdings):
                part_of[position, dim] = index.setdefault(without_repeats(holding[dim]), len(index))
            parts.append(IntervalLists.of(tuple(index)))
            continue
        axes = spec.cutting_axes(dim)
        for axis in axes:
            part_of[:, dim] = part_of[:, dim] * mesh.shape[axis] + coordinates[axis]
        cuts = tuple((mesh.shape[axis], spec._segments(axis)) for axis in axes)
        parts.append(_parts(shape[dim], cuts))
    return PartTable(tuple(parts), part_of)


def _coordinates(mesh: Mesh) -> list[np.ndarray]:
    """Per axis, the coordinate of each rank in mesh order; numpy.indices ends at 64 axes."""
    rest = np.arange(mesh.size)
    coordinates: list[np.ndarray] = []
    for extent in reversed(mesh.shape):
        rest, coordinate = np.divmod(rest, extent)
        coordinates.append(coordinate)
    return coordinates[::-1]


@lru_cache(maxsize=1024)
def _parts(extent: int, cuts: tuple[tuple[int, tuple[int, ...] | None], ...]) -> IntervalLists:
    """Cut a dim by axes one after the other, each (how many ranks, segments that it cuts each on its own).

    Tensors of a model share extents and axes: equal arguments give the same object.
    """
    parts = IntervalLists.of([merged(((0, extent),))])
    for ranks, segments in cuts:
        if parts.simple and not segments:
            parts = parts.chunks(ranks)
            continue
        cut: list[Intervals] = []
        for held in parts:
            pieces = segments_of(held, segments)
            cut += [part_of_segments(pieces, ranks, index) for index in range(ranks)]
        parts = IntervalLists.of(cut)
    return parts
