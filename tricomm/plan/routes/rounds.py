"""Rounds: decide when each hop happens.

Every message moves the same fraction of itself at a time, along all hops of its chain at once: with messages cut into n
chunks, chunk c crosses the h-th of its chain's links between hosts in step c + h. So in each step a NIC carries one
n-th of all that it has to carry, none more than one n-th of what the busiest carries, and n + (links of the longest
chain) - 1 steps are all: the optimum but for filling the chains. No search over orders can do better by more than
that, so none is made. Hops within a host take next to nothing beside those; they are the rounds of a step.

Within a round a rank sends to other hosts first, and to those after it first, each to others: if all began with the
lowest rank, its NIC alone would be busy until queues have filled.

A rank executes its rounds in order. Sender and receiver hold a hop in the same round and, of several between the same
two ranks, in the same order, so sends and receives match and nothing can deadlock, even if a send blocks until its
receive is posted and a group of operations completes as one (NCCL).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Lazy, numbers, offsets_of, power_of_two
from tricomm.layout.topology import Topology
from tricomm.plan.network.links import ChainLinks
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND, Message, Unicasts

BATCH_STRIDE = 1 << 40
"""Round numbers of one batch of messages; rounds are ordered, not dense."""

STEP_STRIDE = 1 << 16
"""Round numbers of one step; more than a chain has hops within hosts."""

UNICAST_STEPS = 1 << 20
"""Steps over which the chunks of a unicast message are spread."""


class Hop(NamedTuple):
    """Chunk ``chunk`` of message ``message`` goes from ``source`` to ``destination`` in round ``round``."""

    round: int
    source: int
    destination: int
    message: int
    chunk: int


class Hops(Lazy[Hop]):
    """Hops as columns.

    Attributes:
        table: int array (hops, fields of a Hop).
    """

    __slots__ = ("_by_end", "table")

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self._by_end: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of_rank(self, rank: int, end: int) -> np.ndarray:
        """Take the rows in which a rank stands in the field ``end``, in their order."""
        if end not in self._by_end:  # sorted once for all ranks
            order = np.argsort(self.table[:, end], kind="stable")
            self._by_end[end] = order, self.table[order, end]
        order, ranks = self._by_end[end]
        start, stop = np.searchsorted(ranks, [rank, rank + 1]).tolist()
        rows: np.ndarray = self.table[order[start:stop]]
        return rows

    def __len__(self) -> int:
        return len(self.table)

    def _items(self, rows: np.ndarray) -> Iterator[Hop]:
        return map(Hop._make, self.table[rows].tolist())


def hops_of_rank(hops: Sequence[Hop], rank: int, end: int) -> np.ndarray:
    """Take the hops, as rows of :func:`hop_table`, in which a rank stands in the field ``end``."""
    return (hops if isinstance(hops, Hops) else Hops(hop_table(hops))).of_rank(rank, end)


def hop_table(hops: Sequence[Hop]) -> np.ndarray:
    """Make hops an int array (hops, fields of a Hop).

    Example:
        >>> hop_table([Hop(0, 2, 3, 1, 0)]).tolist()
        [[0, 2, 3, 1, 0]]
    """
    return hops.table if isinstance(hops, Hops) else np.array(hops, np.int64).reshape(-1, len(Hop._fields))


def schedule(messages: Sequence[Message], participants: Sequence[int], topology: Topology) -> Sequence[Hop]:
    """List all hops of the messages, each with its round, in order.

    Args:
        messages: at most one per pair of ranks if all are unicast; then a rank can compute its own hops alone.
        participants: all ranks of either mesh, sorted.
        topology: which hops are within a host.

    Example:
        Two chunks along a chain of three hosts; the second leaves rank 0 while rank 1 forwards the first:

        >>> from tricomm.plan.parts import Part
        >>> chunks = ((Part(0, 4, (((0, 4),),)),), (Part(0, 4, (((4, 8),),)),))
        >>> message = Message((0, 1, 2), chunks)
        >>> hops = schedule([message], range(3), Topology.flat(3))
        >>> [(hop.round // STEP_STRIDE, hop.source, hop.destination, hop.chunk) for hop in hops]
        [(0, 0, 1, 0), (1, 0, 1, 1), (1, 1, 2, 0), (2, 1, 2, 1)]
    """
    if isinstance(messages, Unicasts):
        pairs, counts = messages.pairs, messages.chunk_counts
        table = _unicast_hops(pairs.senders, pairs.receivers, counts, participants)
    elif all(len(message.chain) == 2 for message in messages):
        ends = numbers(rank for message in messages for rank in message.chain)
        counts = numbers(len(message.chunks) for message in messages)
        table = _unicast_hops(ends[0::2], ends[1::2], counts, participants)
    else:
        table = _chained_hops(messages, topology)
    return Hops(table[order_of_hops(table, participants, topology)])


def order_of_hops(table: np.ndarray, participants: Sequence[int], topology: Topology) -> np.ndarray:
    """Sort hops by round and rank: to other hosts before its own, to ranks after it before those before it."""
    rounds, senders, receivers, message, chunk = table.T
    distances = _distances(senders, receivers, participants)
    return np.lexsort((chunk, message, distances, topology.share_host(senders, receivers), senders, rounds))


def _distances(senders: np.ndarray, receivers: np.ndarray, participants: Sequence[int]) -> np.ndarray:
    """Count how many places after each sender, in the circle of all participants, its receiver stands."""
    ranks = np.array(participants, np.int64)
    distances: np.ndarray = (np.searchsorted(ranks, receivers) - np.searchsorted(ranks, senders)) % len(ranks)
    return distances


def _chained_hops(messages: Sequence[Message], topology: Topology) -> np.ndarray:
    counts = numbers((len(message.chunks) for message in messages), len(messages))
    links = ChainLinks.of([message.chain for message in messages], [message.parents for message in messages])
    at_once = numbers((message.in_one_call for message in messages), len(messages))[links.chain]
    batch = numbers(_first_fit(messages), len(messages))[links.chain]
    after = np.where(at_once, 0, _after_first(links, topology)) + batch * BATCH_STRIDE
    of_link = counts[links.chain]
    link = np.repeat(np.arange(len(of_link)), of_link)
    chunk = np.arange(len(link)) - offsets_of(of_link)[link]
    step = chunk * counts.max() // of_link[link]
    return np.column_stack(
        (step * STEP_STRIDE + after[link], links.sources[link], links.destinations[link], links.chain[link], chunk)
    )


def _after_first(links: ChainLinks, topology: Topology) -> np.ndarray:
    """Count how many rounds after its chunk's first a hop over each link comes."""
    leaves = ~topology.share_host(links.sources, links.destinations)
    # A chain within one host is in a hurry too: then its hops are steps.
    stays = ~np.logical_or.reduceat(leaves, links.firsts)
    rounds = np.where(leaves | stays[links.chain], STEP_STRIDE, 1)
    before = offsets_of(rounds)[:-1]
    after: np.ndarray = before - before[links.firsts][links.chain]
    return after


def _unicast_hops(
    senders: np.ndarray, receivers: np.ndarray, counts: np.ndarray, participants: Sequence[int]
) -> np.ndarray:
    """Find the round of each chunk from its own message alone, so that a rank needs no others to know its own.

    All ranks send at once to the ranks at the same distances, at most 128 a round. Chunks of messages of several sizes
    meet in the same rounds, of which there are a power of two.
    """
    distances = _distances(senders, receivers, participants)
    message = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(len(message)) - offsets_of(counts)[message]
    first = (distances // MAX_PEERS_PER_ROUND * BATCH_STRIDE)[message]
    steps = power_of_two(counts)
    step = chunk * steps[message] // counts[message] * (UNICAST_STEPS // steps)[message]
    rounds = first + step * STEP_STRIDE
    return np.column_stack((rounds, senders[message], receivers[message], message, chunk))


def _first_fit(messages: Sequence[Message]) -> list[int]:
    """Find the first batch in which every rank of the chain still has fewer than 128 sends and receives."""
    sends: dict[tuple[int, int], int] = {}
    receives: dict[tuple[int, int], int] = {}
    batches: list[int] = []
    for message in messages:
        batch, most = 0, MAX_PEERS_PER_ROUND - (len(message.sources) - 1 if message.in_one_call else 0)
        while any(sends.get((batch, rank), 0) >= most for rank in message.sources) or any(
            receives.get((batch, rank), 0) >= MAX_PEERS_PER_ROUND for rank in message.chain[1:]
        ):
            batch += 1
        for counts, ranks in ((sends, message.sources), (receives, message.chain[1:])):
            for rank in ranks:
                counts[batch, rank] = counts.get((batch, rank), 0) + 1
        batches.append(batch)
    return batches
