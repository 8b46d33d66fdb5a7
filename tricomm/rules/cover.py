"""Proofs about pieces: which elements of a tensor they define, how often, and what is left when some are taken away.

All exact, by arithmetic on the coordinates of single dims: a piece is a product over dims, so coordinates that belong
to the same pieces behave alike, and counting is done on one cell for each combination of such classes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from math import prod
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


@lru_cache(4096)
def cover(shape: Shape, pieces: tuple[Piece, ...]) -> Cover:
    """Count how often each element of a tensor of that shape is defined."""
    if 0 in shape:
        return Cover(0, None, None)
    cells = [_Cells.of(size, [_Runs.of(piece, dim) for piece in pieces]) for dim, size in enumerate(shape)]
    sizes, held = [one.sizes for one in cells], [one.held for one in cells]
    found = _counted([one.labels for one in cells], sizes, held, np.arange(len(pieces)))

    def first(place: Shape | None) -> Shape | None:
        return place and tuple([int(one.edges[at]) for at, one in zip(place, cells, strict=True)])

    return Cover(found.missing_numel, first(found.missing), first(found.repeated))


class _Runs(NamedTuple):
    """What a piece holds of a dim, as runs of neighbours: a tensor of one dim may have billions of coordinates.

    Attributes:
        starts: of the runs, in order.
        length: of each run.
    """

    starts: np.ndarray
    length: int

    @classmethod
    def of(cls, piece: Piece, dim: int) -> "_Runs":
        length, starts = 1, np.array([piece.start[dim]])
        for digit in reversed(piece.digits):
            if digit.dim == dim:
                if digit.step == length:
                    length *= digit.size
                else:
                    starts = np.add.outer(np.arange(digit.size) * digit.step, starts)
        return cls(np.sort(starts, axis=None), length)

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where runs begin, and where they end."""
        return self.starts, self.starts + self.length

    def holds(self, places: np.ndarray) -> np.ndarray:
        """Which coordinates lie in a run."""
        last = np.searchsorted(self.starts, places, "right") - 1
        held: np.ndarray = (last >= 0) & (places < self.starts[last] + self.length)
        return held


class _Cells(NamedTuple):
    """A dim in cells that pieces hold whole or not at all.

    Attributes:
        edges: where each cell begins, and the end.
        labels: of each cell, see ``_classes``.
        held: of each piece, the labels that it holds.
    """

    edges: np.ndarray
    labels: np.ndarray
    held: list[np.ndarray]

    @classmethod
    def of(cls, size: int, runs: list[_Runs]) -> "_Cells":
        edges = np.unique(np.concatenate([np.array([0, size]), *(edge for one in runs for edge in one.edges)]))
        sets = [np.flatnonzero(one.holds(edges[:-1])) for one in runs]
        return cls(edges, *_classes(len(edges) - 1, sets))

    @property
    def sizes(self) -> np.ndarray:
        """How many coordinates each class has."""
        found = np.zeros(self.labels.max() + 1, np.int64)
        np.add.at(found, self.labels, np.diff(self.edges))
        return found


def _counted(
    labels: list[np.ndarray], sizes: list[np.ndarray], held: list[list[np.ndarray]], pieces: np.ndarray
) -> Cover:
    """The same from the classes of each dim, with places in cells: the label of every cell, how many coordinates each
    class has, and the labels that each piece holds.
    """
    if prod(map(len, sizes)) > MAX_CELLS:
        return _counted_by_class(labels, sizes, held, pieces)
    counts = np.zeros([len(one) for one in sizes], np.int64)
    for index in pieces:
        counts[np.ix_(*[dim[index] for dim in held])] += 1
    weights = np.ones((), np.int64)
    for one in sizes:
        weights = weights[..., None] * one

    def first(cells: np.ndarray) -> Shape | None:
        found = np.argwhere(cells)
        if not len(found):
            return None
        # Classes are numbered by their first coordinate, so the first cell holds the first element.
        return tuple(int(_firsts(one)[label]) for one, label in zip(labels, found[0], strict=True))

    return Cover(int(weights[counts == 0].sum()), first(counts == 0), first(counts > 1))


def _counted_by_class(
    labels: list[np.ndarray], sizes: list[np.ndarray], held: list[list[np.ndarray]], pieces: np.ndarray
) -> Cover:
    """One class of the first dim after the other, where all at once would be too many cells."""
    numel, missing, repeated = 0, None, None
    for label, first in enumerate(_firsts(labels[0]).tolist()):
        here = np.array([index for index in pieces if label in held[0][index]], np.int64)
        found = _counted(labels[1:], sizes[1:], held[1:], here)
        numel += found.missing_numel * int(sizes[0][label])
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
    outside: list[Piece] = []
    inside = [piece]
    for dim in range(len(piece.start)):
        taken = _Runs.of(other, dim)
        parts, inside = inside, []
        for part in parts:
            held, bounds = _held(part, dim, taken)
            outside += _masked(part, dim, ~held, bounds)
            inside += _masked(part, dim, held, bounds)
        if not inside:
            return [piece]
    return outside


def _held(piece: Piece, dim: int, taken: _Runs) -> tuple[np.ndarray, np.ndarray | None]:
    """Which coordinates of a piece others hold along a dim.

    Returns:
        A mask with one axis for each digit of that dim. If the last digit walks over neighbours, its axis has cells
        instead, each held whole or not at all, and there are their bounds: where each begins, and the end.
    """
    digits = [digit for digit in piece.digits if digit.dim == dim]
    size = digits.pop().size if digits and digits[-1].step == 1 else None
    firsts = np.array(piece.start[dim])
    for digit in digits:
        firsts = firsts[..., None] + np.arange(digit.size) * digit.step
    if size is None:
        return taken.holds(firsts), None
    edges, begins = np.unique(np.concatenate(taken.edges)), firsts.reshape(-1)
    low, high = np.searchsorted(edges, begins), np.searchsorted(edges, begins + size)
    counts = high - low
    which = np.arange(counts.sum()) + np.repeat(low - counts.cumsum() + counts, counts)
    bounds = np.unique(np.concatenate([np.array([0, size]), edges[which] - np.repeat(begins, counts)]))
    return taken.holds(firsts[..., None] + bounds[:-1]), bounds


def _masked(piece: Piece, dim: int, mask: np.ndarray, bounds: np.ndarray | None) -> list[Piece]:
    """The places of a piece where a mask over the digits of one dim is set; see ``_held``."""
    indices = [index for index, digit in enumerate(piece.digits) if digit.dim == dim]
    result = []
    for box in _boxes(mask):
        part = piece
        for index, (begin, end) in reversed(list(zip(indices, box, strict=True))):
            if bounds is not None and index == indices[-1]:
                begin, end = int(bounds[begin]), int(bounds[end])
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
