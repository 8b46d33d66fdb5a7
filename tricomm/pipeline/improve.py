"""Local search: move what is on the critical path to an earlier place, as long as that helps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tricomm.errors import PlanError
from tricomm.pipeline.actions import Action, Kind
from tricomm.pipeline.communication import with_communication
from tricomm.pipeline.costs import Costs
from tricomm.pipeline.schedule import Schedule
from tricomm.pipeline.simulate import run_clock
from tricomm.pipeline.timeline import Timeline

REACH = 4
"""Places by which an action is moved at most."""


def improved(schedule: Schedule, costs: Costs, memory: Sequence[int], trials: int) -> Schedule:
    """A schedule that is no longer, found by moving actions of the critical path before others of their stage.

    Deterministic: the path is walked from its start, and the first move that helps is kept.

    Args:
        schedule: without communication, one stage per position.
        costs: of its stages and channels.
        memory: per stage, the most activations that it may hold.
        trials: moves that are tried at most.
    """
    timeline = _ideal(schedule, costs)
    left = trials
    while True:
        for candidate in _neighbours(schedule, timeline, memory):
            if not left:
                return schedule
            left -= 1
            try:
                shorter = _ideal(candidate, costs)
            except PlanError:  # the move made stages wait for each other in a circle
                continue
            if shorter.makespan_seconds < timeline.makespan_seconds * (1 - 1e-9):
                schedule, timeline = candidate, shorter
                break
        else:
            return schedule


def _ideal(schedule: Schedule, costs: Costs) -> Timeline:
    """With all receives posted at the start."""
    return run_clock(with_communication(schedule, receives_ahead=3 * schedule.microbatches), costs)


def _neighbours(schedule: Schedule, timeline: Timeline, memory: Sequence[int]) -> Iterator[Schedule]:
    """Schedules in which an action of the critical path stands up to REACH places earlier."""
    for step in timeline.critical_path():
        if not isinstance(step.what, Action):
            continue
        stage = step.what.stage
        actions = schedule.lists[stage]
        index = actions.index(step.what)
        for earlier in range(index - 1, max(-1, index - 1 - REACH), -1):
            moved = (*actions[:earlier], step.what, *actions[earlier:index], *actions[index + 1 :])
            if _is_allowed(moved, memory[stage]):
                yield replace(schedule, lists=(*schedule.lists[:stage], moved, *schedule.lists[stage + 1 :]))


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
