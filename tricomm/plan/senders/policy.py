"""Sender choice: which holder of a task sends it, and in which order its receivers forward it.

A policy turns tasks into assignments. An assignment names one sender, so a policy that divides a task among
several holders returns several assignments for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tricomm.layout.columns import Groups, Lazy
from tricomm.layout.intervals import Region, region_numel
from tricomm.layout.topology import Topology
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import by_host, other_hosts
from tricomm.plan.network.nic_seconds import NicSeconds
from tricomm.plan.tasks import Task, Tasks


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


class SendLoads:
    """What each NIC and rank sends so far, as senders are chosen one by one.

    Args:
        topology: NICs and their rates.
        fan_out: of the strategy that will route.
    """

    def __init__(self, topology: Topology, fan_out: FanOut) -> None:
        self.topology = topology
        self.fan_out = fan_out
        self.nics = NicSeconds(topology)
        self.rank_nbytes: dict[int, int] = {}

    def seconds_with(self, sender: int, demand: TransferDemand) -> float:
        """For how long the sender's NIC would send with this demand."""
        sends = self.fan_out.sends(other_hosts(demand.hosts, sender, self.topology))
        return self.nics.after(self.topology.nic(sender), sends * demand.nbytes)

    def assign(self, sender: int, demand: TransferDemand) -> Assignment:
        """Choose this sender. The host whose NICs send most so far comes last, so that it forwards nothing."""
        hosts = demand.hosts
        if self.fan_out.hosts_forward and len(hosts) > 1:
            here = self.topology.host(sender)
            others = other_hosts(hosts, sender, self.topology)
            last = max(reversed(others), key=self._busy_seconds, default=None)  # the last one of equals
            hosts = tuple(sorted(hosts, key=lambda ranks: (ranks is last, self.topology.host(ranks[0]) != here)))
        assignment = Assignment(sender, tuple(rank for ranks in hosts for rank in ranks), demand.regions)
        self.add(assignment, demand.nbytes)
        return assignment

    def add(self, assignment: Assignment, nbytes: int) -> None:
        """Add an assignment whose order is fixed."""
        sender = assignment.sender
        others = other_hosts(by_host(assignment.receivers, self.topology), sender, self.topology)
        self.nics.add(self.topology.nic(sender), self.fan_out.sends(others) * nbytes)
        self.rank_nbytes[sender] = self.rank_nbytes.get(sender, 0) + nbytes
        for ranks in self.fan_out.forwarding(others):
            self.nics.add_evenly(ranks, nbytes)

    def copy(self) -> "SendLoads":
        """The same loads, to go on from."""
        other = SendLoads(self.topology, self.fan_out)
        other.nics = self.nics.copy()
        other.rank_nbytes = dict(self.rank_nbytes)
        return other

    def best(self, demand: TransferDemand) -> int:
        """The holder whose NIC then sends least; ties go to the rank that sends least, then to mesh order."""
        return min(demand.holders, key=lambda rank: (self.seconds_with(rank, demand), self.rank_nbytes.get(rank, 0)))

    def _busy_seconds(self, ranks: Sequence[int]) -> float:
        return max(self.nics.of(self.topology.nic(rank)) for rank in ranks)


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


Choice = Callable[[Sequence[TransferDemand], SendLoads], tuple[Assignment, ...]]
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
    loads = SendLoads(topology, fan_out)
    for assignment in forced:
        loads.add(assignment, assignment.numel * itemsize)
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
    demands: Sequence[TransferDemand], loads: SendLoads, order: Sequence[int] | None = None
) -> tuple[Assignment, ...]:
    """Give each demand to its best holder, in the given order (largest first); assignments in that of ``demands``."""
    chosen: dict[int, Assignment] = {}
    for index in largest_first(demands) if order is None else order:
        chosen[index] = loads.assign(loads.best(demands[index]), demands[index])
    return tuple(chosen[index] for index in sorted(chosen))
