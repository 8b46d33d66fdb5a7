"""Sender choice: which holder of a task sends it, and in which order its receivers forward it.

A policy turns tasks into assignments. An assignment names one sender, so a policy that divides a task among
several holders returns several assignments for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np

from tricomm.layout.columns import Groups, Lazy
from tricomm.layout.intervals import Region, region_numel
from tricomm.layout.topology import Topology
from tricomm.plan.tasks import Task, Tasks


class FanOut(Enum):
    """How often a strategy puts a task on its sender's NIC; the rest is forwarded by receivers."""

    EVERY_RANK = "once for every receiver on another host"
    EVERY_HOST = "once for every other host"
    ONCE = "once; each host but the last forwards it"


@dataclass(frozen=True, slots=True)
class Assignment:
    """``sender`` brings ``regions`` to every rank of ``receivers``.

    Attributes:
        sender: one of the task's holders.
        receivers: host by host; a strategy that forwards does so in this order of the hosts.
        regions: of one task.
    """

    sender: int
    receivers: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def numel(self) -> int:
        """Elements, counted once."""
        return sum(region_numel(region) for region in self.regions)


class DirectAssignments(Lazy[Assignment]):
    """Assignments as columns, each of a whole task to one receiver.

    Attributes:
        senders, receivers: one of each.
        regions: of each.
    """

    __slots__ = ("receivers", "regions", "senders")

    def __init__(self, senders: np.ndarray, receivers: np.ndarray, regions: Groups) -> None:
        self.senders, self.receivers, self.regions = senders, receivers, regions

    def __len__(self) -> int:
        return len(self.senders)

    def _items(self, rows: np.ndarray) -> Iterator[Assignment]:
        pairs = zip(self.senders[rows].tolist(), self.receivers[rows].tolist(), strict=True)
        for (sender, receiver), regions in zip(pairs, self.regions._items(rows), strict=True):
            yield Assignment(sender, (receiver,), regions)


def direct_assignments(tasks: Sequence[Task], first_holder: bool = False) -> DirectAssignments | None:
    """The assignments where each task has one receiver and one holder (or the first is to send): nothing is to be
    chosen. None where there is a choice.
    """
    if not isinstance(tasks, Tasks) or not tasks.one_receiver or not (first_holder or tasks.one_holder):
        return None
    receivers, senders = tasks.receiver_sets.first(tasks.receivers), tasks.holder_sets.first(tasks.holders)
    holds = senders == receivers if tasks.one_holder else tasks.holder_sets.includes(tasks.holders, receivers)
    travels = (~holds).nonzero()[0]
    return DirectAssignments(senders[travels], receivers[travels], tasks.regions.take(travels))


class SenderPolicy(Protocol):
    """A rule that chooses senders. Deterministic: equal arguments, equal choice, on every rank."""

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """One or more assignments for every task that has receivers."""
        ...

    def __hash__(self) -> int: ...


class TransferDemand(NamedTuple):
    """What has to leave a host: some holders, and receivers on hosts where nobody holds it (or all receivers).

    Attributes:
        holders: who may send.
        hosts: the receivers of each host.
        regions, nbytes: what.
    """

    holders: tuple[int, ...]
    hosts: tuple[tuple[int, ...], ...]
    regions: tuple[Region, ...]
    nbytes: int

    def crossings(self, fan_out: FanOut) -> int:
        """How often it enters a NIC in all, whoever sends."""
        return sum(map(len, self.hosts)) if fan_out is FanOut.EVERY_RANK else len(self.hosts)


