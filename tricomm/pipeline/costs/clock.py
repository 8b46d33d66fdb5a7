"""The clock of the simulator: events in the order of time, what moves, and who waits in which queue."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from tricomm.pipeline.costs.costs import Costs, TransferCost
from tricomm.pipeline.costs.in_order import run_in_order
from tricomm.pipeline.costs.programs import Key, Known, Post, Program
from tricomm.pipeline.costs.rates import ROUNDING, fair_rates
from tricomm.pipeline.costs.timeline import Span, Timeline, Transfer, require_ended
from tricomm.pipeline.schedule.actions import Channel
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.schedule import Schedule


def run_clock(
    schedule: Schedule,
    costs: Costs,
    queues: Queues = Queues.PER_CHANNEL,
    *,
    in_order: bool = True,
    known: Known | None = None,
) -> Timeline:
    """Do what ``simulate`` does, for a schedule with communication that is known to run: those that search call it.

    Without ``in_order`` queues have no order: whichever transfer is ready first goes first. Ranks could not do that,
    for they would have to know of each other which are ready.

    ``known`` is filled with what is worked out, for other schedules with the same costs, edges and queues.
    """
    known = Known() if known is None else known
    programs = known.programs_of(schedule, costs, queues)
    if in_order and queues is not Queues.BLOCKING and known.is_never_shared(schedule, costs, queues):
        return run_in_order(schedule, costs, programs, known)
    kind = _Clock if in_order else _UnorderedClock
    return kind(schedule, costs, queues, programs, known).timeline()


@dataclass(eq=False, slots=True)
class _Moving:
    """A transfer on its way.

    Attributes:
        number: of the transfer.
        ends: per queue that it stands in, its place there.
        sent, posted, begin: when the sender and the receiver came to it, and when it went on the wire; -1 is not yet.
    """

    number: int
    key: Key
    cost: TransferCost
    ends: dict[int, int] = field(default_factory=dict)
    sent: float = -1.0
    posted: float = -1.0
    begin: float = -1.0
    remaining: float = 0.0
    rate: float = 1.0


class _Clock:
    """One simulation."""

    def __init__(self, schedule: Schedule, costs: Costs, queues: Queues, programs: list[Program], known: Known) -> None:
        self.schedule, self.costs, self.programs = schedule, costs, programs
        self.is_blocking = queues is Queues.BLOCKING
        self.ranks_of = {
            channel: (schedule.pipeline_rank_of(channel.sender), schedule.pipeline_rank_of(channel.receiver))
            for channel in schedule.channels
        }
        self.now = 0.0
        self.next_index = [0] * schedule.pipeline_ranks
        self.busy_until = [0.0] * schedule.pipeline_ranks
        self.blocking: list[list[int]] = [[] for _ in schedule.lists]  # what compute waits for besides
        self.spans: list[list[Span]] = [[] for _ in schedule.lists]
        self.moving: dict[int, _Moving] = {}
        self.arrived: dict[int, float] = {}
        self.off_wire: dict[Channel, float] = {}  # since when a channel carries nothing
        self.transfers: list[Transfer] = []
        self.alone: list[tuple[float, int, _Moving]] = []  # ends on the wire of those that share nothing
        self.shared: list[_Moving] = []  # those that share something, with a rate that changes
        self.shared_since = 0.0
        self.rates = known.rates
        self.has_changed = False  # whether others share than when the rates were given
        self.wakes: list[tuple[float, int]] = []  # when a pipeline rank may go on, each once
        self.is_pending: set[tuple[float, int]] = set()
        self.begun = 0
        self.waiting: dict[int, deque[_Moving]] = {}

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
            while self.wakes and self.wakes[0][0] <= self.now:
                wake = heapq.heappop(self.wakes)
                self.is_pending.discard(wake)
                self.advance(wake[1])
        require_ended(self.schedule, self.next_index)
        return Timeline(
            self.schedule,
            self.costs,
            tuple(tuple(spans) for spans in self.spans),
            tuple(sorted(self.transfers, key=lambda one: one.begin)),
        )

    def next_time(self) -> float | None:
        if self.has_changed:
            self.share()
        upcoming = self.wakes[0][0] if self.wakes else inf
        if self.alone and self.alone[0][0] < upcoming:
            upcoming = self.alone[0][0]
        for one in self.shared:
            end = self.shared_since + one.remaining / one.rate
            upcoming = min(upcoming, end)
        return None if upcoming == inf else max(self.now, upcoming)

    def wake(self, pipeline_rank: int, at: float) -> None:
        """Go on with a pipeline rank at some time."""
        wake = (at, pipeline_rank)
        if wake not in self.is_pending:
            self.is_pending.add(wake)
            heapq.heappush(self.wakes, wake)

    def advance(self, pipeline_rank: int) -> None:
        """Go on with a pipeline rank's list as far as time and data allow."""
        program, index, now = self.programs[pipeline_rank], self.next_index[pipeline_rank], self.now
        length, busy_until = len(program), self.busy_until[pipeline_rank]
        while index < length:
            if busy_until > now:
                self.wake(pipeline_rank, busy_until)
                break
            entry = program[index]
            if isinstance(entry, Post):
                self.post(entry, pipeline_rank)
                index += 1
                continue
            action, seconds, needs = entry
            ready = self.ready(needs, pipeline_rank)
            if ready is None:
                break  # woken when the data is on its way
            if ready > now:
                self.wake(pipeline_rank, ready)
                break
            busy_until = now + seconds
            self.spans[pipeline_rank].append(Span(action, now, busy_until))
            self.blocking[pipeline_rank].clear()
            index += 1
        self.next_index[pipeline_rank], self.busy_until[pipeline_rank] = index, busy_until

    def ready(self, needs: tuple[int, ...], pipeline_rank: int) -> float | None:
        """When the inputs of a compute action are there; None if that is not known yet."""
        latest = 0.0
        if self.blocking[pipeline_rank]:
            needs = (*needs, *self.blocking[pipeline_rank])
        for number in needs:
            arrival = self.arrived.get(number)
            if arrival is None:
                return None
            latest = max(latest, arrival)
        return latest

    def post(self, entry: Post, pipeline_rank: int) -> None:
        number, key, cost, is_send, queue = entry
        one = self.moving.get(number)
        if one is None:
            one = self.moving[number] = _Moving(number, key, cost)
        if is_send:
            one.sent = self.now
        else:
            one.posted = self.now
        if self.is_blocking:
            self.blocking[pipeline_rank].append(number)
        self.enter(one, queue)

    # ---- queues: who may begin

    def enter(self, one: _Moving, queue: int) -> None:
        """Let a transfer stand in a queue, and begin if it is its turn in both of its queues."""
        waiting = self.waiting.get(queue)
        if waiting is None:
            waiting = self.waiting[queue] = deque()
        one.ends[queue] = len(waiting)
        waiting.append(one)
        if len(one.ends) == 2:
            self.begin_if_first(one)

    def begin_if_first(self, one: _Moving) -> None:
        if one.begin >= 0 or len(one.ends) != 2:
            return
        for queue in one.ends:
            if self.waiting[queue][0] is not one:
                return
        self.begin(one)

    def leave(self, done: Sequence[_Moving]) -> None:
        """Take what is off the wire out of its queues, and let those behind it begin.

        After all that ended at this moment have gone, so that whoever waits longest is first.
        """
        following: list[_Moving] = []
        queues: dict[int, deque[_Moving]] = {}
        for one in done:
            for queue in one.ends:
                queues[queue] = waiting = self.waiting[queue]
                waiting.popleft()  # only the first of both its queues is on the wire
        for waiting in queues.values():
            if waiting and len(waiting[0].ends) == 2:
                following.append(waiting[0])
        if len(following) > 1:
            following.sort(key=self.ready_since)
        for one in following:
            self.begin_if_first(one)

    def ready_since(self, one: _Moving) -> float:
        """When both ends had come to it and the one before it on its channel was off the wire: channels alternate."""
        return max(one.sent, one.posted, self.off_wire.get(one.key[0], 0.0))

    # ---- the wire

    def begin(self, one: _Moving) -> None:
        """Put a transfer on the wire."""
        one.begin, one.remaining = self.now, one.cost.busy_seconds
        self.begun += 1
        if one.cost.loads and one.remaining > 0:
            self.progress_shared()
            self.shared.append(one)
            self.has_changed = True
        else:
            heapq.heappush(self.alone, (self.now + one.remaining, self.begun, one))

    def progress_shared(self) -> None:
        """Count what the sharing transfers have moved up to now."""
        seconds = self.now - self.shared_since
        if seconds:
            for one in self.shared:
                one.remaining = max(0.0, one.remaining - seconds * one.rate)
            self.shared_since = self.now

    def share(self) -> None:
        """Give each sharing transfer its rate."""
        channels = tuple([one.key[0] for one in self.shared])
        rates = self.rates.get(channels)
        if rates is None:
            rates = self.rates[channels] = fair_rates([one.cost.loads for one in self.shared])
        for one, rate in zip(self.shared, rates, strict=True):
            one.rate = rate
        self.has_changed = False

    def finish_transfers(self) -> None:
        """Take what is done off the wire."""
        done: list[_Moving] = []
        while self.alone and self.alone[0][0] <= self.now:
            done.append(heapq.heappop(self.alone)[2])
        ended = [one for one in self.shared if one.remaining <= ROUNDING * one.cost.busy_seconds]
        if ended:
            self.shared = [one for one in self.shared if one not in ended]
            self.has_changed = True
        done += ended
        for one in done:
            channel, microbatch = one.key
            self.off_wire[channel] = self.now
            arrival = self.now + one.cost.latency_seconds
            self.arrived[one.number] = arrival
            self.transfers.append(Transfer(channel, microbatch, one.sent, one.posted, one.begin, self.now, arrival))
            sender, receiver = self.ranks_of[channel]
            # Whoever computes looks again when it ends, and a sender waits only where compute waits for all.
            if arrival > self.now or self.is_blocking:
                self.wake(sender, arrival)
            if arrival > self.now or self.busy_until[receiver] <= self.now:
                self.wake(receiver, arrival)
        if done:
            self.leave(done)


