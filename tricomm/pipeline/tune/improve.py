"""Local search: move single actions of a schedule to other places, as long as that helps.

First what is on the critical path moves forward. That ends where only several moves together would help, as where hops
share NICs; then random moves are tried, some of which may do harm for a while (simulated annealing).

Off by default (``tune(trials=0)``), as regular schedules are mostly as good. With 1000 trials 6 of the 84 problems of
``bench.pipeline.exact`` get shorter, by up to 3.4 %: the mean distance to the proven optimum goes from 0.26 % to
0.14 %, in seven times the time.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import exp

from tricomm.errors import PlanError
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Action, Kind
from tricomm.pipeline.schedule.schedule import Schedule

REACH = 4
"""Places by which an action is moved at most."""

HARM = 5e-4
"""The part of the makespan by which a random move may typically lengthen it at first; at the end it may not at all."""


Ideal = Callable[[Schedule], Timeline]
"""What an order of computation allows at best: see ``Simulator.ideal``."""


def improved(schedule: Schedule, ideal: Ideal, memory: Sequence[int], trials: int) -> Schedule:
    """A schedule that is no longer; the same for the same arguments.

    Args:
        schedule: without communication, one stage per pipeline rank.
        ideal: by which schedules are compared.
        memory: per stage, the most activations that it may hold.
        trials: schedules that are simulated at most.
    """
    schedule, seconds, left = _along_the_path(schedule, ideal, memory, trials)
    return _wandered(schedule, seconds, ideal, memory, left)


def _along_the_path(
    schedule: Schedule, ideal: Ideal, memory: Sequence[int], trials: int
) -> tuple[Schedule, float, int]:
    """(a schedule that no move of the critical path shortens, its makespan, trials left); the first move that helps is
    kept.
    """
    timeline = ideal(schedule)
    left = trials
    while True:
        for candidate in _neighbours(schedule, timeline, memory):
            if not left:
                return schedule, timeline.makespan_seconds, left
            left -= 1
            try:
                shorter = ideal(candidate)
            except PlanError:  # the move made stages wait for each other in a cycle
                continue
            if shorter.makespan_seconds < timeline.makespan_seconds * (1 - 1e-9):
                schedule, timeline = candidate, shorter
                break
        else:
            return schedule, timeline.makespan_seconds, left


def _wandered(schedule: Schedule, seconds: float, ideal: Ideal, memory: Sequence[int], trials: int) -> Schedule:
    """The shortest schedule on a random walk from one of that makespan."""
    rng = random.Random(0)
    best, best_seconds = schedule, seconds
    for turn in range(trials):
        candidate = _random_neighbour(schedule, memory, rng)
        if candidate is schedule:
            continue
        try:
            found = ideal(candidate).makespan_seconds
        except PlanError:
            continue
        harm = HARM * best_seconds * (1 - turn / trials)
        if found <= seconds or rng.random() < exp((seconds - found) / harm):
            schedule, seconds = candidate, found
        if found < best_seconds * (1 - 1e-9):
            best, best_seconds = candidate, found
    return best


def _neighbours(schedule: Schedule, timeline: Timeline, memory: Sequence[int]) -> Iterator[Schedule]:
    """Schedules in which an action of the critical path stands up to REACH places earlier."""
    for step in timeline.critical_path():
        if not isinstance(step.what, Action):
            continue
        stage = step.what.stage
        actions = schedule.lists[stage]
        index = actions.index(step.what)
        for earlier in range(index - 1, max(-1, index - 1 - REACH), -1):
            moved = _moved(actions, index, earlier)
            if _is_allowed(moved, memory[stage]):
                yield _with_list(schedule, stage, moved)


def _random_neighbour(schedule: Schedule, memory: Sequence[int], rng: random.Random) -> Schedule:
    """The schedule with one action elsewhere; the same one if the move that was drawn is not allowed."""
    stage = rng.randrange(len(schedule.lists))
    actions = schedule.lists[stage]
    index = rng.randrange(len(actions))
    place = min(max(0, index + rng.randint(-REACH, REACH)), len(actions) - 1)
    moved = _moved(actions, index, place)
    return _with_list(schedule, stage, moved) if _is_allowed(moved, memory[stage]) else schedule


def _moved(actions: tuple[Action, ...], index: int, place: int) -> tuple[Action, ...]:
    others = (*actions[:index], *actions[index + 1 :])
    return (*others[:place], actions[index], *others[place:])


def _with_list(schedule: Schedule, stage: int, actions: tuple[Action, ...]) -> Schedule:
    return replace(schedule, lists=(*schedule.lists[:stage], actions, *schedule.lists[stage + 1 :]))


def _is_allowed(actions: Sequence[Action], memory: int) -> bool:
    """Whether each F comes before its backward, each I before its W, and no more is held than may be."""
    done: set[tuple[Kind, int]] = set()
    held = 0
    for action in actions:
        if action.kind.gives_gradient and (Kind.FORWARD, action.microbatch) not in done:
            return False
        if action.kind is Kind.WEIGHT_GRADIENT and (Kind.INPUT_GRADIENT, action.microbatch) not in done:
            return False
        held += (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT))
        if held > memory:
            return False
        done.add((action.kind, action.microbatch))
    return True
