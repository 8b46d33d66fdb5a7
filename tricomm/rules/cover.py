"""Proofs about pieces: which elements of a tensor they define, how often, and what is left when some are taken away.

All exact, by arithmetic on the coordinates of single dims: a piece is a product over dims, so coordinates that belong
to the same pieces behave alike, and counting is done on one cell for each combination of such classes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from tricomm.rules.boxes import Piece
from tricomm.rules.checks import Shape
from tricomm.rules.coalesce import coalesced

MAX_CELLS = 1 << 22
"""How many combinations of classes are counted at once."""


class Cover(NamedTuple):
    """How pieces cover a tensor.

    Attributes:
        missing_numel: elements in no piece.
        missing: the first of them, or None.
        repeated: the first element that lies in several pieces, or None.
    """

    missing_numel: int
    missing: Shape | None
    repeated: Shape | None


def coordinates(piece: Piece, dim: int) -> np.ndarray:
    """Destination coordinates along a dim: an array with one axis for each digit of that dim."""
    result = np.array(piece.start[dim])
    for digit in piece.digits:
        if digit.dim == dim:
            result = result[..., None] + np.arange(digit.size) * digit.step
    return result


@lru_cache(4096)
def cover(shape: Shape, pieces: tuple[Piece, ...]) -> Cover:
    """Count how often each element of a tensor of that shape is defined."""
    if 0 in shape:
        return Cover(0, None, None)
    runs = [[_Runs.of(piece, dim) for piece in pieces] for dim in range(len(shape))]
    units = [gcd(size, *(one.unit for one in of_dim)) for size, of_dim in zip(shape, runs, strict=True)]
    classes = [
        _classes(size // unit, [one.blocks(unit) for one in of_dim])
        for size, unit, of_dim in zip(shape, units, runs, strict=True)
    ]
    found = _counted([labels for labels, _ in classes], [held for _, held in classes], np.arange(len(pieces)))

    def first(block: Shape | None) -> Shape | None:
        return block and tuple(at * unit for at, unit in zip(block, units, strict=True))

    return Cover(found.missing_numel * prod(units), first(found.missing), first(found.repeated))


class _Runs(NamedTuple):
    """What a piece holds of a dim, as runs of neighbours: a tensor of one dim may have billions of coordinates.

    Attributes:
        start: of the first run.
        length: of each run.
        outer: (size, step) of the digits that say where the others begin.
    """

    start: int
    length: int
    outer: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, piece: Piece, dim: int) -> "_Runs":
        length, outer = 1, []
        for digit in reversed(piece.digits):
            if digit.dim == dim:
                if digit.step == length:
                    length *= digit.size
                else:
                    outer.append((digit.size, digit.step))
        return cls(piece.start[dim], length, tuple(outer))

    @property
    def unit(self) -> int:
        """The longest block, counted from 0 on, that is held whole or not at all, wherever it lies."""
        return gcd(self.start, self.length, *(step for _, step in self.outer))

    def blocks(self, unit: int) -> np.ndarray:
        """Which blocks of some coordinates are held, for a divisor of the own unit."""
        held = self.start // unit + np.arange(self.length // unit)
        for size, step in self.outer:
            held = np.add.outer(np.arange(size) * (step // unit), held)
        return held.reshape(-1)


def _counted(labels: list[np.ndarray], held: list[list[np.ndarray]], pieces: np.ndarray) -> Cover:
    """The same from the classes of each dim: the label of every coordinate, and the labels that each piece holds."""
    sizes = [int(one.max()) + 1 for one in labels]
    if prod(sizes) > MAX_CELLS:
        return _counted_by_class(labels, held, pieces)
    counts = np.zeros(sizes, np.int64)
    for index in pieces:
        counts[np.ix_(*[dim[index] for dim in held])] += 1
    weights = np.ones((), np.int64)
    for one in labels:
        weights = weights[..., None] * np.bincount(one)

    def first(cells: np.ndarray) -> Shape | None:
        found = np.argwhere(cells)
        if not len(found):
            return None
        # Classes are numbered by their first coordinate, so the first cell holds the first element.
        return tuple(int(_firsts(one)[label]) for one, label in zip(labels, found[0], strict=True))

    return Cover(int(weights[counts == 0].sum()), first(counts == 0), first(counts > 1))


def _counted_by_class(labels: list[np.ndarray], held: list[list[np.ndarray]], pieces: np.ndarray) -> Cover:
    """One class of the first dim after the other, where all at once would be too many cells."""
    numel, missing, repeated = 0, None, None
    weights = np.bincount(labels[0])
    for label, first in enumerate(_firsts(labels[0]).tolist()):
        here = np.array([index for index in pieces if label in held[0][index]], np.int64)
        found = _counted(labels[1:], held[1:], here)
        numel += found.missing_numel * int(weights[label])
        if missing is None and found.missing is not None:
            missing = (first, *found.missing)
        if repeated is None and found.repeated is not None:
            repeated = (first, *found.repeated)
    return Cover(numel, missing, repeated)


def defines_exactly_once(shape: Shape, pieces: tuple[Piece, ...]) -> bool:
    """Whether every element lies in exactly one piece."""
    return cover(shape, pieces).missing is None and sum(piece.numel for piece in pieces) == prod(shape)


def without(pieces: Sequence[Piece], taken: Sequence[Piece]) -> tuple[Piece, ...]:
    """The elements of some pieces that lie in none of the others, as pieces."""
    rest = list(pieces)
    for other in taken:
        rest = [part for piece in rest for part in _minus(piece, other)]
    return coalesced(rest)


def _classes(size: int, sets: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """A label for each coordinate, equal where the same sets hold it; and the labels that each set consists of.

    Labels are counted in the order of their first coordinates.
    """
    labels = np.zeros(size, np.int64)
    known: dict[bytes, np.ndarray] = {}
    for held in sets:
        if len(held) < size and held.tobytes() not in known:
            known[held.tobytes()] = held
            labels[held] = labels.max() + 1 + np.unique(labels[held], return_inverse=True)[1]
    _, firsts, labels = np.unique(labels, return_index=True, return_inverse=True)
    labels = firsts.argsort().argsort()[labels]
    every = np.arange(labels.max() + 1)
    within = {key: np.unique(labels[held]) for key, held in known.items()}
    return labels, [every if len(held) == size else within[held.tobytes()] for held in sets]


def _firsts(labels: np.ndarray) -> np.ndarray:
    """The first coordinate of each label."""
    firsts: np.ndarray = np.unique(labels, return_index=True)[1]
    return firsts


def _minus(piece: Piece, other: Piece) -> list[Piece]:
    """A piece without the elements of another."""
    members = [np.isin(coordinates(piece, dim), coordinates(other, dim)) for dim in range(len(piece.start))]
    if not all(held.any() for held in members):
        return [piece]
    outside: list[Piece] = []
    inside = [piece]
    for dim in range(len(piece.start)):
        parts = inside
        inside = []
        for part in parts:
            held = np.isin(coordinates(part, dim), coordinates(other, dim))
            outside += _masked(part, dim, ~held)
            inside += _masked(part, dim, held)
    return outside


def _masked(piece: Piece, dim: int, mask: np.ndarray) -> list[Piece]:
    """The places of a piece where a mask over the digits of one dim is set."""
    indices = [index for index, digit in enumerate(piece.digits) if digit.dim == dim]
    result = []
    for box in _boxes(mask):
        part = piece
        for index, (begin, end) in reversed(list(zip(indices, box, strict=True))):
            part = part.narrowed(index, begin, end)
        result.append(part)
    return result


def _boxes(mask: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    """Disjoint boxes that hold exactly the places where the mask is set."""
    if mask.all() or not mask.any():
        return [tuple((0, size) for size in mask.shape)] if mask.any() else []
    result = []
    for _, run in groupby(range(len(mask)), key=lambda place: mask[place].tobytes()):
        first, *more = run
        result += [((first, first + 1 + len(more)), *box) for box in _boxes(mask[first])]
    return result
