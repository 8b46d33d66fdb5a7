"""Strategies: how an assignment travels. Each turns assignments into messages.

The vocabulary is a message: chunks that follow one chain of ranks. Send/recv, all-gather and broadcast differ
only in their chains and chunks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.columns import Groups
from tricomm.layout.intervals import Region, region_numel
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import by_host, grouped
from tricomm.plan.routes.chunks import (
    Message,
    PairColumns,
    RegionsByChain,
    RouteContext,
    chained,
    even_parts,
    unicast,
)
from tricomm.plan.senders.policy import Assignment, DirectAssignments


class Strategy(Protocol):
    """A rule that routes. Deterministic: equal arguments, equal messages, on every rank."""

    @property
    def fan_out(self) -> FanOut:
        """How often a task leaves its sender's NIC."""
        ...

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """Messages that bring every assignment to each of its receivers once."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Chunked:
    """What the strategies have in common.

    Args:
        chunk_bytes: size of a chunk; None chooses one that fits the staging budget and, for a chain, balances its
            fill time against what a chunk costs.
    """

    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None and (not isinstance(self.chunk_bytes, int) or self.chunk_bytes <= 0):
            raise PlanError(f"chunk_bytes={self.chunk_bytes!r} must be a positive number of bytes, or None to choose")


@dataclass(frozen=True, slots=True)
class SendRecv(_Chunked):
    """One message per pair of ranks; a task with several receivers is sent to each of them."""

    @property
    def fan_out(self) -> FanOut:
        """See Strategy."""
        return FanOut.EVERY_RANK

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """See Strategy."""
        return unicast(_pairs(assignments), self.chunk_bytes, context)


def _pairs(assignments: Sequence[Assignment]) -> PairColumns:
    """What goes from each rank to each other."""
    if isinstance(assignments, DirectAssignments):
        order = np.lexsort((assignments.receivers, assignments.senders))
        senders, receivers = assignments.senders[order], assignments.receivers[order]
        regions = assignments.regions.take(order)
        is_new = np.ones(len(order), bool)
        is_new[1:] = (senders[1:] != senders[:-1]) | (receivers[1:] != receivers[:-1])
        begins = np.flatnonzero(is_new)
        groups = Groups(regions.regions, np.append(regions.offsets[begins], len(regions.regions)))
        return PairColumns(senders[begins], receivers[begins], groups, groups.numel)
    by_pair: dict[tuple[int, int], list[Region]] = {}
    for assignment in assignments:
        for receiver in assignment.receivers:
            by_pair.setdefault((assignment.sender, receiver), []).extend(assignment.regions)
    ends = np.array(sorted(by_pair), np.int64).reshape(-1, 2)
    lists = tuple(tuple(by_pair[pair]) for pair in sorted(by_pair))
    numel = np.array([sum(map(region_numel, regions)) for regions in lists], np.int64)
    return PairColumns(ends[:, 0], ends[:, 1], lists, numel)


@dataclass(frozen=True, slots=True)
class _Chained(_Chunked, ABC):
    """A strategy in which receivers may forward."""

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """See Strategy."""
        if isinstance(assignments, DirectAssignments) or all(
            len(assignment.receivers) == 1 for assignment in assignments
        ):
            # Nothing to forward. A rank that plans alone sees its own part only, which must then be cut the same.
            return unicast(_pairs(assignments), self.chunk_bytes, context)
        return chained(self._regions_by_chain(assignments, context), self.chunk_bytes, context)

    @abstractmethod
    def _regions_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> RegionsByChain:
        """What travels along which chain."""


@dataclass(frozen=True, slots=True)
class LocalAllGather(_Chained):
    """Each receiving host gets a task once, a part per device, and its devices hand the parts around (Alpa's).

    A part goes around as a chain: sender, the device whose part it is, the other devices of the host. Alpa needs
    the host's devices to divide the tensor and one replicated axis; here parts are as even as rows allow.
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy."""
        return FanOut.EVERY_HOST

    def _regions_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> RegionsByChain:
        by_chain: dict[tuple[int, ...], list[Region]] = {}
        for assignment in assignments:
            for ranks in by_host(assignment.receivers, context.topology):
                _hand_around(by_chain, assignment, ranks)
        return by_chain


@dataclass(frozen=True, slots=True)
class GlobalAllGather(_Chained):
    """Every receiver gets a part of a task, and all receivers hand their parts around one ring (scatter, then
    all-gather, both at once here).
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy."""
        return FanOut.ONCE

    def _regions_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> RegionsByChain:
        by_chain: dict[tuple[int, ...], list[Region]] = {}
        for assignment in assignments:
            _hand_around(by_chain, assignment, assignment.receivers)
        return by_chain


@dataclass(frozen=True, slots=True)
class Broadcast(_Chained):
    """A task with several receivers travels along one chain of them, in chunks, so that all links work at once.

    The chain enters each host once, and ranks of a host stand next to each other (the paper's section 3). Where
    a host's receivers have NICs of their own the task is cut into as many parts, and each part enters a host at
    another device, so that all its NICs work.
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy."""
        return FanOut.ONCE

    def _regions_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> RegionsByChain:
        topology = context.topology
        alike: dict[tuple[int, ...], list[Assignment]] = {}
        for assignment in assignments:
            alike.setdefault(assignment.receivers, []).append(assignment)
        by_chain: dict[tuple[int, ...], list[Region]] = {}
        for receivers, members in alike.items():
            hosts = [grouped(ranks, topology.nic) for ranks in by_host(receivers, topology)]
            rails = max(map(len, hosts))
            sizes = [assignment.numel for assignment in members]
            # Equal assignments rotate over the rails; otherwise each is spread over all of them.
            pieces = rails // gcd(rails, len(members)) if max(sizes) - min(sizes) <= max(sizes) // 64 else rails
            rail = 0
            for assignment in members:
                for part in even_parts(assignment.regions, pieces):
                    chain = [assignment.sender]
                    for nics in hosts:
                        first = rail % len(nics)
                        chain += [rank for ranks in (*nics[first:], *nics[:first]) for rank in ranks]
                    by_chain.setdefault(tuple(chain), []).extend(part)
                    rail += 1
        return {chain: regions for chain, regions in by_chain.items() if regions}


@dataclass(frozen=True, slots=True)
class Auto:
    """Whichever strategy the cost model finds fastest for this pair of layouts on this topology."""

    @property
    def candidates(self) -> tuple[Strategy, ...]:
        """The strategies to compare, cheapest to run first: it wins ties."""
        return SendRecv(), Broadcast(), LocalAllGather(), GlobalAllGather()


def _hand_around(by_chain: dict[tuple[int, ...], list[Region]], assignment: Assignment, ranks: Sequence[int]) -> None:
    """A part of the assignment for each rank, which goes on to the others in a ring."""
    for index, part in enumerate(even_parts(assignment.regions, len(ranks))):
        if part:
            by_chain.setdefault((assignment.sender, *ranks[index:], *ranks[:index]), []).extend(part)
