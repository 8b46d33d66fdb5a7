"""Where hops to and from several neighbours share a NIC: an order in which they take turns on it.

Two transfers that share a NIC both end late. One after the other, the first ends in half the time, and if it is the
one that is needed first, nothing is lost. A rank can see to that by itself, in an order that all know: it starts to
send when its send before has ended, and posts a receive when its receive before has arrived (``Queues.PER_DIRECTION``).
What it cannot do by itself is to find the order, for ranks that disagree wait for each other. So the order is that of
a simulation: first one in which whatever is ready first goes first, then better ones, in which two neighbours on a NIC
that lie on the critical path have changed places (the neighbourhood of van Laarhoven et al. for job shops, 1992).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tricomm.errors import PlanError
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.simulate import check_stages
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Action, Channel, receive, send
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.communication import interleave, with_communication
from tricomm.pipeline.schedule.schedule import Schedule

Order = dict[tuple[int, bool], tuple[tuple[Channel, int], ...]]
"""Per pipeline rank and direction (whether it sends), the transfers in the order of their turns."""


def ideal_timeline(schedule: Schedule, costs: Costs, queues: Queues = Queues.PER_CHANNEL) -> Timeline:
    """What an order of computation allows with all receives posted at the start, and, if transfers take turns, with
    each beginning as soon as both ends are ready and free.
    """
    posted = with_communication(schedule, receives_ahead=max(map(len, schedule.lists)))
    return run_clock(posted, costs, queues, in_order=queues is not Queues.PER_DIRECTION)


def in_turn(schedule: Schedule, costs: Costs, *, trials: int = 0) -> Schedule:
    """Put in sends and receives such that hops take turns, for ``Queues.PER_DIRECTION``.

    Args:
        schedule: sends and receives that it has are dropped.
        costs: by which the order is found; with others the schedule still runs, but the order may be a bad one.
        trials: so many other orders are simulated at most.

    Raises:
        PlanError: costs of another number of stages, or a schedule that cannot run.
    """
    check_stages(schedule, costs)
    timeline = ideal_timeline(schedule, costs, Queues.PER_DIRECTION)
    schedule = schedule.compute_only()
    timeline = _improved(schedule, timeline, costs, trials)
    order = _order_of(timeline)
    lists = []
    for pipeline_rank, actions in enumerate(schedule.lists):
        received = _receives(timeline, order[pipeline_rank, False], pipeline_rank)
        lists.append(interleave(actions, [*received, *_sends(schedule, order[pipeline_rank, True], pipeline_rank)]))
    return replace(schedule, lists=tuple(lists))


def _improved(schedule: Schedule, timeline: Timeline, costs: Costs, trials: int) -> Timeline:
    """The best of some orders, from that of a timeline on: the first one that is better is followed at once; those that
    are as good are kept for later.
    """
    following = [(_order_of(timeline), timeline)]
    best, seen = timeline, {str(following[0][0])}
    while following:
        order, timeline = following.pop()
        for other in _swaps(order, timeline):
            key = str(other)
            if key in seen:
                continue
            if len(seen) > trials:
                return best
            seen.add(key)
            try:
                found = run_clock(_all_posted(schedule, other), costs, Queues.PER_DIRECTION)
            except PlanError:  # it made ranks wait for each other
                continue
            if found.makespan_seconds < timeline.makespan_seconds * (1 - 1e-9):
                following.append((other, found))
                best = min(best, found, key=lambda one: one.makespan_seconds)
                break
            if found.makespan_seconds <= timeline.makespan_seconds * (1 + 1e-9):
                following.insert(0, (other, found))
    return best


def _order_of(timeline: Timeline) -> Order:
    """In which order the transfers of a timeline took their turns."""
    place = timeline.schedule.pipeline_rank_of
    return {
        (pipeline_rank, is_send): tuple(
            (one.channel, one.microbatch)
            for one in timeline.transfers
            if place(one.channel.sender if is_send else one.channel.receiver) == pipeline_rank
        )
        for pipeline_rank in range(timeline.schedule.pipeline_ranks)
        for is_send in (True, False)
    }


def _swaps(order: Order, timeline: Timeline) -> Iterator[Order]:
    """Orders in which a transfer of the critical path goes before the one of another channel that it waited for."""
    critical = {(step.what, step.begin) for step in timeline.critical_path()}
    begins = {(one.channel, one.microbatch): one.begin for one in timeline.transfers}
    ends = {(one.channel, one.microbatch): one.end for one in timeline.transfers}
    for queue, turns in order.items():
        for index in range(1, len(turns)):
            before, one = turns[index - 1 : index + 1]
            has_waited = (one[0], begins[one]) in critical and ends[before] == begins[one]
            if has_waited and before[0] != one[0]:
                yield {**order, queue: (*turns[: index - 1], one, before, *turns[index + 1 :])}


def _all_posted(schedule: Schedule, order: Order) -> Schedule:
    """The schedule with an order, all receives standing at the start."""
    lists = []
    for pipeline_rank, actions in enumerate(schedule.lists):
        received = [(0, receive(*crossing)) for crossing in order[pipeline_rank, False]]
        lists.append(interleave(actions, [*received, *_sends(schedule, order[pipeline_rank, True], pipeline_rank)]))
    return replace(schedule, lists=tuple(lists))


def _sends(schedule: Schedule, sent: Sequence[tuple[Channel, int]], pipeline_rank: int) -> Iterator[tuple[int, Action]]:
    """(index of the compute action before which it stands, send), in order: after its producer and the send before."""
    places = {action: index for index, action in enumerate(schedule.lists[pipeline_rank])}
    slot = 0
    for channel, microbatch in sent:
        slot = max(slot, places[schedule.producer(channel, microbatch)] + 1)
        yield slot, send(channel, microbatch)


def _receives(
    timeline: Timeline, received: Sequence[tuple[Channel, int]], pipeline_rank: int
) -> list[tuple[int, Action]]:
    """The same for receives: each stands before what is computed, or waited for, when its transfer begins."""
    spans = timeline.compute[pipeline_rank]
    begins = {(one.channel, one.microbatch): one.begin for one in timeline.transfers}
    consumers = {
        (channel, span.action.microbatch): index
        for index, span in enumerate(spans)
        for channel in timeline.schedule.inputs(span.action)
    }
    found = []
    slot = len(spans)
    # From the last to the first: none may stand after one that comes later on the wire.
    for one in reversed(received):
        current = next((index for index, span in enumerate(spans) if span.end > begins[one]), len(spans))
        slot = min(slot, current, consumers[one])
        found.append((slot, receive(*one)))
    return found[::-1]
