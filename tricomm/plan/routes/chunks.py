"""Messages: cut what travels along one chain of ranks into chunks.

A message is a chain of ranks, the sender first, and chunks of elements. Chunk c moves along the chain hop by
hop; a relay forwards a chunk once it has it. A message to one receiver is a chain of two.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Lazy, counts_of, numbers, offsets_of, power_of_two
from tricomm.layout.topology import Topology
from tricomm.plan.network.links import ChainLinks, crossings
from tricomm.plan.network.nic_seconds import link_seconds
from tricomm.plan.parts import Part, PartGroups, in_order, nbytes_of
from tricomm.plan.routes.cuts import (
    Chunk,
    Chunks,
    Kinds,
    Pattern,
    even_chunks,
    even_pattern,
    kinds_of,
    stepped_chunks,
    stepped_pattern,
)

MAX_PEERS_PER_ROUND = 128
"""A round groups at most this many sends and as many receives on a rank: 256 operations, above which one
NCCL group has been seen to hang (pytorch#174942)."""

MIN_CHUNK_NBYTES = 16 << 10
MAX_UNICAST_CHUNK_NBYTES = 8 << 20
MAX_CHUNKS = 256
UNICAST_CHUNKS = 4
"""Rounds of a unicast plan in which ranks have several peers: each round moves the same part of every message, so
that no pair runs ahead and leaves a NIC idle at the end. More of them were measured to gain nothing."""

FILL_SHARE = 1 / 200
"""Share of the busiest link's time below which the time to fill a chain is not worth reducing."""

BUSY_SHARE = 1 / 5
"""Maximum share of the busiest link's time that a rank spends on the cost of chunks, so that the link hides it."""

ROUND_COSTS = 20
"""Least ratio of what a unicast round lasts to what it costs."""

ROUNDS_IN_FLIGHT = 10
"""Most chunks of one peer that are staged at once, both directions together; divides the staging budget."""


@dataclass(frozen=True, slots=True)
class Message:
    """Chunks that follow one chain of ranks.

    Attributes:
        chain: the sender, then the receivers in the order in which they receive and forward.
        chunks: in the order of sending.
        parents: of each receiver, the place in ``chain`` of the rank from which it receives; None is the one before it.
        in_one_call: whether each chunk goes from the sender to all others at once, by a broadcast where the ranks'
            transport has such; elsewhere the sender sends it to each of them.

    Example:
        >>> chunks = ((Part(0, 4, (((0, 4),),)),), (Part(0, 4, (((4, 6),),)),))
        >>> message = Message((0, 2, 3), chunks)  # rank 2 forwards to rank 3
        >>> message.numel, message.nbytes, message.chunk_nbytes(1)
        (6, 24, 8)
    """

    chain: tuple[int, ...]
    chunks: Sequence[Chunk]
    parents: tuple[int, ...] | None = field(default=None, repr=False)
    in_one_call: bool = field(default=False, repr=False)

    @property
    def sources(self) -> tuple[int, ...]:
        """The rank from which each receiver hears, in the order of the chain."""
        return self.chain[:-1] if self.parents is None else tuple(self.chain[place] for place in self.parents)

    def chunk_nbytes(self, index: int) -> int:
        """Count the bytes of one chunk."""
        if isinstance(self.chunks, Chunks):
            return self.chunks.nbytes[index]
        return nbytes_of(self.chunks[index])

    @property
    def nbytes(self) -> int:
        """Count the bytes of the message, each once, however many ranks receive it."""
        return sum(self.chunk_nbytes(index) for index in range(len(self.chunks)))

    @property
    def numel(self) -> int:
        """Count the elements of the message, each once."""
        return sum(part.numel for chunk in self.chunks for part in chunk)


def in_one_call(message: Message) -> Message:
    """The same message to all receivers at once, if there are several and not too many."""
    receivers = len(message.chain) - 1
    if not 1 < receivers <= MAX_PEERS_PER_ROUND:
        return message
    return replace(message, parents=(0,) * receivers, in_one_call=True)


Grouped = PartGroups | tuple[tuple[Part, ...], ...]
"""The parts of several messages: of one stack as columns, of several as values."""


class PairColumns(NamedTuple):
    """What goes from one rank to one other, as columns, ascending by sender and then by receiver.

    Attributes:
        senders, receivers: (pairs,), ranks.
        parts: of each pair.
    """

    senders: np.ndarray
    receivers: np.ndarray
    parts: Grouped

    @property
    def nbytes(self) -> np.ndarray:
        """Bytes of each pair."""
        if isinstance(self.parts, PartGroups):
            return self.parts.nbytes
        return numbers(map(nbytes_of, self.parts), len(self.parts))

    def take(self, rows: np.ndarray) -> "PairColumns":
        """Take some rows."""
        if isinstance(self.parts, PartGroups):
            parts: Grouped = self.parts.take(rows)
        else:
            parts = tuple(self.parts[row] for row in rows.tolist())
        return PairColumns(self.senders[rows], self.receivers[rows], parts)


class CutTable(NamedTuple):
    """The chunks of some messages, equal ones once, as columns; see Pattern.

    Attributes:
        first: (messages,), the number of the first chunk of each that has several.
        nbytes: (chunks,).
        firsts: (chunks + 1,), the first piece of each chunk.
        spans: (pieces, dims, 2), where each piece starts and stops, by place in the part of its message; None if some
            message has several parts, parts differ in their number of dims, or no message has several chunks.
        are_whole: whether each chunk is one piece.
    """

    first: np.ndarray
    nbytes: np.ndarray
    firsts: np.ndarray
    spans: np.ndarray | None
    are_whole: bool

    @classmethod
    def of(cls, first: np.ndarray, patterns: Sequence[Pattern]) -> "CutTable":
        """Of messages that are cut by some patterns."""
        counts = np.concatenate([counts_of(one.firsts) for one in patterns] or [np.zeros(0, np.int64)])
        nbytes = numbers(size for one in patterns for size in one.nbytes)
        spans = [one.spans for one in patterns if one.spans is not None]
        alike = len({one.shape[1] for one in spans}) == 1 and len(spans) == len(patterns)
        table = np.concatenate(spans) if alike else None
        return cls(first, nbytes, offsets_of(counts), table, bool((counts == 1).all()))


class MessageTable(Lazy[Message]):
    """Messages as columns.

    Attributes:
        senders: (messages,), the first rank of each chain.
        parts: of each message.
        nbytes: (messages,), of each.
        cut: the chunks of those messages that have more than one.
        chunk_counts: (messages,).
    """

    __slots__ = ("_cuts", "chunk_counts", "cut", "nbytes", "parts", "senders")

    def __init__(
        self,
        senders: np.ndarray,
        parts: Grouped,
        nbytes: np.ndarray,
        cut: Mapping[int, Chunks],
    ) -> None:
        self.senders, self.parts, self.nbytes, self.cut = senders, parts, nbytes, cut
        self.chunk_counts = np.ones(len(senders), np.int64)
        self.chunk_counts[list(cut)] = [len(chunks) for chunks in cut.values()]
        self._cuts: CutTable | None = None

    def cuts(self) -> "CutTable":
        """The chunks of those messages that have several."""
        if self._cuts is None:
            bases: dict[int, int] = {}  # by pattern, which most messages share
            patterns: list[Pattern] = []
            count, of_messages = 0, []
            for chunks in self.cut.values():
                pattern = chunks.pattern
                base = bases.get(id(pattern))
                if base is None:
                    base = bases[id(pattern)] = count
                    patterns.append(pattern)
                    count += len(pattern.chunks)
                of_messages.append(base)
            first = np.zeros(len(self), np.int64)
            first[numbers(self.cut, len(self.cut))] = of_messages
            self._cuts = CutTable.of(first, patterns)
        return self._cuts

    @property
    @abstractmethod
    def links(self) -> ChainLinks:
        """The links of all chains, message after message."""

    @abstractmethod
    def receivers_of(self, row: int) -> tuple[int, ...]:
        """The ranks that receive a message, in the order of its chain."""

    def parents_of(self, row: int) -> tuple[int, ...] | None:
        """See Message."""
        return None

    def __len__(self) -> int:
        return len(self.senders)

    def _items(self, rows: np.ndarray) -> Iterator[Message]:
        parts = self.parts
        wholes = parts._items(rows) if isinstance(parts, PartGroups) else (parts[row] for row in rows.tolist())
        for row, sender, whole in zip(rows.tolist(), self.senders[rows].tolist(), wholes, strict=True):
            yield Message((sender, *self.receivers_of(row)), self.cut.get(row, (whole,)), self.parents_of(row))


class Unicasts(MessageTable):
    """Messages to one receiver each, as columns.

    Attributes:
        pairs: what goes where.
    """

    __slots__ = ("pairs",)

    def __init__(self, pairs: PairColumns, cut: Mapping[int, Chunks]) -> None:
        super().__init__(pairs.senders, pairs.parts, pairs.nbytes, cut)
        self.pairs = pairs

    @property
    def links(self) -> ChainLinks:
        """See MessageTable."""
        rows = np.arange(len(self))
        return ChainLinks(rows, self.pairs.senders, self.pairs.receivers, rows)

    def receivers_of(self, row: int) -> tuple[int, ...]:
        """See MessageTable."""
        return (int(self.pairs.receivers[row]),)

    @classmethod
    def of(cls, pairs: PairColumns, counts: np.ndarray, pattern_of: Callable[[Kinds, int], Pattern]) -> "Unicasts":
        """Cut each message into as many chunks as ``counts`` says, and leave out empty ones."""
        return cls(pairs, cut_where(pairs.parts, counts, pattern_of))

    def touching(self, rank: int) -> "Unicasts":
        """Take the messages that a rank sends or receives."""
        rows = np.flatnonzero((self.pairs.senders == rank) | (self.pairs.receivers == rank))
        if len(rows) == len(self):
            return self
        at = {row: index for index, row in enumerate(rows.tolist())}
        return Unicasts(self.pairs.take(rows), {at[row]: chunks for row, chunks in self.cut.items() if row in at})


def cut_where(parts: Grouped, counts: np.ndarray, pattern_of: Callable[[Kinds, int], Pattern]) -> dict[int, Chunks]:
    """Cut the groups of which ``counts`` says that they have several chunks."""
    rows = np.flatnonzero(counts > 1)
    several = zip(rows.tolist(), counts[rows].tolist(), strict=True)
    if not len(rows):
        return {}
    if isinstance(parts, PartGroups) and parts.groups.single:
        regions = parts.groups.regions
        extents = [lists.lengths[regions.rows[rows, dim]].tolist() for dim, lists in enumerate(regions.dims)]
        shapes = zip(*extents, strict=True) if extents else [()] * len(rows)  # tensors without dims
        cut = zip(several, shapes, strict=True)
        return {row: Chunks(parts, row, pattern_of(((parts.itemsize, shape),), count)) for (row, count), shape in cut}
    wholes = parts._items(rows) if isinstance(parts, PartGroups) else [parts[row] for row in rows.tolist()]
    return {
        row: Chunks((whole,), 0, pattern_of(kinds_of(whole), count))
        for (row, count), whole in zip(several, wholes, strict=True)
    }


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What a strategy may know beside the assignments.

    Attributes:
        topology: hosts and rates.
        peers: an upper bound on the peers of one rank, equal on all ranks.
        staging_nbytes: the budget for packed chunks on one rank.
    """

    topology: Topology
    peers: int
    staging_nbytes: int

    def chunk_limit_nbytes(self, peers: int) -> int:
        """Find the largest chunk with which ``peers`` transfers at once fit into the staging budget, even if a cut
        that falls between rows makes it an eighth larger.
        """
        return max(self.staging_nbytes // (ROUNDS_IN_FLIGHT * max(peers, 1)) * 8 // 9, 1)


PartsByChain = Mapping[tuple[int, ...], Sequence[Part]]
"""What travels along each chain of ranks."""


def chained(
    by_chain: PartsByChain, chunk_bytes: int | None, context: RouteContext, *, fills: bool = True
) -> tuple[Message, ...]:
    """Make messages with chunks of a size that makes the plan fast, or of ``chunk_bytes`` if that is given.

    ``fills`` says that a chain has to be filled, for which small chunks are good.
    """
    if chunk_bytes is not None:
        return messages_of(by_chain, chunk_bytes)
    if not by_chain:
        return ()
    links = ChainLinks.of(tuple(by_chain))
    operations = np.bincount(links.sources, minlength=len(context.topology.hosts))
    np.add.at(operations, links.destinations[links.lasts], 1)
    per_rank = int(operations.max())
    limit = context.chunk_limit_nbytes(min(per_rank, MAX_PEERS_PER_ROUND))
    by_chain = {chain: in_order(parts) for chain, parts in by_chain.items()}
    nbytes = numbers(map(nbytes_of, by_chain.values()), len(by_chain))
    count = _chunk_count(links, nbytes, per_rank, context.topology) if fills else 1
    return messages(by_chain, nbytes, count, limit)


def _chunk_count(links: ChainLinks, nbytes: np.ndarray, per_rank: int, topology: Topology) -> int:
    """Choose in how many chunks to cut each message.

    Filling takes what a whole message takes on every link of its chain but the busiest, shared as links are.
    """
    crossed = crossings(links.sources, links.destinations, topology)
    sending, _ = link_seconds(crossed, nbytes[links.chain], topology)
    on_path = sending[crossed.out]
    fill = float((np.bincount(links.chain, on_path) - np.maximum.reduceat(on_path, links.firsts)).max())
    return best_chunk_count(fill, float(sending.max()), per_rank, topology)


def best_chunk_count(fill_seconds: float, busiest_seconds: float, per_rank: int, topology: Topology) -> int:
    """Choose in how many chunks to cut messages that follow chains.

    n chunks take (busiest link) + fill / n. A chunk more keeps a rank busy for ``per_rank`` posts, which does not slow
    the link down while there is little of it: so n is as large as filling is worth and BUSY_SHARE allows, and not below
    sqrt(fill / cost), which is best where nothing hides. Latency overlaps as long as a chunk lasts longer than it.
    """
    latency = topology.latency_seconds
    most = min(MAX_CHUNKS, int(busiest_seconds / latency)) if latency else MAX_CHUNKS
    cost = per_rank * topology.overhead_seconds
    wanted = fill_seconds / (FILL_SHARE * busiest_seconds)
    if cost:
        wanted = max(min(wanted, BUSY_SHARE * busiest_seconds / cost), sqrt(fill_seconds / cost))
    return max(min(most, round(wanted)), 1)


def unicast(pairs: PairColumns, chunk_bytes: int | None, context: RouteContext) -> Unicasts:
    """Make messages whose chunks follow from the message alone, so that each rank of a pair finds them for itself.

    As many as a round is worth, in powers of two, or if that is more as the staging budget asks for.
    """
    topology, peers = context.topology, context.peers
    if chunk_bytes is not None:
        return Unicasts.of(pairs, -(-pairs.nbytes // chunk_bytes), lambda kinds, _: stepped_pattern(kinds, chunk_bytes))
    limit = min(MAX_UNICAST_CHUNK_NBYTES, context.chunk_limit_nbytes(min(peers, MAX_PEERS_PER_ROUND)))
    # A round is worth its cost if it takes much longer.
    round_seconds = ROUND_COSTS * (topology.latency_seconds + peers * topology.overhead_seconds) / peers
    nbytes = pairs.nbytes
    wanted = np.ones(len(nbytes), np.int64)
    if peers > 1:
        rates = topology.rates_between(pairs.senders, pairs.receivers)
        wanted = np.minimum(nbytes / np.maximum(rates * round_seconds, MIN_CHUNK_NBYTES), UNICAST_CHUNKS)
    worth = power_of_two(np.maximum(wanted.astype(np.int64), 1))
    return Unicasts.of(pairs, np.maximum(worth, -(-nbytes // limit)), even_pattern)


def chunk_counts(nbytes: np.ndarray, count: int, limit_nbytes: int, tiny_nbytes: int = MIN_CHUNK_NBYTES) -> np.ndarray:
    """Choose into how many chunks to cut messages of some sizes: ``count``, fewer if they would be tiny, more if they
    would exceed the limit.
    """
    least = np.maximum(-(-nbytes // limit_nbytes), 1)
    counts: np.ndarray = np.maximum(np.minimum(count, nbytes // tiny_nbytes), least)
    return counts


def messages(by_chain: PartsByChain, nbytes: np.ndarray, count: int, limit_nbytes: int) -> tuple[Message, ...]:
    """Cut each message into ``count`` chunks; fewer if they would be tiny, more if they would exceed the limit."""
    parts = chunk_counts(nbytes, count, limit_nbytes)
    counted = zip(by_chain.items(), parts.tolist(), strict=True)
    return tuple(_message(chain, parts, count) for (chain, parts), count in sorted(counted, key=lambda one: one[0][0]))


def _message(chain: tuple[int, ...], parts: Sequence[Part], count: int) -> Message:
    return Message(chain, (tuple(parts),) if count == 1 else even_chunks(parts, count))


def messages_of(by_chain: PartsByChain, chunk_nbytes: int) -> tuple[Message, ...]:
    """Make messages with chunks of the size that was asked for; the last of each may be smaller."""
    return tuple(
        Message(chain, stepped_chunks(in_order(parts), chunk_nbytes))
        for chain, parts in sorted(by_chain.items(), key=lambda one: one[0])
    )