class Loads:
    """Seconds for which each NIC sends so far, as senders are chosen one by one.

    Args:
        topology: NICs and their rates.
        fan_out: of the strategy that will route.
    """

    def __init__(self, topology: Topology, fan_out: FanOut) -> None:
        self.topology = topology
        self.fan_out = fan_out
        self.nic_seconds: dict[int, float] = {}
        self.rank_nbytes: dict[int, int] = {}

    def after(self, sender: int, demand: TransferDemand) -> float:
        """What the sender's NIC would have to send with this demand, in seconds."""
        nic = self.topology.nic(sender)
        copies = self._copies(sender, demand)
        return self.nic_seconds.get(nic, 0.0) + copies * demand.nbytes / self.topology.nic_rate(nic)[0]

    def add(self, sender: int, demand: TransferDemand) -> Assignment:
        """Choose this sender. The host whose NICs send most so far comes last, so that it forwards nothing."""
        hosts = demand.hosts
        if self.fan_out is FanOut.ONCE and len(hosts) > 1:
            here = self.topology.host(sender)
            remote = [ranks for ranks in hosts if self.topology.host(ranks[0]) != here]
            last = max(reversed(remote), key=self._busy_seconds, default=None)  # the last one of equals
            hosts = tuple(sorted(hosts, key=lambda ranks: (ranks is last, self.topology.host(ranks[0]) != here)))
        assignment = Assignment(sender, tuple(rank for ranks in hosts for rank in ranks), demand.regions)
        self.follow(assignment, demand.nbytes)
        return assignment

    def follow(self, assignment: Assignment, nbytes: int) -> None:
        """Add an assignment whose order is fixed."""
        sender = assignment.sender
        hosts = by_host(assignment.receivers, self.topology)
        self.nic_seconds[self.topology.nic(sender)] = self.after(
            sender, TransferDemand((sender,), hosts, assignment.regions, nbytes)
        )
        self.rank_nbytes[sender] = self.rank_nbytes.get(sender, 0) + nbytes
        if self.fan_out is FanOut.ONCE:
            here = self.topology.host(sender)
            for ranks in [ranks for ranks in hosts if self.topology.host(ranks[0]) != here][:-1]:
                self._forward(ranks, nbytes)

    def copy(self) -> "Loads":
        """The same loads, to go on from."""
        other = Loads(self.topology, self.fan_out)
        other.nic_seconds = dict(self.nic_seconds)
        other.rank_nbytes = dict(self.rank_nbytes)
        return other

    def best(self, demand: TransferDemand) -> int:
        """The holder whose NIC then sends least; ties go to the rank that sends least, then to mesh order."""
        return min(demand.holders, key=lambda rank: (self.after(rank, demand), self.rank_nbytes.get(rank, 0)))

    @property
    def bottleneck_seconds(self) -> float:
        """The NIC that sends longest."""
        return max(self.nic_seconds.values(), default=0.0)

    def _copies(self, sender: int, demand: TransferDemand) -> int:
        here = self.topology.host(sender)
        remote = [len(ranks) for ranks in demand.hosts if self.topology.host(ranks[0]) != here]
        if self.fan_out is FanOut.EVERY_RANK:
            return sum(remote)
        return len(remote) if self.fan_out is FanOut.EVERY_HOST else min(len(remote), 1)

    def _busy_seconds(self, ranks: Sequence[int]) -> float:
        return max(self.nic_seconds.get(self.topology.nic(rank), 0.0) for rank in ranks)

    def _forward(self, ranks: Sequence[int], nbytes: int) -> None:
        """A host forwards over the NICs of all its receivers evenly."""
        nics = dict.fromkeys(self.topology.nic(rank) for rank in ranks)
        for nic in nics:
            seconds = nbytes / len(nics) / self.topology.nic_rate(nic)[0]
            self.nic_seconds[nic] = self.nic_seconds.get(nic, 0.0) + seconds


def grouped(ranks: Iterable[int], number_of: Callable[[int], int]) -> tuple[tuple[int, ...], ...]:
    """The ranks that have the same number together, in the order of the first of each group."""
    groups: dict[int, list[int]] = {}
    for rank in ranks:
        groups.setdefault(number_of(rank), []).append(rank)
    return tuple(map(tuple, groups.values()))


def by_host(ranks: Iterable[int], topology: Topology) -> tuple[tuple[int, ...], ...]:
    """The ranks of each host, hosts in the order of their first rank."""
    return grouped(ranks, topology.host)


