"""Pieces: what each holder of a source tile sends of it, as columns."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, IntervalLists, Regions, counts_of, offsets_of, spread
from tricomm.plan.product.grid import Grid
from tricomm.plan.product.sharing import BY_TURNS, UNITS, Allotment, Ends, Sharing, turns_of
from tricomm.plan.refine import Cells

WIDE = 64
"""A dim of so many coordinates is fine enough to be cut where shares end."""

SLIVERS = 128
"""A part of a cell that is smaller than a share by so much goes with the part beside it: a message costs more."""


class Line(NamedTuple):
    """The cells of each tile one after the other, the last dim fastest: where a cell begins follows from its place in
    each dim.

    Attributes:
        before: per dim and cell, coordinates of the cells before it in the same part.
        totals: per dim and part, coordinates of all its cells.
        ordinals: per dim and cell, how many cells of the same part are before it.
        counts: per dim and part, how many cells it has.
        largest: elements of the largest tile.
        most_cells: of a tile.
    """

    before: list[np.ndarray]
    totals: list[np.ndarray]
    ordinals: list[np.ndarray]
    counts: list[np.ndarray]
    largest: int
    most_cells: int

    @classmethod
    def of(cls, lengths: Sequence[np.ndarray], parts: Sequence[np.ndarray], counts: Sequence[int]) -> "Line":
        """From the coordinates and the part of each cell, dim by dim."""
        before, totals, ordinals, numbers = [], [], [], []
        for extent, part, count in zip(lengths, parts, counts, strict=True):
            order = part.argsort(kind="stable")
            total = np.zeros(count, np.int64)
            np.add.at(total, part, extent)
            ends = offsets_of(extent[order])[:-1]
            found = np.empty(len(part), np.int64)
            found[order] = ends - offsets_of(total)[part[order]]
            number = np.empty(len(part), np.int64)
            of_part = np.bincount(part, minlength=count)
            number[order] = np.arange(len(part)) - offsets_of(of_part)[part[order]]
            before.append(found)
            totals.append(total)
            ordinals.append(number)
            numbers.append(of_part)
        largest, most_cells = (prod([int(of_dim.max()) for of_dim in dims]) for dims in (totals, numbers))
        return cls(before, totals, ordinals, numbers, largest, most_cells)

    def place(self, rows: np.ndarray, lengths: Sequence[np.ndarray], parts: np.ndarray) -> np.ndarray:
        """Elements of its tile before each cell (rows: its place in each dim; parts: of its tile)."""
        found = np.zeros(len(rows), np.int64)
        for dim, (before, totals) in enumerate(zip(self.before, self.totals, strict=True)):
            # Cells before this one in this dim, in all of the later dims; then go on within its own row.
            found = found * totals[parts[:, dim]]
            inner = np.ones(len(rows), np.int64)
            for earlier in range(dim):
                inner = inner * lengths[earlier][rows[:, earlier]]
            found += inner * before[rows[:, dim]]
        return found

    def numbers(self, rows: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Which of the cells of its tile each is (rows: its place in each dim; parts: of its tile)."""
        found = np.zeros(len(rows), np.int64)
        for dim, (ordinals, counts) in enumerate(zip(self.ordinals, self.counts, strict=True)):
            found = found * counts[parts[:, dim]] + ordinals[rows[:, dim]]
        return found

    def sizes(self, parts: np.ndarray) -> np.ndarray:
        """Elements of tiles, given their parts."""
        found = np.ones(len(parts), np.int64)
        for dim, totals in enumerate(self.totals):
            found *= totals[parts[:, dim]]
        return found


class Pieces(NamedTuple):
    """Columns, a row for each piece.

    Attributes:
        senders: rank of each.
        tiles: the destination tile it is part of.
        cells: which of the rows of cells each is of.
        copies: for which replica it is, where each replica is sent one of its own.
        parts: of the line in which its cell lies, the number of its part.
        shares: which of its sender's shares it is in; no two pieces of one tile from one sender are of the same.
        places: elements of the destination tile before the middle of the piece, were it cut as the cells are.
        regions: one product of intervals each.
    """

    senders: np.ndarray
    tiles: np.ndarray
    cells: np.ndarray
    copies: np.ndarray
    parts: np.ndarray
    shares: np.ndarray
    places: np.ndarray
    regions: Groups


