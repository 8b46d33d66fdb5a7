"""Messages: what travels along one chain of ranks, and in how many chunks.

A message is a chain of ranks, the sender first, and chunks of elements. Chunk c moves along the chain hop by
hop; a relay forwards a chunk once it has it. A message to one receiver is a chain of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt

from tricomm.intervals import Region, cut_regions, region_numel
from tricomm.topology import Topology

MAX_PEERS_PER_ROUND = 128
"""A round groups at most this many sends and as many receives on a rank: 256 operations, above which one
NCCL group has been seen to hang (pytorch#174942)."""

MIN_CHUNK_NBYTES = 16 << 10
MAX_UNICAST_CHUNK_NBYTES = 8 << 20
MAX_CHUNKS = 256
UNICAST_CHUNKS = 8
"""Rounds of a unicast plan in which ranks have several peers: each round moves the same part of every message, so
that no pair runs ahead and leaves a NIC idle at the end."""

ROUND_COSTS = 20
"""A unicast round lasts at least so many times what it costs."""

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
        """The largest chunk with which ``peers`` transfers at once fit into the staging budget, even if a cut that
        falls between rows makes it an eighth larger.
        """
        return max(self.staging_nbytes // (ROUNDS_IN_FLIGHT * max(peers, 1)) * 8 // 9, 1)


Legs = Mapping[tuple[int, ...], Sequence[Region]]
"""What travels along each chain."""


def even_parts(regions: Sequence[Region], count: int) -> list[tuple[Region, ...]]:
    """Cut regions into about equal parts, between rows where that changes a part by an eighth at the most."""
    numel = sum(map(region_numel, regions))
    points = [numel * index // count for index in range(1, count)]
    return cut_regions(regions, points, numel // count // 16)


def chained(legs: Legs, chunk_bytes: int | None, context: RouteContext) -> tuple[Message, ...]:
    """Messages with chunks of a size that makes the plan fast."""
    if chunk_bytes is not None:
        return messages_of(legs, chunk_bytes, context.itemsize)
    if not legs:
        return ()
    sends: dict[int, int] = {}
    for chain in legs:
        for rank in chain:
            sends[rank] = sends.get(rank, 0) + 1
    per_rank = max(sends.values())
    limit = context.chunk_limit_nbytes(min(per_rank, MAX_PEERS_PER_ROUND))
    return messages(legs, _chunk_count(legs, per_rank, context), limit, context.itemsize)


def _chunk_count(legs: Legs, per_rank: int, context: RouteContext) -> int:
    """In how many chunks to cut each message.

    n chunks take (busiest link) + fill / n + n * cost, where fill is the time of a whole message on every link of
    its chain but the busiest, shared as links are, and cost what a rank is busy for with a chunk more. Least at
    sqrt(fill / cost). Latency overlaps as long as a chunk lasts longer than it.
    """
    topology = context.topology
    link_seconds: dict[tuple[str, int], float] = {}
    paths: list[list[tuple[str, int]]] = []
    for chain, regions in legs.items():
        nbytes = sum(map(region_numel, regions)) * context.itemsize
        path: list[tuple[str, int]] = []
        for source, destination in pairwise(chain):
            link, rate = ("rank", source), topology.intra_bytes_per_second
            if topology.host(source) != topology.host(destination):
                nic = topology.nic(source)
                link, rate = ("NIC", nic), topology.nic_rate(nic).send_bytes_per_second
            link_seconds[link] = link_seconds.get(link, 0.0) + nbytes / rate
            path.append(link)
        paths.append(path)
    fill = max(sum(map(link_seconds.__getitem__, path)) - max(map(link_seconds.__getitem__, path)) for path in paths)
    busiest = max(link_seconds.values())
    most = min(MAX_CHUNKS, int(busiest / topology.latency_seconds)) if topology.latency_seconds else MAX_CHUNKS
    cost = per_rank * topology.overhead_seconds
    return max(min(most, round(sqrt(fill / cost)) if cost else MAX_CHUNKS), 1)


def unicast(legs: Legs, context: RouteContext) -> tuple[Message, ...]:
    """Messages whose chunks follow from the message alone, so that each rank of a pair finds them for itself.

    Counts are powers of two, so that the chunks of messages of several sizes fall into the same rounds.
    """
    topology, peers = context.topology, context.peers
    limit = min(MAX_UNICAST_CHUNK_NBYTES, context.chunk_limit_nbytes(min(peers, MAX_PEERS_PER_ROUND)))
    # A round is worth its cost if it takes much longer.
    round_seconds = ROUND_COSTS * (topology.latency_seconds + peers * topology.overhead_seconds) / peers
    result: list[Message] = []
    for chain, regions in sorted(legs.items()):
        nbytes = sum(map(region_numel, regions)) * context.itemsize
        here, there = chain
        is_local = topology.host(here) == topology.host(there)
        rate = topology.intra_bytes_per_second if is_local else topology.nic_rate(topology.nic(here))[0]
        wanted = min(UNICAST_CHUNKS, int(nbytes / max(rate * round_seconds, MIN_CHUNK_NBYTES))) if peers > 1 else 1
        parts = max(wanted, ceil(nbytes / limit), 1)
        result.append(_message(chain, regions, 1 << (parts - 1).bit_length()))
    return tuple(result)


def messages(legs: Legs, count: int, limit_nbytes: int, itemsize: int) -> tuple[Message, ...]:
    """Each message in ``count`` chunks; fewer if they would be tiny, more if they would exceed the limit."""
    result: list[Message] = []
    for chain, regions in sorted(legs.items()):
        nbytes = sum(map(region_numel, regions)) * itemsize
        parts = max(min(count, nbytes // MIN_CHUNK_NBYTES), ceil(nbytes / limit_nbytes), 1)
        result.append(_message(chain, regions, parts))
    return tuple(result)


def _message(chain: tuple[int, ...], regions: Sequence[Region], parts: int) -> Message:
    chunks = (tuple(regions),) if parts == 1 else even_parts(regions, parts)
    return Message(chain, tuple(chunk for chunk in chunks if chunk))


def messages_of(legs: Legs, chunk_nbytes: int, itemsize: int) -> tuple[Message, ...]:
    """Chunks of the size that was asked for, or less."""
    result: list[Message] = []
    for chain, regions in sorted(legs.items()):
        numel, most = sum(map(region_numel, regions)), max(1, chunk_nbytes // itemsize)
        parts = cut_regions(regions, range(most, numel, most), 0)
        result.append(Message(chain, tuple(part for part in parts if part)))
    return tuple(result)
