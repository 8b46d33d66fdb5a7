"""Which schedule, how many microbatches: from measured costs and a limit on memory, by simulating the candidates.

A hop hides behind compute up to c = (depth (F + B) + W) / 2 (W only with a split backward), and what it costs beyond
that comes back with every microbatch. So a slow hop wants a deeper warm-up, which holds more activations; or fewer
microbatches where latency dominates, more where the fill of the pipeline does; or fewer bytes, which is the planner's
task. The formula only explains: the choice is made by simulation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tricomm.errors import ArgumentError, PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.exposure import ExposureReport, exposure_of
from tricomm.pipeline.costs.simulate import simulate
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import MAX_COUNT, Edge
from tricomm.pipeline.schedule.schedule import chain
from tricomm.pipeline.tune.evaluate import Candidate, Limits
from tricomm.pipeline.tune.search import WORTH_IT, Problem, Progress, search

SHOWN = 5
"""So many of the others are printed."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen, from what, and what remains exposed.

    >>> tuned = tune(lambda _: Costs.uniform(2, 1, 1, 1, 0.5), [4])
    >>> print(tuned)
    chosen: 13.5 s  eager 1F1B, depth 1, W 2 per stage later, 4 microbatches, receives 1 ahead, holds 3 activations
      next:  13.5 s  eager 1F1B, depth 2, W 2 per stage later, 4 microbatches, receives 1 ahead, holds 4 activations
    hidden but for fill and drain: 0>1, 1>0

    Attributes:
        best: the chosen candidate.
        timeline: of it.
        compared: the best of each order and number of microbatches that fits, the chosen one first, then by time.
        refused: candidates that would be faster and do not fit, fastest first.
        exposures: one per channel.
    """

    best: Candidate
    timeline: Timeline
    compared: tuple[Candidate, ...]
    refused: tuple[Candidate, ...]
    exposures: tuple[ExposureReport, ...]

    def __str__(self) -> str:
        lines = [f"chosen: {self.best.line}"]
        faster = [one for one in self.compared if one.makespan_seconds < self.best.makespan_seconds]
        if faster:
            lines.append(f"  though {_gain(self.best, min(faster, key=lambda one: one.makespan_seconds))}")
        lines += [f"  next:  {one.line}" for one in _different(self.compared)[1 : 1 + SHOWN]]
        lines += [f"  does not fit: {one.line}" for one in _different(self.refused)[:3]]
        hidden = [one for one in self.exposures if not one.reason]
        if hidden:
            names = ", ".join(str(one.channel) for one in hidden)
            lines.append(f"hidden but for fill and drain: {names}")
        for one in self.exposures:
            if one.reason:
                lines.append(f"exposed by {one.exposed_seconds:.6g} s: {one.channel}: {one.reason}")
        return "\n".join(lines)


@checks_kinds
def tune(
    costs_of: Callable[[int], Costs],
    microbatches: Iterable[int],
    *,
    limits: Limits = Limits(),  # noqa: B008  an immutable value
    edges: Iterable[tuple[int, int]] = (),
    allow_split: bool = True,
    trials: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """Choose the schedule of one stage per pipeline rank.

    Compared are GPipe, 1F1B and its eager forms at depths 0 to 3, each with whole backwards or split ones with several
    delays, and list schedules that fill the memory limit; for each, receives posted 1 to 4 actions ahead. Of those
    within 0.5 % of the fastest, the one that holds least is taken.

    >>> tuned = tune(lambda _: Costs.uniform(4, 1, 1, 1, 1.0), [8], limits=Limits(activations=7))
    >>> tuned.best.name, tuned.best.makespan_seconds
    ('eager 1F1B, depth 1, W 2 per stage later', 30.0)

    Args:
        costs_of: what one microbatch costs if the batch is split into so many; see ``Workload.costs``. Where hops are
            reshards, plan each anew: the planner chooses chunks to the size of the message.
        microbatches: the numbers that may be chosen.
        limits: on memory.
        edges: which stages feed which; () is the chain.
        allow_split: whether the backward can be split.
        trials: so many moves of single actions are tried on the fastest schedule, for stages and hops that are so
            uneven that no regular schedule fits them.
        progress: told of a long search as it goes on.

    Raises:
        PlanError: no number of microbatches, costs of an edge that is not there, or nothing fits the limits.
    """
    if not 0 <= trials <= MAX_COUNT:
        raise PlanError(f"trials={trials} must be from 0 to {MAX_COUNT}; give the moves to try, such as 1000")
    counts = tuple(dict.fromkeys(microbatches))
    if not counts:
        raise PlanError("microbatches is empty; give the numbers of microbatches that may be chosen")
    given = tuple(Edge(*edge) for edge in edges)
    costs = {count: _checked(costs_of(count), count) for count in counts}
    found: list[Candidate] = []
    for count in counts:
        own = given or chain(len(costs[count].stages))
        _check_channels(costs[count], own)
        known = min((one.makespan_seconds for one in found if _fits(one, limits)), default=float("inf"))
        problem = Problem(costs[count], count, own, limits, allow_split, trials, known)
        found += search(problem, progress or _nobody)
    fitting = sorted((one for one in found if _fits(one, limits)), key=lambda one: one.makespan_seconds)
    if not fitting:
        least = min(found, key=lambda one: (one.nbytes, one.activations))
        raise PlanError(
            f"no schedule fits {limits}: the least that one holds is {least.line}; raise the limit, use more "
            "microbatches, or recompute activations"
        )
    near = [one for one in fitting if one.makespan_seconds <= fitting[0].makespan_seconds * (1 + WORTH_IT)]
    best = min(near, key=lambda one: (one.nbytes, one.activations, one.receives_ahead or 0, one.makespan_seconds))
    return _explained(best, fitting, [one for one in found if not _fits(one, limits)], costs[best.microbatches])


def _explained(best: Candidate, fitting: Sequence[Candidate], refused: Sequence[Candidate], costs: Costs) -> Tuned:
    """Say how the chosen candidate fares beside the others."""
    timeline = simulate(best.schedule, costs, queues=best.queues)
    faster = sorted(
        (one for one in refused if one.makespan_seconds < best.makespan_seconds * (1 - WORTH_IT)),
        key=lambda one: one.makespan_seconds,
    )
    exposures = (exposure_of(channel, timeline, best.depth, bool(faster)) for channel in best.schedule.channels)
    others = (one for one in fitting if one is not best)
    return Tuned(best, timeline, (best, *others), tuple(faster), tuple(exposures))


def _fits(one: Candidate, limits: Limits) -> bool:
    return limits.allow(one.activations, one.nbytes)


def _checked(costs: object, count: int) -> Costs:
    """Refuse what a function for costs gave that are none."""
    if not isinstance(costs, Costs):
        raise ArgumentError(
            f"costs_of({count}) gave {costs!r}, which are no Costs; return Costs for each number of microbatches"
        )
    return costs


def _nobody(done: int, known: int, fastest: Candidate | None) -> None:
    """Hear of progress and do nothing."""


def _check_channels(costs: Costs, edges: Sequence[Edge]) -> None:
    """Refuse costs of a channel that no edge has: they would be left out."""
    unknown = sorted({channel.edge for channel in costs.channels} - set(edges))
    if unknown:
        whole = [tuple(edge) for edge in sorted({*edges, *unknown})]
        raise PlanError(
            f"the costs name edge {unknown[0]}, which is none of the edges {', '.join(map(str, edges)) or '()'}; pass "
            f"edges={whole}, or those that there are"
        )


def _different(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Leave out candidates of which a simpler one takes and holds as much."""
    found: dict[tuple[object, ...], Candidate] = {}
    for one in candidates:
        found.setdefault((f"{one.makespan_seconds:.6g}", one.microbatches, one.activations, one.nbytes), one)
    return list(found.values())


def _gain(best: Candidate, fastest: Candidate) -> str:
    """Why the chosen one is not the fastest."""
    part = 1 - fastest.makespan_seconds / best.makespan_seconds
    ours, theirs = f"{best.activations} activations", f"{fastest.activations}"
    if fastest.nbytes != best.nbytes:
        ours, theirs = f"{best.nbytes / 1e6:.6g} MB", f"{fastest.nbytes / 1e6:.6g} MB"
    if ours.split()[0] == theirs.split()[0]:
        ours, theirs = (f"receives {one.receives_ahead or 0} ahead" for one in (best, fastest))
    return (
        f"{fastest.makespan_seconds:.6g} s  {fastest} is {part:.2%} faster: less than the {WORTH_IT:.1%} that costs "
        f"are known to, and the chosen one takes {ours} instead of {theirs}"
    )
