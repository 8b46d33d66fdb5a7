"""The simulator: when each action of a schedule begins and ends, given what stages and hops cost.

Rules. A pipeline rank computes its actions in order; each begins when the one before has ended and its inputs are
there. A send or receive is posted when the action before it in the list has ended. A transfer begins when both its ends
are posted and the transfers before it in its queues are off the wire; it then moves at its full speed, or at a fair
share of what it loads together with others; its data is there ``latency_seconds`` after its last byte. These are the
rules of an NCCL stream that runs beside compute; gloo is a little more generous.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tricomm.errors import PlanError
from tricomm.pipeline.costs.costs import Costs, Load, TransferCost
from tricomm.pipeline.costs.timeline import Span, Timeline, Transfer
from tricomm.pipeline.schedule.actions import Action, Channel
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule

ROUNDING = 1e-12
"""Parts of a link or of a transfer that are no more than rounding."""


def simulate(schedule: Schedule, costs: Costs, *, queues: Queues = Queues.PER_CHANNEL) -> Timeline:
    """Run a schedule on a clock.

    Args:
        schedule: without sends and receives, all receives count as posted at the start: the best that can be.
        costs: of its stages and channels.
        queues: how transfers wait for each other.

    Raises:
        PlanError: costs of another number of stages, or a schedule that cannot run.

    >>> from tricomm.pipeline.schedule.generators import eager_one_f_one_b, one_f_one_b
    >>> costs = Costs.uniform(4, 1.0, 1.0, 1.0, hop=1.0)  # F, I, W and each hop take a second
    >>> simulate(one_f_one_b(4, 8), costs).makespan_seconds
    49.0
    >>> simulate(eager_one_f_one_b(4, 8), costs).makespan_seconds
    39.0
    """
    check_stages(schedule, costs)
    if not schedule.has_communication and schedule.channels:
        schedule = with_communication(schedule, receives_ahead=max(map(len, schedule.lists)))
    check(schedule, queues)
    return run_clock(schedule, costs, queues)


def check_stages(schedule: Schedule, costs: Costs) -> None:
    """Refuse costs of another number of stages.

    Raises:
        PlanError: if they are.
    """
    if len(costs.stages) != schedule.stages:
        raise PlanError(
            f"costs are of {len(costs.stages)} stages and the schedule has {schedule.stages}; give one StageCost for "
            "each"
        )


def run_clock(
    schedule: Schedule, costs: Costs, queues: Queues = Queues.PER_CHANNEL, *, in_order: bool = True
) -> Timeline:
    """What ``simulate`` does, for a schedule with communication that is known to run: those that search call it.

    Without ``in_order`` queues have no order: whichever transfer is ready first goes first. Ranks could not do that,
    for they would have to know of each other which are ready.
    """
    return _Run(schedule, costs, queues, in_order).timeline()


@dataclass(eq=False, slots=True)
class _Moving:
    """A transfer on its way; ``ends`` are the queues that it stands in."""

    channel: Channel
    microbatch: int
    cost: TransferCost
    ends: list[tuple[int, ...]] = field(default_factory=list)
    sent: float = -1.0
    posted: float = -1.0
    begin: float = -1.0
    remaining: float = 0.0
    rate: float = 1.0


class _Run:
    """One simulation."""

    def __init__(self, schedule: Schedule, costs: Costs, queues: Queues, in_order: bool) -> None:
        self.schedule, self.costs, self.queues, self.in_order = schedule, costs, queues, in_order
        self.now = 0.0
        self.next_index = [0] * schedule.pipeline_ranks
        self.busy_until = [0.0] * schedule.pipeline_ranks
        self.blocking: list[list[tuple[Channel, int]]] = [[] for _ in schedule.lists]  # what compute waits for besides
        self.spans: list[list[Span]] = [[] for _ in schedule.lists]
        self.moving: dict[tuple[Channel, int], _Moving] = {}
        self.waiting: dict[tuple[int, ...], deque[_Moving]] = {}
        self.arrived: dict[tuple[Channel, int], float] = {}
        self.off_wire: dict[Channel, float] = {}  # since when a channel carries nothing
        self.transfers: list[Transfer] = []
        self.alone: list[tuple[float, int, _Moving]] = []  # ends on the wire of those that share nothing
        self.shared: list[_Moving] = []  # those that share something, with a rate that changes
        self.shared_since = 0.0
        self.wake: list[tuple[float, int]] = []  # when a pipeline rank may go on
        self.turn = 0

    def timeline(self) -> Timeline:
        for pipeline_rank in range(self.schedule.pipeline_ranks):
            self.advance(pipeline_rank)
        while True:
            upcoming = self.next_time()
            if upcoming is None:
                break
            self.now = upcoming
            self.progress_shared()
            self.finish_transfers()
            while self.wake and self.wake[0][0] <= self.now:
                self.advance(heapq.heappop(self.wake)[1])
        for pipeline_rank, index in enumerate(self.next_index):
            if index < len(self.schedule.lists[pipeline_rank]):
                raise PlanError(
                    f"{self.schedule.lists[pipeline_rank][index]} at pipeline rank {pipeline_rank} waits for ever; "
                    "call check, which says for what"
                )
        return Timeline(
            self.schedule,
            self.costs,
            tuple(tuple(spans) for spans in self.spans),
            tuple(sorted(self.transfers, key=lambda one: one.begin)),
        )

    def next_time(self) -> float | None:
        times = [self.wake[0][0]] if self.wake else []
        times += [self.alone[0][0]] if self.alone else []
        times += [self.shared_since + one.remaining / one.rate for one in self.shared]
        return max(self.now, min(times)) if times else None

    def advance(self, pipeline_rank: int) -> None:
        """Go on with a pipeline rank's list as far as time and data allow."""
        actions = self.schedule.lists[pipeline_rank]
        while self.next_index[pipeline_rank] < len(actions):
            action = actions[self.next_index[pipeline_rank]]
            if self.busy_until[pipeline_rank] > self.now:
                heapq.heappush(self.wake, (self.busy_until[pipeline_rank], pipeline_rank))
                return
            if action.is_compute:
                ready = self.ready(action)
                if ready is None:
                    return  # woken when the data is on its way
                if ready > self.now:
                    heapq.heappush(self.wake, (ready, pipeline_rank))
                    return
                end = self.now + self.costs.seconds(action)
                self.spans[pipeline_rank].append(Span(action, self.now, end))
                self.busy_until[pipeline_rank] = end
                self.blocking[pipeline_rank].clear()
            else:
                self.post(action)
            self.next_index[pipeline_rank] += 1

    def ready(self, action: Action) -> float | None:
        """When the inputs of a compute action are there; None if that is not known yet."""
        latest = 0.0
        for channel in self.schedule.inputs(action):
            if channel in self.schedule.channels:
                arrival = self.arrived.get((channel, action.microbatch))
                if arrival is None:
                    return None
                latest = max(latest, arrival)
        for key in self.blocking[self.schedule.pipeline_rank_of(action.stage)]:
            if key not in self.arrived:
                return None
            latest = max(latest, self.arrived[key])
        return latest

    def post(self, action: Action) -> None:
        channel, key = action.channel, (action.channel, action.microbatch)
        one = self.moving.get(key)
        if one is None:
            one = self.moving[key] = _Moving(channel, action.microbatch, self.costs.transfer(channel))
        if action.kind.is_send:
            one.sent = self.now
        else:
            one.posted = self.now
        if self.queues is Queues.BLOCKING:
            self.blocking[self.schedule.pipeline_rank_of(action.stage)].append(key)
        queue = self.queues.key(self.schedule, channel, action.stage)
        one.ends.append(queue)
        waiting = self.waiting.setdefault(queue, deque())
        waiting.append(one)
        self.begin_if_first(one)

    def begin_if_first(self, one: _Moving) -> None:
        """Put a transfer on the wire if both ends are posted and it is its turn in both queues."""
        if one.begin >= 0 or len(one.ends) < 2 or not all(self.is_turn_of(one, queue) for queue in one.ends):
            return
        one.begin, one.remaining = self.now, one.cost.busy_seconds
        self.turn += 1
        if one.cost.loads and one.remaining > 0:
            self.progress_shared()
            self.shared.append(one)
            self.share()
        else:
            heapq.heappush(self.alone, (self.now + one.remaining, self.turn, one))

    def is_turn_of(self, one: _Moving, queue: tuple[int, ...]) -> bool:
        waiting = self.waiting[queue]
        return waiting[0] is one if self.in_order else all(other.begin < 0 for other in waiting)

    def progress_shared(self) -> None:
        """Count what the sharing transfers have moved up to now."""
        for one in self.shared:
            one.remaining = max(0.0, one.remaining - (self.now - self.shared_since) * one.rate)
        self.shared_since = self.now

    def share(self) -> None:
        """Give each sharing transfer its rate."""
        for one, rate in zip(self.shared, fair_rates([one.cost.loads for one in self.shared]), strict=True):
            one.rate = rate

    def finish_transfers(self) -> None:
        """Take what is done off the wire, and let those behind it begin."""
        done: list[_Moving] = []
        while self.alone and self.alone[0][0] <= self.now:
            done.append(heapq.heappop(self.alone)[2])
        ended = [one for one in self.shared if one.remaining <= ROUNDING * one.cost.busy_seconds]
        if ended:
            self.shared = [one for one in self.shared if one not in ended]
            self.share()
        for one in (*done, *ended):
            self.off_wire[one.channel] = self.now
            arrival = self.now + one.cost.latency_seconds
            self.arrived[one.channel, one.microbatch] = arrival
            self.transfers.append(
                Transfer(one.channel, one.microbatch, one.sent, one.posted, one.begin, self.now, arrival)
            )
            for stage in one.channel:
                heapq.heappush(self.wake, (arrival, self.schedule.pipeline_rank_of(stage)))
            for queue in one.ends:
                self.waiting[queue].remove(one)
        # After all that ended at this moment have gone, so that whoever waits longest is first.
        self.begin_next(dict.fromkeys(queue for one in (*done, *ended) for queue in one.ends))

    def begin_next(self, queues: Iterable[tuple[int, ...]]) -> None:
        """Let go what stands in queues and may."""
        if self.in_order:
            following = [self.waiting[queue][0] for queue in queues if self.waiting[queue]]
        else:
            following = [one for queue in queues for one in self.waiting[queue]]
        for one in sorted(following, key=self.ready_since):
            self.begin_if_first(one)

    def ready_since(self, one: _Moving) -> float:
        """When both ends had come to it and the one before it on its channel was off the wire: channels alternate."""
        return max(one.sent, one.posted, self.off_wire.get(one.channel, 0.0))


def fair_rates(loads: Sequence[Sequence[Load]]) -> list[float]:
    """The speed of each transfer, 1 being that of one that has all that it loads for itself.

    What each takes of the link that it loads most rises together (max-min), until one moves at full speed or a link
    is full; those on a full link keep what they have.
    """
    peaks = [max(load for _, load in one) for one in loads]
    free = {name: 1.0 for one in loads for name, _ in one}
    rates = [0.0] * len(loads)
    rising = set(range(len(loads)))
    while rising:
        slopes: dict[str, float] = {}
        for index in rising:
            for name, load in loads[index]:
                slopes[name] = slopes.get(name, 0.0) + load / peaks[index]
        step = min(free[name] / slope for name, slope in slopes.items())
        step = min(step, *(peaks[index] * (1 - rates[index]) for index in rising))
        for name, slope in slopes.items():
            free[name] -= step * slope
        for index in rising:
            rates[index] += step / peaks[index]
        full = {name for name in slopes if free[name] <= ROUNDING}
        rising -= {
            index for index in rising if rates[index] >= 1 - ROUNDING or any(name in full for name, _ in loads[index])
        }
    return rates
