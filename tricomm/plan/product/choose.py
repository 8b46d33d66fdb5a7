"""Whether formulas apply to a move, and which of their ways it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups
from tricomm.layout.mesh import Mesh
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.choice import WORTH_IT
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.grid import Grid, Rings, grid_of, is_product, ranks_of
from tricomm.plan.product.loads import Loads
from tricomm.plan.product.pieces import BY_TURNS, Cutting
from tricomm.plan.product.rings import FROM_SENDER, RingMessages, Visits, ring_hops
from tricomm.plan.product.shared import SharedHosts
from tricomm.plan.product.tried import SIMULATED_RANKS, fastest
from tricomm.plan.refine import cells
from tricomm.plan.routes.chunks import (
    MAX_PEERS_PER_ROUND,
    MIN_CHUNK_NBYTES,
    PairColumns,
    RouteContext,
    best_chunk_count,
    chunk_counts,
    cut_where,
    unicast,
)
from tricomm.plan.routes.cuts import Chunks, even_pattern, stepped_pattern
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.rounds import schedule
from tricomm.plan.routes.strategies import Auto, Broadcast, GlobalAllGather, SendRecv, Strategy
from tricomm.plan.tasks import wire_itemsize

FEW_SHARES = 9
"""Where ways are simulated, each holder has fewer shares than that of what it sends, or as many as are level."""

FEW_HOSTS_OF_A_SENDER = 8
"""Up to so many hosts a sender may give what it sends to each of them by itself."""


class Nics(NamedTuple):
    """The NICs of a mesh, all equally fast.

    Attributes:
        ranks: the most that share one.
        send, receive: bytes per second.
    """

    ranks: int
    send: float
    receive: float


@lru_cache(maxsize=64)
def nics_of(mesh: Mesh, topology: Topology) -> Nics | None:
    """The NICs of a mesh; None if they are not all equally fast."""
    nics, of_nic = np.unique(topology.nic_numbers[ranks_of(mesh)], return_counts=True)
    send, receive = topology.nic_send_rates[nics], topology.nic_receive_rates[nics]
    if (send != send[0]).any() or (receive != receive[0]).any():
        return None
    return Nics(int(of_nic.max()), float(send[0]), float(receive[0]))


@lru_cache(maxsize=64)
def share_hosts(first: Mesh, second: Mesh, topology: Topology) -> bool:
    """Whether a host has ranks of both meshes."""
    here, there = (topology.host_numbers[ranks_of(mesh)] for mesh in (first, second))
    return bool(np.isin(here, there).any())


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
        cutting = Cutting(per_dim, first, second, alone=is_shared)
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

    def loads(self, messages: int, shares: int, children: int) -> Loads:
        """What the NICs of a tile's replicas carry if it comes in so many messages, so many shares of a holder."""
        if self.shared is not None:
            return Loads.among(self.shared, _rails(self), messages, shares, children)
        return Loads.apart(self.rings.most_hosts, _rails(self), messages, children)

    def routes(self, rank: int | None) -> Routes:
        """What all ranks do, or what one has part in."""
        if len(self.participants) > SIMULATED_RANKS:
            return self._routes_of(best_way(ways_of(self), self.delay), rank)
        ways = ways_of(self, range(BY_TURNS, FEW_SHARES))
        found = fastest(ways, attrgetter("seconds"), self.delay, self._routes_of, self.context.topology)
        return self._routes_of(found, rank)

    def delay(self, way: "Way") -> float:
        """Seconds by which a way may keep back other stacks that move at the same time.

        Where receivers are the slower side, it is all the same to a stack alone how many of its holders send. But ties
        fall alike for all stacks of a set, on the same holders, and those then keep the whole set waiting.
        """
        return way.uneven_seconds if self.has_company else 0.0

    def _routes_of(self, way: "Way", rank: int | None = None) -> Routes:
        return self._directly(way, rank) if way.children == 0 else self._round_about(way, rank)

    def _parts(self, regions: Groups) -> PartGroups:
        """Regions of the stack."""
        return PartGroups(self.stack, self.itemsize, regions)

    def _directly(self, way: "Way", rank: int | None) -> Routes:
        if self.shared is not None:
            pairs = self.shared.pairs(way.shares, rank, self._parts)
        else:
            pieces = self.cutting.pieces(self.rings.replicas, way.shares, rank)
            receivers = self.destination.ranks[pieces.tiles, pieces.copies]
            order = np.lexsort((receivers, pieces.senders))
            parts = self._parts(pieces.regions.take(order))
            pairs = PairColumns(pieces.senders[order], receivers[order], parts)
        strategy = self.strategy if isinstance(self.strategy, SendRecv) else SendRecv()
        messages = unicast(pairs, strategy.chunk_bytes, self.context)
        return Routes(strategy, messages, schedule(messages, self.participants, self.context.topology))

    def _round_about(self, way: "Way", rank: int | None) -> Routes:
        if self.shared is not None:
            visits = self.shared.visits(way.shares, rank)
        else:
            pieces = self.cutting.pieces(1, way.shares, rank)
            visits = Visits.round_about(pieces, self.cutting.sizes_of(pieces.tiles), self.rings)
        strategy = Broadcast() if isinstance(self.strategy, Auto) else self.strategy
        messages = RingMessages.of(visits, self.rings, way.children, self._parts, way.chunks_of)
        places = {one: place for place, one in enumerate(self.senders)}
        hops = ring_hops(messages, max(way.shares, 1), places, self.participants, self.context.topology, rank)
        return Routes(strategy, messages, hops)


