"""Sender policies that give each task one sender and try many: branch and bound, random orders, the best of all."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tricomm.errors import ArgumentError, check_count, shown
from tricomm.kinds import explains_missing
from tricomm.layout.topology import Topology
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.senders.policy import (
    Assignment,
    LeastLoaded,
    Naive,
    SenderPolicy,
    SendLoads,
    TransferDemand,
    choose_senders,
    direct_assignments,
    greedy,
    largest_first,
)
from tricomm.plan.tasks import Task


@explains_missing
@dataclass(frozen=True, slots=True)
class Search:
    """Search depth-first for the senders with which the busiest NIC sends least.

    Tasks are taken largest first and holders in the order of the load they would get, so the first leaf is
    LeastLoaded's choice. A branch is left when a bound that no completion can beat is not below the best so far:
    the larger of the load that is there and of all that is to be sent, spread over every NIC that may send. (The
    bound in the paper's code gives the rest to the least loaded sender and may cut off the optimum.)

    Args:
        nodes: how many choices to try at the most; a number and not a time, so that all ranks find the same.

    Raises:
        PlanError: ``nodes`` is not positive; an ArgumentError if it is not an integer.

    Example:
        >>> from tricomm import Mesh, Search, ShardingSpec, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=Search(nodes=100)).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 4), 2048), ((1, 3), 2048)]
    """

    nodes: int = 20_000

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes, 1, "at least 1, an integer; leave it out for the default")

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> from tricomm.plan.parts import Part
        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> [one.sender for one in Search().assign((task, task), Topology.flat(3), FanOut.ONCE)]
        [0, 1]
        """
        return choose_senders(tasks, topology, fan_out, self._choose)

    def _choose(self, demands: Sequence[TransferDemand], loads: SendLoads) -> tuple[Assignment, ...]:
        return _Searching(demands, loads, self.nodes).run()


class _Searching:
    """One search. The path is kept on a stack of its own: there may be thousands of tasks."""

    def __init__(self, demands: Sequence[TransferDemand], start: SendLoads, nodes: int) -> None:
        self.demands = demands
        self.order = largest_first(demands)
        self.start = start
        self.nodes = nodes
        topology = start.topology
        nics = {topology.nic(rank) for demand in demands for rank in demand.holders} | set(start.nics.seconds)
        if start.fan_out.hosts_forward:
            nics |= {topology.nic(rank) for demand in demands for ranks in demand.hosts for rank in ranks}
        self.rates = {nic: topology.nic_rate(nic).send_bytes_per_second for nic in sorted(nics)}
        # What is still to be sent from each place in the order on, in bytes, however it is chosen.
        self.rest = [0]
        for index in reversed(self.order):
            demand = demands[index]
            self.rest.append(self.rest[-1] + start.fan_out.crossings(demand.hosts) * demand.nbytes)
        self.rest.reverse()

    def bound(self, loads: SendLoads, depth: int) -> float:
        """Bound every completion from below: by the load that is there, and by everything spread evenly."""
        sent = sum(loads.nics.of(nic) * rate for nic, rate in self.rates.items())
        even = (sent + self.rest[depth]) / sum(self.rates.values())
        return max(loads.nics.busiest, even)

    def run(self) -> tuple[Assignment, ...]:
        """Find the best choice within the budget of nodes."""
        best: tuple[float, tuple[Assignment, ...]] | None = None
        stack: list[tuple[int, SendLoads, tuple[Assignment, ...]]] = [(0, self.start, ())]
        nodes = 0
        while stack and (nodes < self.nodes or best is None):
            depth, loads, chosen = stack.pop()
            nodes += 1
            if best is not None and self.bound(loads, depth) >= best[0] * (1 - 1e-12):
                continue
            if depth == len(self.order):
                best = (loads.nics.busiest, chosen)
                continue
            demand = self.demands[self.order[depth]]
            for sender in reversed(_distinct(demand, loads)):
                after = loads.copy()
                stack.append((depth + 1, after, (*chosen, after.assign(sender, demand))))
        assert best is not None
        at = dict(zip(self.order, best[1], strict=True))
        return tuple(at[index] for index in sorted(at))


def _distinct(demand: TransferDemand, loads: SendLoads) -> list[int]:
    """List one holder per NIC, the one that sends least, best NIC first."""
    per_nic: dict[int, int] = {}
    for rank in sorted(demand.holders, key=lambda rank: loads.rank_nbytes.get(rank, 0)):
        per_nic.setdefault(loads.topology.nic(rank), rank)
    return sorted(per_nic.values(), key=lambda rank: loads.seconds_with(rank, demand))


@explains_missing
@dataclass(frozen=True, slots=True)
class RandomizedGreedy:
    """Try many random orders of the tasks, each task to the least loaded holder, and take the best (the paper's idea).

    Args:
        trials: how many orders.
        seed: of the random numbers, so that all ranks find the same.

    Raises:
        PlanError: ``trials`` is not positive; an ArgumentError if it or ``seed`` is not an integer.

    Example:
        >>> from tricomm import Mesh, RandomizedGreedy, ShardingSpec, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=RandomizedGreedy(trials=10)).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 3), 2048), ((1, 4), 2048)]
    """

    trials: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("trials", self.trials, 1, "at least 1, an integer; leave it out for the default")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentError(
                f"seed={shown(self.seed)} must be an integer, the same on all ranks; leave it out for 0"
            )

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> from tricomm.plan.parts import Part
        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> greedy = RandomizedGreedy(trials=3)
        >>> sorted(one.sender for one in greedy.assign((task, task), Topology.flat(3), FanOut.ONCE))
        [0, 1]
        """
        return choose_senders(tasks, topology, fan_out, self._choose)

    def _choose(self, demands: Sequence[TransferDemand], loads: SendLoads) -> tuple[Assignment, ...]:
        generator = random.Random(self.seed)
        best: tuple[float, tuple[Assignment, ...]] | None = None
        for _ in range(self.trials):
            order = list(range(len(demands)))
            generator.shuffle(order)
            tried = loads.copy()
            chosen = greedy(demands, tried, order)
            if best is None or tried.nics.busiest < best[0]:
                best = (tried.nics.busiest, chosen)
        assert best is not None
        return best[1]


@explains_missing
@dataclass(frozen=True, slots=True)
class Ensemble:
    """Take whichever of Naive, LeastLoaded, RandomizedGreedy and Search loads the busiest NIC least (the paper's).

    Example:
        >>> from tricomm import Ensemble, Mesh, ShardingSpec, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=Ensemble()).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 4), 2048), ((1, 3), 2048)]
    """

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> from tricomm.plan.parts import Part
        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> [one.sender for one in Ensemble().assign((task, task), Topology.flat(3), FanOut.ONCE)]
        [0, 1]
        """
        without_choice = direct_assignments(tasks)
        if without_choice is not None:
            return without_choice
        members: tuple[SenderPolicy, ...] = (Naive(), LeastLoaded(), RandomizedGreedy(), Search())
        choices = [member.assign(tasks, topology, fan_out) for member in members]
        return min(choices, key=lambda choice: sending_seconds(choice, topology, fan_out))


def sending_seconds(assignments: Sequence[Assignment], topology: Topology, fan_out: FanOut) -> float:
    """For how long the busiest NIC sends, if hosts forward in the order of each assignment's receivers."""
    loads = SendLoads(topology, fan_out)
    for assignment in assignments:
        loads.add(assignment, assignment.nbytes)
    return loads.nics.busiest
