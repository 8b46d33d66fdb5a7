"""The evaluation of candidates: a schedule with communication in, what it takes and holds out."""

from collections.abc import Sequence
from dataclasses import dataclass

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds, explains_fields, refuse_wrong_kinds
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.programs import Known
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Edge
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.pipeline.tune.orders import CandidateOrder


@explains_fields
@dataclass(frozen=True, slots=True)
class Limits:
    """What a pipeline rank may hold at once; None does not limit.

    >>> Limits(activations=4, nbytes=8 << 30).nbytes
    8589934592

    Attributes:
        activations: microbatches between forward and the end of the backward.
        nbytes: activations, receive buffers and sends under way, as the costs give their bytes.

    Raises:
        PlanError: a limit that leaves room for nothing.
    """

    activations: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        refuse_wrong_kinds(Limits.__init__, activations=self.activations, nbytes=self.nbytes)
        for name in ("activations", "nbytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name}={value} leaves room for nothing; give at least 1, or None for no limit")

    @checks_kinds
    def allow(self, activations: int, nbytes: int) -> bool:
        """Whether so much may be held.

        >>> Limits(activations=4).allow(activations=5, nbytes=0)
        False
        """
        _check_held(activations=activations, nbytes=nbytes)
        return (self.activations is None or activations <= self.activations) and (
            self.nbytes is None or nbytes <= self.nbytes
        )

    @checks_kinds
    def most_held(self, activation_nbytes: int, microbatches: int) -> int:
        """Return how many activations of some bytes may be held, at least one.

        >>> Limits(nbytes=8 << 30).most_held(activation_nbytes=3 << 30, microbatches=16)
        2
        """
        _check_held(activation_nbytes=activation_nbytes, microbatches=microbatches)
        most = microbatches if self.activations is None else min(microbatches, self.activations)
        if self.nbytes is not None and activation_nbytes:
            most = min(most, self.nbytes // activation_nbytes)
        return max(1, most)


def _check_held(**given: int) -> None:
    for name, value in given.items():
        if value < 0:
            raise PlanError(f"{name}={value} must be at least 0; give what is held")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule and what it would take.

    >>> from tricomm.pipeline import Costs, tune
    >>> best = tune(lambda _: Costs.uniform(2, 1, 1, 1, 0.5), [4]).best
    >>> best.makespan_seconds, best.activations, best.queues.name
    (13.5, 3, 'PER_CHANNEL')

    Attributes:
        name: in words.
        schedule: with sends and receives.
        microbatches: into which the batch is split.
        receives_ahead: as for ``with_communication``; None if hops take turns, in the order of ``in_turn``.
        depth: of the warm-up; None for list schedules and GPipe.
        is_split: whether backwards are I then W.
        makespan_seconds: of the whole batch.
        activations, nbytes: the most that some pipeline rank holds.
    """

    name: str
    schedule: Schedule
    microbatches: int
    receives_ahead: int | None
    depth: int | None
    is_split: bool
    makespan_seconds: float
    activations: int
    nbytes: int

    @property
    def queues(self) -> Queues:
        """How transfers wait for each other; to be given to the Executor with the schedule.

        >>> from tricomm.pipeline import Costs, tune
        >>> best = tune(lambda _: Costs.uniform(2, 1, 1, 1, 0.5), [4]).best
        >>> best.queues  # Executor(best.schedule, stages, edges, queues=best.queues)
        <Queues.PER_CHANNEL: 'one per directed edge'>
        """
        return Queues.PER_DIRECTION if self.receives_ahead is None else Queues.PER_CHANNEL

    @property
    def line(self) -> str:
        """What it takes and what it is, in one line.

        >>> from tricomm.pipeline import Costs, tune
        >>> best = tune(lambda _: Costs.uniform(2, 1, 1, 1, 0.5), [4]).best
        >>> best.line
        '13.5 s  eager 1F1B, depth 1, W 2 per stage later, 4 microbatches, receives 1 ahead, holds 3 activations'
        """
        held = f"holds {self.activations} activations" + (f", {self.nbytes / 1e6:.6g} MB" if self.nbytes else "")
        return f"{self.makespan_seconds:.6g} s  {self}, {held}"

    def __str__(self) -> str:
        hops = "hops in turn" if self.receives_ahead is None else f"receives {self.receives_ahead} ahead"
        return f"{self.name}, {self.microbatches} microbatches, {hops}"


class Simulator:
    """Simulate schedules of one pipeline; what the clock needs of an action is worked out once for all of them.

    Args:
        costs: of its stages and hops.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._known = {queues: Known() for queues in Queues}

    def run(self, schedule: Schedule, queues: Queues = Queues.PER_CHANNEL, *, in_order: bool = True) -> Timeline:
        """Simulate a schedule with communication that is known to run; see ``run_clock``."""
        return run_clock(schedule, self.costs, queues, in_order=in_order, known=self._known[queues])

    def ideal(self, schedule: Schedule, queues: Queues = Queues.PER_CHANNEL) -> Timeline:
        """Simulate with all receives posted at the start, and, if transfers take turns, with each beginning as soon as
        both ends are ready and free: what an order of computation allows at best.
        """
        posted = with_communication(schedule, receives_ahead=max(map(len, schedule.lists)))
        return self.run(posted, queues, in_order=queues is not Queues.PER_DIRECTION)

    def evaluate(self, order: CandidateOrder, schedule: Schedule, receives_ahead: int | None) -> Candidate:
        """Say what an order takes and holds, with the sends and receives of ``schedule``."""
        queues = Queues.PER_DIRECTION if receives_ahead is None else Queues.PER_CHANNEL
        timeline = self.run(schedule, queues)
        peaks = timeline.peaks()
        return Candidate(
            order.name,
            schedule,
            schedule.microbatches,
            receives_ahead,
            order.depth,
            schedule.is_split,
            timeline.makespan_seconds,
            max(peak.activations for peak in peaks),
            max(peak.nbytes for peak in peaks),
        )


def lower_bound_seconds(costs: Costs, microbatches: int, edges: Sequence[Edge]) -> float:
    """Return what no schedule undercuts.

    Each stage waits for its first input and then computes all that it has to. Of what transfers share, each is idle
    until the first of them can begin, then moves all of them, and after the last, at best a gradient, the stage that
    gets it has a backward to do and to pass on.
    """
    begins = [0.0] * len(costs.stages)  # of the first forward
    tails = [stage.backward_seconds for stage in costs.stages]  # from the last gradient to the end
    for edge in sorted(edges, key=lambda edge: edge.source):
        arrival = costs.stages[edge.source].forward_seconds + costs.transfer(edge.forward).seconds
        begins[edge.destination] = max(begins[edge.destination], begins[edge.source] + arrival)
        back = costs.stages[edge.destination].input_gradient_seconds + costs.transfer(edge.backward).seconds
        tails[edge.destination] = max(tails[edge.destination], back + tails[edge.source])
    pairs = zip(begins, costs.stages, strict=True)
    bounds = [begin + microbatches * stage.total_seconds for begin, stage in pairs]
    busy: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for edge in edges:
        for channel in (edge.forward, edge.backward):
            cost = costs.transfer(channel)
            # A gradient cannot come before the first activation either.
            begin = begins[edge.source] + costs.stages[edge.source].forward_seconds
            tail = cost.latency_seconds + tails[edge.source]
            for name, load in cost.loads:
                busy[name] = busy.get(name, 0.0) + load * cost.busy_seconds * microbatches
                first[name] = min(first.get(name, begin), begin)
                last[name] = min(last.get(name, tail), tail)
    return max([*bounds, *(first[name] + seconds + last[name] for name, seconds in busy.items())])