@dataclass(frozen=True, slots=True)
class Way:
    """How a product move may go, and what that should take: from the largest tiles alone, so equal on every rank.

    Attributes:
        context: what a strategy may know.
        children: 0 if each replica hears from holders; 1 if pieces go from host to host in chains, 2 in trees,
            FROM_SENDER if a sender gives them to every host by itself.
        shares: how many each holder has of the line of its tile's cells; 0 or BY_TURNS leaves cells whole.
        chunks: into how many chunks a message is cut if it is not too small or too large for that.
        limit_nbytes: the largest chunk that the staging budget allows.
        chunk_bytes: the size of chunks, where a strategy says so.
        seconds: what it should take.
        uneven_seconds: for which the busiest NIC of the source sends longer than if all sent the same.
    """

    context: RouteContext
    children: int
    shares: int
    chunks: int
    limit_nbytes: int
    chunk_bytes: int | None
    seconds: float
    uneven_seconds: float

    def chunks_of(self, parts: PartGroups) -> Mapping[int, Chunks]:
        """The chunks of those messages that have more than one, given their parts."""
        nbytes = parts.nbytes
        if self.chunk_bytes is not None:
            most = max(self.chunk_bytes, parts.itemsize)
            return cut_where(parts, -(-nbytes // most), lambda kinds, _: stepped_pattern(kinds, most))
        return cut_where(parts, chunk_counts(nbytes, self.chunks, self.limit_nbytes), even_pattern)


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
    def of(cls, move: ProductMove, copies: int, shares: int) -> "Load":
        """With cells shared evenly, or each cell whole."""
        holders, itemsize, ranks = move.source.replicas, move.itemsize, move.sending.ranks
        tile = move.cutting.source_line.largest * itemsize * copies
        cells, cell = move.cutting.source_line.most_cells * copies, move.cutting.largest_cell * itemsize
        each, even = -(-cells // holders), ranks * tile / holders
        if shares <= 0:
            return cls(cell, min(ranks * each * cell, min(ranks, len(move.source.ranks)) * tile), each, even)
        if move.cutting.alone:
            return cls(cell / holders / shares, even, cells * shares, even)
        piece = min(tile / holders / shares, cell)
        return cls(piece, even, each + shares - 1 + int(holders > 1), even)


def ways_of(move: ProductMove, shares: Iterable[int] = range(4)) -> list[Way]:
    """The ways that a move may go, plain ones first, with so many shares a holder, or as many as are level."""
    ways: list[Way] = []
    if isinstance(move.strategy, Auto | SendRecv) or move.rings.replicas == 1:
        ways += [direct_way(move, count) for count in (0, 1, BY_TURNS)]
    if not isinstance(move.strategy, SendRecv) and move.rings.replicas > 1:
        # As many messages as places to enter at, so that all NICs are busy from the first step to the last.
        messages = max(round(_tile_nbytes(move) / Load.of(move, 1, 1).piece_nbytes), 1)
        places = _places(move)
        level = set(shares)
        if move.shared is None:
            level |= {-(-places // messages), places // gcd(places, messages), -(-2 * _rails(move) // messages)}
        ways += [round_way(move, count, children) for children in _kinds(move) for count in sorted(level)]
    return ways


def best_way(ways: Sequence[Way], delay: Callable[[Way], float]) -> Way:
    """The fastest with its delay of others, the plainest one that is about as fast."""
    seconds = [way.seconds + delay(way) for way in ways]
    best = 0
    for number in range(1, len(ways)):
        if seconds[number] < seconds[best] * (1 - WORTH_IT):
            best = number
    return ways[best]


def direct_way(move: ProductMove, shares: int) -> Way:
    """Every replica hears from holders."""
    topology, copies = move.context.topology, move.rings.replicas
    load, loads = Load.of(move, copies, shares), move.loads(1, 1, 1)
    of_nic = move.rings.tiles_of_nic * _tile_nbytes(move)
    entering = min(loads.heard, 1.0) * move.receiving.ranks * _tile_nbytes(move) / move.receiving.receive
    leaving = max(load.nic_nbytes * loads.free, loads.directly * of_nic) / move.sending.send
    seconds = max(leaving, entering, load.messages * topology.overhead_seconds)
    each = topology.overhead_seconds + topology.latency_seconds
    uneven = load.uneven_nbytes * loads.free / move.sending.send
    return Way(move.context, 0, shares, 1, move.context.staging_nbytes, None, seconds + each, uneven)


def round_way(move: ProductMove, shares: int, children: int) -> Way:
    """Holders send each cell once, and replicas hand it on, in chains or trees of hosts."""
    context, topology, rings = move.context, move.context.topology, move.rings
    load, tile = Load.of(move, 1, shares), _tile_nbytes(move)
    messages = max(round(tile / load.piece_nbytes), 1)
    loads = move.loads(messages, shares, children)
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
    chunks = best_chunk_count(fill, busiest, messages, topology) if busiest else 1
    chunks = max(min(chunks, int(load.piece_nbytes) // MIN_CHUNK_NBYTES), 1)
    if chunk_bytes is not None:
        chunks = max(-(-int(load.piece_nbytes) // chunk_bytes), 1)
    together = messages if chunks > 1 or children != 1 else round(loads.first * messages / _rails(move))
    limit = context.chunk_limit_nbytes(min(together, MAX_PEERS_PER_ROUND))
    posts = max(load.messages * loads.free, messages) * max(chunks, -(-int(load.piece_nbytes) // limit))
    each = topology.overhead_seconds + topology.latency_seconds
    filling = fill / chunks if children != 2 else fill / depth * min(depth, chunks) / chunks
    seconds = (
        max(busiest, posts * topology.overhead_seconds) + filling + (depth + rings.of_host.bit_length() - 1) * each
    )
    uneven = load.uneven_nbytes * loads.free / move.sending.send
    return Way(context, children, shares, chunks, limit, chunk_bytes, seconds, uneven)


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
