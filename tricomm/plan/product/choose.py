"""Whether formulas apply to a move, and which of their ways it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, gcd
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.grid import Grid, Rings, grid_of, is_product
from tricomm.plan.product.loads import Loads, sent_directly
from tricomm.plan.product.nics import Nics, nics_of, share_hosts, units_of
from tricomm.plan.product.pieces import Cutting
from tricomm.plan.product.rings import BESIDE, FROM_SENDER, RingMessages, Visits, ring_hops
from tricomm.plan.product.shared import SharedHosts
from tricomm.plan.product.sharing import BY_TURNS, WHOLE, Sharing
from tricomm.plan.product.tried import SIMULATED_RANKS, fastest
from tricomm.plan.product.way import Way, best_way
from tricomm.plan.refine import cells
from tricomm.plan.routes.chunks import (
    MAX_PEERS_PER_ROUND,
    MIN_CHUNK_NBYTES,
    PairColumns,
    RouteContext,
    best_chunk_count,
    unicast,
)
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.rounds import schedule
from tricomm.plan.routes.strategies import Auto, Broadcast, GlobalAllGather, SendRecv, Strategy
from tricomm.plan.tasks import wire_itemsize

FEW_SHARES = 9
"""Where ways are simulated, each holder has fewer shares than that of what it sends, or as many as are level."""

FEW_HOSTS_OF_A_SENDER = 8
"""Up to so many hosts a sender may give what it sends to each of them by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class ProductMove:
    """A move that formulas can route.

    Attributes:
        source, destination: the grids.
        holders: the ranks of each tile of the source, by host.
        rings: those of the destination's.
        cutting: of the source's tiles.
        shared: what is sent where a host has ranks of both meshes, else None.
        sending, receiving: the NICs of either side.
        context: what a strategy may know.
        strategy: as asked.
        stack, itemsize: the number of the stack, and bytes of an element on the wire.
        senders: the source's ranks.
        participants: all ranks of either mesh, sorted.
        has_company: whether other stacks move at the same time.
    """

    source: Grid
    destination: Grid
    holders: Rings
    rings: Rings
    cutting: Cutting
    shared: SharedHosts | None
    sending: Nics
    receiving: Nics
    context: RouteContext
    strategy: Auto | SendRecv | Broadcast | GlobalAllGather
    stack: int
    itemsize: int
    senders: tuple[int, ...]
    participants: Sequence[int]
    has_company: bool = False

    @classmethod
    def of(
        cls,
        source: ShardingSpec,
        destination: ShardingSpec,
        stack: int,
        context: RouteContext,
        participants: Sequence[int],
        strategy: Strategy | Auto = Auto(),  # noqa: B008  an immutable value
        *,
        has_company: bool = False,
    ) -> "ProductMove | None":
        """None where formulas do not apply: explicit holdings, NICs that differ in a mesh, nothing to move, a strategy
        that is none of theirs, or no replicas, where each element has one way to go and nothing is to be chosen.
        """
        topology = context.topology
        if not (is_product(source) and is_product(destination)) or 0 in (*source.global_shape, source.mesh.size):
            return None
        if not source.global_shape or (source.exclusive and destination.exclusive):
            return None
        if not isinstance(strategy, Auto | SendRecv | Broadcast | GlobalAllGather):
            return None
        sending, receiving = nics_of(source.mesh, topology), nics_of(destination.mesh, topology)
        if sending is None or receiving is None:
            return None
        first, second = grid_of(source), grid_of(destination)
        holders, rings = Rings.of(first, topology), Rings.of(second, topology)
        per_dim = [cells(*parts) for parts in zip(part_table(source).parts, part_table(destination).parts, strict=True)]
        is_shared = share_hosts(source.mesh, destination.mesh, topology)
        cutting = Cutting(per_dim, first, second, alone=is_shared, units=units_of(first, topology))
        shared = SharedHosts(cutting, holders, rings, topology.host_numbers) if is_shared else None
        senders = source.mesh.ranks
        return cls(
            first,
            second,
            holders,
            rings,
            cutting,
            shared,
            sending,
            receiving,
            context,
            strategy,
            stack,
            wire_itemsize(source, destination),
            senders,
            participants,
            has_company,
        )

    def loads(self, messages: int, sharing: Sharing, kinds: Sequence[int]) -> list[Loads]:
        """What the NICs of a tile's replicas carry if it comes in so many messages, shared so among holders; for some
        numbers of children.
        """
        if self.shared is not None:
            return Loads.among(self.shared, _rails(self), messages, sharing, kinds)
        return [Loads.apart(self.rings.most_hosts, _rails(self), messages, children) for children in kinds]

    def routes(self, rank: int | None) -> Routes:
        """What all ranks do, or what one has part in."""
        if len(self.participants) > SIMULATED_RANKS:
            return self.routes_of(best_way(ways_of(self), self.delay), rank)
        return self.routes_of(_simulated_way(self), rank)

    def delay(self, way: Way) -> float:
        """Seconds by which a way may keep back other stacks that move at the same time.

        Where receivers are the slower side, it is all the same to a stack alone how many of its holders send. But ties
        fall alike for all stacks of a set, on the same holders, and those then keep the whole set waiting.
        """
        return way.uneven_seconds if self.has_company else 0.0

    def routes_of(self, way: Way, rank: int | None = None) -> Routes:
        """The same, by a way."""
        return self._directly(way, rank) if way.children == 0 else self._round_about(way, rank)

    def _parts(self, regions: Groups) -> PartGroups:
        """Regions of the stack."""
        return PartGroups(self.stack, self.itemsize, regions)

    def _directly(self, way: Way, rank: int | None) -> Routes:
        if self.shared is not None:
            pairs = self.shared.pairs(way.sharing, rank, self._parts)
        else:
            pieces = self.cutting.pieces(self.rings.replicas, way.sharing, rank)
            receivers = self.destination.ranks[pieces.tiles, pieces.copies]
            order = np.lexsort((receivers, pieces.senders))
            parts = self._parts(pieces.regions.take(order))
            pairs = PairColumns(pieces.senders[order], receivers[order], parts)
        strategy = self.strategy if isinstance(self.strategy, SendRecv) else SendRecv()
        messages = unicast(pairs, strategy.chunk_bytes, self.context)
        return Routes(strategy, messages, schedule(messages, self.participants, self.context.topology))

    def _round_about(self, way: Way, rank: int | None) -> Routes:
        if self.shared is not None:
            visits = self.shared.visits(way.sharing, rank)
        else:
            pieces = self.cutting.pieces(1, way.sharing, rank)
            sizes = self.cutting.sizes_of(pieces.tiles)
            visits = Visits.round_about(pieces, sizes, self.rings, way.by_replica, way.skewed)
        strategy = Broadcast() if isinstance(self.strategy, Auto) else self.strategy
        messages = RingMessages.of(visits, self.rings, way.children, self._parts, way.chunks_of)
        places = {one: place for place, one in enumerate(self.senders)}
        hops = ring_hops(messages, way.sharing.each, places, self.participants, self.context.topology, rank)
        return Routes(strategy, messages, hops)


