"""Fewer and larger pieces of the same elements: digits are joined, then pieces that continue each other."""

from collections import defaultdict
from collections.abc import Iterable
from operator import sub

from tricomm.rules.boxes import REPEATED, Digit, Piece


def coalesced(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same elements in as few pieces as joining finds, sorted by their place in the destination."""
    found = [_with_joined_digits(piece) for piece in pieces]
    count = 0
    while len(found) > 1 and len(found) != count:
        count = len(found)
        found = [_with_joined_digits(piece) for piece in _continued(_progressions(found))]
    return tuple(sorted(found, key=lambda piece: (piece.start, piece.digits)))


def _with_joined_digits(piece: Piece) -> Piece:
    """Neighbouring digits that are one walk on both sides are one digit."""
    result: list[Digit] = []
    for digit in sorted(piece.digits, key=lambda digit: (digit.dim, -digit.step)):
        outer = result[-1] if result else None
        if (
            outer is not None
            and (outer.dim, outer.source_dim) == (digit.dim, digit.source_dim)
            and (outer.step, outer.source_step) == (digit.step * digit.size, digit.source_step * digit.size)
        ):
            result[-1] = digit._replace(size=outer.size * digit.size)
        else:
            result.append(digit)
    return piece.replaced(result, piece.source_start)


def _walk(first: Piece, second: Piece) -> Digit | None:
    """The step from one piece to the next as a digit of size 2, if it goes along one dim on either side."""
    there = [(dim, step) for dim, step in enumerate(map(sub, second.start, first.start)) if step]
    source = [(dim, step) for dim, step in enumerate(map(sub, second.source_start, first.source_start)) if step]
    if len(there) != 1 or len(source) > 1 or any(step < 0 for _, step in there + source):
        return None
    return Digit(2, *there[0], *(source[0] if source else (REPEATED, 0)))


def _progressions(pieces: list[Piece]) -> list[Piece]:
    """Pieces of the same digits that follow each other by one step become one piece with one digit more."""
    groups: dict[object, list[Piece]] = defaultdict(list)
    for piece in sorted(pieces, key=lambda piece: piece.start):
        groups[piece.tensor, piece.value, piece.digits].append(piece)
    result: list[Piece] = []
    for group in groups.values():
        begin = 0
        while begin < len(group):
            first, end = group[begin], begin + 1
            walk = _walk(first, group[end]) if end < len(group) else None
            while walk is not None and end < len(group) and _walk(group[end - 1], group[end]) == walk:
                end += 1
            more = () if walk is None else (walk._replace(size=end - begin),)
            result.append(first.replaced((*first.digits, *more), first.source_start))
            begin = end
    return result


def _continued(pieces: list[Piece]) -> list[Piece]:
    """Pieces that continue each other along one digit, and differ in nothing but its size, become one."""
    by_start = {_place(piece): piece for piece in pieces}
    for piece in pieces:
        place = _place(piece)
        grown = by_start.get(place)
        while grown is not None:
            by_start[_place(grown)] = piece = grown
            grown = _grown(piece, by_start)
    return list(by_start.values())


def _place(piece: Piece, start: tuple[int, ...] | None = None, source_start: tuple[int, ...] | None = None) -> object:
    """What no two pieces of one destination share."""
    return (
        piece.tensor,
        piece.value,
        piece.start if start is None else start,
        piece.source_start if source_start is None else source_start,
    )


def _grown(piece: Piece, by_start: dict[object, Piece]) -> Piece | None:
    """The piece with a neighbour joined to it, which is taken out of ``by_start``; None if it has no such neighbour."""
    for index, digit in enumerate(piece.digits):
        without = (*piece.digits[:index], *piece.digits[index + 1 :])
        for places in (digit.size, -1):
            start, source_start = _stepped(piece, digit, places)
            place = _place(piece, start, source_start)
            other = by_start.get(place)
            if other is None:
                continue
            if other.digits == without:
                size = 1
            elif places > 0 and [d._replace(size=0) for d in other.digits] == [
                d._replace(size=0) for d in piece.digits
            ]:
                size = other.digits[index].size
                if (*other.digits[:index], *other.digits[index + 1 :]) != without:
                    continue
            else:
                continue
            del by_start[place]
            digits = (*piece.digits[:index], digit._replace(size=digit.size + size), *piece.digits[index + 1 :])
            if places > 0:
                return piece.replaced(digits, piece.source_start)
            del by_start[_place(piece)]
            return other.replaced(digits, source_start)
    return None


def _stepped(piece: Piece, digit: Digit, places: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the piece would start so many places further along a digit."""
    start, source_start = list(piece.start), list(piece.source_start)
    start[digit.dim] += places * digit.step
    if digit.source_dim != REPEATED:
        source_start[digit.source_dim] += places * digit.source_step
    return tuple(start), tuple(source_start)
