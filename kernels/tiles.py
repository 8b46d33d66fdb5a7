"""The rows of one launch, and how they are cut into tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tricomm.kernels import layout
from tricomm.kernels.boxes import Columns

MAX_TILE_NBYTES = 4096
"""Of what is moved as bits: smaller programs follow each other more evenly, and write closer to each other."""
MIN_FILLED = 0.8
"""Of all tiles of a launch; smaller ones are taken where less would be."""
VECTORS_LOG2 = 4
"""Of words of 16 bytes."""


class Program(NamedTuple):
    """What a program of a launch takes at a time: tiles, of so many words each, by warps of 32 threads."""

    words: int
    warps: int
    tiles: int = 1


COPIES = (Program(512, 4), Program(256, 2), Program(128, 1))
"""Four words a thread, as finding the place of a narrow one takes most of the time."""
FEW_VECTORS = (Program(256, 2), Program(128, 1), Program(64, 2, 2))
"""Where all words have 16 bytes. A multiprocessor holds 32 programs, so that boxes of a KiB go two at a time."""
MANY_VECTORS = (Program(256, 4), Program(128, 1), Program(64, 2, 2))
VECTORS_OF_ONE = (Program(128, 4),)
"""The fewer words a thread has, the more threads there are; but programs that read where their box is begin later."""
MANY_TILES = 10_000
"""Of 4 KiB: less are done in two rounds of the multiprocessors, or one, of which more threads would make more."""
WIDE_CASTS = (Program(256, 4), Program(128, 1))
PERSISTENT = (Program(2048, 16),)
"""These are to fill a multiprocessor each."""
SQUARES, LARGE_SQUARES = Program(0, 4), Program(0, 16)

Integers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one launch.

    Attributes:
        rows: (boxes, 32), as ``layout`` says.
        tiles: (tiles,), the row of each tile.
        rank: dims that are used, 2, 4 or 6.
        transposed_nbytes: bytes of a unit if these rows are for the transposing kernel, else 0.
        program: what takes a tile at a time, or several.
        side: of the squares of a transpose, in units.
        kind: of the words of all boxes, their WORD_LOG2, and ``layout.IN_RUNS`` more of words in runs, if these alone
            are to be compiled; else ``layout.ANY``.
        is_persistent: whether a small grid does all tiles.
    """

    rows: Integers
    tiles: Integers
    rank: int
    transposed_nbytes: int
    program: Program = COPIES[0]
    side: int = 0
    kind: int = layout.ANY
    is_persistent: bool = False

    @property
    def shared(self) -> tuple[int, ...] | None:
        """The row of all boxes, if they differ in their places only: with the tiles of each as the first. It comes with
        the launch, so that no program waits for it.
        """
        if self.is_persistent:
            return None
        columns = np.arange(layout.ROW_INTS) > layout.FIRST_TILE
        columns[layout.TOTAL] = True
        if (self.rows[:, columns] != self.rows[0, columns]).any() or self.each_magic == (0, 0):
            return None
        row = self.rows[0].tolist()
        row[layout.FIRST_TILE] = len(self.tiles) // len(self.rows)
        return tuple(row)

    @property
    def given(self) -> tuple[tuple[int, ...] | None, Integers, tuple[int, int], tuple[int, int]]:
        """What a launch is given beside the rows: the row of all boxes instead of them, or None; what tells of tiles;
        magic and shift; and what to add to the bases.
        """
        row = self.shared
        if row is None:
            return None, self.tiles, self.each_magic, (0, 0)
        places = np.ascontiguousarray(self.rows.view(np.int64)[:, layout.READ_PLACE : layout.WRITE_PLACE + 1])
        if len(places) > 1 or self.program.tiles > 1:
            return row, places.view(np.int32).reshape(-1), self.each_magic, (0, 0)
        return row, places.view(np.int32).reshape(-1), (0, 0), (int(places[0, 0]), int(places[0, 1]))

    @property
    def each_magic(self) -> tuple[int, int]:
        """(magic, shift), as int32, with ``tile // n == (2 * tile * magic >> 32) >> shift`` where each row has n tiles;
        (0, 0) where they have not all as many.
        """
        each, rest = divmod(len(self.tiles), len(self.rows))
        first = self.rows[:, layout.FIRST_TILE]
        if rest or (first != np.arange(len(self.rows)) * each).any():
            return 0, 0
        magic, shift = magic_numbers(np.array([2 * each]))
        return int(magic.astype(np.uint32).view(np.int32)[0]), int(shift[0])


def magic_numbers(divisors: Columns) -> tuple[Columns, Columns]:
    """(magic, shift) with ``n // divisor == (n * magic >> 32) >> shift`` for all n below 2**31 and divisors from 2 on.

    With l bits in divisor - 1 the magic number is 2**(31+l) / divisor, rounded up: the error, below 2**l, times n
    stays below 2**(31+l) (Granlund and Montgomery, 1994).
    """
    bits = np.frexp((divisors - 1).astype(np.float64))[1].astype(np.int64)
    power = np.int64(1) << (31 + bits)
    return (power + divisors - 1) // divisors, bits - 1


def fitting_program(words: Columns, nbytes: Columns, programs: Sequence[Program]) -> Program:
    """Of the largest tiles of which boxes of so many words leave little empty; else of those of which they leave least.

    A program takes its time and its place on a multiprocessor whether its tile is full or not.

    Args:
        words: (n,), of each box.
        nbytes: (n,), of its words.
        programs: that there are, those of the most words first.
    """
    small = [each for each in programs if each.words * (words * nbytes).sum() <= MAX_TILE_NBYTES * words.sum()]
    programs = small or programs[-1:]
    filled = [float(words.sum() / (-(-words // each.words) * each.words).sum()) for each in programs]
    enough = min(MIN_FILLED, max(filled))
    return next(each for each, share in zip(programs, filled, strict=True) if share >= enough)


def square(unit_nbytes: int, extent_y: Columns, extent_x: Columns, is_of_vectors: bool) -> tuple[Program, int]:
    """What takes the squares of transposed boxes, and their side in units: large ones read and write full lines of
    memory, but leave more empty, and take too many registers without vectors.
    """
    large = layout.LARGE_SIDE
    area = (-(-extent_y // large) * -(-extent_x // large) * large**2).sum()
    if is_of_vectors and unit_nbytes <= 2 and (extent_y * extent_x).sum() >= MIN_FILLED * area:
        return LARGE_SQUARES, large
    return SQUARES, layout.tile_side(unit_nbytes)
