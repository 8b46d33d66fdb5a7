"""Pieces: boxes of digits that have a place in two tensors at once, and how they are cut.

A piece is an n-d box of *digits*. Each digit walks along one dim of the destination by a step, and along one dim of
the source by another (or along none, where one source element is repeated). So a piece is a product over the dims
on either side, as the shards of a ``ShardingSpec`` are, and cutting it by intervals of a dim gives pieces again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

REPEATED = -1
"""The source dim of a digit that stays on one source element."""


class Digit(NamedTuple):
    """A dim of a piece: each of ``size`` places is ``step`` further in ``dim``, ``source_step`` in ``source_dim``.

    Example:
        >>> print(Digit(size=4, dim=0, step=8, source_dim=1, source_step=2))
        4(d0+8 <- d1+2)
    """

    size: int
    dim: int
    step: int
    source_dim: int
    source_step: int

    def __str__(self) -> str:
        source = "same" if self.source_dim == REPEATED else f"d{self.source_dim}+{self.source_step}"
        return f"{self.size}(d{self.dim}+{self.step} <- {source})"


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a destination tensor that come from one source tensor, or that are all one value.

    Attributes:
        digits: by destination dim and there the longest step first; none has size 1.
        start: the destination coordinates of its first element.
        source_start: the source coordinates of that element.
        tensor: the source tensor, as its place among the sources of the destination; None for a fill.
        value: of a fill.

    Example:
        >>> piece = Piece((Digit(4, 0, 1, 1, 1), Digit(6, 1, 1, 0, 1)), (0, 0), (0, 0), tensor=0)
        >>> print(piece)
        [4, 6] at [0, 0] <- tensor 0 at [0, 0]: 4(d0+1 <- d1+1) 6(d1+1 <- d0+1)
        >>> piece.strided((6, 1)), piece.source_strided((4, 1))
        ((0, (6, 1)), (0, (1, 4)))
    """

    digits: tuple[Digit, ...]
    start: tuple[int, ...]
    source_start: tuple[int, ...]
    tensor: int | None = None
    value: float | None = None

    def __str__(self) -> str:
        """Sizes, where it begins on both sides, and the steps of each digit."""
        source = repr(self.value) if self.tensor is None else f"tensor {self.tensor} at {list(self.source_start)}"
        return (
            f"{list(self.shape)} at {list(self.start)} <- {source}: {' '.join(map(str, self.digits)) or 'one element'}"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each digit.

        >>> piece = Piece((Digit(4, 0, 1, 1, 1), Digit(6, 1, 1, 0, 1)), (0, 0), (0, 0), tensor=0)  # 4 x 6, transposed
        >>> piece.shape
        (4, 6)
        """
        return tuple([digit.size for digit in self.digits])

    @property
    def numel(self) -> int:
        """Elements of the destination.

        >>> piece = Piece((Digit(4, 0, 1, 1, 1), Digit(6, 1, 1, 0, 1)), (0, 0), (0, 0), tensor=0)  # 4 x 6, transposed
        >>> piece.numel
        24
        """
        result = 1
        for digit in self.digits:
            result *= digit.size
        return result

    def strided(self, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Offset, and stride per digit, in a destination with those strides (elements, or bytes).

        >>> piece = Piece((Digit(4, 0, 1, 1, 1), Digit(6, 1, 1, 0, 1)), (0, 0), (0, 0), tensor=0)  # 4 x 6, transposed
        >>> piece.strided((6, 1))  # as in torch.as_strided(destination, piece.shape, strides, offset)
        (0, (6, 1))
        """
        offset = sum(map(int.__mul__, self.start, strides))
        return offset, tuple([digit.step * strides[digit.dim] for digit in self.digits])

    def source_strided(self, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The same in the source; the stride of a repeated digit is 0.

        >>> piece = Piece((Digit(4, 0, 1, 1, 1), Digit(6, 1, 1, 0, 1)), (0, 0), (0, 0), tensor=0)  # 4 x 6, transposed
        >>> piece.source_strided((4, 1))  # the source has 6 rows of 4
        (0, (1, 4))
        """
        offset = sum(map(int.__mul__, self.source_start, strides))
        steps = [0 if d.source_dim == REPEATED else d.source_step * strides[d.source_dim] for d in self.digits]
        return offset, tuple(steps)

    def replaced(self, digits: Iterable[Digit], source_start: tuple[int, ...]) -> "Piece":
        """This piece with the same place in the destination, walked by other digits of another source.

        >>> row = Piece((Digit(4, 0, 1, 0, 1),), (0,), (2,), tensor=0)
        >>> print(row.replaced([Digit(4, 0, 1, 0, 3)], (5,)))
        [4] at [0] <- tensor 0 at [5]: 4(d0+1 <- d0+3)
        """
        return Piece(tuple(digits), self.start, source_start, self.tensor, self.value)

    def narrowed(self, index: int, begin: int, end: int) -> "Piece":
        """Only the places [begin, end) of one digit, at least one.

        >>> print(Piece((Digit(4, 0, 1, 0, 1),), (8,), (0,), tensor=0).narrowed(0, 1, 3))
        [2] at [9] <- tensor 0 at [1]: 2(d0+1 <- d0+1)
        """
        digit = self.digits[index]
        if (begin, end) == (0, digit.size):
            return self
        start, source_start = list(self.start), list(self.source_start)
        if digit.dim != REPEATED:
            start[digit.dim] += begin * digit.step
        if digit.source_dim != REPEATED:
            source_start[digit.source_dim] += begin * digit.source_step
        kept = () if end - begin == 1 else (digit._replace(size=end - begin),)
        digits = (*self.digits[:index], *kept, *self.digits[index + 1 :])
        return Piece(digits, tuple(start), tuple(source_start), self.tensor, self.value)

    def split(self, index: int, inner: int) -> "Piece":
        """One digit as two: the inner one of that size, which divides it.

        >>> print(Piece((Digit(6, 0, 1, 0, 1),), (0,), (0,), tensor=0).split(0, inner=2))
        [3, 2] at [0] <- tensor 0 at [0]: 3(d0+2 <- d0+2) 2(d0+1 <- d0+1)
        """
        size, dim, step, source_dim, source_step = self.digits[index]
        pair = (
            Digit(size // inner, dim, step * inner, source_dim, source_step * inner),
            Digit(inner, dim, step, source_dim, source_step),
        )
        kept = tuple(digit for digit in pair if digit.size > 1)
        return self.replaced((*self.digits[:index], *kept, *self.digits[index + 1 :]), self.source_start)

    def exchanged(self) -> "Piece":
        """Source and destination exchanged, repeated digits kept: to be cut like a source and exchanged again.

        >>> print(Piece((Digit(4, 0, 1, 1, 2),), (8,), (0, 3), tensor=0).exchanged())
        [4] at [0, 3] <- tensor 0 at [8]: 4(d1+2 <- d0+1)
        """
        digits = tuple([Digit(d.size, d.source_dim, d.source_step, d.dim, d.step) for d in self.digits])
        return Piece(digits, self.source_start, self.start, self.tensor, self.value)

    def turned(self, tensor: int | None = None) -> "Piece":
        """Source and destination exchanged. A repeated digit is left out, so that the first of the replicas is taken.

        Args:
            tensor: the place of the destination tensor among the sources of the reversed map.

        Example:
            >>> thrice = Piece((Digit(3, 0, 1, REPEATED, 0), Digit(4, 1, 1, 0, 1)), (0, 0), (0,), tensor=0)
            >>> print(thrice.turned(tensor=2))
            [4] at [0] <- tensor 2 at [0, 0]: 4(d0+1 <- d1+1)
        """
        kept = [digit for digit in self.digits if digit.source_dim != REPEATED]
        digits = tuple([Digit(d.size, d.source_dim, d.source_step, d.dim, d.step) for d in kept])
        return Piece(digits, self.source_start, self.start, tensor)


def renumbered(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """Source tensors counted in the order in which the pieces read them first; and their old numbers in that order."""
    order: dict[int, int] = {}
    result = []
    for piece in pieces:
        if piece.tensor is not None:
            number = order.setdefault(piece.tensor, len(order))
            piece = Piece(piece.digits, piece.start, piece.source_start, number)
        result.append(piece)
    return tuple(result), tuple(order)


def cut(piece: Piece, dim: int, room: int, below: int | None = None) -> tuple[list[Piece], list[Piece]]:
    """The parts of a piece less than ``room`` source coordinates from its start along a source dim, and the others.

    Args:
        piece: what to cut.
        dim: a dim of the source.
        room: a number of coordinates.
        below: count only the digits of a step below this, as if the others stood still.
    """
    walking = [
        i for i, d in enumerate(piece.digits) if d.source_dim == dim and (below is None or d.source_step < below)
    ]
    reach = sum((piece.digits[i].size - 1) * piece.digits[i].source_step for i in walking)
    if room <= 0:
        return [], [piece]
    if reach < room:
        return [piece], []
    index = max(walking, key=lambda i: piece.digits[i].source_step)
    size, step = piece.digits[index].size, piece.digits[index].source_step
    rest = reach - (size - 1) * step
    inside = min(size, max(0, -(-(room - rest) // step)))
    outside = min(size, -(-room // step))
    near = [piece.narrowed(index, 0, inside)] if inside else []
    far = [piece.narrowed(index, outside, size)] if outside < size else []
    for place in range(inside, outside):
        lower, upper = cut(piece.narrowed(index, place, place + 1), dim, room - place * step, below)
        near, far = near + lower, far + upper
    return near, far


def divide(piece: Piece, dim: int, size: int) -> list[Piece]:
    """Make two source dims of one: coordinate c becomes (c // size, c % size), in as many pieces as that takes."""
    open_pieces, done = [piece], []
    while open_pieces:
        piece = open_pieces.pop()
        low = [i for i, d in enumerate(piece.digits) if d.source_dim == dim and d.source_step % size]
        offset = piece.source_start[dim] % size
        reach = offset + sum((piece.digits[i].size - 1) * piece.digits[i].source_step for i in low)
        if reach < size:
            done.append(_divided(piece, dim, size))
        else:
            open_pieces += _without_carry(piece, dim, size, low, reach)
    return done


def _divided(piece: Piece, dim: int, size: int) -> Piece:
    """The same, where no digit carries over a multiple of ``size``."""
    digits = []
    for digit in piece.digits:
        if digit.source_dim == dim:
            whole = digit.source_step % size == 0
            step = digit.source_step // size if whole else digit.source_step
            digit = digit._replace(source_dim=dim if whole else dim + 1, source_step=step)
        elif digit.source_dim > dim:
            digit = digit._replace(source_dim=digit.source_dim + 1)
        digits.append(digit)
    start = piece.source_start
    return piece.replaced(digits, (*start[:dim], *divmod(start[dim], size), *start[dim + 1 :]))


def _without_carry(piece: Piece, dim: int, size: int, low: list[int], reach: int) -> list[Piece]:
    """A piece of which some digits carry, as parts nearer to pieces of which none does."""
    index = max(low, key=lambda i: piece.digits[i].source_step)
    digit = piece.digits[index]
    step = digit.source_step
    offset = piece.source_start[dim] % size
    rest = reach - offset - (digit.size - 1) * step
    if size % step == 0 and rest < step <= offset % step + rest:
        # The shorter digits carry into this one: cut them there, and each part goes on alone.
        near, far = cut(piece, dim, step - offset % step, below=step)
        return near + far
    places = size // gcd(size, step)
    if digit.size > places and (step * places > size or offset + rest < step):
        # After so many places the remainders repeat: count the repetitions by a digit of their own.
        whole = digit.size - digit.size % places
        parts = [piece.narrowed(index, 0, whole).split(index, places)]
        return parts + ([piece.narrowed(index, whole, digit.size)] if whole < digit.size else [])
    first = min(-(-(size - offset) // step), digit.size - 1)
    return [piece.narrowed(index, 0, first), piece.narrowed(index, first, digit.size)]
