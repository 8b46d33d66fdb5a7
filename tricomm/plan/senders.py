"""Sender choice: which holder of a task sends it.

A balance object turns tasks into assignments. An assignment names one sender, so a balance that divides a
task among several holders returns several assignments for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tricomm.intervals import Region, region_numel
from tricomm.plan.tasks import Task
from tricomm.topology import Topology


@dataclass(frozen=True, slots=True)
class Assignment:
    """``sender`` brings ``regions`` to every rank of ``receivers``."""

    sender: int
    receivers: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def numel(self) -> int:
        """Elements, counted once."""
        return sum(region_numel(region) for region in self.regions)


class Balance(Protocol):
    """A rule that chooses senders. Deterministic: equal arguments, equal choice, on every rank."""

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology) -> tuple[Assignment, ...]:
        """One or more assignments for every task that has receivers, in the order of the tasks."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Naive:
    """The first holder in mesh order sends: the paper's baseline."""

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology) -> tuple[Assignment, ...]:
        """See Balance."""
        return tuple(Assignment(task.holders[0], task.receivers, task.regions) for task in tasks if task.receivers)


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Largest task first, to the holder whose host has the least to send through its NIC so far.

    Longest-processing-time-first (Graham 1969) over NICs; ties go to the rank with the least to send, then to
    mesh order. A holder on the only receiving host costs its NIC nothing and so wins. The paper's "load
    balance only" keeps the given order, and its code weighs whole tiles where only slices travel.
    """

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology) -> tuple[Assignment, ...]:
        """See Balance."""
        nic_nbytes: dict[str, int] = {}
        rank_nbytes: dict[int, int] = {}
        chosen: dict[int, Assignment] = {}
        sized = [(task.numel * itemsize, index, task) for index, task in enumerate(tasks) if task.receivers]
        for nbytes, index, task in sorted(sized, key=lambda item: (-item[0], item[1])):
            hosts = {topology.host(rank) for rank in task.receivers}

            def cost(holder: int, nbytes: int = nbytes, hosts: set[str] = hosts) -> tuple[int, int, bool]:
                host = topology.host(holder)
                leaves = hosts != {host}
                return (
                    nic_nbytes.get(host, 0) + (nbytes if leaves else 0),
                    rank_nbytes.get(holder, 0),
                    leaves,
                )

            sender = min(task.holders, key=cost)
            nic_nbytes[topology.host(sender)] = cost(sender)[0]
            rank_nbytes[sender] = rank_nbytes.get(sender, 0) + nbytes
            chosen[index] = Assignment(sender, task.receivers, task.regions)
        return tuple(chosen[index] for index in sorted(chosen))
