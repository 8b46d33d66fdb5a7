"""Rounds: when each hop happens.

Every message moves the same fraction of itself at a time, along all hops of its chain at once: with messages cut into n
chunks, chunk c crosses the h-th of its chain's links between hosts in step c + h. So in each step a NIC carries one
n-th of all that it has to carry, none more than one n-th of what the busiest carries, and n + (links of the longest
chain) - 1 steps are all: the optimum but for filling the chains. No search over orders can do better by more than
that, so none is made. Hops within a host take next to nothing beside those; they are the rounds of a step.

Within a round a rank sends to those after it first, each to others: if all began with the lowest rank, its NIC alone
would be busy until queues have filled.

A rank executes its rounds in order. Both sides hold a hop in the same round and, of several between the same two
ranks, in the same order, so sends and receives match and nothing can deadlock, even if a send blocks until its
receive is posted and a group of operations completes as one (NCCL).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tricomm.columns import Lazy, bounds, numbers
from tricomm.plan.chunks import MAX_PEERS_PER_ROUND, Message, Unicasts
from tricomm.topology import Topology

WAVE_STRIDE = 1 << 40
"""Round numbers of one wave; rounds are ordered, not dense."""

STEP_STRIDE = 1 << 16
"""Round numbers of one step: more than a chain has hops within hosts."""

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
    """Hops as columns: ``table`` is an int array (hops, fields of a Hop)."""

    __slots__ = ("table",)

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def _items(self, rows: np.ndarray) -> Iterator[Hop]:
        return map(Hop._make, self.table[rows].tolist())


def schedule(messages: Sequence[Message], participants: Sequence[int], topology: Topology) -> Sequence[Hop]:
    """All hops of the messages, each with its round, in order.

    Args:
        messages: at most one per pair of ranks if all are unicast; then a rank can compute its own hops alone.
        participants: all ranks of either mesh, sorted.
        topology: which hops are within a host.
    """
    if isinstance(messages, Unicasts):
        return _unicast_hops(messages.pairs.senders, messages.pairs.receivers, messages.chunk_counts, participants)
    if all(len(message.chain) == 2 for message in messages):
        ends = numbers(rank for message in messages for rank in message.chain)
        counts = numbers(len(message.chunks) for message in messages)
        return _unicast_hops(ends[0::2], ends[1::2], counts, participants)
    steps = max(len(message.chunks) for message in messages)
    hops: list[Hop] = []
    for index, (message, wave) in enumerate(zip(messages, _first_fit(messages), strict=True)):
        count = len(message.chunks)
        firsts = [chunk * steps // count * STEP_STRIDE + wave * WAVE_STRIDE for chunk in range(count)]
        for source, destination, after in _along(message.chain, topology):
            hops += [Hop(first + after, source, destination, index, chunk) for chunk, first in enumerate(firsts)]
    position = {rank: index for index, rank in enumerate(participants)}

    def order(hop: Hop) -> tuple[int, ...]:
        distance = (position[hop.destination] - position[hop.source]) % len(position)
        return hop.round, hop.source, distance, hop.message, hop.chunk

    return tuple(sorted(hops, key=order))


def _along(chain: Sequence[int], topology: Topology) -> list[tuple[int, int, int]]:
    """(source, destination, rounds after the chunk's first) of the hops of a chain."""
    pairs = list(pairwise(chain))
    leaves = [topology.host(source) != topology.host(destination) for source, destination in pairs]
    result: list[tuple[int, int, int]] = []
    after = 0
    for (source, destination), leaves_host in zip(pairs, leaves, strict=True):
        result.append((source, destination, after))
        # A chain within one host is in a hurry too: then its hops are steps.
        after += STEP_STRIDE if leaves_host or not any(leaves) else 1
    return result


def _unicast_hops(senders: np.ndarray, receivers: np.ndarray, counts: np.ndarray, participants: Sequence[int]) -> Hops:
    """Unicast: the round of a chunk from its own message alone, so that each rank knows its own without the others'.

    Everybody sends at once to the ranks at the same distances, at most 128 a round.
    """
    ranks = np.array(participants, np.int64)
    distances = (np.searchsorted(ranks, receivers) - np.searchsorted(ranks, senders)) % len(ranks)
    message = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(len(message)) - bounds(counts)[message]
    first = (distances // MAX_PEERS_PER_ROUND * WAVE_STRIDE)[message]
    rounds = first + chunk * UNICAST_STEPS // counts[message] * STEP_STRIDE
    columns = rounds, senders[message], receivers[message], message, chunk
    order = np.lexsort((chunk, message, distances[message], senders[message], rounds))
    return Hops(np.column_stack(columns)[order])


def _first_fit(messages: Sequence[Message]) -> list[int]:
    """The first wave in which every rank of the chain still has fewer than 128 sends and receives."""
    sends: dict[tuple[int, int], int] = {}
    receives: dict[tuple[int, int], int] = {}
    waves: list[int] = []
    for message in messages:
        wave = 0
        while any(sends.get((wave, rank), 0) >= MAX_PEERS_PER_ROUND for rank in message.chain[:-1]) or any(
            receives.get((wave, rank), 0) >= MAX_PEERS_PER_ROUND for rank in message.chain[1:]
        ):
            wave += 1
        for counts, ranks in ((sends, message.chain[:-1]), (receives, message.chain[1:])):
            for rank in ranks:
                counts[wave, rank] = counts.get((wave, rank), 0) + 1
        waves.append(wave)
    return waves
