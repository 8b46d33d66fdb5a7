"""Which of its ways a move takes that formulas can route."""

from dataclasses import replace
from functools import lru_cache
from math import ceil, gcd, prod
from operator import attrgetter
from typing import NamedTuple

from tricomm.layout.spec import ShardingSpec
from tricomm.plan.product.allotted import FEW_DELIVERIES
from tricomm.plan.product.loads import Loads, sent_directly
from tricomm.plan.product.move import ProductMove
from tricomm.plan.product.rings import BESIDE, BY_LOAD, FROM_SENDER
from tricomm.plan.product.sharing import BY_ALLOTMENT, BY_TURNS, WHOLE, Sharing
from tricomm.plan.product.tried import SIMULATED_RANKS, Trial, fastest, plainest
from tricomm.plan.product.way import Way, best_way
from tricomm.plan.routes.chunks import MAX_CHUNKS, MAX_PEERS_PER_ROUND, RouteContext, best_chunk_count
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.strategies import Auto, SendRecv, Strategy

FEW_SHARES = 9
"""Where ways are simulated, each holder has fewer shares than that of what it sends, or as many as are level."""

TRIED_CHUNKS = 32
"""Where ways are simulated, messages are first cut into no more chunks, with which they differ as with many."""

TRIED_DOUBLINGS = 4
"""Then those of the best way are cut into up to so many powers of two times as many."""

FEW_HOSTS_OF_A_SENDER = 8
"""Up to so many hosts a sender may give what it sends to each of them by itself."""