def local_and_remote(
    tasks: Sequence[Task], itemsize: int, topology: Topology
) -> tuple[list[Assignment], list[TransferDemand], list[Assignment]]:
    """Divide the tasks by what there is to choose.

    A receiver on a host where some rank holds the task gets it from there: its NIC then carries nothing.

    Returns:
        assignments within hosts; demands with a choice, of sender or of order; assignments without any.
    """
    local: list[Assignment] = []
    demands: list[TransferDemand] = []
    forced: list[Assignment] = []
    sent: dict[int, int] = {}
    for task in tasks:
        receivers = task.remote_receivers
        if not receivers:
            continue
        if len(receivers) == len(task.holders) == 1:
            forced.append(Assignment(task.holders[0], receivers, task.regions))
            continue
        nbytes = task.numel * itemsize
        holders_at = {topology.host(ranks[0]): ranks for ranks in by_host(task.holders, topology)}
        remote: list[tuple[int, ...]] = []
        for ranks in by_host(receivers, topology):
            here = holders_at.get(topology.host(ranks[0]))
            if here is None:
                remote.append(ranks)
            else:
                sender = min(here, key=lambda rank: sent.get(rank, 0))
                sent[sender] = sent.get(sender, 0) + nbytes
                local.append(Assignment(sender, ranks, task.regions))
        if remote:
            demands.append(TransferDemand(task.holders, tuple(remote), task.regions, nbytes))
    return local, demands, forced


Choice = Callable[[Sequence[TransferDemand], Loads], tuple[Assignment, ...]]
"""(demands, the loads of what is sent anyway, to be changed) -> one or more assignments for every demand."""


def choose_senders(
    tasks: Sequence[Task], itemsize: int, topology: Topology, fan_out: FanOut, choice: Choice
) -> Sequence[Assignment]:
    """Assignments for all tasks, of which ``choice`` makes those where there is a choice."""
    without_choice = direct_assignments(tasks)
    if without_choice is not None:
        return without_choice
    local, demands, forced = local_and_remote(tasks, itemsize, topology)
    if not demands:
        return (*local, *forced)
    loads = Loads(topology, fan_out)
    for assignment in forced:
        loads.follow(assignment, assignment.numel * itemsize)
    return (*local, *forced, *choice(demands, loads))


@dataclass(frozen=True, slots=True)
class Naive:
    """The first holder in mesh order sends: the paper's baseline."""

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy."""
        without_choice = direct_assignments(tasks, first_holder=True)
        if without_choice is not None:
            return without_choice
        result: list[Assignment] = []
        for task in tasks:
            if task.remote_receivers:
                sender = task.holders[0]
                here = topology.host(sender)
                hosts = sorted(
                    by_host(task.remote_receivers, topology), key=lambda ranks: topology.host(ranks[0]) != here
                )
                result.append(Assignment(sender, tuple(rank for ranks in hosts for rank in ranks), task.regions))
        return tuple(result)


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Largest task first, to the holder whose NIC has the least to send so far.

    Longest-processing-time-first (Graham 1969) over NICs. The paper's "load balance only" keeps the given order,
    and its code weighs whole tiles where only slices travel.
    """

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy."""
        return choose_senders(tasks, itemsize, topology, fan_out, greedy)


def largest_first(demands: Sequence[TransferDemand]) -> list[int]:
    """The indices of demands, by falling size; equal ones in the given order."""
    return sorted(range(len(demands)), key=lambda index: -demands[index].nbytes)


def greedy(
    demands: Sequence[TransferDemand], loads: Loads, order: Sequence[int] | None = None
) -> tuple[Assignment, ...]:
    """Give each demand to its best holder, in the given order (largest first); assignments in that of ``demands``."""
    chosen: dict[int, Assignment] = {}
    for index in largest_first(demands) if order is None else order:
        chosen[index] = loads.add(loads.best(demands[index]), demands[index])
    return tuple(chosen[index] for index in sorted(chosen))
