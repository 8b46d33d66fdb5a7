"""Where sends and receives stand in a schedule: sends right after their producer, receives ahead of their consumer."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.schedule.actions import Action, Channel, Kind, receive, send
from tricomm.pipeline.schedule.schedule import Schedule, relisted

_Crossing = dict[tuple[int, Kind], list[Channel]]
"""By stage and kind of action."""


@checks_kinds
def with_communication(schedule: Schedule, *, receives_ahead: int = 1) -> Schedule:
    """Put in the sends and receives that the edges between pipeline ranks need.

    A send stands right after the action that gives its data. A receive stands ``receives_ahead`` compute actions ahead
    of the action that needs its data, or earlier where that is needed so that each channel receives in the order in
    which it sends: then one queue per channel never blocks.

    A receive that is posted right before its use (0) hides nothing: a transfer starts when both ends are there. With 1
    it has the compute action before to hide behind, which is enough in a steady state. Each further one costs a buffer.

    Args:
        schedule: sends and receives that it has are dropped.
        receives_ahead: compute actions of the receiver's pipeline rank; a number beyond its list posts all at the
            start.

    Raises:
        PlanError: a negative number.

    Example:
        >>> from tricomm.pipeline.schedule.generators import gpipe
        >>> print(with_communication(gpipe(2, 2)))
        0: 0F0      0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1
        1: 1RECV_F0 1RECV_F1 1F0      1F1 1B0      1SEND_B0 1B1 1SEND_B1
    """
    if receives_ahead < 0:
        raise PlanError(
            f"receives_ahead={receives_ahead} would post a receive after its use; give the number of compute actions "
            "by which receives come first, usually 1"
        )
    schedule = schedule.compute_only()
    outputs = _crossing(schedule, schedule.outputs)
    received = _receives(schedule, outputs, receives_ahead)
    lists = []
    for pipeline_rank, actions in enumerate(schedule.lists):
        sent = [
            (index + 1, send(channel, action.microbatch))
            for index, action in enumerate(actions)
            for channel in outputs[action.stage, action.kind]
        ]
        lists.append(interleave(actions, [*sent, *received[pipeline_rank]]))
    return relisted(schedule, lists)


@checks_kinds
def with_synchronous_communication(schedule: Schedule) -> Schedule:
    """Put in sends and receives of which both ends may await each: none is under way while a rank computes.

    All pipeline ranks follow one order, in which a tensor crosses right before it is needed. So a rank that waits for
    another one in a send or a receive waits for what that one does earlier in the order, and none waits in a circle.
    Each list computes in the order in which it did, and needs no more receive buffers than with receives ahead.

    Args:
        schedule: sends and receives that it has are dropped.

    Raises:
        PlanError: its computations cannot be done in the order in which they stand.

    Example:
        >>> from tricomm.pipeline.schedule.generators import gpipe
        >>> print(with_synchronous_communication(gpipe(2, 2)))
        0: 0F0      0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1
        1: 1RECV_F0 1F0      1RECV_F1 1F1 1B0 1SEND_B0 1B1      1SEND_B1
    """
    schedule = schedule.compute_only()
    inputs, outputs = _crossing(schedule, schedule.inputs), _crossing(schedule, schedule.outputs)
    place = schedule.pipeline_rank_by_stage
    lists: list[list[Action]] = [[] for _ in schedule.lists]
    left = [deque(actions) for actions in schedule.lists]
    waiting: dict[Channel, deque[int]] = {channel: deque() for channel in schedule.channels}
    done: set[Action] = set()
    while any(left):
        before = len(done)
        for pipeline_rank, actions in enumerate(left):
            if not actions or not _needs(schedule, actions[0]) <= done:
                continue
            action = actions.popleft()
            for channel in inputs[action.stage, action.kind]:
                while action.microbatch in waiting[channel]:  # those that left before it come before it
                    microbatch = waiting[channel].popleft()
                    lists[place[channel.sender]].append(send(channel, microbatch))
                    lists[pipeline_rank].append(receive(channel, microbatch))
            lists[pipeline_rank].append(action)
            done.add(action)
            for channel in outputs[action.stage, action.kind]:
                waiting[channel].append(action.microbatch)
        if len(done) == before:
            stuck = ", ".join(str(actions[0]) for actions in left if actions)
            raise PlanError(f"{stuck} wait for each other; change the order of the actions of a pipeline rank")
    return relisted(schedule, lists)


def _needs(schedule: Schedule, action: Action) -> set[Action]:
    """What other stages compute before an action."""
    return {schedule.producer(channel, action.microbatch) for channel in schedule.inputs(action)}


def interleave(actions: Sequence[Action], placed: Iterable[tuple[int, Action]]) -> tuple[Action, ...]:
    """Compute actions with others among them: each stands before the compute action of its index, or at the end; those
    of one index in the order in which they are given.
    """
    slots: dict[int, list[Action]] = {}
    for index, action in placed:
        slots.setdefault(index, []).append(action)
    out: list[Action] = []
    for index, action in enumerate(actions):
        out += [*slots.get(index, ()), action]
    return (*out, *slots.get(len(actions), ()))


def _receives(schedule: Schedule, outputs: _Crossing, ahead: int) -> list[list[tuple[int, Action]]]:
    """Per pipeline rank, (index of the compute action before which it stands, receive)."""
    sent: dict[Channel, list[int]] = {channel: [] for channel in schedule.channels}
    wanted: dict[tuple[Channel, int], int] = {}
    inputs = _crossing(schedule, schedule.inputs)
    for actions in schedule.lists:
        for index, action in enumerate(actions):
            for channel in outputs[action.stage, action.kind]:
                sent[channel].append(action.microbatch)
            for channel in inputs[action.stage, action.kind]:
                wanted[channel, action.microbatch] = max(0, index - ahead)
    found: list[list[tuple[int, Action]]] = [[] for _ in schedule.lists]
    placed: list[tuple[int, int, Channel, int]] = []
    for channel, microbatches in sent.items():
        slot = len(schedule.lists[schedule.pipeline_rank_of(channel.receiver)])
        # From the last to the first: none may come after one that is sent later.
        for turn in range(len(microbatches) - 1, -1, -1):
            slot = min(slot, wanted[channel, microbatches[turn]])
            placed.append((slot, turn, channel, microbatches[turn]))
    for slot, _, channel, microbatch in sorted(placed):
        found[schedule.pipeline_rank_of(channel.receiver)].append((slot, receive(channel, microbatch)))
    return found


def _crossing(schedule: Schedule, channels_of: Callable[[Action], tuple[Channel, ...]]) -> _Crossing:
    """Return the channels of each compute action that leave their pipeline rank, the nearest stage first: it is the
    next to wait.
    """
    place = schedule.pipeline_rank_by_stage
    found: _Crossing = {}
    for action in schedule.actions():
        if (action.stage, action.kind) not in found:
            crossing = (one for one in channels_of(action) if place[one.sender] != place[one.receiver])
            ordered = sorted(crossing, key=lambda channel: abs(channel.sender - channel.receiver))
            found[action.stage, action.kind] = ordered
    return found
