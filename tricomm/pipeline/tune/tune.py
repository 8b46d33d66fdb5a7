"""Which schedule, how many microbatches: from measured costs and a limit on memory, by simulating the candidates.

A hop hides behind compute up to c = (depth (F + B) + W) / 2 (W only with a split backward), and what it costs beyond
that comes back with every microbatch. So a slow hop wants a deeper warm-up, which holds more activations; or fewer
microbatches where latency dominates, more where the fill of the pipeline does; or fewer bytes, which is the planner's
task. The formula only explains: the choice is made by simulation.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from tricomm.errors import PlanError
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.exposure import ExposureReport, exposure_of
from tricomm.pipeline.costs.simulate import simulate
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Edge
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.generators import eager_one_f_one_b, gpipe, warm_up_of
from tricomm.pipeline.schedule.schedule import Schedule, chain
from tricomm.pipeline.tune.greedy import PREFERENCES, list_schedule
from tricomm.pipeline.tune.improve import improved
from tricomm.pipeline.tune.in_turn import ideal_timeline, in_turn

DEPTHS = (0, 1, 2, 3)
RECEIVES_AHEAD = (1, 2, 3, 4)

TURNED_FORMS = 8
TURNED_ACTIONS = 20_000
"""How many forms are looked at with hops in turn, and for each, how many actions are simulated to find their order."""

WORTH_IT = 0.005
"""A schedule that holds more must be faster by this part: the costs are not known better."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pipeline rank may hold at once; None does not limit.

    Attributes:
        activations: microbatches between forward and the end of the backward.
        nbytes: activations, receive buffers and sends under way, as the costs give their bytes.
    """

    activations: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule and what it would take.

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
        """How transfers wait for each other; to be given to the Executor with the schedule."""
        return Queues.PER_DIRECTION if self.receives_ahead is None else Queues.PER_CHANNEL

    def __str__(self) -> str:
        hops = "hops in turn" if self.receives_ahead is None else f"receives {self.receives_ahead} ahead"
        return f"{self.name}, {self.microbatches} microbatches, {hops}"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen, from what, and what remains exposed.

    Attributes:
        best: the chosen candidate.
        timeline: of it.
        compared: the best of each form and number of microbatches that fits, fastest first.
        refused: forms that would be faster and do not fit, in words.
        exposures: one per channel.
    """

    best: Candidate
    timeline: Timeline
    compared: tuple[Candidate, ...]
    refused: tuple[str, ...]
    exposures: tuple[ExposureReport, ...]

    def __str__(self) -> str:
        lines = [f"chosen: {_line(self.best)}"]
        lines += [f"  next:  {_line(one)}" for one in self.compared[1:6]]
        lines += [f"  does not fit: {text}" for text in self.refused[:3]]
        hidden = [one for one in self.exposures if not one.reason]
        if hidden:
            names = ", ".join(str(one.channel) for one in hidden)
            lines.append(f"hidden but for fill and drain: {names}")
        for one in self.exposures:
            if one.reason:
                lines.append(f"exposed by {one.exposed_seconds:.6g} s: {one.channel}: {one.reason}")
        return "\n".join(lines)


def tune(
    costs_of: Callable[[int], Costs],
    microbatches: Iterable[int],
    *,
    limits: Limits = Limits(),
    edges: Iterable[tuple[int, int]] = (),
    allow_split: bool = True,
    trials: int = 0,
) -> Tuned:
    """Choose the schedule of one stage per pipeline rank.

    Compared are GPipe, 1F1B and its eager forms at depths 0 to 3, each with whole backwards or split ones with several
    delays, and list schedules that fill the memory limit; for each, receives posted 1 to 4 actions ahead. Of those
    within 0.5 % of the fastest, the one that holds least is taken.

    Args:
        costs_of: what one microbatch costs if the batch is split into so many; see ``Workload.costs``. Where hops are
            reshards, plan each anew: the planner chooses chunks to the size of the message.
        microbatches: the numbers that may be chosen.
        limits: on memory.
        edges: which stages feed which; () is the chain.
        allow_split: whether the backward can be split.
        trials: so many moves of single actions are tried on the fastest schedule, for stages and hops that are so
            uneven that no regular schedule fits them.

    Raises:
        PlanError: no number of microbatches, or nothing fits the limits.
    """
    search = _Search(tuple(Edge(*edge) for edge in edges), limits, allow_split, trials)
    counts = tuple(dict.fromkeys(microbatches))
    if not counts:
        raise PlanError("microbatches is empty; give the numbers of microbatches that may be chosen")
    for count in counts:
        search.look_at(count, costs_of(count))
    if not search.fitting:
        raise PlanError(
            f"no schedule fits {limits}: the least that one holds is {search.least}; raise the limit, use more "
            "microbatches, or recompute activations"
        )
    compared = sorted(search.fitting, key=lambda one: one.makespan_seconds)
    near = [one for one in compared if one.makespan_seconds <= compared[0].makespan_seconds * (1 + WORTH_IT)]
    best = min(near, key=lambda one: (one.nbytes, one.activations, one.receives_ahead or 0, one.makespan_seconds))
    costs = costs_of(best.microbatches)
    timeline = simulate(best.schedule, costs, queues=best.queues)
    refused = [text for seconds, text in sorted(search.refused) if seconds < best.makespan_seconds * (1 - WORTH_IT)]
    exposures = tuple(exposure_of(channel, timeline, best.depth, bool(refused)) for channel in best.schedule.channels)
    others = tuple(one for one in compared if one is not best)
    return Tuned(best, timeline, (best, *others), tuple(refused), exposures)


