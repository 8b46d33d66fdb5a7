"""Cuts: parts of tensors in pieces, wherever they are, and the chunks that pieces make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import numpy as np

from tricomm.layout.columns import Lazy, counts_of, numbers, offsets_of
from tricomm.layout.intervals import Piece, cut_shapes
from tricomm.plan.parts import Part, taken

Chunk = tuple[Part, ...]
"""Parts that travel together, packed one after the other, each row-major."""


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """How parts of some shapes are cut into chunks, wherever the parts are.

    Attributes:
        every: the pieces of each chunk; some may be empty.
        chunks: the same without those that are empty.
        nbytes: bytes of each chunk.
        spans: (pieces, dims, 2), where each piece starts and stops, by place in the part; None if there are
            several parts.
        firsts: (chunks + 1,), the first piece of each chunk.
    """

    every: tuple[tuple[Piece, ...], ...]
    chunks: tuple[tuple[Piece, ...], ...]
    nbytes: tuple[int, ...]
    spans: np.ndarray | None
    firsts: np.ndarray


Kinds = tuple[tuple[int, tuple[int, ...]], ...]
"""(itemsize, shape) of some parts: all that cutting them depends on."""


def kinds_of(parts: Sequence[Part]) -> Kinds:
    """What cutting some parts depends on."""
    return tuple([(part.itemsize, part.shape) for part in parts])


@lru_cache(maxsize=4096)
def even_pattern(kinds: Kinds, count: int) -> Pattern:
    """See :func:`even_parts`."""
    unit, total = _unit_and_total(kinds)
    return _pattern(kinds, unit, [total * index // count for index in range(1, count)], total // count // 16)


@lru_cache(maxsize=4096)
def stepped_pattern(kinds: Kinds, most_nbytes: int) -> Pattern:
    """See :func:`stepped_chunks`."""
    unit, total = _unit_and_total(kinds)
    most = max(most_nbytes // unit, 1)
    return _pattern(kinds, unit, range(most, total, most), 0)


def _unit_and_total(kinds: Kinds) -> tuple[int, int]:
    """The bytes that every itemsize is a multiple of, and how many of those there are."""
    unit = gcd(*(itemsize for itemsize, _ in kinds))
    return unit, sum(itemsize // unit * prod(shape) for itemsize, shape in kinds)


def _pattern(kinds: Kinds, unit: int, points: Sequence[int], slack: int) -> Pattern:
    weights = [itemsize // unit for itemsize, _ in kinds]
    every = tuple(cut_shapes([shape for _, shape in kinds], weights, points, slack))
    chunks = tuple(pieces for pieces in every if pieces)
    firsts = offsets_of(numbers(map(len, chunks), len(chunks)))
    if len(kinds) > 1:
        nbytes = tuple(sum(kinds[piece.region][0] * piece.numel for piece in pieces) for pieces in chunks)
        return Pattern(every, chunks, nbytes, None, firsts)
    spans = np.array([piece.spans for pieces in chunks for piece in pieces], np.int64).reshape(int(firsts[-1]), -1, 2)
    sizes = offsets_of((spans[:, :, 1] - spans[:, :, 0]).prod(1) * kinds[0][0])[firsts]
    return Pattern(every, chunks, tuple(counts_of(sizes).tolist()), spans, firsts)


class Chunks(Lazy[Chunk]):
    """The chunks of a message: their sizes are known, their parts are cut when somebody looks at them.

    Args:
        groups: the parts of messages.
        row: which of them.
        pattern: how its parts are cut.
    """

    __slots__ = ("_groups", "_row", "nbytes", "pattern", "pieces")

    def __init__(self, groups: Sequence[Sequence[Part]], row: int, pattern: Pattern) -> None:
        self._groups, self._row, self.pattern = groups, row, pattern
        self.pieces, self.nbytes = pattern.chunks, pattern.nbytes

    def __len__(self) -> int:
        return len(self.pieces)

    def _items(self, rows: np.ndarray) -> Iterator[Chunk]:
        parts = self._groups[self._row]
        return (taken(self.pieces[row], parts) for row in rows.tolist())


def even_parts(parts: Sequence[Part], count: int) -> list[Chunk]:
    """Cut parts into so many groups of about equal bytes, between rows where that changes one by an eighth at the most.

    Example:
        >>> [len(group) for group in even_parts([Part(0, 4, (((0, 4),), ((0, 8),)))], 2)]
        [1, 1]
    """
    if count == 1:
        return [tuple(parts)]
    return [taken(pieces, parts) for pieces in even_pattern(kinds_of(parts), count).every]


def even_chunks(parts: Sequence[Part], count: int) -> Chunks:
    """Cut parts as :func:`even_parts` does, and leave out empty groups."""
    return Chunks((parts,), 0, even_pattern(kinds_of(parts), count))


def stepped_chunks(parts: Sequence[Part], most_nbytes: int) -> Chunks:
    """Cut parts into chunks of ``most_nbytes``, or of one element if that is larger; the last may have less."""
    return Chunks((parts,), 0, stepped_pattern(kinds_of(parts), most_nbytes))