class _UnorderedClock(_Clock):
    """One simulation in which a queue only keeps two transfers from being on the wire at once."""

    def __init__(self, schedule: Schedule, costs: Costs, queues: Queues, programs: list[Program], known: Known) -> None:
        super().__init__(schedule, costs, queues, programs, known)
        self.entered: dict[int, int] = {}  # how many came to a queue
        self.complete: dict[int, dict[_Moving, None]] = {}  # those of which both ends came, and that wait
        self.occupied: set[int] = set()

    def enter(self, one: _Moving, queue: int) -> None:
        one.ends[queue] = self.entered[queue] = self.entered.get(queue, 0) + 1
        if len(one.ends) == 2:
            for end in one.ends:
                self.complete.setdefault(end, {})[one] = None
            self.begin_if_first(one)

    def begin_if_first(self, one: _Moving) -> None:
        if one.begin < 0 and not any(queue in self.occupied for queue in one.ends):
            self.occupied.update(one.ends)
            for queue in one.ends:
                del self.complete[queue][one]
            self.begin(one)

    def leave(self, done: Sequence[_Moving]) -> None:
        queues = dict.fromkeys(queue for one in done for queue in one.ends)
        self.occupied.difference_update(queues)
        following = [
            (self.ready_since(one), number, one.ends[queue], one)
            for number, queue in enumerate(queues)
            for one in self.complete.get(queue, ())
        ]
        for *_, one in sorted(following, key=lambda item: item[:3]):
            self.begin_if_first(one)
