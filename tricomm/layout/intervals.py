"""Ordered tuples of half-open intervals of global coordinates: the arithmetic under every layout.

What a rank holds along one tensor dim is such a tuple; its local coordinate is the position in their
concatenation, so ``((8, 12), (0, 4))`` is eight elements of which the first is global coordinate 8.
A product of them, one per dim, is a :data:`Region`.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise, product
from math import prod
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
    if len(intervals) == 1:  # nearly always, and called for every message
        return intervals[0][1] - intervals[0][0]
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


def without_repeats(intervals: Intervals) -> Intervals:
    """Drop coordinates that stand there before; the others stay in their order.

    Example:
        >>> without_repeats(((4, 6), (0, 2), (5, 8)))
        ((4, 6), (0, 2), (6, 8))
    """
    if all(one[1] <= other[0] for one, other in pairwise(sorted(intervals))):
        return intervals
    result: list[Interval] = []
    for start, stop in intervals:
        fresh = [(start, stop)]
        for low, high in result:
            fresh = [(a, b) for x, y in fresh for a, b in ((x, min(y, low)), (max(x, high), y)) if a < b]
        result += fresh
    return tuple(result)


def chunk(intervals: Intervals, parts: int, index: int) -> Intervals:
    """Part ``index`` of ``parts`` as torch.chunk cuts them: ceil(n / parts) each, the last ones less or none."""
    size = length(intervals)
    step = -(-size // parts)
    return take(intervals, min(index * step, size), min((index + 1) * step, size))


def part_of_segments(segments: Sequence[Intervals], ranks: int, index: int) -> Intervals:
    """Take the part of rank ``index`` of so many, of segments that are cut each on its own."""
    return merged([interval for piece in segments for interval in chunk(piece, ranks, index)])


def segments_of(held: Intervals, segments: Sequence[int] | None) -> list[Intervals]:
    """Split what is held by segment; all of it is one if there are none."""
    if not segments:
        return [held]
    edges = [0, *accumulate(segments)]
    return [clip(held, start, stop) for start, stop in pairwise(edges)]


def runs(inner: Intervals, outer: Intervals) -> tuple[Run, ...]:
    """Find where the coordinates of ``inner``, all of which ``outer`` holds, stand in both concatenations.

    A coordinate that ``outer`` holds several times has several runs.

    Example:
        >>> runs(((4, 6), (0, 2)), ((0, 2), (4, 8)))
        (Run(inner_start=0, outer_start=2, length=2), Run(inner_start=2, outer_start=0, length=2))
    """
    if len(inner) == len(outer) == 1:
        (start, stop), (outer_start, outer_stop) = inner[0], outer[0]
        low, high = max(start, outer_start), min(stop, outer_stop)
        return (Run(low - start, low - outer_start, high - low),) if low < high else ()
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


def first_runs(inner: Intervals, outer: Intervals) -> tuple[Run, ...]:
    """As :func:`runs`, with the first run only of a coordinate that ``outer`` holds several times.

    Example:
        >>> first_runs(((3, 5),), ((4, 5), (3, 5)))
        (Run(inner_start=1, outer_start=0, length=1), Run(inner_start=0, outer_start=1, length=1))
    """
    found = runs(inner, outer)
    if sum(run.length for run in found) == length(inner):
        return found
    seen: list[Interval] = []
    result: list[Run] = []
    for run in sorted(found, key=lambda run: run.outer_start):
        span = (run.inner_start, run.inner_start + run.length)
        for start, stop in without_repeats((*seen, span))[len(seen) :]:
            result.append(Run(start, run.outer_start + start - run.inner_start, stop - start))
        seen = list(without_repeats((*seen, span)))
    return tuple(result)


def region_shape(region: Region) -> tuple[int, ...]:
    """Extents of the region, one per dim."""
    return tuple(length(intervals) for intervals in region)


def region_numel(region: Region) -> int:
    """How many elements the region holds; 1 for the region of a 0-d tensor."""
    return prod(map(length, region))


def joint_runs(inner: Intervals, first: Intervals, second: Intervals) -> tuple[tuple[int, int, int], ...]:
    """(position in ``first``, position in ``second``, length) of the coordinates of ``inner``.

    Of a coordinate that ``first`` holds several times the first is taken; in ``second`` it stands as often as there.
    """
    result: list[tuple[int, int, int]] = []
    for a, b in product(first_runs(inner, first), runs(inner, second)):
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


class Piece(NamedTuple):
    """The part ``spans`` (start, stop per dim, as positions) of a region, by its place among several."""

    region: int
    spans: tuple[Interval, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod([stop - start for start, stop in self.spans])

    def of(self, region: Region) -> Region:
        """As global coordinates, in the region that stands at its place."""
        return tuple([take(intervals, *span) for intervals, span in zip(region, self.spans, strict=True)])


def cut_shapes(
    shapes: Sequence[tuple[int, ...]], weights: Sequence[int], points: Sequence[int], slack: int
) -> list[tuple[Piece, ...]]:
    """Cut the elements of regions of some shapes, taken one region after the other and row-major, into consecutive
    parts.

    Args:
        shapes: of what to cut, wherever it is; none is empty.
        weights: of an element of each.
        points: where, ascending, as sums of weights in that order; n points give n + 1 parts.
        slack: by what weight a cut may move from its point so that it falls between regions, between rows, or at a
            multiple of ``ALIGNED_NUMEL``. A part may end up empty.
    """
    cuts = _cuts_of_one(shapes[0], weights[0], points, slack) if len(shapes) == 1 else None
    if cuts is not None:
        dim, edges = cuts
        before, behind = (tuple((0, extent) for extent in side) for side in (shapes[0][:dim], shapes[0][dim + 1 :]))
        spans = pairwise([0, *edges, shapes[0][dim]])
        return [(Piece(0, (*before, span, *behind)),) if span[0] < span[1] else () for span in spans]
    parts: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    rest = [Piece(index, tuple((0, extent) for extent in shape)) for index, shape in enumerate(shapes)][::-1]
    position = 0
    for point in points:
        while rest:
            each = weights[rest[-1].region]
            weight = rest[-1].numel * each
            ahead = point - position
            if weight <= ahead + slack:
                current.append(rest.pop())
                position += weight
                continue
            if ahead > slack and ahead >= each:
                first, second = _cut_piece(rest.pop(), ahead // each, slack // each)
                current += first
                position += sum(piece.numel for piece in first) * each
                rest += reversed(second)
            break
        parts.append(tuple(current))
        current = []
    parts.append((*current, *reversed(rest)))
    return parts


def _cuts_of_one(
    shape: tuple[int, ...], weight: int, points: Sequence[int], slack: int
) -> tuple[int, list[int]] | None:
    """(dim, where) to cut one region if every cut falls between the rows of one dim, as most do; else None.

    It cuts where :func:`_cut_piece` does, without making pieces of what is to be cut again.
    """
    dim = next((dim for dim, extent in enumerate(shape) if extent > 1), None)
    if dim is None:
        return None
    row, slack_numel = prod(shape[dim + 1 :]), slack // weight
    edges: list[int] = []
    start = 0
    for point in points:
        ahead, rest = point - start * row * weight, shape[dim] - start
        if rest * row * weight <= ahead + slack:
            start += rest
        elif ahead > slack and ahead >= weight:
            begin = _row_of_cut(ahead // weight, rest, row, slack_numel) if rest > 1 else None
            if begin is None:
                return None
            start += begin
        edges.append(start)
    return dim, edges


def _row_of_cut(point: int, rows: int, row: int, slack_numel: int) -> int | None:
    """Before which of several rows of ``row`` elements to cut at a point; None if the cut falls inside of a row."""
    begin, inside = divmod(point, row)
    if row == 1 and slack_numel >= ALIGNED_NUMEL:
        return min(max(round(point / ALIGNED_NUMEL) * ALIGNED_NUMEL, 1), rows - 1)
    if min(inside, row - inside) > slack_numel:
        return None
    begin += 2 * inside > row
    return begin if 0 < begin < rows else None  # to cut behind the first row, or before the last, may be far off


ALIGNED_NUMEL = 64
"""Cuts inside a row fall at multiples of this where they may, so that wide words fit on both sides."""


def _cut_piece(piece: Piece, point: int, slack_numel: int) -> tuple[list[Piece], list[Piece]]:
    """Elements before and from ``point`` on, in as few pieces as possible; neither side is empty."""
    extents = [stop - start for start, stop in piece.spans]
    dim = next(dim for dim, extent in enumerate(extents) if extent > 1)
    extent = extents[dim]
    row = prod(extents) // extent
    begin, inside = divmod(point, row)
    between = _row_of_cut(point, extent, row, slack_numel)
    if between is not None:
        begin, inside = between, 0

    def rows(start: int, stop: int) -> list[Piece]:
        first = piece.spans[dim][0]
        span = (first + start, first + stop)
        return [Piece(piece.region, (*piece.spans[:dim], span, *piece.spans[dim + 1 :]))] if start < stop else []

    if not inside:
        return rows(0, begin), rows(begin, extent)
    first, second = _cut_piece(rows(begin, begin + 1)[0], inside, slack_numel)
    return rows(0, begin) + first, second + rows(begin + 1, extent)
