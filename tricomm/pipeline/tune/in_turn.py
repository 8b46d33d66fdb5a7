"""Where hops to and from several neighbours share a NIC: an order in which they take turns on it.

Two transfers that share a NIC both end late. One after the other, the first ends in half the time, and if it is the
one that is needed first, nothing is lost. A rank can see to that by itself, in an order that all know: it starts to
send when its send before has ended, and posts a receive when its receive before has arrived (``Queues.PER_DIRECTION``).
What it cannot do by itself is to find the order, for ranks that disagree wait for each other. So the order is that of
a simulation: first one in which whatever is ready first goes first, then better ones, in which two neighbours on a NIC
that lie on the critical path have changed places (the neighbourhood of van Laarhoven et al. for job shops, 1992).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.simulate import check_costs
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.actions import Action, Channel, Kind, receive, send
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.communication import interleave
from tricomm.pipeline.schedule.schedule import Schedule, relisted
from tricomm.pipeline.tune.evaluate import Simulator

Order = dict[tuple[int, bool], tuple[tuple[Channel, int], ...]]
"""Per pipeline rank and direction (whether it sends), the transfers in the order of their turns."""


@checks_kinds
def in_turn(schedule: Schedule, costs: Costs, *, trials: int = 0) -> Schedule:
    """Put in sends and receives such that hops take turns, for ``Queues.PER_DIRECTION``.

    >>> from tricomm.pipeline import one_f_one_b
    >>> print(in_turn(one_f_one_b(2, 1), Costs.uniform(2, 1, 1, 1, 0.5)))
    0: 0F0      0RECV_B0 0SEND_F0 0B0
    1: 1RECV_F0 1F0      1B0      1SEND_B0

    Args:
        schedule: sends and receives that it has are dropped.
        costs: by which the order is found; with others the schedule still runs, but the order may be a bad one.
        trials: so many other orders are simulated at most.

    Raises:
        PlanError: costs of another number of stages or of other edges, or a schedule that cannot run.
    """
    check_costs(schedule, costs)
    if trials < 0:
        raise PlanError(f"trials={trials} must be at least 0; give how many other orders may be tried")
    simulator = Simulator(costs)
    ideal = simulator.ideal(schedule, Queues.PER_DIRECTION)
    return order_in_turn(schedule.compute_only(), simulator, ideal, trials=trials)


def order_in_turn(
    schedule: Schedule, simulator: Simulator, ideal: Timeline, *, trials: int, enough: float = 0.0
) -> Schedule:
    """Do what ``in_turn`` does, for a schedule without communication that is known to run.

    Args:
        schedule: of computation.
        simulator: with the costs.
        ideal: of the schedule, with ``Queues.PER_DIRECTION``.
        trials: so many other orders are simulated at most.
        enough: seconds that no order undercuts.
    """
    timeline = _improved(schedule, ideal, simulator, trials, enough) if trials else ideal
    order = _order_of(timeline)
    lists = []
    for pipeline_rank, actions in enumerate(schedule.lists):
        received = _receives(timeline, order[pipeline_rank, False], pipeline_rank)
        lists.append(interleave(actions, [*received, *_sends(schedule, order[pipeline_rank, True], pipeline_rank)]))
    return relisted(schedule, lists)


def _improved(schedule: Schedule, timeline: Timeline, simulator: Simulator, trials: int, enough: float) -> Timeline:
    """Return the best of some orders, from that of a timeline on: the first one that is better is followed at once;
    those that are as good are kept for later.
    """
    following = [(_order_of(timeline), timeline)]
    best, seen = timeline, {tuple(following[0][0].values())}
    while following and best.makespan_seconds > enough * (1 + 1e-9):
        order, timeline = following.pop()
        posted = [_all_posted(schedule, order, pipeline_rank) for pipeline_rank in range(len(schedule.lists))]
        for changed, other in _swaps(order, timeline):
            key = tuple(other.values())
            if key in seen:
                continue
            if len(seen) > trials:
                return best
            seen.add(key)
            lists = [*posted[:changed], _all_posted(schedule, other, changed), *posted[changed + 1 :]]
            try:
                found = simulator.run(relisted(schedule, lists), Queues.PER_DIRECTION)
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
    place = timeline.schedule.pipeline_rank_by_stage
    order: dict[tuple[int, bool], list[tuple[Channel, int]]] = {
        (pipeline_rank, is_send): [] for pipeline_rank in range(len(timeline.compute)) for is_send in (True, False)
    }
    for one in timeline.transfers:
        turn = (one.channel, one.microbatch)
        order[place[one.channel.sender], True].append(turn)
        order[place[one.channel.receiver], False].append(turn)
    return {queue: tuple(turns) for queue, turns in order.items()}


def _swaps(order: Order, timeline: Timeline) -> Iterator[tuple[int, Order]]:
    """(a pipeline rank, the order in which there a transfer of the critical path goes before the one of another channel
    that it waited for).
    """
    critical = {(step.what, step.begin) for step in timeline.critical_path()}
    begins = {(one.channel, one.microbatch): one.begin for one in timeline.transfers}
    ends = {(one.channel, one.microbatch): one.end for one in timeline.transfers}
    for queue, turns in order.items():
        for index in range(1, len(turns)):
            before, one = turns[index - 1 : index + 1]
            has_waited = (one[0], begins[one]) in critical and ends[before] == begins[one]
            if has_waited and before[0] != one[0]:
                yield queue[0], {**order, queue: (*turns[: index - 1], one, before, *turns[index + 1 :])}


def _all_posted(schedule: Schedule, order: Order, pipeline_rank: int) -> tuple[Action, ...]:
    """The list of a pipeline rank with an order, all receives standing at the start."""
    received = [(0, receive(*crossing)) for crossing in order[pipeline_rank, False]]
    sent = _sends(schedule, order[pipeline_rank, True], pipeline_rank)
    return interleave(schedule.lists[pipeline_rank], [*received, *sent])


def _sends(schedule: Schedule, sent: Sequence[tuple[Channel, int]], pipeline_rank: int) -> Iterator[tuple[int, Action]]:
    """(index of the compute action before which it stands, send), in order: after its producer and the send before."""
    producers = {
        (action.stage, action.microbatch, action.kind is Kind.FORWARD): index
        for index, action in enumerate(schedule.lists[pipeline_rank])
        if action.kind is not Kind.WEIGHT_GRADIENT
    }
    slot = 0
    for channel, microbatch in sent:
        slot = max(slot, producers[channel.sender, microbatch, channel.is_forward] + 1)
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
    ends = [span.end for span in spans]
    found = []
    slot = len(spans)
    # From the last to the first: none may stand after one that comes later on the wire.
    for one in reversed(received):
        slot = min(slot, bisect_right(ends, begins[one]), consumers[one])
        found.append((slot, receive(*one)))
    return found[::-1]
