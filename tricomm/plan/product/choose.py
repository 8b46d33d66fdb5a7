"""Whether formulas apply to a move, and which of their two ways it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from tricomm.layout.mesh import Mesh
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.choice import WORTH_IT
from tricomm.plan.product.grid import Grid, Rings, grid_of, is_product, rings_of
from tricomm.plan.product.pieces import Cutting
from tricomm.plan.product.rings import RingMessages, ring_hops
from tricomm.plan.refine import cells
from tricomm.plan.routes.chunks import (
    MAX_PEERS_PER_ROUND,
    MIN_CHUNK_NBYTES,
    Message,
    PairColumns,
    RouteContext,
    best_chunk_count,
    chunk_counts,
    unicast,
)
from tricomm.plan.routes.rounds import Hop, schedule
from tricomm.plan.routes.strategies import Broadcast, SendRecv, Strategy


class Nics(NamedTuple):
    """The NICs of a mesh, all alike.

    Attributes:
        ranks: that share one.
        send, receive: bytes per second.
    """

    ranks: int
    send: float
    receive: float


@lru_cache(maxsize=64)
def nics_of(mesh: Mesh, topology: Topology) -> Nics | None:
    """The NICs of a mesh; None if they are not all alike."""
    ranks = np.array(mesh.ranks, np.int64)
    nics, of_nic = np.unique(topology.nic_numbers[ranks], return_counts=True)
    _, of_host = np.unique(topology.host_numbers[ranks], return_counts=True)
    send, receive = topology.nic_send_rates[nics], topology.nic_receive_rates[nics]
    if any((column != column[0]).any() for column in (of_nic, of_host, send, receive)):
        return None
    return Nics(int(of_nic[0]), float(send[0]), float(receive[0]))


@lru_cache(maxsize=64)
def share_hosts(first: Mesh, second: Mesh, topology: Topology) -> bool:
    """Whether a host has ranks of both meshes."""
    here, there = (topology.host_numbers[np.array(mesh.ranks, np.int64)] for mesh in (first, second))
    return bool(np.isin(here, there).any())


class Routes(NamedTuple):
    """How a move goes: see the fields of Move."""

    strategy: Strategy
    messages: Sequence[Message]
    hops: Sequence[Hop]


@dataclass(frozen=True, slots=True, eq=False)
class ProductMove:
    """A move that formulas can route.

    Attributes:
        source, destination: the grids.
        rings: of the destination's tiles.
        cutting: of the source's.
        sending, receiving: the NICs of either side.
        context: what a strategy may know.
        senders: the source's ranks.
        participants: all ranks of either mesh, sorted.
    """

    source: Grid
    destination: Grid
    rings: Rings
    cutting: Cutting
    sending: Nics
    receiving: Nics
    context: RouteContext
    senders: tuple[int, ...]
    participants: Sequence[int]

    @classmethod
    def of(
        cls, source: ShardingSpec, destination: ShardingSpec, context: RouteContext, participants: Sequence[int]
    ) -> "ProductMove | None":
        """None where formulas do not apply: explicit holdings, hosts that are not alike or have ranks of both meshes,
        nothing to move, or no replicas, where each element has one way to go and nothing is to be chosen.
        """
        topology = context.topology
        if not (is_product(source) and is_product(destination)) or 0 in (*source.global_shape, source.mesh.size):
            return None
        if not source.global_shape or (source.exclusive and destination.exclusive):
            return None
        sending, receiving = nics_of(source.mesh, topology), nics_of(destination.mesh, topology)
        if sending is None or receiving is None or share_hosts(source.mesh, destination.mesh, topology):
            return None
        first, second = grid_of(source), grid_of(destination)
        rings = rings_of(second, topology)
        if rings is None:
            return None
        per_dim = [cells(*parts) for parts in zip(part_table(source).parts, part_table(destination).parts, strict=True)]
        cutting = Cutting(per_dim, first, second)
        return cls(first, second, rings, cutting, sending, receiving, context, source.mesh.ranks, participants)

    def routes(self, rank: int | None) -> Routes:
        """What all ranks do, or what one has part in."""
        way = best_way(self)
        return self._unicast(way, rank) if way.copies > 1 or self.rings.length == 1 else self._rings(way, rank)

    def _unicast(self, way: "Way", rank: int | None) -> Routes:
        pieces = self.cutting.pieces(way.copies, way.shares, rank)
        receivers = self.destination.ranks[pieces.tiles, pieces.copies]
        order = np.lexsort((receivers, pieces.senders))
        regions = pieces.regions.take(order)
        pairs = PairColumns(pieces.senders[order], receivers[order], regions, regions.numel)
        messages = unicast(pairs, None, self.context)
        return Routes(SendRecv(), messages, schedule(messages, self.participants, self.context.topology))

    def _rings(self, way: "Way", rank: int | None) -> Routes:
        pieces = self.cutting.pieces(1, way.shares, rank)
        needed = np.stack(np.unravel_index(pieces.tiles, self.destination.parts), -1)
        tile_sizes = self.cutting.destination_line.sizes(needed)
        messages = RingMessages.of(pieces, tile_sizes, self.rings, way.chunks_of)
        places = {one: place for place, one in enumerate(self.senders)}
        hops = ring_hops(messages, max(way.shares, 1), places, self.participants, self.context.topology, rank)
        return Routes(Broadcast(), messages, hops)


@dataclass(frozen=True, slots=True)
class Way:
    """How a product move may go, and what that should take: from the largest tiles alone, so equal on every rank.

    Attributes:
        context: what a strategy may know.
        copies: how often a piece is sent: once, or to each replica.
        shares: how many each holder has of the line of its tile's cells; 0 leaves cells whole.
        chunks: into how many chunks a message of a ring is cut if it is not too small or too large for that.
        limit_nbytes: the largest chunk that the staging budget allows.
        seconds: what it should take.
    """

    context: RouteContext
    copies: int
    shares: int
    chunks: int
    limit_nbytes: int
    seconds: float

    def chunks_of(self, numel: np.ndarray) -> np.ndarray:
        """Into how many chunks messages of some numbers of elements are cut."""
        return chunk_counts(numel * self.context.itemsize, self.chunks, self.limit_nbytes)


class Load(NamedTuple):
    """What the busiest of the source sends: bytes of a message, bytes of a NIC, and messages of a rank."""

    piece_nbytes: float
    nic_nbytes: float
    messages: int

    @classmethod
    def of(cls, move: ProductMove, copies: int, shares: int) -> "Load":
        """With cells shared evenly, or each cell whole."""
        holders, itemsize, ranks = move.source.replicas, move.context.itemsize, move.sending.ranks
        tile = move.cutting.source_line.largest * itemsize * copies
        cells = int(np.prod([np.bincount(held).max() for held in move.cutting.held])) * copies
        cell = int(np.prod([lengths.max() for lengths in move.cutting.lengths])) * itemsize
        each = -(-cells // holders)
        if not shares:
            return cls(cell, min(ranks * each * cell, min(ranks, len(move.source.ranks)) * tile), each)
        piece = min(tile / holders / shares, cell)
        return cls(piece, ranks * tile / holders, each + shares - 1 + int(holders > 1))


def best_way(move: ProductMove) -> Way:
    """The fastest, the plainest one that is about as fast."""
    ways = [direct_way(move, shares) for shares in (0, 1)]
    if move.rings.length > 1:
        ways += [ring_way(move, shares) for shares in (0, 1)]
        # As many messages as places to enter at, so that all NICs are busy from the first step to the last.
        messages = max(round(_tile_nbytes(move) / Load.of(move, 1, 1).piece_nbytes), 1)
        places = _places(move)
        level = {-(-places // messages), places // gcd(places, messages)}
        ways += [ring_way(move, shares) for shares in sorted(level) if shares > 1]
    best = ways[0]
    for way in ways[1:]:
        if way.seconds < best.seconds * (1 - WORTH_IT):
            best = way
    return best


def direct_way(move: ProductMove, shares: int) -> Way:
    """Every replica hears from holders."""
    topology, copies = move.context.topology, move.rings.length
    load = Load.of(move, copies, shares)
    entering = move.receiving.ranks * _tile_nbytes(move) / move.receiving.receive
    busiest = max(load.nic_nbytes / move.sending.send, entering)
    seconds = max(busiest, load.messages * topology.overhead_seconds)
    each = topology.overhead_seconds + topology.latency_seconds
    return Way(move.context, copies, shares, 1, move.context.staging_nbytes, seconds + each)


def ring_way(move: ProductMove, shares: int) -> Way:
    """Holders send each cell once, and replicas hand it on."""
    context, topology, rings = move.context, move.context.topology, move.rings
    load, tile = Load.of(move, 1, shares), _tile_nbytes(move)
    leaving = load.nic_nbytes / move.sending.send
    of_nic = move.receiving.ranks / rings.of_host * tile
    entering = of_nic / move.receiving.receive
    handed_on = of_nic / move.receiving.send * (rings.hosts - 1) / rings.hosts
    busiest = max(leaving, entering, handed_on)
    messages = max(round(tile / load.piece_nbytes), 1)
    # In one chunk each, a NIC receives in each step the messages that entered a ring at one place.
    at_once = -(-messages // _places(move))
    step = at_once * tile / messages * max(move.receiving.ranks / rings.of_host, 1.0) / move.receiving.receive
    fill = max(max(leaving, step) + (rings.hosts - 1) * step - busiest, 0.0)
    chunks = best_chunk_count(fill, busiest, messages, topology)
    chunks = max(min(chunks, int(load.piece_nbytes) // MIN_CHUNK_NBYTES), 1)
    limit = context.chunk_limit_nbytes(min(messages if chunks > 1 else at_once, MAX_PEERS_PER_ROUND))
    posts = max(load.messages, messages) * max(chunks, -(-int(load.piece_nbytes) // limit))
    each = topology.overhead_seconds + topology.latency_seconds
    seconds = max(busiest, posts * topology.overhead_seconds) + fill / chunks + rings.length * each
    return Way(context, 1, shares, chunks, limit, seconds)


def _places(move: ProductMove) -> int:
    """Places where a message can enter a ring that differ for the network: a NIC each."""
    return move.rings.hosts * max(move.rings.of_host // move.receiving.ranks, 1)


def _tile_nbytes(move: ProductMove) -> int:
    """Bytes of the largest tile of the destination."""
    return move.cutting.destination_line.largest * move.context.itemsize
