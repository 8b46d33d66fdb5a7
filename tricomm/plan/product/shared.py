"""Hosts with ranks of both meshes: what is there stays there, and goes on from there."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, offsets_of
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.grid import Rings
from tricomm.plan.product.pieces import Cutting, Parts
from tricomm.plan.product.rings import Visits
from tricomm.plan.product.sharing import Allotment, Sharing, turns_of
from tricomm.plan.routes.chunks import PairColumns


class Arcs(NamedTuple):
    """Stretches of the rings of cells, as columns: behind a host that has holders of the cell up to the next one.

    Attributes:
        cell: a row of those that were asked about.
        source, tile: its source tile and its destination tile.
        place: the host, as the tile's ring counts it.
        spans: hosts behind it that have no holders.
        holding: the host, as the source tile's ring counts it.
        holders: holders there.
    """

    cell: np.ndarray
    source: np.ndarray
    tile: np.ndarray
    place: np.ndarray
    spans: np.ndarray
    holding: np.ndarray
    holders: np.ndarray

    def take(self, rows: np.ndarray) -> "Arcs":
        """Some of them."""
        return Arcs(*(column[rows] for column in self))


def arcs_of(source: np.ndarray, tile: np.ndarray, holders: Rings, rings: Rings) -> Arcs:
    """The arcs of cells, given their source tiles and their destination tiles.

    Args:
        source, tile: (cells,).
        holders: the ranks of each source tile, by host.
        rings: those of each destination tile.
    """
    if holders.most_hosts <= rings.most_hosts:
        found = _found(rings, tile, holders.host_numbers[source])
        cell, holding = np.nonzero(found >= 0)
        place = found[cell, holding]
        order = np.lexsort((place, cell))
        cell, place, holding = cell[order], place[order], holding[order]
    else:
        found = _found(holders, source, rings.host_numbers[tile])
        cell, place = np.nonzero(found >= 0)
        holding = found[cell, place]
    first = offsets_of(np.bincount(cell, minlength=len(source)))[:-1]
    last = np.ones(len(cell), bool)
    last[:-1] = cell[1:] != cell[:-1]
    following = np.where(last, place[first[cell]] + rings.hosts[tile[cell]], np.append(place, 0)[1:])
    return Arcs(
        cell,
        source[cell],
        tile[cell],
        place,
        following - place - 1,
        holding,
        holders.count(source[cell], holding),
    )


def _found(rings: Rings, tiles: np.ndarray, hosts: np.ndarray) -> np.ndarray:
    """Which of its tile's hosts each of a row of hosts is; -1 where it has no replicas."""
    return rings.find(tiles.repeat(hosts.shape[1]), hosts.reshape(-1)).reshape(hosts.shape)


