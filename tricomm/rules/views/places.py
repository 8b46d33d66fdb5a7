"""Where digits fall into intervals: the places along one dim of a tensor that a rank holds, and where in its shard."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from tricomm.layout.intervals import Interval, Intervals, merged

Box = tuple[Interval, ...]
"""Places of some digits: [begin, end) of each."""

Steps = tuple[tuple[int, int], ...]
"""(size, step) of each digit that walks along a dim."""


class Places(NamedTuple):
    """The places of some digits that a rank holds: a product, walked by one step per digit in the shard.

    Attributes:
        of_digits: per digit, the intervals of its places, in the order in which the shard has them.
        first: the coordinate in the shard of the first of them; of none it is 0.
        steps: per digit, how much further in the shard each next place of them is.
    """

    of_digits: tuple[Intervals, ...]
    first: int
    steps: tuple[int, ...]


def places(start: int, digits: Steps, held: Intervals, *, once: bool) -> Places | None:
    """Find the places that lie in intervals of a dim; None if they are no product, or not one walk.

    Args:
        start: the coordinate of the first place of all.
        digits: those that walk along the dim.
        held: a rank's intervals of the dim.
        once: of places that are held several times, take the first.

    Example:
        Two heads of four rows, of which the rank has the last three rows, and then two segments of one row each:

        >>> places(0, ((2, 4), (4, 1)), ((5, 8),), once=False)
        Places(of_digits=(((1, 2),), ((1, 4),)), first=0, steps=(4, 1))
        >>> places(0, ((2, 4), (4, 1)), ((1, 2), (5, 6)), once=False)
        Places(of_digits=(((0, 2),), ((1, 2),)), first=0, steps=(1, 1))
        >>> places(0, ((2, 4), (4, 1)), ((3, 8),), once=False) is None
        True
    """
    if not digits and len(held) == 1:
        low, high = held[0]
        return Places((), max(start - low, 0), ()) if low <= start < high else NOWHERE
    order = sorted(range(len(digits)), key=lambda index: -digits[index][1])
    found = _found(start, tuple([digits[index] for index in order]), held, once)
    if not digits:
        return NOWHERE if not found else Places((), found[0][1], ()) if len(found) == 1 else None
    if not found:
        return Places(((),) * len(digits), 0, tuple([step for _, step in digits]))
    (first_box, first), inner = found[0], found[0][0][1:]
    outer = [box[0] for box, _ in found]
    step = _step([high - low for low, high in outer], [at for _, at in found], digits[order[0]][1])
    if step is None or any(box[1:] != inner for box, _ in found):
        return None
    of_digits: list[Intervals] = [()] * len(digits)
    steps = [size_and_step[1] for size_and_step in digits]
    of_digits[order[0]], steps[order[0]] = merged(outer), step
    for index, interval in zip(order[1:], first_box[1:], strict=True):
        of_digits[index] = (interval,)
    return Places(tuple(of_digits), first, tuple(steps))


NOWHERE = Places((), -1, ())
"""Of a dim without digits, whose one coordinate is not held."""


def _found(start: int, digits: Steps, held: Intervals, once: bool) -> list[tuple[Box, int]]:
    """Each box of places that lies in one interval, and where its first place stands in the shard."""
    found: list[tuple[Box, int]] = []
    offset = 0
    for low, high in held:
        for box in boxes_between(start, digits, low, high):
            at = start + sum([begin * step for (begin, _), (_, step) in zip(box, digits, strict=True)])
            found.append((box, offset + at - low))
        offset += high - low
    return list({box: (box, at) for box, at in reversed(found)}.values())[::-1] if once else found


def boxes_between(start: int, digits: Steps, low: int, high: int) -> Iterator[Box]:
    """Disjoint boxes of the places with coordinates in [low, high).

    Args:
        start: the coordinate of the first place.
        digits: longest step first.
        low, high: coordinates.

    Example:
        >>> list(boxes_between(0, ((2, 4), (4, 1)), 3, 8))
        [((0, 1), (3, 4)), ((1, 2), (0, 4))]
    """
    if not digits:
        if low <= start < high:
            yield ()
        return
    (size, step), rest = digits[0], digits[1:]
    reach = sum([(count - 1) * stride for count, stride in rest])
    first = max(0, -(-(low - reach - start) // step))
    last = min(size, -(-(high - start) // step))
    whole = max(first, -(-(low - start) // step))
    end = min(last, (high - 1 - reach - start) // step + 1)
    if whole >= end:
        whole = end = last
    for place in range(first, whole):
        yield from (((place, place + 1), *box) for box in boxes_between(start + place * step, rest, low, high))
    if whole < end:
        yield ((whole, end), *[(0, count) for count, _ in rest])
    for place in range(end, last):
        yield from (((place, place + 1), *box) for box in boxes_between(start + place * step, rest, low, high))


def _step(counts: Sequence[int], starts: Sequence[int], step: int) -> int | None:
    """How much further in the shard each next place is, if that is the same for all; boxes walk by ``step``."""
    if len(counts) == 1:
        return step
    between, rest = divmod(starts[1] - starts[0], counts[0])
    if rest or (max(counts) > 1 and between != step) or between < 0:
        return None
    expected = [starts[0] + between * count for count in accumulate(counts[:-1], initial=0)]
    return between if expected == list(starts) else None
