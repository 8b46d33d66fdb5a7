"""Pieces: what each holder of a source tile sends of it, as columns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, IntervalLists, Regions, counts_of, offsets_of, spread
from tricomm.plan.product.grid import Grid
from tricomm.plan.refine import Cells

WIDE = 64
"""A dim of so many coordinates is fine enough to be cut where shares end."""


class Line(NamedTuple):
    """The cells of each tile one after the other, the last dim fastest: where a cell begins follows from its place in
    each dim.

    Attributes:
        before: per dim and cell, coordinates of the cells before it in the same part.
        totals: per dim and part, coordinates of all its cells.
    """

    before: list[np.ndarray]
    totals: list[np.ndarray]

    @classmethod
    def of(cls, lengths: Sequence[np.ndarray], parts: Sequence[np.ndarray], counts: Sequence[int]) -> "Line":
        """From the coordinates and the part of each cell, dim by dim."""
        before, totals = [], []
        for extent, part, count in zip(lengths, parts, counts, strict=True):
            order = part.argsort(kind="stable")
            total = np.zeros(count, np.int64)
            np.add.at(total, part, extent)
            ends = offsets_of(extent[order])[:-1]
            found = np.empty(len(part), np.int64)
            found[order] = ends - offsets_of(total)[part[order]]
            before.append(found)
            totals.append(total)
        return cls(before, totals)

    @property
    def largest(self) -> int:
        """Elements of the largest tile."""
        return int(np.prod([totals.max() for totals in self.totals]))

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

    def sizes(self, parts: np.ndarray) -> np.ndarray:
        """Elements of tiles, given their parts."""
        found = np.ones(len(parts), np.int64)
        for dim, totals in enumerate(self.totals):
            found *= totals[parts[:, dim]]
        return found


class Pieces(NamedTuple):
    """Columns, a row for each piece.

    Attributes:
        senders: ranks.
        tiles: of the destination.
        copies: which replica of the tile the piece is for; 0 where all share it.
        shares: which of its sender's shares each piece is of; no two of one tile from one sender are of the same.
        places: elements of the destination tile before the middle of the piece, were it cut as the cells are.
        regions: one product of intervals each.
    """

    senders: np.ndarray
    tiles: np.ndarray
    copies: np.ndarray
    shares: np.ndarray
    places: np.ndarray
    regions: Groups


class Cutting:
    """The cells of two product layouts, and how their holders share them.

    Args:
        cells: of each dim.
        source, destination: the grids.
    """

    def __init__(self, cells: Sequence[Cells], source: Grid, destination: Grid) -> None:
        self.cells, self.source, self.destination = cells, source, destination
        self.lengths = [dim.intervals.lengths for dim in cells]
        self.held = [dim.held.classes for dim in cells]
        self.needed = [dim.needed.classes for dim in cells]
        self.source_line = Line.of(self.lengths, self.held, source.parts)
        self.destination_line = Line.of(self.lengths, self.needed, destination.parts)

    def pieces(self, copies: int, shares: int, rank: int | None) -> Pieces:
        """What is sent.

        Args:
            copies: 1 if each piece is sent once, or as many as a tile has replicas.
            shares: how many each holder has of the line of a tile's cells; 0 leaves cells whole, and holders may then
                send more than others.
            rank: only what this rank sends or, in its own tile, receives; None is everything.
        """
        if rank is None:
            everything = [np.arange(len(lengths)) for lengths in self.lengths]
            return self._shared(everything, copies, shares, None, None)
        held, needed = self.source.find(rank), self.destination.find(rank)
        if held is not None:
            tile = self.source.parts_of(held[0])
            chosen = [np.flatnonzero(of_dim == part) for of_dim, part in zip(self.held, tile, strict=True)]
            return self._shared(chosen, copies, shares, held[1], None)
        assert needed is not None
        tile = self.destination.parts_of(needed[0])
        chosen = [np.flatnonzero(of_dim == part) for of_dim, part in zip(self.needed, tile, strict=True)]
        return self._shared(chosen, copies, shares, None, needed[1] if copies > 1 else None)

    def _shared(
        self, chosen: list[np.ndarray], copies: int, shares: int, holder: int | None, copy: int | None
    ) -> Pieces:
        """The pieces of every combination of chosen cells, of one holder and for one copy if they are given."""
        rows = np.stack(np.meshgrid(*chosen, indexing="ij"), -1).reshape(-1, len(chosen))
        copy_of = np.zeros(len(rows), np.int64) if copy is None else np.full(len(rows), copy)
        if copies > 1 and copy is None:
            copy_of = np.tile(np.arange(copies), len(rows))
            rows = rows.repeat(copies, 0)
        held = _columns(self.held, rows)
        size = _product(self.lengths, rows)
        tile_size = self.source_line.sizes(held)
        begin = copy_of * tile_size + self.source_line.place(rows, self.lengths, held)
        total = copies * tile_size
        count = self.source.replicas * max(shares, 1)
        if shares:
            first, last = begin * count // total, ((begin + size) * count - 1) // total
        else:
            first = last = (2 * begin + size) * count // (2 * total)
        if holder is None:
            low, high = first, last
        else:
            low = np.maximum(first, holder * max(shares, 1))
            high = np.minimum(last, (holder + 1) * max(shares, 1) - 1)
        counts = np.maximum(high - low + 1, 0)
        row = np.arange(len(rows)).repeat(counts)
        share = np.arange(len(row)) - (offsets_of(counts)[:-1] - low).repeat(counts)
        dim, start, stop = self._cuts(rows[row], size[row], begin[row], total[row], count, share, first[row], last[row])
        kept = start < stop
        row, share, dim, start, stop = row[kept], share[kept], dim[kept], start[kept], stop[kept]
        return self._of_shares(rows[row], copy_of[row], max(shares, 1), share, dim, start, stop)

    def _cuts(
        self,
        rows: np.ndarray,
        size: np.ndarray,
        begin: np.ndarray,
        total: np.ndarray,
        count: int,
        share: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(dim, from, to): which coordinates of a cell a share takes, cut along one dim where the share ends."""
        extents = np.column_stack([length[rows[:, at]] for at, length in enumerate(self.lengths)])
        wide = extents >= WIDE
        dim = np.where(wide.any(1), wide.argmax(1), extents.argmax(1))
        extent = extents[np.arange(len(rows)), dim]

        def cut(point: np.ndarray) -> np.ndarray:
            part = (point * total - begin * count) / (count * size)  # in [0, 1]; exact integers but for the division
            found: np.ndarray = np.rint(part * extent).astype(np.int64)
            return found

        return dim, np.where(share == first, 0, cut(share)), np.where(share == last, extent, cut(share + 1))

    def _of_shares(
        self,
        rows: np.ndarray,
        copies: np.ndarray,
        shares: int,
        share: np.ndarray,
        dim: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
    ) -> Pieces:
        held, needed = _columns(self.held, rows), _columns(self.needed, rows)
        sources = np.ravel_multi_index(tuple(held.T), self.source.parts)
        tiles = np.ravel_multi_index(tuple(needed.T), self.destination.parts)
        extent = np.column_stack([length[rows[:, at]] for at, length in enumerate(self.lengths)])[
            np.arange(len(rows)), dim
        ]
        places = self.destination_line.place(rows, self.lengths, needed)
        places += _product(self.lengths, rows) * (low + high) // (2 * extent)
        lists, columns = [], []
        for at, cells in enumerate(self.cells):
            cut = (dim == at) & (high - low < extent)
            found, column = cut_lists(cells.intervals, rows[:, at], cut, low, high)
            lists.append(found)
            columns.append(column)
        regions = Regions(tuple(lists), np.column_stack(columns))
        groups = Groups(regions, np.arange(len(rows) + 1))
        return Pieces(self.source.ranks[sources, share // shares], tiles, copies, share % shares, places, groups)


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


def _columns(classes: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    return np.column_stack([of_dim[rows[:, dim]] for dim, of_dim in enumerate(classes)])


def _product(lengths: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    found = np.ones(len(rows), np.int64)
    for dim, of_dim in enumerate(lengths):
        found *= of_dim[rows[:, dim]]
    return found