def routes_of_move(move: ProductMove, rank: int | None) -> Routes:
    """What all ranks do, or what one has part in, by the best way."""
    if len(move.participants) > SIMULATED_RANKS:
        return move.routes_of(best_way(ways_of(move), move.delay), rank)
    return move.routes_of(_simulated_way(move), rank)


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
    ways = [replace(way, chunks=min(way.chunks, TRIED_CHUNKS)) for way in ways_of(move, is_simulated=True)]
    trial = Trial(move.messages_of, lambda way: move.routes_of(way).hops, move.context.topology)
    best = fastest(ways, attrgetter("seconds"), move.delay, trial)
    if best.children != 0 and move.shared is None:
        best = fastest([best, replace(best, least_heard=True)], attrgetter("seconds"), move.delay, trial)
    if best.children == 0 or best.chunk_bytes is not None:
        return best
    # An estimate of how long chains take to fill may be wrong, too.
    counts = [best.chunks // 2, *(best.chunks << doublings for doublings in range(TRIED_DOUBLINGS + 1))]
    return plainest([replace(best, chunks=count) for count in counts if 0 < count <= MAX_CHUNKS], trial)


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
    holders, copies = move.source.replicas, move.rings.replicas
    if isinstance(move.strategy, Auto | SendRecv) or move.rings.replicas == 1:
        (loads,), directly = move.loads(1, Sharing(holders, 1), (1,)), sent_directly(move.shared)
        direct = [Sharing(holders, count) for count in (WHOLE, 1, BY_TURNS)]
        if is_simulated and holders > 1 and prod(map(len, move.cutting.lengths)) * copies <= FEW_DELIVERIES:
            direct += [Sharing(holders, count) for count in BY_ALLOTMENT]
        ways += [direct_way(move, sharing, loads, directly) for sharing in direct + _by_nic(move, 1)]
    if not isinstance(move.strategy, SendRecv) and move.rings.replicas > 1:
        shares, fewer = (range(BY_TURNS, FEW_SHARES), {1, 2}) if is_simulated else (range(4), {1})
        sharings = [Sharing(holders, count) for count in sorted({*shares, *_level_shares(move, holders, is_simulated)})]
        for senders in _fewer_senders(move, is_simulated):
            sharings += [
                Sharing(senders, count) for count in sorted({*fewer, *_level_shares(move, senders, is_simulated)})
            ]
        found = [round_ways(move, sharing) for sharing in sharings + _by_nic(move, 2)]
        about = [way for of_kind in zip(*found, strict=True) for way in of_kind]
        ways += about
        if is_simulated and move.shared is None and move.rings.is_ragged:
            ways += [replace(way, by_replica=True) for way in about]
        if is_simulated and move.shared is None and holders > 1:
            each = [round_ways(move, sharing) for sharing in _of_each_cell(move)]
            ways += [replace(way, by_cell=True) for of_kind in zip(*each, strict=True) for way in of_kind]
        if is_simulated and move.shared is not None:
            ways += [replace(way, skewed=not way.skewed) for way in about]
            if (move.shared.entry >= 0).any():
                ways += [replace(way, aside=True) for way in about]
        if is_simulated:
            alone = [way for way in ways if way.children == FROM_SENDER and move.is_uneven(way)]
            ways += [replace(way, children=BY_LOAD) for way in alone]
    return ways


def _of_each_cell(move: ProductMove) -> list[Sharing]:
    """Ways of sharing a cell of which equal parts enter at every NIC of a host, or of all hosts of a tile."""
    senders = [(min(count, move.source.replicas), count) for count in sorted({move.rails, _places(move)})]
    return [Sharing(few, -(-count // few)) for few, count in senders]


def _by_nic(move: ProductMove, most_shares: int) -> list[Sharing]:
    """Ways of sharing by NIC, with up to so many shares, where holders are unequally many on NICs."""
    if move.cutting.units is None or move.shared is not None:
        return []
    return [Sharing(move.source.replicas, count, is_by_nic=True) for count in range(1, most_shares + 1)]


def _level_shares(move: ProductMove, senders: int, is_simulated: bool) -> set[int]:
    """As many shares of a sender that there are messages for all places to enter at, so that all NICs are busy from the
    first step to the last.
    """
    if move.shared is not None and not is_simulated:
        return set()  # hosts that have holders are not as busy as the others, which an estimate says little of
    messages = max(round(move.tile_nbytes / Load.of(move, 1, Sharing(senders, 1)).piece_nbytes), 1)
    places = _places(move)
    return {-(-places // messages), places // gcd(places, messages), -(-2 * move.rails // messages)}


def _fewer_senders(move: ProductMove, is_simulated: bool) -> list[int]:
    """How many of a tile's holders may send, if not all: for a message, or two, a NIC of a host or of all hosts."""
    cutting = move.cutting
    cells = 1 if cutting.alone else cutting.source_line.most_cells
    least = -(-move.rails * cells // cutting.destination_line.most_cells)
    counts = {
        least,
        2 * least,
        least * move.rings.most_hosts,
        *((move.rails,) if is_simulated and cutting.alone else ()),
    }
    return sorted(count for count in counts if count < move.source.replicas)


def direct_way(move: ProductMove, sharing: Sharing, loads: Loads, directly: float) -> Way:
    """Every replica hears from holders; ``directly`` is what ``sent_directly`` says."""
    topology, copies = move.context.topology, move.rings.replicas
    load = Load.of(move, copies, sharing)
    of_nic = move.rings.tiles_of_nic * move.tile_nbytes
    entering = min(loads.heard, 1.0) * move.receiving.ranks * move.tile_nbytes / move.receiving.receive
    leaving = max(load.nic_nbytes * loads.free, directly * of_nic) / move.sending.send
    seconds = max(leaving, entering, load.messages * topology.overhead_seconds)
    each = topology.overhead_seconds + topology.latency_seconds
    uneven = _uneven_seconds(move, load, loads, sharing)
    return Way(
        move.context,
        0,
        sharing,
        1,
        move.context.staging_nbytes,
        move.tiny_nbytes,
        None,
        seconds + each,
        uneven,
    )


def round_ways(move: ProductMove, sharing: Sharing) -> list[Way]:
    """Holders send each cell once, and replicas hand it on, in chains or trees of hosts; or not."""
    load, kinds = Load.of(move, 1, sharing), _kinds(move)
    messages = max(round(move.tile_nbytes / load.piece_nbytes), 1)
    every = zip(kinds, move.loads(messages, sharing, kinds), strict=True)
    return [_round_way(move, sharing, children, load, loads) for children, loads in every]


def _round_way(move: ProductMove, sharing: Sharing, children: int, load: Load, loads: Loads) -> Way:
    context, topology, rings = move.context, move.context.topology, move.rings
    tile = move.tile_nbytes
    messages = max(round(tile / load.piece_nbytes), 1)
    of_nic = rings.tiles_of_nic * tile
    leaving = max(load.nic_nbytes * loads.free, loads.sent / move.rails * of_nic) / move.sending.send
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
    chunks = max(min(chunks, int(load.piece_nbytes) // move.tiny_nbytes), 1)
    if chunk_bytes is not None:
        chunks = max(-(-int(load.piece_nbytes) // chunk_bytes), 1)
    together = messages if chunks > 1 or children != 1 else round(loads.first * messages / move.rails)
    limit = context.chunk_limit_nbytes(min(together, MAX_PEERS_PER_ROUND))
    posts = max(load.messages * loads.free, messages) * max(chunks, -(-int(load.piece_nbytes) // limit))
    each = topology.overhead_seconds + topology.latency_seconds
    filling = fill / chunks if children != 2 else fill / depth * min(depth, chunks) / chunks
    seconds = max(busiest, posts * topology.overhead_seconds) + filling + copying / chunks + handing + depth * each
    uneven = _uneven_seconds(move, load, loads, sharing)
    # So few messages that the places where they enter would all be on one host; between shared hosts it is tried.
    apart = rings.most_hosts * rings.of_host // messages
    skewed = move.shared is None and rings.most_hosts > 1 and apart > 0 and apart % rings.most_hosts == 0
    return Way(
        context,
        children,
        sharing,
        chunks,
        limit,
        move.tiny_nbytes,
        chunk_bytes,
        seconds,
        uneven,
        skewed=skewed,
    )


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
    of_replica = first * move.tile_nbytes / of_host
    posts = max(beside * ceil(first * messages / of_host) - 1, 0)
    each = topology.overhead_seconds + topology.latency_seconds
    copying = levels * beside * of_replica / topology.intra_bytes_per_second
    if topology.memory_bytes_per_second is not None:
        copying = max(copying, of_host * (of_host - 1) * of_replica / topology.memory_bytes_per_second)
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
    return move.rings.most_hosts * move.rails
