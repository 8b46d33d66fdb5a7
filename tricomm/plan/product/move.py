"""A move that formulas can route, and its routes by a way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tricomm.layout.columns import Groups
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.allotted import allotted
from tricomm.plan.product.entries import least_heard
from tricomm.plan.product.grid import Grid, Rings, grid_of, is_held_once
from tricomm.plan.product.loads import Loads
from tricomm.plan.product.nics import Nics, nics_of, share_hosts, units_of
from tricomm.plan.product.pieces import Cutting
from tricomm.plan.product.rings import BY_LOAD, FROM_SENDER, RingMessages, Visits, ring_hops
from tricomm.plan.product.shared import SharedHosts
from tricomm.plan.product.sharing import BY_ALLOTMENT, Allotment, Sharing
from tricomm.plan.product.way import Way
from tricomm.plan.refine import cells
from tricomm.plan.routes.chunks import MIN_CHUNK_NBYTES, PairColumns, RouteContext, Unicasts, unicast
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.rounds import schedule
from tricomm.plan.routes.strategies import Auto, Broadcast, GlobalAllGather, SendRecv, Strategy
from tricomm.plan.tasks import wire_itemsize

WORTH_A_POST = 4
"""How much longer than it takes to post a chunk it shall be on its way, where NICs are so slow that a small one is."""

LEAST_CHUNK_NBYTES = 1 << 10


@dataclass(frozen=True, slots=True, eq=False)
class ProductMove:
    """A move that formulas can route.

    Attributes:
        source, destination: the grids.
        rings: the ranks of each tile of the destination, by host.
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
        """None where formulas do not apply: holdings that are no grid, NICs that differ in a mesh, nothing to move, a
        strategy that is none of theirs, or no replicas, where each element has one way to go and there is no choice.
        """
        topology = context.topology
        if 0 in (*source.global_shape, source.mesh.size, len(source.global_shape)):
            return None
        if is_held_once(source) and is_held_once(destination):
            return None
        if not isinstance(strategy, Auto | SendRecv | Broadcast | GlobalAllGather):
            return None
        if isinstance(strategy, Broadcast) and strategy.one_call:
            return None
        sending, receiving = nics_of(source.mesh, topology), nics_of(destination.mesh, topology)
        first, second = grid_of(source), grid_of(destination)
        if first is None or second is None or sending is None or receiving is None:
            return None
        rings = Rings.of(second, topology)
        per_dim = [cells(*parts) for parts in zip(part_table(source).parts, part_table(destination).parts, strict=True)]
        is_shared = share_hosts(source.mesh, destination.mesh, topology)
        cutting = Cutting(per_dim, first, second, alone=is_shared, units=units_of(first, topology))
        shared = SharedHosts(cutting, Rings.of(first, topology), rings, topology.host_numbers) if is_shared else None
        senders = source.mesh.ranks
        return cls(
            first,
            second,
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

    @property
    def rails(self) -> int:
        """NICs of a host through which the replicas of a tile hear."""
        return max(self.rings.of_host // self.receiving.ranks, 1)

    @property
    def tile_nbytes(self) -> int:
        """Bytes of the largest tile of the destination."""
        return self.cutting.destination_line.largest * self.itemsize

    @property
    def tiny_nbytes(self) -> int:
        """Chunks shall not be smaller: a NIC sends them about as fast as a rank posts them."""
        rate = min(self.sending.send, self.receiving.send, self.receiving.receive)
        nbytes = int(WORTH_A_POST * rate * self.context.topology.overhead_seconds)
        return min(max(nbytes, LEAST_CHUNK_NBYTES), MIN_CHUNK_NBYTES)

    def loads(self, messages: int, sharing: Sharing, kinds: Sequence[int]) -> list[Loads]:
        """What the NICs of a tile's replicas carry if it comes in so many messages, shared so among holders; for some
        numbers of children.
        """
        if self.shared is not None:
            return Loads.among(self.shared, self.rails, messages, sharing, kinds)
        return [Loads.apart(self.rings.most_hosts, self.rails, messages, children) for children in kinds]

    def delay(self, way: Way) -> float:
        """Seconds by which a way may keep back other stacks that move at the same time.

        Where receivers are the slower side, it is all the same to a stack alone how many of its holders send. But ties
        fall alike for all stacks of a set, on the same holders, and those then keep the whole set waiting.
        """
        return way.uneven_seconds if self.has_company else 0.0

    def routes_of(self, way: Way, rank: int | None = None) -> Routes:
        """What all ranks do by a way, or what one has part in."""
        messages, topology = self.messages_of(way, rank), self.context.topology
        if isinstance(messages, Unicasts):
            direct = self.strategy if isinstance(self.strategy, SendRecv) else SendRecv()
            return Routes(direct, messages, schedule(messages, self.participants, topology))
        strategy = Broadcast() if isinstance(self.strategy, Auto) else self.strategy
        places = {one: place for place, one in enumerate(self.senders)}
        hops = ring_hops(messages, way.sharing.each, places, self.participants, topology, rank)
        return Routes(strategy, messages, hops)

    def messages_of(self, way: Way, rank: int | None = None) -> Unicasts | RingMessages:
        """The same without the order."""
        return self._directly(way, rank) if way.children == 0 else self._round_about(way, rank)

    def _parts(self, regions: Groups) -> PartGroups:
        """Regions of the stack."""
        return PartGroups(self.stack, self.itemsize, regions)

    def _directly(self, way: Way, rank: int | None) -> Unicasts:
        shares = way.sharing.shares
        allotment = _allotment(self, shares) if shares in BY_ALLOTMENT else None
        if self.shared is not None:
            pairs = self.shared.pairs(way.sharing, rank, self._parts, allotment)
        else:
            pieces = self.cutting.pieces(self.rings.replicas, way.sharing, rank, allotment)
            receivers = self.destination.ranks[pieces.tiles, pieces.copies]
            order = np.lexsort((receivers, pieces.senders))
            parts = self._parts(pieces.regions.take(order))
            pairs = PairColumns(pieces.senders[order], receivers[order], parts)
        chunk_bytes = self.strategy.chunk_bytes if isinstance(self.strategy, SendRecv) else None
        return unicast(pairs, chunk_bytes, self.context)

    def _round_about(self, way: Way, rank: int | None) -> RingMessages:
        return RingMessages.of(self._visits(way, rank), self.rings, self._children(way), self._parts, way.chunks_of)

    def _visits(self, way: Way, rank: int | None) -> Visits:
        if self.shared is not None:
            return self.shared.visits(way.sharing, rank, way.skewed, way.aside)
        if way.least_heard:
            visits = _least_heard(self, replace(way, least_heard=False))
            return visits if rank is None else visits.take(self._with(visits, rank))
        cutting = _by_cell(self) if way.by_cell else self.cutting
        pieces = cutting.pieces(1, way.sharing, rank)
        sizes = cutting.sizes_of(pieces.tiles)
        return Visits.round_about(pieces, sizes, self.rings, way.by_replica, way.skewed)

    def _with(self, visits: Visits, rank: int) -> np.ndarray:
        """Those that a rank sends or hears."""
        needed = self.destination.find(rank)
        heard = visits.tiles == (-1 if needed is None else needed[0])
        return np.flatnonzero(heard | (visits.senders == rank))

    def _children(self, way: Way) -> np.ndarray:
        """How many hosts a host gives the messages of each rank to; see RingMessages."""
        ranks = len(self.context.topology.hosts)
        if way.children != BY_LOAD:
            return np.full(ranks, way.children)
        messages, posts = _loads_of_senders(self, way)
        return np.where(posts > messages.max(initial=0), 1, FROM_SENDER)

    def is_uneven(self, way: Way) -> bool:
        """Whether some senders would post more than others do anyway if they gave their messages to all hosts, and some
        would not.
        """
        messages, posts = _loads_of_senders(self, way)
        more = posts > messages.max(initial=0)
        return bool(more.any() and not more[posts > messages].all())


@lru_cache(maxsize=64)
def _loads_of_senders(move: ProductMove, way: Way) -> tuple[np.ndarray, np.ndarray]:
    """How many messages each rank sends, and how often if it gives each to all its hosts; by identity of the move."""
    visits, ranks = move._visits(way, None), len(move.context.topology.hosts)
    posts = np.bincount(visits.senders, visits.spans, ranks).astype(np.int64)
    return np.bincount(visits.senders, minlength=ranks), posts


@lru_cache(maxsize=64)
def _least_heard(move: ProductMove, way: Way) -> Visits:
    """What all ranks send by a way, but for where it enters; by identity of the move."""
    return least_heard(move._visits(way, None), move.rings, move.context.topology)


@lru_cache(maxsize=64)
def _by_cell(move: ProductMove) -> Cutting:
    """The cutting whose holders share each cell by itself; by identity of the move."""
    return Cutting(move.cutting.cells, move.source, move.destination, alone=True)


@lru_cache(maxsize=64)
def _allotment(move: ProductMove, shares: int) -> Allotment:
    """Who sends each cell to each replica; by identity of the move."""
    return allotted(move.cutting, move.itemsize, move.context.topology, shares)
