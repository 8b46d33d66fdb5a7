"""Sender policies: choose which holder of a task sends it, and in which order its receivers forward it.

A policy turns tasks into assignments. An assignment names one sender, so a policy that divides a task among
several holders returns several assignments for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tricomm.kinds import explains_missing
from tricomm.layout.columns import Lazy
from tricomm.layout.topology import Topology
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import Hosts, HostsOf, by_host, other_hosts
from tricomm.plan.network.nic_seconds import NicSeconds
from tricomm.plan.parts import Part, PartGroups, nbytes_of
from tricomm.plan.tasks import Task, Tasks


@dataclass(frozen=True, slots=True)
class Assignment:
    """``sender`` brings ``parts`` to every rank of ``receivers``.

    Attributes:
        sender: one of the task's holders.
        receivers: host by host; a strategy that forwards does so in this order of the hosts.
        parts: of one task.

    Example:
        >>> Assignment(0, (2, 3), (Part(0, 4, (((0, 4),), ((0, 8),))),)).nbytes
        128
    """

    sender: int
    receivers: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, counted once."""
        return nbytes_of(self.parts)


class DirectAssignments(Lazy[Assignment]):
    """Assignments as columns, each of a whole task to its only receiver: nothing had to be chosen.

    Attributes:
        senders, receivers: (assignments,), one rank of each.
        parts: of each.
    """

    __slots__ = ("parts", "receivers", "senders")

    def __init__(self, senders: np.ndarray, receivers: np.ndarray, parts: PartGroups) -> None:
        self.senders, self.receivers, self.parts = senders, receivers, parts

    def __len__(self) -> int:
        return len(self.senders)

    def _items(self, rows: np.ndarray) -> Iterator[Assignment]:
        pairs = zip(self.senders[rows].tolist(), self.receivers[rows].tolist(), strict=True)
        for (sender, receiver), parts in zip(pairs, self.parts._items(rows), strict=True):
            yield Assignment(sender, (receiver,), parts)


def direct_assignments(tasks: Sequence[Task], first_holder: bool = False) -> DirectAssignments | None:
    """Assign each task's one holder (or the first, if so said) to its one receiver; None where there is a choice."""
    if not isinstance(tasks, Tasks) or not tasks.one_receiver or not (first_holder or tasks.one_holder):
        return None
    receivers, senders = tasks.receiver_sets.first(tasks.receivers), tasks.holder_sets.first(tasks.holders)
    holds = senders == receivers if tasks.one_holder else tasks.holder_sets.includes(tasks.holders, receivers)
    travels = (~holds).nonzero()[0]
    return DirectAssignments(senders[travels], receivers[travels], tasks.parts.take(travels))


class SenderPolicy(Protocol):
    """Chooses senders. Deterministic: equal arguments give equal assignments on every rank.

    Example:
        Split, Naive, LeastLoaded, Search, RandomizedGreedy and Ensemble are policies; others need this member only:

        >>> task = Task((Part(0, 4, (((0, 4),),)),), holders=(0, 1), receivers=(2,))
        >>> Naive().assign((task,), Topology.flat(3), FanOut.ONCE)
        (Assignment(sender=0, receivers=(2,), parts=(Part(stack=0, itemsize=4, region=(((0, 4),),)),)),)
    """

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """Make one or more assignments for every task that has remote receivers.

        Args:
            tasks: all of a move.
            topology: hosts and rates.
            fan_out: of the strategy that will route.

        Example:
            >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
            >>> (assignment,) = Naive().assign((task,), Topology.flat(3), FanOut.ONCE)
            >>> assignment.sender, assignment.receivers, assignment.nbytes
            (0, (2,), 24)
        """
        ...

    def __hash__(self) -> int: ...


class TransferDemand(NamedTuple):
    """Parts that have to leave a host, and the ranks that may send them.

    Attributes:
        holders: who may send.
        hosts: the receivers, by host, of hosts where nobody holds the parts; so none is a sender's own.
        parts, nbytes: what.
    """

    holders: tuple[int, ...]
    hosts: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    nbytes: int


class SendLoads:
    """Track what each NIC and rank sends, as senders are chosen one by one.

    Args:
        topology: NICs and their rates.
        fan_out: of the strategy that will route.
    """

    def __init__(self, topology: Topology, fan_out: FanOut) -> None:
        self.topology = topology
        self.fan_out = fan_out
        self.nics = NicSeconds(topology)
        self.rank_nbytes: dict[int, int] = {}
        self._hosts_of = HostsOf(topology)

    def seconds_with(self, sender: int, demand: TransferDemand) -> float:
        """For how long the NIC of a holder would send if it sent this too."""
        return self.nics.after(self.topology.nic(sender), self.fan_out.sends(demand.hosts) * demand.nbytes)

    def assign(self, sender: int, demand: TransferDemand) -> Assignment:
        """Choose this holder. The host whose NICs send most so far goes last, so that it forwards nothing."""
        hosts = demand.hosts
        if self.fan_out.hosts_forward and len(hosts) > 1:
            last = max(reversed(hosts), key=self._busy_seconds)  # the last one of equals
            hosts = (*[ranks for ranks in hosts if ranks is not last], last)
        self._add(sender, hosts, demand.nbytes)
        return Assignment(sender, tuple([rank for ranks in hosts for rank in ranks]), demand.parts)

    def add(self, assignment: Assignment, nbytes: int) -> None:
        """Add an assignment whose sender and order of receivers are chosen."""
        hosts = self._hosts_of[assignment.receivers]
        self._add(assignment.sender, other_hosts(hosts, assignment.sender, self.topology), nbytes)

    def _add(self, sender: int, others: Hosts, nbytes: int) -> None:
        """Add what goes to receivers on hosts that are not the sender's, in this order."""
        self.nics.add(self.topology.nic(sender), self.fan_out.sends(others) * nbytes)
        self.rank_nbytes[sender] = self.rank_nbytes.get(sender, 0) + nbytes
        for ranks in self.fan_out.forwarding(others):
            self.nics.add_evenly(ranks, nbytes)

    def copy(self) -> "SendLoads":
        """The same loads, to go on from."""
        other = SendLoads(self.topology, self.fan_out)
        other.nics, other._hosts_of = self.nics.copy(), self._hosts_of
        other.rank_nbytes = dict(self.rank_nbytes)
        return other

    def best(self, demand: TransferDemand) -> int:
        """Find the holder whose NIC would send least; ties go to the NIC that sends least without it, which of two fast
        and slow ones is the slow one, then to the rank that sends least, then to mesh order.
        """
        nbytes, nic_of = self.fan_out.sends(demand.hosts) * demand.nbytes, self.topology.nic

        def load(rank: int) -> tuple[float, float, int]:
            nic = nic_of(rank)
            return self.nics.after(nic, nbytes), self.nics.of(nic), self.rank_nbytes.get(rank, 0)

        return min(demand.holders, key=load)

    def _busy_seconds(self, ranks: Sequence[int]) -> float:
        return max(self.nics.of(self.topology.nic(rank)) for rank in ranks)


