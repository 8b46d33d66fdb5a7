"""Strategies: how an assignment travels. Each turns assignments into messages.

A message is a chain of ranks, the sender first, and chunks of elements. Chunk c moves along the chain hop by
hop; a relay forwards a chunk once it has it. A message to one receiver is a chain of two. That is the whole
vocabulary: send/recv, all-gather and broadcast differ only in their chains and chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

from tricomm.errors import PlanError
from tricomm.intervals import Region, region_numel, split_region
from tricomm.plan.senders import Assignment
from tricomm.topology import Topology

MAX_PEERS_PER_ROUND = 128
"""A round groups at most this many sends and as many receives on a rank: 256 operations, above which one
NCCL group has been seen to hang (pytorch#174942)."""

MIN_CHUNK_NBYTES = 64 << 10
MAX_UNICAST_CHUNK_NBYTES = 8 << 20
MAX_CHUNKS = 256
ROUNDS_IN_FLIGHT = 10
"""Chunks of one peer that may be staged at once, both directions together; divides the staging budget."""

Chunk = tuple[Region, ...]
"""Regions that travel together, packed one after the other, each row-major."""


@dataclass(frozen=True, slots=True)
class Message:
    """Chunks that follow one chain of ranks.

    Attributes:
        chain: the sender, then the receivers in the order in which they receive and forward.
        chunks: in the order of sending.
    """

    chain: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def chunk_numel(self, index: int) -> int:
        """Elements of one chunk."""
        return sum(region_numel(region) for region in self.chunks[index])

    @property
    def numel(self) -> int:
        """Elements of the message, counted once."""
        return sum(self.chunk_numel(index) for index in range(len(self.chunks)))


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What a strategy may know beside the assignments.

    Attributes:
        itemsize: bytes of one element on the wire.
        topology: hosts and rates.
        peers: an upper bound on the peers of one rank, equal on all ranks.
        staging_nbytes: the budget for packed chunks on one rank.
    """

    itemsize: int
    topology: Topology
    peers: int
    staging_nbytes: int

    def chunk_limit_nbytes(self, peers: int) -> int:
        """The largest chunk with which ``peers`` transfers at once fit into the staging budget."""
        return self.staging_nbytes // (ROUNDS_IN_FLIGHT * max(peers, 1))


class Strategy(Protocol):
    """A rule that routes. Deterministic: equal arguments, equal messages, on every rank."""

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> tuple[Message, ...]:
        """Messages that bring every assignment to each of its receivers once."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SendRecv:
    """One message per pair of ranks; a task with several receivers is sent to each of them.

    Args:
        chunk_bytes: size of a chunk; None chooses one that fits the staging budget.
    """

    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_chunk_bytes(self.chunk_bytes)

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> tuple[Message, ...]:
        """See Strategy."""
        by_pair: dict[tuple[int, ...], list[Region]] = {}
        for assignment in assignments:
            for receiver in assignment.receivers:
                by_pair.setdefault((assignment.sender, receiver), []).extend(assignment.regions)
        limit = min(
            MAX_UNICAST_CHUNK_NBYTES,
            context.chunk_limit_nbytes(min(context.peers, MAX_PEERS_PER_ROUND)),
        )
        return _messages(by_pair, self.chunk_bytes or max(limit, 1), context.itemsize)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A task with several receivers travels along one chain of them, in chunks, so that all links work at once.

    The chain enters each host once and the ranks of a host stand next to each other (MLSys 2023, section 3).

    Args:
        chunk_bytes: size of a chunk; None balances the chain's latency against its fill time.
    """

    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_chunk_bytes(self.chunk_bytes)

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> tuple[Message, ...]:
        """See Strategy."""
        by_chain: dict[tuple[int, ...], list[Region]] = {}
        for assignment in assignments:
            chain = (assignment.sender, *_chain_order(assignment, context.topology))
            by_chain.setdefault(chain, []).extend(assignment.regions)
        return _messages(by_chain, self.chunk_bytes or _chain_chunk_nbytes(by_chain, context), context.itemsize)


@dataclass(frozen=True, slots=True)
class Auto:
    """Whichever strategy the cost model finds fastest for this pair of layouts on this topology."""

    @property
    def candidates(self) -> tuple[Strategy, ...]:
        """The strategies to compare, cheapest to run first: it wins ties."""
        return SendRecv(), Broadcast()


def _chain_order(assignment: Assignment, topology: Topology) -> tuple[int, ...]:
    """Receivers host by host: the sender's own host first, then in the order of the mesh, from the sender on.

    Starting after the sender's rank spreads the first hops of several chains over the hosts.
    """
    hosts: dict[str, list[int]] = {}
    for rank in assignment.receivers:
        hosts.setdefault(topology.host(rank), []).append(rank)
    own = topology.host(assignment.sender)
    names = sorted(hosts, key=lambda host: host != own)
    others = [host for host in names if host != own]
    turn = assignment.sender % len(others) if others else 0
    ordered = [host for host in names if host == own] + others[turn:] + others[:turn]
    return tuple(rank for host in ordered for rank in hosts[host])


def _chain_chunk_nbytes(by_chain: dict[tuple[int, ...], list[Region]], context: RouteContext) -> int:
    """Chunk size for chains: n pieces over h hops take (n + h - 1)(latency + bytes / n / rate), least at
    n = sqrt((h - 1) bytes / (latency rate)).
    """
    topology = context.topology
    numel = max(
        (sum(region_numel(region) for region in regions) for regions in by_chain.values()),
        default=0,
    )
    nbytes = numel * context.itemsize
    hops = max((len(chain) - 1 for chain in by_chain), default=1)
    bytes_per_latency = max(1, int(topology.latency_seconds * topology.nic_bytes_per_second))
    count = min(max(isqrt(max(hops - 1, 0) * nbytes // bytes_per_latency), 1), MAX_CHUNKS)
    chunk = max(-(-nbytes // count), MIN_CHUNK_NBYTES)
    return max(1, min(chunk, context.chunk_limit_nbytes(1)))


def _messages(by_chain: dict[tuple[int, ...], list[Region]], chunk_nbytes: int, itemsize: int) -> tuple[Message, ...]:
    max_numel = max(1, chunk_nbytes // itemsize)
    return tuple(Message(chain, tuple(_chunks(regions, max_numel))) for chain, regions in sorted(by_chain.items()))


def _chunks(regions: Sequence[Region], max_numel: int) -> Iterator[Chunk]:
    """Small regions travel together; a large one is cut and travels alone, so that it needs no packing if it
    is contiguous on both sides.
    """
    together: list[Region] = []
    numel = 0
    for region in regions:
        size = region_numel(region)
        alone = 2 * size > max_numel
        if together and (alone or numel + size > max_numel):
            yield tuple(together)
            together, numel = [], 0
        if alone:
            for piece in split_region(region, max_numel):
                yield (piece,)
        else:
            together.append(region)
            numel += size
    if together:
        yield tuple(together)


def _check_chunk_bytes(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes <= 0):
        raise PlanError(f"chunk_bytes={chunk_bytes!r} must be a positive number of bytes, or None to choose")
