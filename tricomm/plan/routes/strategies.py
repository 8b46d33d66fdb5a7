"""Strategies: turn assignments into messages, which say along which chain of ranks elements travel.

A message is chunks that follow one chain of ranks. Send/recv, all-gather and broadcast differ only in their chains
and chunks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Protocol

import numpy as np

from tricomm.errors import ArgumentError, check_count, shown
from tricomm.kinds import explains_missing
from tricomm.layout.columns import Groups
from tricomm.layout.topology import Topology
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import by_host, grouped
from tricomm.plan.parts import Part, PartGroups, in_order
from tricomm.plan.routes.chunks import (
    Message,
    PairColumns,
    PartsByChain,
    RouteContext,
    chained,
    in_one_call,
    unicast,
)
from tricomm.plan.routes.cuts import even_parts
from tricomm.plan.senders.policy import Assignment, DirectAssignments


class Strategy(Protocol):
    """Routes assignments. Deterministic: equal arguments give equal messages on every rank.

    Example:
        SendRecv, Broadcast, LocalAllGather and GlobalAllGather are strategies; others need these two members only:

        >>> from tricomm import SendRecv, Topology
        >>> SendRecv().fan_out
        <FanOut.EVERY_RANK: 'once for every receiver on another host'>
        >>> SendRecv().route((), RouteContext(Topology.flat(2), 1, 1 << 20))
        ()
    """

    @property
    def fan_out(self) -> FanOut:
        """How often a task leaves its sender's NIC: what the sender policy must know before routing.

        >>> from tricomm import Broadcast
        >>> Broadcast().fan_out  # of a task only one copy leaves its sender
        <FanOut.ONCE: 'once; each host but the last forwards it'>
        """
        ...

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """Make the messages that bring every assignment to each of its receivers once.

        >>> from tricomm import Broadcast, Topology
        >>> assignment = Assignment(0, (1, 2), (Part(0, 4, (((0, 8),),)),))  # rank 0 brings 8 elements to ranks 1 and 2
        >>> [message.chain for message in Broadcast().route([assignment], RouteContext(Topology.flat(3), 2, 1 << 20))]
        [(0, 1, 2)]
        """
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Chunked:
    """A strategy with chunks of a size that the caller may set.

    Args:
        chunk_bytes: size of a chunk; None chooses one that fits the staging budget and, for a chain, weighs the time
            to fill the chain against what a chunk costs.

    Raises:
        PlanError: a size that is not positive.
        ArgumentError: one that is not an integer.
    """

    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_bytes is not None:
            check_count("chunk_bytes", self.chunk_bytes, 1, "a positive number of bytes, or None to choose")


@explains_missing
@dataclass(frozen=True, slots=True)
class SendRecv(_Chunked):
    """Send one message per pair of ranks; a task with several receivers is sent to each of them.

    Args:
        chunk_bytes: size of a chunk; None chooses one that fits the staging budget.

    Example:
        >>> from tricomm import Mesh, SendRecv, ShardingSpec, Topology, make_plan
        >>> one = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 20,), "float32")
        >>> four = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
        >>> hosts = Topology(("a", "b", "b", "c", "c"))
        >>> move = make_plan(one, four, topology=hosts, strategy=SendRecv()).moves[0]
        >>> [message.chain for message in move.messages]
        [(0, 1), (0, 2), (0, 3), (0, 4)]
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy.

        >>> SendRecv().fan_out
        <FanOut.EVERY_RANK: 'once for every receiver on another host'>
        """
        return FanOut.EVERY_RANK

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """See Strategy.

        >>> from tricomm import Topology
        >>> assignment = Assignment(0, (1, 2), (Part(0, 4, (((0, 8),),)),))
        >>> [message.chain for message in SendRecv().route([assignment], RouteContext(Topology.flat(3), 2, 1 << 20))]
        [(0, 1), (0, 2)]
        """
        return unicast(_pairs(assignments), self.chunk_bytes, context)


def _pairs(assignments: Sequence[Assignment]) -> PairColumns:
    """Collect what goes from each rank to each other."""
    if isinstance(assignments, DirectAssignments):
        order = np.lexsort((assignments.receivers, assignments.senders))
        senders, receivers = assignments.senders[order], assignments.receivers[order]
        parts = assignments.parts.take(order)
        is_new = np.ones(len(order), bool)
        is_new[1:] = (senders[1:] != senders[:-1]) | (receivers[1:] != receivers[:-1])
        begins = np.flatnonzero(is_new)
        regions, offsets = parts.groups.regions, parts.groups.offsets
        groups = Groups(regions, np.append(offsets[begins], len(regions)))
        return PairColumns(senders[begins], receivers[begins], PartGroups(parts.stack, parts.itemsize, groups))
    by_pair: dict[tuple[int, int], list[Part]] = {}
    for assignment in assignments:
        for receiver in assignment.receivers:
            by_pair.setdefault((assignment.sender, receiver), []).extend(assignment.parts)
    ends = np.array(sorted(by_pair), np.int64).reshape(-1, 2)
    return PairColumns(ends[:, 0], ends[:, 1], tuple(in_order(by_pair[pair]) for pair in sorted(by_pair)))


@dataclass(frozen=True, slots=True)
class _Chained(_Chunked, ABC):
    """A strategy in which receivers may forward what they receive."""

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """See Strategy.

        >>> from tricomm import Topology
        >>> assignment = Assignment(0, (1, 2), (Part(0, 4, (((0, 8),),)),))
        >>> context = RouteContext(Topology.flat(3), 2, 1 << 20)
        >>> [message.chain for message in Broadcast().route([assignment], context)]
        [(0, 1, 2)]
        >>> [message.chain for message in GlobalAllGather().route([assignment], context)]
        [(0, 1, 2), (0, 2, 1)]
        """
        if isinstance(assignments, DirectAssignments) or all(
            len(assignment.receivers) == 1 for assignment in assignments
        ):
            # Nothing to forward. A rank that plans alone sees its own part only, which must then be cut the same.
            return unicast(_pairs(assignments), self.chunk_bytes, context)
        return chained(self._parts_by_chain(assignments, context), self.chunk_bytes, context)

    @abstractmethod
    def _parts_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> PartsByChain:
        """Choose the chains, and which parts travel along each."""


@explains_missing
@dataclass(frozen=True, slots=True)
class LocalAllGather(_Chained):
    """Send each host a task once, a part per device; the devices of the host hand the parts around (Alpa's).

    A part goes around as a chain: sender, the device whose part it is, the other devices of the host. Alpa needs
    the host's devices to divide the tensor and one replicated axis; here parts are as even as rows allow.

    Args:
        chunk_bytes: size of a chunk; None chooses one.

    Example:
        >>> from tricomm import LocalAllGather, Mesh, ShardingSpec, Topology, make_plan
        >>> one = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 20,), "float32")
        >>> four = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
        >>> hosts = Topology(("a", "b", "b", "c", "c"))
        >>> move = make_plan(one, four, topology=hosts, strategy=LocalAllGather()).moves[0]
        >>> [message.chain for message in move.messages]
        [(0, 1, 2), (0, 2, 1), (0, 3, 4), (0, 4, 3)]
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy.

        >>> LocalAllGather().fan_out
        <FanOut.EVERY_HOST: 'once for every other host'>
        """
        return FanOut.EVERY_HOST

    def _parts_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> PartsByChain:
        by_chain: dict[tuple[int, ...], list[Part]] = {}
        for assignment in assignments:
            for ranks in by_host(assignment.receivers, context.topology):
                _ring(by_chain, assignment, ranks)
        return by_chain


@explains_missing
@dataclass(frozen=True, slots=True)
class GlobalAllGather(_Chained):
    """Send each receiver a part of a task; all receivers hand the parts around one ring.

    A scatter and an all-gather, here both at once: a part is forwarded chunk by chunk.

    Args:
        chunk_bytes: size of a chunk; None chooses one.

    Example:
        >>> from tricomm import GlobalAllGather, Mesh, ShardingSpec, Topology, make_plan
        >>> one = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 20,), "float32")
        >>> four = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
        >>> hosts = Topology(("a", "b", "b", "c", "c"))
        >>> move = make_plan(one, four, topology=hosts, strategy=GlobalAllGather()).moves[0]
        >>> [message.chain for message in move.messages]
        [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 3, 4, 1, 2), (0, 4, 1, 2, 3)]
    """

    @property
    def fan_out(self) -> FanOut:
        """See Strategy.

        >>> GlobalAllGather().fan_out
        <FanOut.ONCE: 'once; each host but the last forwards it'>
        """
        return FanOut.ONCE

    def _parts_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> PartsByChain:
        by_chain: dict[tuple[int, ...], list[Part]] = {}
        for assignment in assignments:
            _ring(by_chain, assignment, assignment.receivers)
        return by_chain


@explains_missing
@dataclass(frozen=True, slots=True)
class Broadcast(_Chained):
    """Send a task along one chain of its receivers, in chunks, so that all links work at once.

    The chain enters each host once, and ranks of a host stand next to each other (the paper's section 3). Where
    a host's receivers have NICs of their own the task is cut into as many parts, and each part enters a host at
    another device, so that all its NICs work.

    Args:
        chunk_bytes: size of a chunk; None weighs the time to fill the chain against what a chunk costs.
        one_call: have each chunk broadcast by one call of NCCL, in a communicator of its sender and receivers that is
            made in the first call and kept (eight of a channel). For few bytes to many ranks on several hosts; Auto
            takes it where it should be faster. Without NCCL the sender sends to each.

    Example:
        >>> from tricomm import Broadcast, Mesh, ShardingSpec, Topology, make_plan
        >>> one = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 20,), "float32")
        >>> four = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
        >>> hosts = Topology(("a", "b", "b", "c", "c"))
        >>> move = make_plan(one, four, topology=hosts, strategy=Broadcast()).moves[0]
        >>> [message.chain for message in move.messages]
        [(0, 1, 2, 3, 4)]
        >>> [chunk[0].region for chunk in move.messages[0].chunks][:2]  # each chunk is one region of one dim
        [(((0, 262144),),), (((262144, 524288),),)]
        >>> move = make_plan(one, four, topology=hosts, strategy=Broadcast(one_call=True)).moves[0]
        >>> [(hop.source, hop.destination) for hop in move.hops], len({hop.round for hop in move.hops})
        ([(0, 1), (0, 2), (0, 3), (0, 4)], 1)
    """

    one_call: bool = False

    def __post_init__(self) -> None:
        _Chunked.__post_init__(self)
        if not isinstance(self.one_call, bool):
            raise ArgumentError(f"one_call={shown(self.one_call)} must be True or False; leave it out for a chain")

    def __repr__(self) -> str:
        return f"Broadcast(chunk_bytes={self.chunk_bytes}{', one_call=True' if self.one_call else ''})"

    def route(self, assignments: Sequence[Assignment], context: RouteContext) -> Sequence[Message]:
        """See Strategy.

        >>> from tricomm import Topology
        >>> assignment = Assignment(0, (2, 1), (Part(0, 4, (((0, 8),),)),))
        >>> context = RouteContext(Topology.flat(3), 2, 1 << 20)
        >>> [(message.chain, message.sources) for message in Broadcast(one_call=True).route([assignment], context)]
        [((0, 1, 2), (0, 0))]
        """
        if not self.one_call or isinstance(assignments, DirectAssignments):
            return _Chained.route(self, assignments, context)
        if all(len(assignment.receivers) == 1 for assignment in assignments):
            return _Chained.route(self, assignments, context)
        by_chain: dict[tuple[int, ...], list[Part]] = {}
        for assignment in assignments:
            by_chain.setdefault((assignment.sender, *sorted(assignment.receivers)), []).extend(assignment.parts)
        return tuple(map(in_one_call, chained(by_chain, self.chunk_bytes, context, fills=False)))

    @property
    def fan_out(self) -> FanOut:
        """See Strategy.

        >>> Broadcast().fan_out
        <FanOut.ONCE: 'once; each host but the last forwards it'>
        """
        return FanOut.ONCE

    def _parts_by_chain(self, assignments: Sequence[Assignment], context: RouteContext) -> PartsByChain:
        topology = context.topology
        alike: dict[tuple[int, ...], list[Assignment]] = {}
        for assignment in assignments:
            alike.setdefault(assignment.receivers, []).append(assignment)
        by_chain: dict[tuple[int, ...], list[Part]] = {}
        for receivers, members in alike.items():
            hosts = [grouped(ranks, topology.nic) for ranks in by_host(receivers, topology)]
            rails = max(map(len, hosts))
            sizes = [assignment.nbytes for assignment in members]
            # Equal assignments rotate over the rails; otherwise each is spread over all of them.
            pieces = rails // gcd(rails, len(members)) if max(sizes) - min(sizes) <= max(sizes) // 64 else rails
            rail = 0
            for assignment in members:
                for part in even_parts(assignment.parts, pieces):
                    chain = [assignment.sender]
                    for nics in hosts:
                        first = rail % len(nics)
                        chain += [rank for ranks in (*nics[first:], *nics[:first]) for rank in ranks]
                    by_chain.setdefault(tuple(chain), []).extend(part)
                    rail += 1
        return {chain: parts for chain, parts in by_chain.items() if parts}


@explains_missing
@dataclass(frozen=True, slots=True)
class Auto:
    """Take the strategy that the cost model finds fastest for this pair of specs on this topology.

    A strategy with more messages has to be 3 % faster than one with fewer.

    To compare them, every rank works out what all ranks would do. Where more ranks take part, and parts of dims say all
    that the specs say, formulas choose between sending to every replica and handing pieces round the replicas, and a
    rank works out its own part alone; see ``tricomm.plan.product``. Of several tensors formulas plan each as suits it,
    also among few ranks; a search, which takes one strategy for all, is made where that is not at the NICs' limit.

    Args:
        search_up_to: how many ranks may take part for strategies to be compared; 0 is none.
        cache: a folder that only this user can write; plans that formulas cannot make and that take long to search for
            are kept there, and read by every rank that finds them. No part of what ranks compare.

    Example:
        >>> from tricomm import Auto, Mesh, ShardingSpec, Topology, make_plan
        >>> one = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1 << 20,), "float32")
        >>> four = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
        >>> hosts = Topology(("a", "b", "b", "c", "c"))
        >>> make_plan(one, four, topology=hosts, strategy=Auto()).moves[0].strategies
        (GlobalAllGather(chunk_bytes=None),)
    """

    search_up_to: int = 32
    cache: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_count("search_up_to", self.search_up_to, 0, "a number of ranks, 0 or more, such as 32")
        if self.cache is not None and not isinstance(self.cache, str):
            raise ArgumentError(f"cache={shown(self.cache)} must be the path of a folder, or None to keep nothing")

    @property
    def candidates(self) -> tuple[Strategy, ...]:
        """List the strategies to compare, cheapest to run first: it wins ties.

        >>> [type(strategy).__name__ for strategy in Auto().candidates]
        ['SendRecv', 'Broadcast', 'LocalAllGather', 'GlobalAllGather']
        """
        return SendRecv(), Broadcast(), LocalAllGather(), GlobalAllGather()


def candidates_on(auto: Auto, topology: Topology) -> tuple[Strategy, ...]:
    """List those that Auto compares on a topology, on which a broadcast may be one call.

    >>> candidates_on(Auto(), Topology(["a", "b"], multicast_hop_seconds=1e-6))[-1]
    Broadcast(chunk_bytes=None, one_call=True)
    """
    more = () if topology.multicast_hop_seconds is None else (Broadcast(one_call=True),)
    return *auto.candidates, *more


def _ring(by_chain: dict[tuple[int, ...], list[Part]], assignment: Assignment, ranks: Sequence[int]) -> None:
    """Cut the assignment into a part for each rank, which goes on to the others in a ring."""
    for index, part in enumerate(even_parts(assignment.parts, len(ranks))):
        if part:
            by_chain.setdefault((assignment.sender, *ranks[index:], *ranks[:index]), []).extend(part)