def divide_by_choice(
    tasks: Sequence[Task], topology: Topology
) -> tuple[list[Assignment], list[TransferDemand], list[Assignment]]:
    """Divide the tasks by what there is to choose.

    A receiver on a host where some rank holds the task gets it from there: its NIC then carries nothing.

    Returns:
        assignments within hosts; demands with a choice, of sender or of order; assignments without a choice.
    """
    within_hosts: list[Assignment] = []
    demands: list[TransferDemand] = []
    forced: list[Assignment] = []
    sent: dict[int, int] = {}
    hosts_of = HostsOf(topology)
    for task in tasks:
        receivers = task.remote_receivers
        if not receivers:
            continue
        if len(receivers) == len(task.holders) == 1:
            forced.append(Assignment(task.holders[0], receivers, task.parts))
            continue
        nbytes = task.nbytes
        holders_at = {topology.host(ranks[0]): ranks for ranks in hosts_of[task.holders]}
        others: list[tuple[int, ...]] = []
        for ranks in hosts_of[receivers]:
            here = holders_at.get(topology.host(ranks[0]))
            if here is None:
                others.append(ranks)
            else:
                sender = min(here, key=lambda rank: sent.get(rank, 0))
                sent[sender] = sent.get(sender, 0) + nbytes
                within_hosts.append(Assignment(sender, ranks, task.parts))
        if others:
            demands.append(TransferDemand(task.holders, tuple(others), task.parts, nbytes))
    return within_hosts, demands, forced


SenderChoice = Callable[[Sequence[TransferDemand], SendLoads], tuple[Assignment, ...]]
"""(demands, the loads of what is sent anyway, which it may change) -> one or more assignments for every demand."""


def choose_senders(
    tasks: Sequence[Task], topology: Topology, fan_out: FanOut, choice: SenderChoice
) -> Sequence[Assignment]:
    """Assign all tasks; ``choice`` makes the assignments where there is a choice."""
    without_choice = direct_assignments(tasks)
    if without_choice is not None:
        return without_choice
    within_hosts, demands, forced = divide_by_choice(tasks, topology)
    if not demands:
        return (*within_hosts, *forced)
    loads = SendLoads(topology, fan_out)
    for assignment in forced:
        loads.add(assignment, assignment.nbytes)
    return (*within_hosts, *forced, *choice(demands, loads))


@explains_missing
@dataclass(frozen=True, slots=True)
class Naive:
    """Let the first holder in mesh order send: the paper's baseline.

    Example:
        >>> from tricomm import Mesh, Naive, ShardingSpec, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=Naive()).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 3), 2048), ((0, 4), 2048)]
    """

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> [one.sender for one in Naive().assign((task, task), Topology.flat(3), FanOut.ONCE)]  # the first holder
        [0, 0]
        """
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
                result.append(Assignment(sender, tuple(rank for ranks in hosts for rank in ranks), task.parts))
        return tuple(result)


@explains_missing
@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Give the largest task first, each to the holder whose NIC has the least to send so far.

    Longest-processing-time-first (Graham 1969) over NICs. The paper's "load balance only" keeps the given order,
    and its code weighs whole tiles where only slices travel.

    Example:
        >>> from tricomm import LeastLoaded, Mesh, ShardingSpec, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=LeastLoaded()).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 4), 2048), ((1, 3), 2048)]
    """

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> [one.sender for one in LeastLoaded().assign((task, task), Topology.flat(3), FanOut.ONCE)]  # in turn
        [0, 1]
        """
        return choose_senders(tasks, topology, fan_out, greedy)


def largest_first(demands: Sequence[TransferDemand]) -> list[int]:
    """Sort the indices of demands by falling size; equal ones stay in the given order."""
    return sorted(range(len(demands)), key=lambda index: -demands[index].nbytes)


def greedy(
    demands: Sequence[TransferDemand], loads: SendLoads, order: Sequence[int] | None = None
) -> tuple[Assignment, ...]:
    """Give each demand to its best holder, in ``order`` (default: largest first).

    Returns:
        one assignment per demand, in the order of ``demands``.
    """
    chosen: dict[int, Assignment] = {}
    for index in largest_first(demands) if order is None else order:
        chosen[index] = loads.assign(loads.best(demands[index]), demands[index])
    return tuple(chosen[index] for index in sorted(chosen))
