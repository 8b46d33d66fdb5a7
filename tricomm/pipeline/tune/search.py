"""The search for one number of microbatches: candidate orders, pruned by bounds that hold, then evaluated.

Every function takes values and gives candidates; nothing is kept between them. What is pruned cannot be faster than
what was found by more than WORTH_IT.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.schedule.actions import Edge, Kind
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.tune.evaluate import Candidate, Limits, Simulator, lower_bound_seconds
from tricomm.pipeline.tune.improve import improved
from tricomm.pipeline.tune.in_turn import order_in_turn
from tricomm.pipeline.tune.orders import CandidateOrder, distinct, known_orders, list_orders

RECEIVES_AHEAD = (1, 2, 3, 4)

TURNED_ORDERS = 8
TURNED_ACTIONS = 20_000
"""How many orders are looked at with hops in turn, and for each, how many actions are simulated to find their turns."""

TURNED_WITHIN = 0.1
"""Orders that are longer by more than this part than the fastest get no better turns: these gain up to 5 %."""

WORTH_IT = 0.005
"""A schedule that holds more must be faster by this part: the costs are not known better."""

Progress = Callable[[int, int, Candidate | None], None]
"""Told how many candidate orders were evaluated, how many are known so far, and the fastest that fits."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked for.

    Attributes:
        costs: of one microbatch.
        microbatches: how many there are.
        edges: which stages feed which.
        limits: on memory.
        allow_split: whether the backward can be split.
        trials: so many moves of single actions are tried.
        known_seconds: of the fastest candidate that was found for another number of microbatches.
    """

    costs: Costs
    microbatches: int
    edges: tuple[Edge, ...]
    limits: Limits
    allow_split: bool
    trials: int
    known_seconds: float

    @property
    def bound_seconds(self) -> float:
        """No schedule is shorter."""
        return lower_bound_seconds(self.costs, self.microbatches, self.edges)

    @property
    def most_held(self) -> list[int]:
        """Per stage, the limit on activations, or as many as the bytes allow."""
        return [self.limits.most_held(stage.activation_nbytes, self.microbatches) for stage in self.costs.stages]

    def fits(self, one: Candidate) -> bool:
        """Whether a candidate keeps to the limits."""
        return self.limits.allow(one.activations, one.nbytes)

    def fastest_seconds(self, found: Iterable[Candidate]) -> float:
        """Return what the fastest takes that fits, of these and those found before."""
        return min([self.known_seconds, *(one.makespan_seconds for one in found if self.fits(one))])


@dataclass(frozen=True, slots=True)
class TimedOrder:
    """An order, and the least that it can take with hops that run at once."""

    order: CandidateOrder
    least_seconds: float


def search(problem: Problem, progress: Progress) -> list[Candidate]:
    """Return the candidates for a number of microbatches, those that do not fit among them."""
    simulator = Simulator(problem.costs)
    timed = sorted(_timed(problem, simulator), key=lambda one: one.least_seconds)
    found: list[Candidate] = []

    def tell(done: int) -> None:
        fitting = [one for one in found if problem.fits(one)]
        progress(done, len(timed), min(fitting, key=lambda one: one.makespan_seconds, default=None))

    if problem.costs.shares_anything:
        for candidate in _in_turn(problem, simulator, [one.order for one in timed]):
            found.append(candidate)
            tell(0)
    for number, one in enumerate(timed):
        # One that fits is always looked at, for a comparison with hops in turn.
        is_compared = any(other.queues is Queues.PER_CHANNEL and problem.fits(other) for other in found)
        is_compared = is_compared or (number > 0 and not problem.costs.shares_anything)
        if is_compared and one.least_seconds > problem.fastest_seconds(found) * (1 + WORTH_IT):
            break
        found += _at_once(problem, simulator, one)
        tell(number + 1)
    found += _improved(problem, simulator, found)
    tell(len(timed))
    return found


def _timed(problem: Problem, simulator: Simulator) -> list[TimedOrder]:
    """Time all orders; list schedules only where the known ones leave something to gain."""
    count = len(problem.costs.stages)
    known = distinct(known_orders(count, problem.microbatches, problem.edges, problem.allow_split))
    timed = [_time(simulator, order) for order in known]
    fitting = (one for one in timed if _most_activations(one.order) <= (problem.limits.activations or float("inf")))
    least = min((one.least_seconds for one in fitting), default=float("inf"))
    if least <= problem.bound_seconds * (1 + WORTH_IT):
        return timed
    lists = list_orders(problem.costs, problem.microbatches, problem.edges, problem.allow_split, problem.most_held)
    return timed + [_time(simulator, order) for order in distinct([*known, *lists])[len(known) :]]


def _time(simulator: Simulator, order: CandidateOrder) -> TimedOrder:
    return TimedOrder(order, simulator.ideal(order.schedule).makespan_seconds)


def _most_activations(order: CandidateOrder) -> int:
    """Return how many activations the fullest stage holds."""
    most = 0
    for actions in order.schedule.lists:
        held = 0
        for action in actions:
            held += (action.kind is Kind.FORWARD) - order.schedule.ends_microbatch(action)
            most = max(most, held)
    return most


def _at_once(problem: Problem, simulator: Simulator, one: TimedOrder) -> list[Candidate]:
    """Evaluate the fewest actions by which receives come ahead that are about as fast as more; else the one that does
    not fit.
    """
    best: Candidate | None = None
    for ahead in RECEIVES_AHEAD:
        schedule = with_communication(one.order.schedule, receives_ahead=ahead)
        candidate = simulator.evaluate(one.order, schedule, ahead)
        if not problem.fits(candidate):
            return [candidate] if best is None else [best]
        if best is None or candidate.makespan_seconds < best.makespan_seconds * (1 - WORTH_IT):
            best = candidate
        if best.makespan_seconds <= one.least_seconds * (1 + WORTH_IT):
            break
    return [] if best is None else [best]


def _in_turn(problem: Problem, simulator: Simulator, orders: Sequence[CandidateOrder]) -> Iterator[Candidate]:
    """Evaluate orders whose hops take turns on what they share: the fastest that fit, with better turns, and those
    that are faster and do not fit.
    """
    ideals = [(order, simulator.ideal(order.schedule, Queues.PER_DIRECTION)) for order in orders]
    ideals.sort(key=lambda pair: pair[1].makespan_seconds)
    fitting, fastest_seconds = 0, problem.known_seconds
    for order, ideal in ideals:
        if fitting == TURNED_ORDERS:
            break
        candidate = simulator.evaluate(order, order_in_turn(order.schedule, simulator, ideal, trials=0), None)
        if not problem.fits(candidate):
            yield candidate
            continue
        fitting += 1
        trials = TURNED_ACTIONS // sum(map(len, order.schedule.lists))
        is_near = candidate.makespan_seconds <= fastest_seconds * (1 + TURNED_WITHIN)
        if is_near and candidate.makespan_seconds > problem.bound_seconds * (1 + 1e-9):
            turned = order_in_turn(order.schedule, simulator, ideal, trials=trials, enough=problem.bound_seconds)
            better = candidate if turned == candidate.schedule else simulator.evaluate(order, turned, None)
            candidate = better if problem.fits(better) else candidate
        fastest_seconds = min(fastest_seconds, candidate.makespan_seconds)
        yield candidate


def _improved(problem: Problem, simulator: Simulator, found: Sequence[Candidate]) -> list[Candidate]:
    """Try to shorten the fastest that fits by moves of single actions."""
    fitting = [one for one in found if problem.fits(one)]
    fastest = min(fitting, key=lambda one: one.makespan_seconds, default=None)
    if not problem.trials or fastest is None or fastest.makespan_seconds > problem.known_seconds:
        return []
    if fastest.makespan_seconds <= problem.bound_seconds:
        return []
    ideal = partial(simulator.ideal, queues=fastest.queues)
    schedule = improved(fastest.schedule.compute_only(), ideal, problem.most_held, problem.trials)
    order = CandidateOrder(f"{fastest.name}, improved", None, schedule)
    if fastest.receives_ahead is None:
        return list(_in_turn(problem, simulator, [order]))
    return _at_once(problem, simulator, _time(simulator, order))
