"""The yardstick: the shortest schedule that exists, found and proved by a constraint solver (OR-tools CP-SAT).

For what it costs to use, ``tune`` comes within a few per cent; this says how many. Needs the extra ``solver``.

All microbatches cost the same, so some shortest schedule does each kind of action in the order of microbatches: the
k-th forward of a stage may as well use the k-th activation to arrive. What remains to be found is, per stage, how its
F, I and W (or F and B) interleave, and the memory limit is a simple order: F k+n begins after W k has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tricomm.errors import PlanError
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.simulate import simulate
from tricomm.pipeline.schedule.actions import Action, Edge, Kind
from tricomm.pipeline.schedule.schedule import Schedule, chain

TICKS = 1 << 20
"""The solver counts in whole ticks; times that have no common divisor are rounded to this part of the work."""


@dataclass(frozen=True, slots=True)
class Exact:
    """What the solver found.

    Attributes:
        schedule: the best one, without sends and receives; those of ``with_communication`` may be posted at any time.
        makespan_seconds: of it, as ``simulate`` has it with all receives posted at the start.
        bound_seconds: no schedule under the limits is shorter.
        solver_seconds: wall time of the search.
    """

    schedule: Schedule
    makespan_seconds: float
    bound_seconds: float
    solver_seconds: float


def solve(
    costs: Costs,
    microbatches: int,
    *,
    memory: int | Sequence[int],
    split: bool = True,
    edges: Sequence[tuple[int, int]] = (),
    limit_seconds: float = 60.0,
    workers: int = 2,
    start: Schedule | None = None,
) -> Exact:
    """Find the schedule of least makespan for stages that have a pipeline rank each and channels that share nothing.

    Args:
        costs: of stages and channels; shared loads are not modelled.
        microbatches: M.
        memory: the most activations that a stage may hold, one number or one per stage.
        split: whether backwards are I then W.
        edges: which stages feed which; () is the chain.
        limit_seconds: after which the best so far is returned with the bound so far.
        workers: threads.
        start: a schedule to begin from, for a shorter search.

    Raises:
        PlanError: OR-tools is not installed, or no schedule was found in time.
    """
    if find_spec("ortools") is None:
        raise PlanError('the exact solver needs OR-tools, which is not installed; run pip install "tricomm[solver]"')
    from ortools.sat.python import cp_model

    stages = len(costs.stages)
    limits = [memory] * stages if isinstance(memory, int) else list(memory)
    if len(limits) != stages or min(limits) < 1:
        raise PlanError(f"memory={memory!r} must be a number from 1, or one for each of {stages} stages")
    model = _Model(cp_model.CpModel(), costs, microbatches, split, tuple(Edge(*edge) for edge in edges))
    model.add_stages(limits)
    model.add_transfers()
    model.minimise()
    if start is not None:
        model.hint(start)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_seconds
    solver.parameters.num_workers = workers
    status = solver.solve(model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise PlanError(
            f"the solver found no schedule of {stages} stages and {microbatches} microbatches in {limit_seconds} s; "
            "raise limit_seconds or memory"
        )
    lists = []
    for actions in model.by_stage:
        lists.append(tuple(sorted(actions, key=lambda action: solver.value(model.begin[action]))))
    schedule = Schedule(tuple(lists), model.edges)
    makespan = simulate(schedule, costs).makespan_seconds
    bound = solver.best_objective_bound * model.tick_seconds
    return Exact(schedule, makespan, min(bound, makespan), solver.wall_time)


class _Model:
    """The variables and rules of one problem."""

    def __init__(self, model: Any, costs: Costs, microbatches: int, split: bool, edges: tuple[Edge, ...]) -> None:
        self.model, self.costs, self.microbatches = model, costs, microbatches
        self.edges = edges or chain(len(costs.stages))
        backward = [Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT] if split else [Kind.BACKWARD]
        self.kinds = [Kind.FORWARD, *backward]
        self.begin: dict[Action, Any] = {}
        self.end: dict[Action, Any] = {}
        self.by_stage: list[list[Action]] = []
        self.tick_seconds = _tick(costs)
        # All work one after the other is long enough for any order.
        work = sum(cost.total_seconds for cost in costs.stages)
        hops = sum(costs.transfer(one).seconds for edge in self.edges for one in (edge.forward, edge.backward))
        self.horizon = self.ticks((work + hops) * microbatches)

    def ticks(self, seconds: float) -> int:
        return round(seconds / self.tick_seconds)

    def add_stages(self, limits: Sequence[int]) -> None:
        for stage, limit in enumerate(limits):
            intervals = []
            actions: list[Action] = []
            for microbatch in range(self.microbatches):
                for kind in self.kinds:
                    action = Action(stage, kind, microbatch)
                    begin = self.model.new_int_var(0, self.horizon, str(action))
                    length = self.ticks(self.costs.seconds(action))
                    intervals.append(self.model.new_fixed_size_interval_var(begin, length, str(action)))
                    self.begin[action], self.end[action] = begin, begin + length
                    actions.append(action)
            self.model.add_no_overlap(intervals)
            self.by_stage.append(actions)
            for microbatch in range(self.microbatches):
                for first, second in zip(self.kinds, self.kinds[1:], strict=False):
                    self._order(Action(stage, first, microbatch), Action(stage, second, microbatch))
                for kind in self.kinds[: 3 if microbatch else 0]:
                    self._order(Action(stage, kind, microbatch - 1), Action(stage, kind, microbatch))
                if microbatch >= limit:
                    self._order(
                        Action(stage, self.kinds[-1], microbatch - limit), Action(stage, Kind.FORWARD, microbatch)
                    )

    def add_transfers(self) -> None:
        for edge in self.edges:
            for channel, kind in ((edge.forward, Kind.FORWARD), (edge.backward, self.kinds[1])):
                cost = self.costs.transfer(channel)
                busy, latency = self.ticks(cost.busy_seconds), self.ticks(cost.latency_seconds)
                before = None
                for microbatch in range(self.microbatches):
                    producer = Action(channel.sender, kind, microbatch)
                    consumer = Action(channel.receiver, kind, microbatch)
                    begin = self.model.new_int_var(0, self.horizon, f"{channel} {microbatch}")
                    self.model.add(begin >= self.end[producer])
                    self.model.add(self.begin[consumer] >= begin + busy + latency)
                    if before is not None:
                        self.model.add(begin >= before + busy)
                    before = begin

    def minimise(self) -> None:
        makespan = self.model.new_int_var(0, self.horizon, "makespan")
        for end in self.end.values():
            self.model.add(makespan >= end)
        for stage, cost in enumerate(self.costs.stages):
            # What must come before a stage's first action and after its last, which the solver would find late.
            self.model.add(makespan >= self.ticks(cost.total_seconds * self.microbatches) + self._head(stage))
        self.model.minimize(makespan)

    def hint(self, start: Schedule) -> None:
        for spans in simulate(start, self.costs).compute:
            for span in spans:
                self.model.add_hint(self.begin[span.action], self.ticks(span.begin))

    def _head(self, stage: int) -> int:
        """Ticks before a stage can begin: the longest way of one microbatch to it."""
        directed_links = [
            self._head(edge.source)
            + self.ticks(self.costs.stages[edge.source].forward_seconds)
            + self.ticks(self.costs.transfer(edge.forward).seconds)
            for edge in self.edges
            if edge.destination == stage
        ]
        return max(directed_links, default=0)

    def _order(self, first: Action, second: Action) -> None:
        self.model.add(self.begin[second] >= self.end[first])


def _tick(costs: Costs) -> float:
    """A time of which all others are multiples if there is one that is not tiny; else a small part of the longest."""
    times = {cost.forward_seconds for cost in costs.stages}
    times |= {cost.input_gradient_seconds for cost in costs.stages}
    times |= {cost.weight_gradient_seconds for cost in costs.stages}
    for hop in costs.all_transfers():
        times |= {hop.busy_seconds, hop.latency_seconds}
    times.discard(0.0)
    divisor = 0.0
    for time in times:
        divisor, rest = time, divisor
        while rest > 1e-9 * time:
            divisor, rest = rest, divisor % rest
            if divisor - rest < 1e-9 * time:
                rest = 0.0
    longest = max(times)
    return divisor if divisor > longest / TICKS else longest / 1024
