"""Chains and trees over the replicas of a tile, as columns, and the rounds of their hops."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, offsets_of
from tricomm.layout.topology import Topology
from tricomm.plan.network.links import ChainLinks
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.grid import Rings
from tricomm.plan.product.pieces import Pieces
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND, MessageTable
from tricomm.plan.routes.cuts import Chunks
from tricomm.plan.routes.rounds import Hops, order_of_hops

STEP_STRIDE = 1 << 32
WITHIN_STEP_STRIDE = 1 << 16
"""Round numbers of one step, and of one kind of hop in it; what is below tells apart rounds that would otherwise have
too many messages."""


FROM_SENDER = -1
"""In the place of a number of children: the sender of a message gives it to every host by itself."""

BY_LOAD = -2
"""The same, but what comes from senders that would have more to post than others goes in chains."""

BESIDE = 2
"""Replicas to which one gives a message on its own host."""


class Visits(NamedTuple):
    """Which replicas each message visits, as columns: on a stretch of its tile's ring of hosts, round which it goes
    from somewhere within, all of them; or one replica.

    Attributes:
        senders: rank that each comes from.
        tiles: of each.
        shares: tells apart messages of one tile from one sender.
        begins: the first host of the stretch, as ``Rings`` counts them.
        spans: how many hosts it has.
        offsets: which of them, counted from the first, each enters first.
        turns: which replica on every host it enters at.
        only: -1; or, of a message to the one replica where it enters, a number that tells it from others of its tile.
        regions: one product of intervals each.
    """

    senders: np.ndarray
    tiles: np.ndarray
    shares: np.ndarray
    begins: np.ndarray
    spans: np.ndarray
    offsets: np.ndarray
    turns: np.ndarray
    only: np.ndarray
    regions: Groups

    @classmethod
    def round_about(
        cls,
        pieces: Pieces,
        tile_sizes: np.ndarray,
        rings: Rings,
        by_replica: bool = False,
        skewed: bool = False,
        entry: np.ndarray | None = None,
    ) -> "Visits":
        """Each piece visits all replicas of its tile.

        Where a piece lies in its tile says where it enters, so each replica has equally much to forward.

        Args:
            pieces: what visits.
            tile_sizes: elements of their tiles.
            rings: of the tiles.
            by_replica: whether as much enters at each replica, and not on each host, if hosts have unequally many.
            skewed: whether those of the next turn enter a host later, so that few pieces do not enter all on one host.
            entry: (tiles,), on which of its hosts all pieces of a tile enter; -1, or None for all, where they lie.
        """
        hosts, number = rings.hosts[pieces.tiles], rings.number[pieces.tiles]
        if by_replica:
            entries = pieces.places * rings.replicas // tile_sizes + number
            at = rings.entries[pieces.tiles, entries % rings.replicas]
            # Turns go round hosts of any number of replicas equally often.
            places, turns = rings.place[pieces.tiles, at], pieces.places * rings.round // tile_sizes + number
        else:
            entries = pieces.places * (hosts * rings.of_host) // tile_sizes + number
            turns = entries // hosts
            places = (entries + turns if skewed else entries) % hosts
        if entry is not None:
            places = np.where(entry[pieces.tiles] >= 0, entry[pieces.tiles], places)
        zeros = np.zeros_like(hosts)
        columns = (pieces.senders, pieces.tiles, pieces.shares, zeros, hosts, places, turns)
        return cls(*columns, zeros - 1, pieces.regions)

    @classmethod
    def joined(cls, parts: "Sequence[Visits]") -> "Visits":
        """All of some, whose regions are of the same dims."""
        columns = [np.concatenate(column) for column in zip(*(part[:-1] for part in parts), strict=True)]
        return cls._make([*columns, Groups.joined([part.regions for part in parts])])

    def take(self, rows: np.ndarray) -> "Visits":
        """Some of them."""
        return Visits._make([*(column[rows] for column in self[:-1]), self.regions.take(rows)])


class Hearers(NamedTuple):
    """Some replicas that hear messages, as columns.

    Attributes:
        message: which.
        host: on which of the hosts that it visits, counted from the first.
        turn: which of that host's replicas, counted from the one at which it enters.
    """

    message: np.ndarray
    host: np.ndarray
    turn: np.ndarray

    def take(self, rows: np.ndarray) -> "Hearers":
        """Some of them."""
        return Hearers(self.message[rows], self.host[rows], self.turn[rows])


class RingMessages(MessageTable):
    """Messages that visit replicas of a tile; ascending by tile, then by sender, then by share.

    The replica at which a message enters a host gives it to two others there, and each of those to two more; and to
    the entry of the host behind it in a chain, to those of two in a tree, to none where senders go to every host.

    Attributes:
        rings: of the tiles.
        visits: of each message.
        children: (messages,), hosts that a host gives a message to: 1 is a chain, 2 a tree; or FROM_SENDER.
        lengths: (messages,), replicas that each visits.
    """

    __slots__ = ("children", "lengths", "rings", "visits")

    def __init__(
        self, rings: Rings, visits: Visits, parts: PartGroups, children: np.ndarray, cut: Mapping[int, Chunks]
    ) -> None:
        super().__init__(visits.senders, parts, parts.nbytes, cut)
        self.rings, self.visits, self.children = rings, visits, children
        ends = (rings.before(visits.tiles, at) for at in (visits.begins, visits.begins + visits.spans))
        begin, end = ends
        self.lengths = np.where(visits.only >= 0, 1, end - begin)

    @classmethod
    def of(
        cls,
        visits: Visits,
        rings: Rings,
        children: np.ndarray,
        parts_of: Callable[[Groups], PartGroups],
        chunks_of: Callable[[PartGroups], Mapping[int, Chunks]],
    ) -> "RingMessages":
        """Sort visits, and cut them into chunks.

        Args:
            visits: in any order.
            rings: of the tiles.
            children: of the messages of each rank: 1, 2 or FROM_SENDER.
            parts_of: says of which stack regions are.
            chunks_of: cuts messages, given their parts.
        """
        visits = visits.take(np.lexsort((visits.only, visits.shares, visits.senders, visits.tiles)))
        parts = parts_of(visits.regions)
        return cls(rings, visits, parts, children[visits.senders], chunks_of(parts))

    @property
    def hearers(self) -> Hearers:
        """Every replica that hears every message, message after message."""
        message = np.arange(len(self)).repeat(self.lengths)
        ahead = np.arange(len(message)) - offsets_of(self.lengths)[message]
        visits, rings = self.visits, self.rings
        tiles, begins = visits.tiles[message], visits.begins[message]
        # From where it enters to the end of the stretch, and then from its beginning.
        entry = rings.before(tiles, begins + visits.offsets[message]) - rings.before(tiles, begins)
        at = (rings.before(tiles, begins) + (entry + ahead) % self.lengths[message]) % rings.replicas
        place = rings.place[tiles, at]
        host = ((place - begins) % rings.hosts[tiles] - visits.offsets[message]) % visits.spans[message]
        return Hearers(message, host, at - rings.firsts[tiles, place])

    def ends(self, hearers: Hearers) -> tuple[np.ndarray, np.ndarray]:
        """(who gives each, who hears it), ranks."""
        message, host, turn = hearers
        children = self.children[message]
        above = np.where(turn == 0, (host - 1) // np.maximum(children, 1), host)
        giver = self._at(message, np.maximum(above, 0), np.maximum(turn - 1, 0) // BESIDE)
        is_first = (turn == 0) & ((host == 0) | (children == FROM_SENDER))
        return np.where(is_first, self.visits.senders[message], giver), self._at(message, host, turn)

    def _at(self, message: np.ndarray, host: np.ndarray, turn: np.ndarray) -> np.ndarray:
        visits = self.visits
        tiles = visits.tiles[message]
        far = (visits.offsets[message] + host) % visits.spans[message]
        places = (visits.begins[message] + far) % self.rings.hosts[tiles]
        return self.rings.at(tiles, places, visits.turns[message] + turn)

    @property
    def links(self) -> ChainLinks:
        """See MessageTable."""
        hearers = self.hearers
        return ChainLinks(hearers.message, *self.ends(hearers), offsets_of(self.lengths)[:-1])

    def _of_row(self, row: int) -> Hearers:
        only = np.array([row])
        assert isinstance(self.parts, PartGroups)
        alone = RingMessages(self.rings, self.visits.take(only), self.parts.take(only), self.children[only], {})
        return alone.hearers._replace(message=np.full(int(self.lengths[row]), row))

    def receivers_of(self, row: int) -> tuple[int, ...]:
        """See MessageTable."""
        return tuple(self.ends(self._of_row(row))[1].tolist())

    def parents_of(self, row: int) -> tuple[int, ...]:
        """See MessageTable."""
        givers, receivers = (ranks.tolist() for ranks in self.ends(self._of_row(row)))
        place = {rank: at for at, rank in enumerate([int(self.senders[row]), *receivers])}
        return tuple(place[giver] for giver in givers)

    def touching(self, rank: int) -> Hearers:
        """The replicas that hear from a rank, and that rank itself."""
        visits, rings = self.visits, self.rings
        sent = np.flatnonzero(visits.senders == rank)
        hosts = np.where(self.children[sent] == FROM_SENDER, visits.spans[sent], 1)
        sent = sent.repeat(hosts)
        first = Hearers(sent, np.arange(len(sent)) - (np.cumsum(hosts) - hosts).repeat(hosts), np.zeros_like(sent))
        at = np.argwhere(rings.ranks == rank)
        if not len(at):
            return first
        tile, replica = at[0].tolist()
        place = int(rings.place[tile, replica])
        replica -= int(rings.firsts[tile, place])
        here = int(rings.count(np.array([tile]), np.array([place]))[0])
        message = np.flatnonzero((visits.tiles == tile) & (visits.senders != rank))
        far = (place - visits.begins[message]) % int(rings.hosts[tile])
        host = (far - visits.offsets[message]) % visits.spans[message]
        turn = (replica - visits.turns[message]) % here
        heard = (far < visits.spans[message]) & ((visits.only[message] < 0) | (turn == 0))
        own = Hearers(message[heard], host[heard], turn[heard])
        goes_on = own.take(np.flatnonzero(visits.only[own.message] < 0))
        found = [first, own]
        for child in range(1, BESIDE + 1):
            beside = goes_on._replace(turn=goes_on.turn * BESIDE + child)
            found.append(beside.take(np.flatnonzero(beside.turn < here)))
        entry = goes_on.take(np.flatnonzero(goes_on.turn == 0))
        children = self.children[entry.message]
        for child in range(1, int(children.max(initial=0)) + 1):
            below = entry._replace(host=entry.host * children + child)
            found.append(below.take(np.flatnonzero((child <= children) & (below.host < visits.spans[below.message]))))
        return Hearers(*(np.concatenate(column) for column in zip(*found, strict=True)))


def ring_hops(
    messages: RingMessages,
    shares: int,
    senders: Mapping[int, int],
    participants: Sequence[int],
    topology: Topology,
    rank: int | None,
) -> Hops:
    """The hops of messages, each with its round, in order.

    Chunk c of a message passes from one host to the next in step c + how many hosts are above, as in
    ``routes.rounds``; on a host it is handed on in the steps after that. All messages do so at once; where a rank would
    have too many of them in one step, the step has several rounds, and which of them a message is in follows from its
    share and from how far its tile's number is from its sender's: no two messages of a tile, and no two of a sender,
    agree in both.

    Args:
        messages: all those that ``rank`` has part in.
        shares: more than the number of any message's share.
        senders: the place of each source rank among them.
        participants: all ranks of either mesh, sorted.
        topology: which hops are within a host.
        rank: leave out other ranks' hops.
    """
    visits, rings = messages.visits, messages.rings
    hearers = messages.hearers if rank is None else messages.touching(rank)
    out, into = messages.ends(hearers)
    message, host, turn = hearers
    circle = max(len(senders), len(rings.ranks))
    of_sender = np.array([senders[one] for one in visits.senders.tolist()], np.int64)
    distance = ((visits.tiles - of_sender) % circle * shares + visits.shares)[message]
    children = messages.children[message]
    at_once = children == FROM_SENDER
    distance = np.where(at_once, distance * int(rings.most_hosts) + host, distance)
    host = np.where(at_once, 0, host)
    depth = np.where(children == 1, host, _levels(host))
    step = depth + _levels(turn)
    # Of a step: what enters first, what is handed on from host to host, within hosts, and to single replicas.
    inside = np.maximum(children, 0) + 1
    within = np.where(turn > 0, inside + turn, np.where(host > 0, 1 + (host - 1) % np.maximum(children, 1), 0))
    only = visits.only[message]
    within = np.where(only >= 0, inside + rings.of_host + only, within)
    counts = messages.chunk_counts[message]
    hop = np.arange(len(message)).repeat(counts)
    chunk = np.arange(len(hop)) - offsets_of(counts)[hop]
    rounds = (step[hop] + chunk) * STEP_STRIDE + within[hop] * WITHIN_STEP_STRIDE + distance[hop] // MAX_PEERS_PER_ROUND
    table = np.column_stack((rounds, out[hop], into[hop], message[hop], chunk))
    return Hops(table[order_of_hops(table, participants, topology)])


def _levels(places: np.ndarray) -> np.ndarray:
    """How many are above places of a tree in which each has two below."""
    levels: np.ndarray = np.frexp((places + 1).astype(np.float64))[1].astype(np.int64) - 1
    return levels
