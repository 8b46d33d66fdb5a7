"""Where pieces meet: what a rank holds of them, and one map after another."""

from collections.abc import Iterable

from tricomm.errors import SpecError
from tricomm.kinds import explains_kinds
from tricomm.layout.intervals import Intervals, Region
from tricomm.rules.boxes import REPEATED, Digit, Piece, cut, divide


@explains_kinds
def within(piece: Piece, region: Region) -> list[Piece]:
    """The parts of a piece that lie in a region of the destination, each within one interval of every dim.

    Args:
        piece: of a bound tensor.
        region: per dim of the destination, intervals of global coordinates: a holding of its ``ShardingSpec``.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> bound = Rules({"w": source("w", (4, 6)).permute(1, 0)}).bind()
        >>> [part.shape for part in within(bound.tensors[0].pieces[0], (((0, 2), (5, 6)), ((0, 4),)))]
        [(2, 4), (4,)]
    """
    return [part.exchanged() for part in within_source(piece.exchanged(), region)]


@explains_kinds
def within_source(piece: Piece, region: Region) -> list[Piece]:
    """The parts of a piece, not of a fill, that lie in a region of the source tensor that it reads.

    Together with :func:`within`, the box that one rank of the source sends to one of the destination.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> bound = Rules({"w": source("w", (4, 6)).permute(1, 0)}).bind()
        >>> [part.shape for part in within_source(bound.tensors[0].pieces[0], (((1, 4),), ((0, 2), (4, 6))))]
        [(2, 3), (2, 3)]
    """
    _require_dims(region, piece.source_start)
    parts = [piece]
    for dim, intervals in enumerate(region):
        parts = [found for part in parts for start, stop in intervals for found in _between(part, dim, start, stop)]
    return parts


@explains_kinds
def to_local(piece: Piece, region: Region) -> Piece:
    """A part of a piece by its place in the shard of a rank that holds this region, where its strides are the shard's.

    Args:
        piece: as :func:`within` gives it: within one interval of every dim, and so with the same steps in the shard.
        region: the rank's holding of the destination.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> bound = Rules({"w": source("w", (8,))}).bind()
        >>> held = (((6, 8), (0, 2)),)
        >>> [to_local(part, held).start for part in within(bound.tensors[0].pieces[0], held)]
        [(0,), (2,)]
    """
    _require_dims(region, piece.start)
    start = tuple([_position(at, intervals) for at, intervals in zip(piece.start, region, strict=True)])
    return Piece(piece.digits, start, piece.source_start, piece.tensor, piece.value)


@explains_kinds
def to_local_source(piece: Piece, region: Region) -> Piece:
    """The same in the shard of a rank that holds this region of the source.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> bound = Rules({"w": source("w", (8,))}).bind()
        >>> held = (((6, 8), (0, 2)),)
        >>> [to_local_source(part, held).source_start for part in within_source(bound.tensors[0].pieces[0], held)]
        [(0,), (2,)]
    """
    return to_local(piece.exchanged(), region).exchanged()


def _require_dims(region: Region, start: tuple[int, ...]) -> None:
    if len(region) != len(start):
        raise SpecError(f"region {region!r} has {len(region)} dims and the tensor {len(start)}; give intervals of each")


def _position(coordinate: int, intervals: Intervals) -> int:
    position = 0
    for start, stop in intervals:
        if start <= coordinate < stop:
            return position + coordinate - start
        position += stop - start
    raise SpecError(f"coordinate {coordinate} lies in none of {intervals}; cut the piece by within() first")


def through(piece: Piece, between: Iterable[Piece]) -> list[Piece]:
    """The piece by the sources of the tensor that it reads.

    Args:
        piece: not of a fill.
        between: the pieces of the tensor that it reads.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> first = Rules({"b": source("a", (4, 6)).permute(1, 0)}).bind()
        >>> second = Rules({"c": source("b", (6, 4)).permute(1, 0)}).bind()
        >>> through(second.tensors[0].pieces[0], first.tensors[0].pieces)[0].source_start
        (0, 0)
    """
    return [part for other in between for nested in _nested(other) for part in _met(piece, nested)]


def _between(piece: Piece, dim: int, start: int, stop: int) -> list[Piece]:
    near, _ = cut(piece, dim, stop - piece.source_start[dim])
    return [part for one in near for part in cut(one, dim, start - one.source_start[dim])[1]]


def _nested(piece: Piece) -> list[Piece]:
    """Parts in which every digit steps further than all shorter ones of its dim reach together."""
    for index, digit in enumerate(piece.digits):
        shorter = [other for other in piece.digits[index + 1 :] if other.dim == digit.dim]
        if sum((other.size - 1) * other.step for other in shorter) >= digit.step:
            singles = [piece.narrowed(index, place, place + 1) for place in range(digit.size)]
            return [part for single in singles for part in _nested(single)]
    return [piece]


def _met(piece: Piece, other: Piece) -> list[Piece]:
    """What both hold of the tensor between them: its dims are taken apart into the digits of ``other``."""
    parts = [piece]
    walks: list[tuple[int, int]] = []
    for dim, start in enumerate(other.start):
        at = len(walks)
        far = [part for one in parts for part in cut(one, at, start - one.source_start[at])[1]]
        parts = [_moved(part, at, -start) for part in far]
        for digit in [digit for digit in other.digits if digit.dim == dim]:
            near = [part for one in parts for part in _below(one, len(walks), digit.size * digit.step)]
            parts = [part for one in near for part in divide(one, len(walks), digit.step)]
            walks.append((digit.source_dim, digit.source_step))
        parts = [part for one in parts for part in _below(one, len(walks), 1)]
        walks.append((REPEATED, 0))
    return [_read(part, other, walks) for part in parts]


def _below(piece: Piece, dim: int, limit: int) -> list[Piece]:
    """The parts of which the coordinate along a source dim is less than the limit."""
    return cut(piece, dim, limit - piece.source_start[dim])[0]


def _moved(piece: Piece, dim: int, by: int) -> Piece:
    start = list(piece.source_start)
    start[dim] += by
    return piece.replaced(piece.digits, tuple(start))


def _read(piece: Piece, other: Piece, walks: list[tuple[int, int]]) -> Piece:
    """A piece in places of the digits of ``other``, as a piece of the source of ``other``."""
    start = list(other.source_start)
    for place, (dim, step) in zip(piece.source_start, walks, strict=True):
        if dim != REPEATED:
            start[dim] += place * step
    digits: list[Digit] = []
    for digit in piece.digits:
        if digit.source_dim != REPEATED:
            dim, step = walks[digit.source_dim]
            digit = digit._replace(source_dim=dim, source_step=digit.source_step * step)
        digits.append(digit)
    return Piece(tuple(digits), piece.start, tuple(start), other.tensor, other.value)
