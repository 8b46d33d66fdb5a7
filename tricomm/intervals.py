"""Ordered tuples of half-open intervals of global coordinates: the arithmetic under every layout.

What a rank holds along one tensor dim is such a tuple; its local coordinate is the position in their
concatenation, so ``((8, 12), (0, 4))`` is eight elements of which the first is global coordinate 8.
A product of them, one per dim, is a :data:`Region`.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

Interval = tuple[int, int]
Intervals = tuple[Interval, ...]
Region = tuple[Intervals, ...]


class Run(NamedTuple):
    """``length`` coordinates that are consecutive in two concatenations at once."""

    inner_start: int
    outer_start: int
    length: int


def length(intervals: Intervals) -> int:
    """How many coordinates the intervals hold."""
    return sum(stop - start for start, stop in intervals)


def merged(intervals: Sequence[Interval]) -> Intervals:
    """The same coordinates in the same order, without empty intervals and with neighbours joined."""
    result: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def clip(intervals: Intervals, start: int, stop: int) -> Intervals:
    """The coordinates that lie in [start, stop), in their order."""
    kept = ((max(a, start), min(b, stop)) for a, b in intervals)
    return tuple((a, b) for a, b in kept if a < b)


def take(intervals: Intervals, begin: int, end: int) -> Intervals:
    """Positions [begin, end) of the concatenation, as global intervals."""
    result: list[Interval] = []
    position = 0
    for start, stop in intervals:
        low, high = max(begin - position, 0), min(end - position, stop - start)
        if low < high:
            result.append((start + low, start + high))
        position += stop - start
    return tuple(result)


def chunk(intervals: Intervals, parts: int, index: int) -> Intervals:
    """Part ``index`` of ``parts`` as torch.chunk cuts them: ceil(n / parts) each, the last ones less or none."""
    size = length(intervals)
    step = -(-size // parts)
    return take(intervals, min(index * step, size), min((index + 1) * step, size))


def runs(inner: Intervals, outer: Intervals) -> tuple[Run, ...]:
    """Where the coordinates of ``inner``, all of which ``outer`` holds, stand in both concatenations.

    Example: ``runs(((4, 6), (0, 2)), ((0, 2), (4, 8)))`` is ``(Run(0, 2, 2), Run(2, 0, 2))``.
    """
    result: list[Run] = []
    inner_position = 0
    for start, stop in inner:
        outer_position = 0
        found: list[tuple[int, int, int]] = []
        for outer_start, outer_stop in outer:
            low, high = max(start, outer_start), min(stop, outer_stop)
            if low < high:
                found.append((low, outer_position + low - outer_start, high - low))
            outer_position += outer_stop - outer_start
        for low, position, count in sorted(found):
            run = Run(inner_position + low - start, position, count)
            last = result[-1] if result else None
            if (
                last is not None
                and last.inner_start + last.length == run.inner_start
                and last.outer_start + last.length == run.outer_start
            ):
                result[-1] = last._replace(length=last.length + run.length)
            else:
                result.append(run)
        inner_position += stop - start
    return tuple(result)


def region_shape(region: Region) -> tuple[int, ...]:
    """Extents of the region, one per dim."""
    return tuple(length(intervals) for intervals in region)


def region_numel(region: Region) -> int:
    """How many elements the region holds; 1 for the region of a 0-d tensor."""
    numel = 1
    for intervals in region:
        numel *= length(intervals)
    return numel


def split_region(region: Region, max_numel: int) -> Iterator[Region]:
    """Cut a region into pieces of at most ``max_numel`` elements, in row-major order.

    The outermost dim of more than one element is cut first, so a piece of a region that is contiguous
    in memory is contiguous too.
    """
    numel = region_numel(region)
    if numel <= max_numel:
        yield region
        return
    shape = region_shape(region)
    dim = next(d for d, extent in enumerate(shape) if extent > 1)
    rows_per_piece = max(1, max_numel // (numel // shape[dim]))
    pieces = -(-shape[dim] // rows_per_piece)
    for index in range(pieces):
        begin, end = (shape[dim] * index // pieces, shape[dim] * (index + 1) // pieces)
        part = (*region[:dim], take(region[dim], begin, end), *region[dim + 1 :])
        yield from split_region(part, max_numel)


def joint_runs(inner: Intervals, first: Intervals, second: Intervals) -> tuple[tuple[int, int, int], ...]:
    """(position in ``first``, position in ``second``, length) of the coordinates of ``inner``."""
    result: list[tuple[int, int, int]] = []
    for a, b in product(runs(inner, first), runs(inner, second)):
        low = max(a.inner_start, b.inner_start)
        high = min(a.inner_start + a.length, b.inner_start + b.length)
        if low < high:
            result.append(
                (
                    a.outer_start + low - a.inner_start,
                    b.outer_start + low - b.inner_start,
                    high - low,
                )
            )
    return tuple(result)