class SharedHosts:
    """What is sent between meshes that share hosts.

    A rank that needs a cell and has a holder of it on its host gets it there. The hosts of the ring between two that
    have holders get it from all holders alike. Cells without such a host are sent as between other meshes.

    Args:
        cutting: the cells, each a line of its own.
        holders: the ranks of each source tile, by host.
        rings: those of each destination tile.
        hosts: of ranks, the topology's numbers.
    """

    def __init__(self, cutting: Cutting, holders: Rings, rings: Rings, hosts: np.ndarray) -> None:
        self.cutting, self.holders, self.rings, self.hosts = cutting, holders, rings, hosts
        self._of_tile: dict[int, tuple[np.ndarray, np.ndarray, Arcs, np.ndarray]] = {}
        self._tile_of = np.full(len(hosts), -1)
        self._tile_of[cutting.source.ranks] = np.arange(len(cutting.source.ranks))[:, None]
        self._copy_of = np.full(len(hosts), -1)
        self._copy_of[cutting.destination.ranks] = np.arange(rings.replicas)

    @cached_property
    def entry(self) -> np.ndarray:
        """See ``entries_aside``."""
        return entries_aside(self.rings, np.unique(self.hosts[self.cutting.source.ranks]))

    def visits(self, sharing: Sharing, rank: int | None, skewed: bool = False, aside: bool = False) -> Visits:
        """What is sent if replicas hand it on.

        Args:
            sharing: of each cell.
            rank: only what this rank has part in; None is everything.
            skewed: whether pieces of the next turn enter a host later; see ``Visits``.
            aside: whether cells without holders on a tile's hosts come last to those that have holders of others.
        """
        entry = self.entry if aside else None
        found: list[Visits] = []
        for rows, holder in self._rows(rank):
            arcs, free = self.arcs(rows)
            cells = rows[free]
            pieces = self.cutting.shared(cells, 1, sharing, holder)
            about = Visits.round_about(
                pieces, self.cutting.sizes_of(pieces.tiles), self.rings, skewed=skewed, entry=entry
            )
            found += [
                about._replace(turns=self.turns(cells[pieces.cells], pieces.parts, sharing)),
                self._onward(rows, arcs.take(np.flatnonzero(arcs.spans > 0)), sharing, skewed),
                self._beside(rows, arcs),
            ]
        joined = Visits.joined(found)
        return joined if rank is None else joined.take(self._with(joined, rank))

    def pairs(
        self,
        sharing: Sharing,
        rank: int | None,
        parts_of: Callable[[Groups], PartGroups],
        allotment: Allotment | None = None,
    ) -> PairColumns:
        """What is sent if each replica hears from a holder; at most one row for each pair of ranks.

        Args:
            sharing: of each cell, with one share a sender at most.
            rank: only what this rank has part in; None is everything.
            parts_of: says of which stack regions are.
            allotment: see ``Cutting.pieces``.
        """
        senders: list[np.ndarray] = []
        receivers: list[np.ndarray] = []
        regions: list[Groups] = []
        for rows, holder in self._rows(rank):
            arcs, free = self.arcs(rows)
            # Of what it needs, a rank looks at its own replica only.
            own = None if rank is None or holder is not None else self.cutting.destination.find(rank)
            copy = None if own is None or self.rings.replicas == 1 else own[1]
            found = self.cutting.shared(rows[free], self.rings.replicas, sharing, holder, copy, allotment)
            near, to, pieces = self._from_arcs(rows, arcs, None if own is None else rank, allotment)
            senders += [found.senders, near]
            receivers += [self.cutting.destination.ranks[found.tiles, found.copies], to]
            regions += [found.regions, pieces]
        sender, receiver = np.concatenate(senders), np.concatenate(receivers)
        order = np.lexsort((receiver, sender))
        if rank is not None:
            order = order[(sender[order] == rank) | (receiver[order] == rank)]
        return PairColumns(sender[order], receiver[order], parts_of(Groups.joined(regions).take(order)))

    def _rows(self, rank: int | None) -> list[tuple[np.ndarray, int | None]]:
        """The cells that a rank holds, with its number among their holders, and the others that it needs."""
        cutting = self.cutting
        if rank is None:
            return [(cutting.every, None)]
        held, needed = cutting.source.find(rank), cutting.destination.find(rank)
        found: list[tuple[np.ndarray, int | None]] = []
        if held is not None:
            found.append((cutting.held_in(held[0]), held[1]))
        if needed is not None:
            rows = cutting.needed_in(needed[0])
            found.append((rows if held is None else rows[cutting.tiles_of(rows)[0] != held[0]], None))
        return found

    def of_tile(self, tile: int) -> tuple[np.ndarray, np.ndarray, Arcs, np.ndarray]:
        """(cells, elements of each, their arcs, which have none) of a destination tile, worked out once."""
        if tile not in self._of_tile:
            rows = self.cutting.needed_in(tile)
            self._of_tile[tile] = rows, self.cutting.numel(rows), *self.arcs(rows)
        return self._of_tile[tile]

    def arcs(self, rows: np.ndarray) -> tuple[Arcs, np.ndarray]:
        """The arcs of some cells, and which cells have none."""
        arcs = arcs_of(*self.cutting.tiles_of(rows), self.holders, self.rings)
        free = np.ones(len(rows), bool)
        free[arcs.cell] = False
        return arcs, np.flatnonzero(free)

    def _onward(self, rows: np.ndarray, arcs: Arcs, sharing: Sharing, skewed: bool) -> Visits:
        """What goes on to the hosts of arcs."""
        arc, part, count = self.parts(arcs, sharing)
        cells = rows[arcs.cell[arc]]
        offsets = self.offsets(arcs.take(arc), cells, part, count, skewed)
        kept, _, regions = self.cutting.cut(cells, Parts.even(part, count, self.cutting.numel(cells)))
        part, chosen = part[kept], arcs.take(arc[kept])
        hosts = self.rings.hosts[chosen.tile]
        zeros = np.zeros_like(part)
        return Visits(
            self.senders(chosen, part, sharing),
            chosen.tile,
            part % sharing.each,
            (chosen.place + 1) % hosts,
            chosen.spans,
            offsets[kept],
            self.turns(cells[kept], part, sharing),
            zeros - 1,
            regions,
        )

    def parts(self, arcs: Arcs, sharing: Sharing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(arc, number of the part, how many parts its cell has) of what goes on from arcs; see ``visits``."""
        count = np.full(len(arcs.cell), 1 if sharing.shares <= 0 else sharing.parts)
        arc, part = _numbered(count)
        return arc, part, count[arc]

    def turns(self, cells: np.ndarray, part: np.ndarray, sharing: Sharing) -> np.ndarray:
        """Which replica of a host parts of cells enter at: level for neighbouring cells of a tile, and for those as far
        apart as a host has replicas.
        """
        number = self.cutting.numbers_needed(cells)
        count = 1 if sharing.shares <= 0 else sharing.parts
        turns: np.ndarray = part + turns_of(number * count, self.rings.of_host)
        return turns

    def senders(self, arcs: Arcs, part: np.ndarray, sharing: Sharing) -> np.ndarray:
        """The holders that send parts of cells to arcs."""
        holders = self.holders.replicas
        if sharing.senders == holders:
            return self.holder(arcs, part // sharing.each)
        # As for cells without arcs, so that few senders are others for other tiles.
        number = sharing.holders(part, arcs.source + arcs.tile + arcs.place, holders)
        ranks: np.ndarray = self.cutting.source.ranks[arcs.source, number]
        return ranks

    def holder(self, arcs: Arcs, number: np.ndarray) -> np.ndarray:
        """The holders that send to arcs, counted from those on the host before each."""
        first = self.holders.firsts[arcs.source, arcs.holding] + taking_turns(arcs) % arcs.holders
        ranks: np.ndarray = self.holders.ranks[arcs.source, (first + number) % self.holders.replicas]
        return ranks

    def offsets(
        self, arcs: Arcs, cells: np.ndarray, part: np.ndarray, count: np.ndarray, skewed: bool = False
    ) -> np.ndarray:
        """Where parts of cells enter the hosts of arcs, counted from the first: level for the parts of a cell, and for
        cells by where they lie in the tile.
        """
        sizes = self.cutting.sizes_of(arcs.tile)
        middles = self.cutting.destination_places(cells) + self.cutting.numel(cells) // 2
        turn = middles * self.rings.of_host * count + part * sizes
        entries: np.ndarray = turn % (sizes * count) * arcs.spans // (sizes * count) + self.rings.number[arcs.tile]
        if skewed:
            entries += turn // (sizes * count)
        entries %= arcs.spans
        return entries

    def _beside(self, rows: np.ndarray, arcs: Arcs) -> Visits:
        """What ranks get from holders on their host."""
        arc, turn = _numbered(self.rings.count(arcs.tile, arcs.place))
        chosen = arcs.take(arc)
        lacks = np.flatnonzero(self._tile_of[self.rings.at(chosen.tile, chosen.place, turn)] != chosen.source)
        chosen, turn = chosen.take(lacks), turn[lacks]
        regions = self.cutting.whole(rows[chosen.cell])
        senders = self.holders.at(chosen.source, chosen.holding, taking_turns(chosen) + turn)
        zeros = np.zeros_like(turn)
        return Visits(senders, chosen.tile, zeros, chosen.place, zeros + 1, zeros, turn, turn, regions)

    def _from_arcs(
        self, rows: np.ndarray, arcs: Arcs, receiver: int | None, allotment: Allotment | None
    ) -> tuple[np.ndarray, np.ndarray, Groups]:
        """(senders, receivers, regions) of what ranks on the hosts of arcs, or one of them, get from holders."""
        rings = self.rings
        begin = rings.before(arcs.tile, arcs.place)
        count = rings.before(arcs.tile, arcs.place + arcs.spans + 1) - begin
        if receiver is None:
            arc, ahead = _numbered(count)
        else:
            ahead = (self._place_of(receiver) - begin) % rings.replicas
            arc = np.flatnonzero(ahead < count)
            ahead = ahead[arc]
        chosen = arcs.take(arc)
        receivers = rings.ranks[chosen.tile, (begin[arc] + ahead) % rings.replicas]
        lacks = np.flatnonzero(self._tile_of[receivers] != chosen.source)
        chosen, receivers, ahead = chosen.take(lacks), receivers[lacks], ahead[lacks]
        if allotment is not None:
            cells, copies = rows[chosen.cell], self._copy_of[receivers]
            part, number, _, regions = self.cutting.allotted(cells, copies, allotment)
            return self.cutting.source.ranks[chosen.source[part], number], receivers[part], regions
        # Those on the host where an arc begins hear from there.
        here = self.rings.count(chosen.tile, chosen.place)
        beside = self.holders.at(chosen.source, chosen.holding, taking_turns(chosen) + ahead)
        senders = np.where(ahead < here, beside, self.holder(chosen, ahead - here))
        return senders, receivers, self.cutting.whole(rows[chosen.cell])

    def _place_of(self, rank: int) -> int:
        """Which replica of its tile's ring a rank is."""
        return int(np.argwhere(self.rings.ranks == rank)[0, 1])

    def _with(self, visits: Visits, rank: int) -> np.ndarray:
        """Those that a rank sends or hears."""
        heard = np.zeros(len(visits.tiles), bool)
        needed = self.cutting.destination.find(rank)
        if needed is not None:
            tile = needed[0]
            replica = int(np.argmax(self.rings.ranks[tile] == rank))
            place = int(self.rings.place[tile, replica])
            far = (place - visits.begins) % int(self.rings.hosts[tile])
            is_it = self.rings.at(visits.tiles, visits.begins, visits.turns) == rank
            heard = (visits.tiles == tile) & (far < visits.spans) & ((visits.only < 0) | is_it)
        return np.flatnonzero(heard | (visits.senders == rank))


def entries_aside(rings: Rings, holding: np.ndarray) -> np.ndarray:
    """Behind which of a tile's hosts the longest stretch without holders begins, (tiles,); -1 where all have some, or
    none has. What enters there comes last to hosts that have holders, and those do not hand it on.

    Args:
        rings: of the tiles.
        holding: hosts with holders of any tile, the topology's numbers.
    """
    found = np.full(len(rings.ranks), -1)
    for tile, count in enumerate(rings.hosts.tolist()):
        busy = np.isin(rings.host_numbers[tile, :count], holding)
        if busy.any() and not busy.all():
            at = np.flatnonzero(busy)
            idle = np.diff(np.append(at, at[0] + count)) - 1
            found[tile] = (at[idle.argmax()] + 1) % count
    return found


def taking_turns(arcs: Arcs) -> np.ndarray:
    """A number by which the holders of a source tile on a host take turns."""
    return turns_of(arcs.tile, arcs.holders)


def _numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows so often as counts say: (which, the how many-th of it)."""
    row = np.arange(len(counts)).repeat(counts)
    return row, np.arange(len(row)) - offsets_of(counts)[row]
