"""Rounds: when each hop happens.

A rank executes its rounds in order. In one round a rank pair exchanges at most one chunk in each direction and
both sides hold the hop in the same round, so sends and receives match and nothing can deadlock, even if a send
blocks until its receive is posted and a group of operations completes as one (NCCL).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tricomm.plan.routes import MAX_PEERS_PER_ROUND, Message
from tricomm.topology import Topology

WAVE_STRIDE = 1 << 32
"""Round numbers of one wave of a unicast plan; rounds are ordered, not dense."""


class Hop(NamedTuple):
    """Chunk ``chunk`` of message ``message`` goes from ``source`` to ``destination`` in round ``round``."""

    round: int
    source: int
    destination: int
    message: int
    chunk: int


def schedule(messages: Sequence[Message], participants: Sequence[int], topology: Topology) -> tuple[Hop, ...]:
    """All hops of the messages, each with its round, in order.

    Args:
        messages: at most one per pair of ranks if all are unicast; then a rank can compute its own hops alone.
        participants: all ranks of either mesh, sorted.
        topology: hosts share NICs.
    """
    if all(len(message.chain) == 2 for message in messages):
        return _tournament(messages, participants)
    return _list_schedule(messages, topology)


def _tournament(messages: Sequence[Message], participants: Sequence[int]) -> tuple[Hop, ...]:
    """Unicast: everybody sends at once to the ranks at the same distances, at most 128 a round.

    The round depends on the pair alone, so each rank knows its own without the others' messages.
    """
    position = {rank: index for index, rank in enumerate(participants)}
    hops: list[Hop] = []
    for index, message in enumerate(messages):
        source, destination = message.chain
        distance = (position[destination] - position[source]) % len(participants)
        wave = distance // MAX_PEERS_PER_ROUND
        for chunk in range(len(message.chunks)):
            hops.append(Hop(wave * WAVE_STRIDE + chunk, source, destination, index, chunk))
    return tuple(sorted(hops))


def _list_schedule(messages: Sequence[Message], topology: Topology) -> tuple[Hop, ...]:
    """Chains: each hop in the earliest round in which its data is there and all four ends are free.

    A rank sends one chunk and receives one chunk a round; a host lets as many chunks in and out as it has NICs.
    """
    used: dict[tuple[str, int | str, int], int] = {}
    hops: list[Hop] = []
    longest = max((len(message.chunks) for message in messages), default=0)
    for chunk in range(longest):
        for index, message in enumerate(messages):
            if chunk >= len(message.chunks):
                continue
            earliest = 0
            for source, destination in pairwise(message.chain):
                ends: list[tuple[str, int | str, int]] = [
                    ("rank out", source, 1),
                    ("rank in", destination, 1),
                ]
                here, there = topology.host(source), topology.host(destination)
                if here != there:
                    ends += [
                        ("NIC out", here, topology.nics_per_host),
                        ("NIC in", there, topology.nics_per_host),
                    ]
                while any(used.get((kind, who, earliest), 0) >= capacity for kind, who, capacity in ends):
                    earliest += 1
                for kind, who, _ in ends:
                    used[kind, who, earliest] = used.get((kind, who, earliest), 0) + 1
                hops.append(Hop(earliest, source, destination, index, chunk))
                earliest += 1
    return tuple(sorted(hops))