@dataclass(frozen=True, slots=True)
class _Form:
    """A schedule without communication, the least that it can take, and the activations that it holds."""

    name: str
    depth: int | None
    schedule: Schedule
    least_seconds: float
    activations: int


class _Search:
    """The candidates so far."""

    def __init__(self, edges: tuple[Edge, ...], limits: Limits, allow_split: bool, trials: int) -> None:
        self.edges, self.limits, self.allow_split, self.trials = edges, limits, allow_split, trials
        self.fitting: list[Candidate] = []
        self.refused: list[tuple[float, str]] = []
        self.fastest = float("inf")
        self.least = ""
        self._least_nbytes: tuple[int, int] | None = None

    def look_at(self, microbatches: int, costs: Costs) -> None:
        """All forms for a number of microbatches; the order is by what they take if receives cost nothing."""
        forms = self.timed(self.known_forms(microbatches, costs), costs)
        fitting = [
            form.least_seconds for form in forms if form.activations <= (self.limits.activations or microbatches)
        ]
        if not fitting or min(fitting) > self.bound(microbatches, costs) * (1 + WORTH_IT):
            forms += self.timed(self.list_schedules(microbatches, costs), costs)
        for form in sorted(forms, key=lambda form: form.least_seconds):
            # No way to post receives makes it faster than with all of them posted at the start.
            if form.least_seconds > self.fastest * (1 + WORTH_IT):
                break
            self.place_receives(form, costs)
        if _has_shared_loads(costs):
            self.take_turns(forms, costs)
        self.improve(microbatches, costs)

    def improve(self, microbatches: int, costs: Costs) -> None:
        """Try to shorten the fastest that fits."""
        fastest = min(self.fitting, key=lambda one: one.makespan_seconds, default=None)
        if not self.trials or fastest is None or fastest.microbatches != microbatches:
            return
        if fastest.makespan_seconds <= self.bound(microbatches, costs):
            return
        ideal = partial(ideal_timeline, costs=costs, queues=fastest.queues)
        schedule = improved(fastest.schedule.compute_only(), ideal, self.most_held(microbatches, costs), self.trials)
        forms = self.timed([(f"{fastest.name}, improved", None, schedule)], costs)
        if fastest.receives_ahead is None:
            self.take_turns(forms, costs)
        else:
            self.place_receives(forms[0], costs)

    def most_held(self, microbatches: int, costs: Costs) -> list[int]:
        """Per stage, the limit on activations, or as many as the bytes allow."""
        return [_most_activations(stage.activation_nbytes, self.limits, microbatches) for stage in costs.stages]

    def timed(self, named: Iterable[tuple[str, int | None, Schedule]], costs: Costs) -> list[_Form]:
        """Each schedule once, with what it takes if all receives are posted at the start."""
        forms: dict[Schedule, _Form] = {}
        for name, depth, schedule in named:
            if schedule not in forms:
                ideal = ideal_timeline(schedule, costs)
                activations = max(peak.activations for peak in ideal.peaks())
                forms[schedule] = _Form(name, depth, schedule, ideal.makespan_seconds, activations)
        return list(forms.values())

    def bound(self, microbatches: int, costs: Costs) -> float:
        """No schedule is shorter: each stage waits for its first input and then computes all that it has to."""
        heads = [0.0] * len(costs.stages)
        for edge in sorted(self.edges or chain(len(costs.stages)), key=lambda edge: edge.source):
            arrival = costs.stages[edge.source].forward_seconds + costs.transfer(edge.forward).seconds
            heads[edge.destination] = max(heads[edge.destination], heads[edge.source] + arrival)
        pairs = zip(heads, costs.stages, strict=True)
        return max(head + microbatches * stage.total_seconds for head, stage in pairs)

    def place_receives(self, form: _Form, costs: Costs) -> None:
        """The best number of actions by which receives come ahead, if some fits."""
        found: Candidate | None = None
        for ahead in RECEIVES_AHEAD:
            candidate = _candidate(form, with_communication(form.schedule, receives_ahead=ahead), ahead, costs)
            if not self.fits(candidate):
                if ahead == RECEIVES_AHEAD[0]:
                    self.refused.append((candidate.makespan_seconds, _line(candidate)))
                break
            if found is None or candidate.makespan_seconds < found.makespan_seconds * (1 - WORTH_IT):
                found = candidate
            if found.makespan_seconds <= form.least_seconds * (1 + WORTH_IT):
                break
        if found is not None:
            self.fitting.append(found)
            self.fastest = min(self.fastest, found.makespan_seconds)

    def take_turns(self, forms: Iterable[_Form], costs: Costs) -> None:
        """The fastest forms that fit with hops that take turns on what they share, with the order of turns improved."""
        pairs = [(form, _candidate(form, in_turn(form.schedule, costs), None, costs)) for form in forms]
        pairs.sort(key=lambda pair: pair[1].makespan_seconds)
        fitting: list[tuple[_Form, Candidate]] = []
        for form, as_ready in pairs:
            if self.fits(as_ready):
                fitting.append((form, as_ready))
            else:
                self.refused.append((as_ready.makespan_seconds, _line(as_ready)))
        for form, as_ready in fitting[:TURNED_FORMS]:
            trials = TURNED_ACTIONS // sum(map(len, form.schedule.lists))
            improved_order = _candidate(form, in_turn(form.schedule, costs, trials=trials), None, costs)
            self.fitting.append(improved_order if self.fits(improved_order) else as_ready)
            self.fastest = min(self.fastest, self.fitting[-1].makespan_seconds)

    def fits(self, one: Candidate) -> bool:
        needs = (one.nbytes, one.activations)
        if self._least_nbytes is None or needs < self._least_nbytes:
            self._least_nbytes, self.least = needs, _line(one)
        limits = self.limits
        return (limits.activations is None or one.activations <= limits.activations) and (
            limits.nbytes is None or one.nbytes <= limits.nbytes
        )

    def known_forms(self, microbatches: int, costs: Costs) -> Iterator[tuple[str, int | None, Schedule]]:
        """What is compared, the simplest first."""
        count = len(costs.stages)
        yield "GPipe", None, gpipe(count, microbatches, edges=self.edges)
        for depth in DEPTHS:
            name = "1F1B" if depth == 0 else f"eager 1F1B, depth {depth}"
            yield name, depth, eager_one_f_one_b(count, microbatches, depth=depth, edges=self.edges)
            delays: list[tuple[str, list[int]]] = [("", [0] * count), (" 1 later", [1] * count)]
            delays += [(f" {turns} per stage later", [turns * stage for stage in range(count)]) for turns in (1, 2)]
            for text, delay in delays if self.allow_split else ():
                schedule = eager_one_f_one_b(
                    count, microbatches, depth=depth, split=True, weight_delay=delay, edges=self.edges
                )
                yield f"{name}, W{text or ' after I'}", depth, schedule

    def list_schedules(self, microbatches: int, costs: Costs) -> Iterator[tuple[str, int | None, Schedule]]:
        """Under the limit of activations, or of as many as the bytes allow."""
        count = len(costs.stages)
        limit = self.most_held(microbatches, costs)
        profiles = {"full": limit} if min(limit) < microbatches else {}
        for depth in DEPTHS[:3]:
            warm_up = [warm_up_of(stage, count, depth) for stage in range(count)]
            profiles[f"depth {depth}"] = [min(pair) for pair in zip(limit, warm_up, strict=True)]
        for split in (True, False) if self.allow_split else (False,):
            for text, memory in profiles.items():
                for index, preference in enumerate(PREFERENCES):
                    name = f"list schedule {index}, {text}, {'split' if split else 'whole'}"
                    yield (
                        name,
                        None,
                        list_schedule(costs, microbatches, memory, preference, split=split, edges=self.edges),
                    )