def product_move(
    source: ShardingSpec,
    destination: ShardingSpec,
    stack: int,
    context: RouteContext,
    participants: tuple[int, ...],
    strategy: Strategy | Auto,
    has_company: bool,
) -> ProductMove | None:
    """See :meth:`ProductMove.of`; of few ranks the same object for equal arguments, so that the plans of all of them
    simulate its ways once.
    """
    of = _small_move if len(participants) <= SIMULATED_RANKS else ProductMove.of
    return of(source, destination, stack, context, participants, strategy, has_company=has_company)


_small_move = lru_cache(maxsize=64)(ProductMove.of)


@lru_cache(maxsize=64)
def _simulated_way(move: ProductMove) -> Way:
    """The way that is the fastest when simulated; by identity of the move."""
    ways = ways_of(move, is_simulated=True)
    return fastest(ways, attrgetter("seconds"), move.delay, move.routes_of, move.context.topology)


class Load(NamedTuple):
    """What the busiest of the source sends: bytes of a message, bytes of a NIC, and messages of a rank; and the bytes
    of a NIC if all sent the same.
    """

    piece_nbytes: float
    nic_nbytes: float
    messages: int
    even_nbytes: float

    @property
    def uneven_nbytes(self) -> float:
        """Bytes that the busiest NIC sends more than if all sent the same."""
        return self.nic_nbytes - self.even_nbytes

    @classmethod
    def of(cls, move: ProductMove, copies: int, sharing: Sharing) -> "Load":
        """With cells shared evenly, or each cell whole."""
        senders, itemsize, ranks = sharing.senders, move.itemsize, move.sending.ranks
        tile = move.cutting.source_line.largest * itemsize * copies
        cells, cell = move.cutting.source_line.most_cells * copies, move.cutting.largest_cell * itemsize
        holders = move.source.replicas
        each, even = -(-cells // senders), ranks * tile / holders
        if sharing.shares <= 0:
            return cls(cell, min(ranks * each * cell, min(ranks, len(move.source.ranks)) * tile), each, even)
        units = move.cutting.units
        if sharing.is_by_nic and units is not None:
            piece = min(tile * int(units.max()) / int(units.sum(1).min()) / sharing.each, cell)
            level = len(move.source.ranks) * tile / move.sending.number
            return cls(piece, level, each + sharing.shares, level)
        busy = -(-ranks * senders // holders)  # of a NIC's ranks
        if move.cutting.alone:
            of_nic = max(even, busy * cell * copies / senders)
            return cls(cell / sharing.parts, of_nic, -(-cells * senders // holders) * sharing.shares, even)
        piece = min(tile / sharing.parts, cell)
        return cls(piece, busy * tile / senders, each + sharing.shares - 1 + int(senders > 1), even)


def ways_of(move: ProductMove, is_simulated: bool = False) -> list[Way]:
    """The ways that a move may go, plain ones first: more of them where they are simulated, not estimated."""
    ways: list[Way] = []
    holders = move.source.replicas
    if isinstance(move.strategy, Auto | SendRecv) or move.rings.replicas == 1:
        (loads,), directly = move.loads(1, Sharing(holders, 1), (1,)), sent_directly(move.shared)
        direct = [Sharing(holders, count) for count in (WHOLE, 1, BY_TURNS)]
        ways += [direct_way(move, sharing, loads, directly) for sharing in direct + _by_nic(move, 1)]
    if not isinstance(move.strategy, SendRecv) and move.rings.replicas > 1:
        shares, fewer = (range(BY_TURNS, FEW_SHARES), {1, 2}) if is_simulated else (range(4), {1})
        sharings = [Sharing(holders, count) for count in sorted({*shares, *_level_shares(move, holders)})]
        for senders in _fewer_senders(move):
            sharings += [Sharing(senders, count) for count in sorted({*fewer, *_level_shares(move, senders)})]
        found = [round_ways(move, sharing) for sharing in sharings + _by_nic(move, 2)]
        about = [way for of_kind in zip(*found, strict=True) for way in of_kind]
        ways += about
        if is_simulated and move.shared is None and move.rings.is_ragged:
            ways += [replace(way, by_replica=True) for way in about]
    return ways


def _by_nic(move: ProductMove, most_shares: int) -> list[Sharing]:
    """Ways of sharing by NIC, with up to so many shares, where holders are unequally many on NICs."""
    if move.cutting.units is None or move.shared is not None:
        return []
    return [Sharing(move.source.replicas, count, is_by_nic=True) for count in range(1, most_shares + 1)]


def _level_shares(move: ProductMove, senders: int) -> set[int]:
    """As many shares of a sender that there are messages for all places to enter at, so that all NICs are busy from the
    first step to the last.
    """
    if move.shared is not None:
        return set()
    messages = max(round(_tile_nbytes(move) / Load.of(move, 1, Sharing(senders, 1)).piece_nbytes), 1)
    places = _places(move)
    return {-(-places // messages), places // gcd(places, messages), -(-2 * _rails(move) // messages)}


def _fewer_senders(move: ProductMove) -> list[int]:
    """How many of a tile's holders may send, if not all: for a message, or two, a NIC of a host or of all hosts."""
    cutting = move.cutting
    cells = 1 if cutting.alone else cutting.source_line.most_cells
    least = -(-_rails(move) * cells // cutting.destination_line.most_cells)
    return sorted(count for count in {least, 2 * least, least * move.rings.most_hosts} if count < move.source.replicas)


def direct_way(move: ProductMove, sharing: Sharing, loads: Loads, directly: float) -> Way:
    """Every replica hears from holders; ``directly`` is what ``sent_directly`` says."""
    topology, copies = move.context.topology, move.rings.replicas
    load = Load.of(move, copies, sharing)
    of_nic = move.rings.tiles_of_nic * _tile_nbytes(move)
    entering = min(loads.heard, 1.0) * move.receiving.ranks * _tile_nbytes(move) / move.receiving.receive
    leaving = max(load.nic_nbytes * loads.free, directly * of_nic) / move.sending.send
    seconds = max(leaving, entering, load.messages * topology.overhead_seconds)
    each = topology.overhead_seconds + topology.latency_seconds
    uneven = _uneven_seconds(move, load, loads, sharing)
    return Way(move.context, 0, sharing, False, False, 1, move.context.staging_nbytes, None, seconds + each, uneven)


def round_ways(move: ProductMove, sharing: Sharing) -> list[Way]:
    """Holders send each cell once, and replicas hand it on, in chains or trees of hosts; or not."""
    load, kinds = Load.of(move, 1, sharing), _kinds(move)
    messages = max(round(_tile_nbytes(move) / load.piece_nbytes), 1)
    every = zip(kinds, move.loads(messages, sharing, kinds), strict=True)
    return [_round_way(move, sharing, children, load, loads) for children, loads in every]


def _round_way(move: ProductMove, sharing: Sharing, children: int, load: Load, loads: Loads) -> Way:
    context, topology, rings = move.context, move.context.topology, move.rings
    tile = _tile_nbytes(move)
    messages = max(round(tile / load.piece_nbytes), 1)
    of_nic = rings.tiles_of_nic * tile
    leaving = max(load.nic_nbytes * loads.free, loads.sent / _rails(move) * of_nic) / move.sending.send
    entering = loads.heard * of_nic / move.receiving.receive
    busiest = max(leaving, entering, loads.handed_on * of_nic / move.receiving.send)
    # In one chunk each, a NIC receives in each step the messages that entered a ring at one place.
    step = loads.first * of_nic / move.receiving.receive
    depth = max(loads.hosts if children != 2 else loads.hosts.bit_length(), 1)
    if children != 2:
        fill = max(max(leaving, step) + (depth - 1) * step - busiest, 0.0)
    else:
        fill = depth * min(max(leaving, step), busiest)
    chunk_bytes = None if isinstance(move.strategy, Auto) else move.strategy.chunk_bytes
    copying, handing = _on_a_host(move, loads.first, messages)
    chunks = best_chunk_count(fill + copying, busiest, messages, topology) if busiest else 1
    chunks = max(min(chunks, int(load.piece_nbytes) // MIN_CHUNK_NBYTES), 1)
    if chunk_bytes is not None:
        chunks = max(-(-int(load.piece_nbytes) // chunk_bytes), 1)
    together = messages if chunks > 1 or children != 1 else round(loads.first * messages / _rails(move))
    limit = context.chunk_limit_nbytes(min(together, MAX_PEERS_PER_ROUND))
    posts = max(load.messages * loads.free, messages) * max(chunks, -(-int(load.piece_nbytes) // limit))
    each = topology.overhead_seconds + topology.latency_seconds
    filling = fill / chunks if children != 2 else fill / depth * min(depth, chunks) / chunks
    seconds = max(busiest, posts * topology.overhead_seconds) + filling + copying / chunks + handing + depth * each
    uneven = _uneven_seconds(move, load, loads, sharing)
    # So few messages that the places where they enter would all be on one host.
    apart = rings.most_hosts * rings.of_host // messages
    skewed = rings.most_hosts > 1 and apart > 0 and apart % rings.most_hosts == 0
    return Way(context, children, sharing, False, skewed, chunks, limit, chunk_bytes, seconds, uneven)


def _on_a_host(move: ProductMove, first: float, messages: int) -> tuple[float, float]:
    """What follows on a host when the last step's messages have come, all at once, before its last replica has them:
    (seconds in which they are copied, seconds in which copies are posted and begin).

    Args:
        move: of which.
        first: see Loads.
        messages: of a tile.
    """
    topology, of_host = move.context.topology, move.rings.of_host
    levels, beside = of_host.bit_length() - 1, min(BESIDE, of_host - 1)
    if not levels:
        return 0.0, 0.0
    of_replica = first * _tile_nbytes(move) / of_host
    posts = max(beside * ceil(first * messages / of_host) - 1, 0)
    each = topology.overhead_seconds + topology.latency_seconds
    copying = levels * beside * of_replica / topology.intra_bytes_per_second
    return copying, posts * topology.overhead_seconds + levels * each


def _uneven_seconds(move: ProductMove, load: Load, loads: Loads, sharing: Sharing) -> float:
    """For how much longer the busiest NIC of the source sends than if all sent the same; see Way."""
    free = loads.free if sharing.senders == move.source.replicas else max(loads.free, 1.0)
    return load.uneven_nbytes * free / move.sending.send


def _kinds(move: ProductMove) -> tuple[int, ...]:
    """How pieces may go from host to host."""
    hosts = move.rings.most_hosts
    if hosts == 1 or not isinstance(move.strategy, Auto):
        return (1,)
    return (1, *((2,) if hosts > 2 else ()), *((FROM_SENDER,) if hosts <= FEW_HOSTS_OF_A_SENDER else ()))


def _places(move: ProductMove) -> int:
    """Places where a message can enter a ring that differ for the network: a NIC each."""
    return move.rings.most_hosts * _rails(move)


def _rails(move: ProductMove) -> int:
    """NICs of a host through which the replicas of a tile hear."""
    return max(move.rings.of_host // move.receiving.ranks, 1)


def _tile_nbytes(move: ProductMove) -> int:
    """Bytes of the largest tile of the destination."""
    return move.cutting.destination_line.largest * move.itemsize