class Cutting:
    """The cells of two product layouts, and how their holders share them.

    A cell is given by its place in each dim: a row of an array (cells, dims).

    Args:
        cells: of each dim.
        source, destination: the grids.
        alone: whether holders share each cell by itself, and not all cells of their tile as one line: so it must be
            where some cells have holders beside those who need them, and no line is as long as its tile.
        units: (tiles, holders), what each holder sends if NICs are level; None if all send the same.
    """

    def __init__(
        self, cells: Sequence[Cells], source: Grid, destination: Grid, alone: bool, units: np.ndarray | None = None
    ) -> None:
        self.cells, self.source, self.destination, self.alone = cells, source, destination, alone
        self.units = units
        self.lengths = [dim.intervals.lengths for dim in cells]
        self.held = [dim.held.classes for dim in cells]
        self.needed = [dim.needed.classes for dim in cells]
        self.source_line = Line.of(self.lengths, self.held, source.parts)
        self.destination_line = Line.of(self.lengths, self.needed, destination.parts)
        self.largest_cell = prod([int(lengths.max()) for lengths in self.lengths])

    @property
    def every(self) -> np.ndarray:
        """All cells."""
        return _combined([np.arange(len(lengths)) for lengths in self.lengths])

    def held_in(self, tile: int) -> np.ndarray:
        """The cells of a source tile."""
        parts = zip(self.held, self.source.parts_of(tile), strict=True)
        return _combined([np.flatnonzero(of_dim == part) for of_dim, part in parts])

    def needed_in(self, tile: int) -> np.ndarray:
        """The cells of a destination tile."""
        parts = zip(self.needed, self.destination.parts_of(tile), strict=True)
        return _combined([np.flatnonzero(of_dim == part) for of_dim, part in parts])

    def tiles_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source tile and the destination tile of each cell."""
        held, needed = _columns(self.held, rows), _columns(self.needed, rows)
        return (
            np.ravel_multi_index(tuple(held.T), self.source.parts),
            np.ravel_multi_index(tuple(needed.T), self.destination.parts),
        )

    def numel(self, rows: np.ndarray) -> np.ndarray:
        """Elements of each cell."""
        return _product(self.lengths, rows)

    def destination_places(self, rows: np.ndarray) -> np.ndarray:
        """Elements of its destination tile before each cell, were the tile cut as the cells are."""
        return self.destination_line.place(rows, self.lengths, _columns(self.needed, rows))

    def whole(self, rows: np.ndarray) -> Groups:
        """Cells as regions."""
        return Groups(Regions(tuple(cells.intervals for cells in self.cells), rows), np.arange(len(rows) + 1))

    def sizes_of(self, tiles: np.ndarray) -> np.ndarray:
        """Elements of destination tiles."""
        return self.destination_line.sizes(np.stack(np.unravel_index(tiles, self.destination.parts), -1))

    def pieces(self, copies: int, sharing: Sharing, rank: int | None, allotment: Allotment | None = None) -> Pieces:
        """What is sent.

        Args:
            copies: 1 if each piece is sent once, or as many as a tile has replicas.
            sharing: of the line of a tile's cells; where it leaves cells whole, holders may send more than others; so
                may they by turns, but as many messages.
            rank: only what this rank sends or, in its own tile, receives; None is everything.
            allotment: where cells are allotted, what each holder sends of them.
        """
        if rank is None:
            return self.shared(self.every, copies, sharing, allotment=allotment)
        held, needed = self.source.find(rank), self.destination.find(rank)
        if held is not None:
            return self.shared(self.held_in(held[0]), copies, sharing, holder=held[1], allotment=allotment)
        assert needed is not None
        copy = needed[1] if copies > 1 else None
        return self.shared(self.needed_in(needed[0]), copies, sharing, copy=copy, allotment=allotment)

    def shared(
        self,
        rows: np.ndarray,
        copies: int,
        sharing: Sharing,
        holder: int | None = None,
        copy: int | None = None,
        allotment: Allotment | None = None,
    ) -> Pieces:
        """The pieces of some cells, of one holder and for one copy if they are given; see ``pieces``."""
        copy_of = np.zeros(len(rows), np.int64) if copy is None else np.full(len(rows), copy)
        if copies > 1 and copy is None:
            copy_of = np.tile(np.arange(copies), len(rows))
            rows = rows.repeat(copies, 0)
        if allotment is not None:
            row, number, places, regions = self.allotted(rows, copy_of, allotment, holder)
            sources, tiles = self.tiles_of(rows[row])
            senders = self.source.ranks[sources, number]
            return Pieces(senders, tiles, row, copy_of[row], number, np.zeros_like(row), places, regions)
        size = self.numel(rows)
        begin, total = self._lines(rows, size, copies, copy_of)
        holders = self.source.replicas
        sources, tiles = self.tiles_of(rows)
        turns = sources + tiles if self.alone else sources
        ends = Ends.of(self.units, sharing) if sharing.is_by_nic and self.units is not None else None
        count = np.full(len(rows), sharing.parts) if ends is None else ends.units[sources]
        if sharing.shares > 0:
            sliver = total * (count // sharing.parts) // SLIVERS
            first = np.minimum((begin * count + sliver) // total, count - 1)  # a sliver at the end has none behind it
            last = np.maximum(((begin + size) * count - 1 - sliver) // total, first)
            if ends is not None:
                first, last = ends.find(sources, first), ends.find(sources, last)
        elif sharing.shares == BY_TURNS:
            first = last = turns_of(self.numbers_held(rows) * copies + copy_of, count) % count
        else:
            first = (2 * begin + size) * count // (2 * total)
            if self.alone:
                first = (first + self._ordinals(rows)) % count
            last = first
        low, high = first, last
        if holder is not None:
            least, most = sharing.of_holder(holder, turns, holders)
            low, high = np.maximum(first, least), np.minimum(last, most)
        counts = np.maximum(high - low + 1, 0)
        row = np.arange(len(rows)).repeat(counts)
        share = np.arange(len(row)) - (offsets_of(counts)[:-1] - low).repeat(counts)
        start, stop = (share, share + 1) if ends is None else ends.spans(sources[row], share)
        parts = Parts(share, first[row], last[row], start, stop, count[row], begin[row], total[row])
        kept, places, regions = self.cut(rows[row], parts)
        row, share = row[kept], share[kept]
        senders = self.source.ranks[sources[row], sharing.holders(share, turns[row], holders)]
        return Pieces(senders, tiles[row], row, copy_of[row], share, share % sharing.each, places, regions)

    def allotted(
        self, rows: np.ndarray, copies: np.ndarray, allotment: Allotment, holder: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Groups]:
        """The parts of some cells for some replicas, of one holder if it is given: (which of the rows each is of, its
        holder, its place as in ``Pieces``, its region).
        """
        row, number, start, stop = allotment.parts(rows, copies)
        if holder is not None:
            own = number == holder
            row, number, start, stop = row[own], number[own], start[own], stop[own]
        kept, places, regions = self.cut(rows[row], Parts.between(start, stop, self.numel(rows[row])))
        return row[kept], number[kept], places, regions

    def _lines(
        self, rows: np.ndarray, size: np.ndarray, copies: int, copy_of: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each cell begins in the line that its holders share, and how long that line is."""
        if self.alone:
            return copy_of * size, copies * size
        held = _columns(self.held, rows)
        tile_size = self.source_line.sizes(held)
        return copy_of * tile_size + self.source_line.place(rows, self.lengths, held), copies * tile_size

    def _ordinals(self, rows: np.ndarray) -> np.ndarray:
        """Numbers by which cells of one source tile take turns."""
        found = np.zeros(len(rows), np.int64)
        for dim, ordinals in enumerate(self.source_line.ordinals):
            found += ordinals[rows[:, dim]]
        return found

    def numbers_held(self, rows: np.ndarray) -> np.ndarray:
        """Which of the cells of its source tile each is, the last dim fastest."""
        return self.source_line.numbers(rows, _columns(self.held, rows))

    def numbers_needed(self, rows: np.ndarray) -> np.ndarray:
        """Which of the cells of its destination tile each is, the last dim fastest."""
        return self.destination_line.numbers(rows, _columns(self.needed, rows))

    def cut(self, rows: np.ndarray, parts: "Parts") -> tuple[np.ndarray, np.ndarray, Groups]:
        """Cut cells where parts end.

        Args:
            rows: the cell of each part.
            parts: what of it.

        Returns:
            Which parts are not empty; of those, how many elements of their destination tile are before their middle,
            were the tile cut as the cells are; and their regions.
        """
        extents = np.column_stack([length[rows[:, at]] for at, length in enumerate(self.lengths)])
        wide = extents >= WIDE
        dim = np.where(wide.any(1), wide.argmax(1), extents.argmax(1))
        extent = extents[np.arange(len(rows)), dim]
        low, high = parts.span(extents.prod(1), extent)
        kept = np.flatnonzero(low < high)
        rows, dim, low, high, extent = rows[kept], dim[kept], low[kept], high[kept], extent[kept]
        places = self.destination_places(rows)
        places += _product(self.lengths, rows) * (low + high) // (2 * extent)
        lists, columns = [], []
        for at, cells in enumerate(self.cells):
            found, column = cut_lists(cells.intervals, rows[:, at], (dim == at) & (high - low < extent), low, high)
            lists.append(found)
            columns.append(column)
        regions = Regions(tuple(lists), np.column_stack(columns))
        return kept, places, Groups(regions, np.arange(len(rows) + 1))