def _candidate(form: _Form, schedule: Schedule, receives_ahead: int | None, costs: Costs) -> Candidate:
    """A form with communication, simulated."""
    queues = Queues.PER_DIRECTION if receives_ahead is None else Queues.PER_CHANNEL
    timeline = run_clock(schedule, costs, queues)
    peaks = timeline.peaks()
    return Candidate(
        form.name,
        schedule,
        schedule.microbatches,
        receives_ahead,
        form.depth,
        schedule.is_split,
        timeline.makespan_seconds,
        max(peak.activations for peak in peaks),
        max(peak.nbytes for peak in peaks),
    )


def _has_shared_loads(costs: Costs) -> bool:
    """Whether transfers of different channels may slow each other down."""
    names = [name for one in costs.all_transfers() for name, _ in one.loads]
    return len(names) > len(set(names)) or bool(costs.other.loads)


def _most_activations(nbytes: int, limits: Limits, microbatches: int) -> int:
    most = microbatches
    if limits.activations is not None:
        most = min(most, limits.activations)
    if limits.nbytes is not None and nbytes:
        most = min(most, limits.nbytes // nbytes)
    return max(1, most)


def _line(one: Candidate) -> str:
    held = f"holds {one.activations} activations" + (f", {one.nbytes / 1e6:.6g} MB" if one.nbytes else "")
    return f"{one.makespan_seconds:.6g} s  {one}, {held}"
