"""Share jobs among machines so that the most loaded one has as little as possible: an exact min-max flow.

Jobs have to be done by machines. A job says on which machines it may be done, and how much of it at most on
each. The answer is the least factor at which machines of ``factor * speed`` capacity can do all jobs, by
Newton's method on the minimal cut (Radzik 1993): each cut that does not hold gives the factor at which it would.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import NamedTuple

SCALE = 1 << 10
"""Capacities are whole numbers of 1/1024 of a unit of work: what rounding costs."""


class Job(NamedTuple):
    """``amount`` of work; ``limits`` says how much of it each machine may do at most (None: all of it)."""

    amount: int
    limits: Mapping[int, int | None]


class Sharing(NamedTuple):
    """The least factor, and per job how much each machine does (only what is above zero), in units of work."""

    factor: Fraction
    amounts: tuple[dict[int, Fraction], ...]


def share(
    jobs: Sequence[Job],
    speeds: Mapping[int, float],
    before: Mapping[int, float],
    at_least: float = 0.0,
) -> Sharing:
    """Divide jobs among machines so that the greatest (load / speed) is least.

    Args:
        jobs: each with an amount above zero that its limits allow.
        speeds: per machine.
        before: load / speed that machines have already.
        at_least: a factor below which nothing is gained; the answer then has fewer pieces.

    Example:
        Machine 1 is three times as fast, and only machine 0 may do the second job:

        >>> found = share([Job(80, {0: None, 1: None}), Job(10, {0: None})], {0: 1.0, 1: 3.0}, before={})
        >>> float(found.factor), [{machine: float(part) for machine, part in job.items()} for job in found.amounts]
        (22.5, [{0: 12.5, 1: 67.5}, {0: 10.0}])
    """
    exact = {machine: Fraction(speed) for machine, speed in speeds.items()}
    factor = max([Fraction(at_least), *(Fraction(before.get(machine, 0.0)) for machine in speeds)])
    total = sum(job.amount for job in jobs) * SCALE
    while True:
        capacities = {
            machine: ceil((factor - Fraction(before.get(machine, 0.0))) * speed * SCALE)
            for machine, speed in exact.items()
        }
        network = _Network(jobs, capacities)
        lacking = total - network.fill()
        if lacking == 0:
            return Sharing(factor, network.amounts())
        # The capacity of the cut grows with the speed of the machines in it.
        factor += Fraction(lacking, SCALE) / sum(exact[machine] for machine in network.full_machines())


class _Network:
    """A maximal flow from jobs to machines: what fits directly, then shortest augmenting paths (Edmonds-Karp)."""

    def __init__(self, jobs: Sequence[Job], capacities: Mapping[int, int]) -> None:
        self.todo = [job.amount * SCALE for job in jobs]
        self.room = dict(capacities)
        self.limits: list[dict[int, int]] = [
            {machine: todo if limit is None else limit * SCALE for machine, limit in job.limits.items()}
            for job, todo in zip(jobs, self.todo, strict=True)
        ]
        self.flow: list[dict[int, int]] = [{} for _ in jobs]
        self.users: dict[int, set[int]] = {machine: set() for machine in capacities}
        self.reached: dict[int, int] = {}
        self.moved_from: dict[int, int | None] = {}

    def fill(self) -> int:
        """Push as much as fits, and say how much that is."""
        start = sum(self.todo)
        for job, limits in enumerate(self.limits):
            for machine, limit in limits.items():
                self._push(job, machine, min(self.todo[job], limit, self.room[machine]))
        while (found := self._reach()) is not None:
            self._augment(found)
        return start - sum(self.todo)

    def amounts(self) -> tuple[dict[int, Fraction], ...]:
        """Say per job who does how much."""
        return tuple(
            {machine: Fraction(value, SCALE) for machine, value in flow.items() if value} for flow in self.flow
        )

    def full_machines(self) -> list[int]:
        """List the machines in the minimal cut, after :meth:`fill`."""
        return list(self.reached)

    def _push(self, job: int, machine: int, amount: int) -> None:
        if amount:
            self.flow[job][machine] = self.flow[job].get(machine, 0) + amount
            self.users[machine].add(job)
            self.todo[job] -= amount
            self.room[machine] -= amount

    def _reach(self) -> int | None:
        """Breadth-first from the jobs that are not done: the first machine with room. ``reached`` says from which
        job each machine was reached, ``moved_from`` from which machine each job.
        """
        self.reached = {}
        self.moved_from = {job: None for job, left in enumerate(self.todo) if left}
        queue = deque(self.moved_from)
        while queue:
            job = queue.popleft()
            for machine, limit in self.limits[job].items():
                if machine in self.reached or self.flow[job].get(machine, 0) >= limit:
                    continue
                self.reached[machine] = job
                if self.room[machine] > 0:
                    return machine
                for user in sorted(self.users[machine]):
                    if user not in self.moved_from:
                        self.moved_from[user] = machine
                        queue.append(user)
        return None

    def _augment(self, machine: int) -> None:
        """Push along the path that leads to ``machine``: each job on it moves work over to make room."""
        path: list[tuple[int, int, int | None]] = []
        into: int | None = machine
        amount = self.room[machine]
        while into is not None:
            job = self.reached[into]
            out_of = self.moved_from[job]
            amount = min(amount, self.limits[job][into] - self.flow[job].get(into, 0))
            amount = min(amount, self.todo[job] if out_of is None else self.flow[job][out_of])
            path.append((job, into, out_of))
            into = out_of
        for job, target, out_of in path:
            if out_of is not None:
                self.flow[job][out_of] -= amount
                self.todo[job] += amount
                self.room[out_of] += amount
                if not self.flow[job][out_of]:
                    self.users[out_of].discard(job)
            self._push(job, target, amount)