class Parts(NamedTuple):
    """Parts of cells, as columns. A cell lies in a line that is cut into parts of some units.

    Attributes:
        share: which part of the line.
        first, last: the first and the last part that have elements of the cell.
        start, stop: the first unit of the part, and the one behind its last.
        units: of the line.
        begin: elements of the line before the cell.
        total: elements of the line.
    """

    share: np.ndarray
    first: np.ndarray
    last: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    units: np.ndarray
    begin: np.ndarray
    total: np.ndarray

    @classmethod
    def even(cls, share: np.ndarray, parts: np.ndarray, size: np.ndarray) -> "Parts":
        """Of cells that are a line each, which is cut evenly."""
        zeros = np.zeros_like(share)
        return cls(share, zeros, parts - 1, share, share + 1, parts, zeros, size)

    @classmethod
    def between(cls, start: np.ndarray, stop: np.ndarray, size: np.ndarray) -> "Parts":
        """Of cells that are a line each, from where to where in UNITS of it."""
        zeros = np.zeros_like(start)
        return cls(zeros - 1, zeros, zeros, start, stop, zeros + UNITS, zeros, size)

    def span(self, size: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(from, to): which coordinates of its cell each part has along a dim of some extents."""

        def cut(unit: np.ndarray) -> np.ndarray:
            part = (unit * self.total - self.begin * self.units) / (self.units * size)  # in [0, 1], of exact integers
            found: np.ndarray = np.rint(part * extent).astype(np.int64)
            return found

        low = np.where(self.share == self.first, 0, cut(self.start))
        return low, np.where(self.share == self.last, extent, cut(self.stop))


def cut_lists(
    lists: IntervalLists, rows: np.ndarray, cut: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[IntervalLists, np.ndarray]:
    """Some lists, of which those that are cut keep the coordinates from ``low`` to ``high`` only.

    Returns:
        Lists, and which of them each row is. A list that is cut stands behind all others, each time it is cut.
    """
    at = np.flatnonzero(cut)
    if not len(at):
        return lists, rows
    groups = rows[at]
    spans = spread(lists.offsets, groups)
    counts = counts_of(lists.offsets)[groups]
    starts, stops = lists.starts[spans], lists.stops[spans]
    ends = np.cumsum(stops - starts)
    begins = ends - (stops - starts)
    firsts = offsets_of(counts)[:-1]
    position = begins - begins[firsts].repeat(counts)
    new_starts = np.maximum(starts, starts + low[at].repeat(counts) - position)
    new_stops = np.minimum(stops, starts + high[at].repeat(counts) - position)
    some = new_starts < new_stops
    kept = np.add.reduceat(some, firsts).astype(np.int64)
    offsets = np.concatenate([lists.offsets, lists.offsets[-1] + np.cumsum(kept)])
    found = IntervalLists(
        np.concatenate([lists.starts, new_starts[some]]), np.concatenate([lists.stops, new_stops[some]]), offsets
    )
    column = rows.copy()
    column[at] = len(lists) + np.arange(len(at))
    return found, column


def _combined(chosen: Sequence[np.ndarray]) -> np.ndarray:
    """Every combination of cells of each dim, a row each."""
    return np.stack(np.meshgrid(*chosen, indexing="ij"), -1).reshape(-1, len(chosen))


def _columns(classes: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    return np.column_stack([of_dim[rows[:, dim]] for dim, of_dim in enumerate(classes)])


def _product(lengths: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    found = np.ones(len(rows), np.int64)
    for dim, of_dim in enumerate(lengths):
        found *= of_dim[rows[:, dim]]
    return found
