"""Simulation without a clock, for transfers that never share: then all times follow from the order alone.

Each begins when the latest of what it waits for has ended, and queues say what that is. So pipeline ranks are looked at
one after the other, each as far as what it waits for is known, whatever the time: a fifth of what the clock takes.
"""

from collections import deque

from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.programs import Known, Post, Program
from tricomm.pipeline.costs.timeline import Span, Timeline, Transfer, require_ended
from tricomm.pipeline.schedule.actions import Channel
from tricomm.pipeline.schedule.schedule import Schedule


def run_in_order(schedule: Schedule, costs: Costs, programs: list[Program], known: Known) -> Timeline:
    """Give the timeline of a schedule with communication of which no two transfers share what they load.

    Raises:
        PlanError: pipeline ranks wait for each other.
    """
    run = _Run(programs, known)
    while run.ready:
        run.advance(run.ready.pop())
    require_ended(schedule, run.next_index)
    run.transfers.sort()
    return Timeline(schedule, costs, tuple(map(tuple, run.spans)), tuple([one for *_, one in run.transfers]))


class _Run:
    """One simulation.

    Attributes:
        ready: pipeline ranks that may go on.
        waiting: the pipeline rank that waits for a transfer, by its number.
        came: by the number of a transfer, when its receiver and its sender came to it.
        queue_of: the queues in which its receiver's and its sender's end stand; -1 is none yet.
        arrived: when its data could be used; None is not known.
        lines: the transfers that stand in a queue, by the number of the queue.
        off_wire: when the last that left a queue had ended.
        idle_since: since when a channel carries nothing.
        transfers: (begin, end, whether it begins as it comes, since when it is ready, itself): of those that begin and
            end together, first comes what has waited for its queue, and of these what has been ready longest.
    """

    def __init__(self, programs: list[Program], known: Known) -> None:
        self.programs = programs
        self.ready = list(range(len(programs)))[::-1]
        self.next_index = [0] * len(programs)
        self.free_at = [0.0] * len(programs)
        self.spans: list[list[Span]] = [[] for _ in programs]
        self.idle_since: dict[Channel, float] = {}
        self.transfers: list[tuple[float, float, bool, float, Transfer]] = []
        self.waiting: dict[int, int] = {}
        self.came = ([0.0] * len(known.transfers), [0.0] * len(known.transfers))
        self.queue_of = ([-1] * len(known.transfers), [-1] * len(known.transfers))
        self.arrived: list[float | None] = [None] * len(known.transfers)
        self.lines: list[deque[Post]] = [deque() for _ in known.queues]
        self.off_wire = [0.0] * len(known.queues)

    def advance(self, pipeline_rank: int) -> None:
        """Go on with a pipeline rank's list as far as it is known when data is there."""
        program, index = self.programs[pipeline_rank], self.next_index[pipeline_rank]
        free_at, spans = self.free_at[pipeline_rank], self.spans[pipeline_rank]
        for entry in program[index:]:
            if isinstance(entry, Post):
                self.post(entry, free_at)
            else:
                action, seconds, needs = entry
                begin = self.ready_at(needs, free_at, pipeline_rank)
                if begin is None:
                    break
                free_at = begin + seconds
                spans.append(Span(action, begin, free_at))
            index += 1
        self.next_index[pipeline_rank], self.free_at[pipeline_rank] = index, free_at

    def ready_at(self, needs: tuple[int, ...], free_at: float, pipeline_rank: int) -> float | None:
        """When a compute action begins; None if that is not known yet."""
        for number in needs:
            arrival = self.arrived[number]
            if arrival is None:
                self.waiting[number] = pipeline_rank
                return None
            free_at = max(free_at, arrival)
        return free_at

    def post(self, entry: Post, at: float) -> None:
        """Let an end of a transfer come to its queue."""
        number, _, _, is_send, queue = entry
        self.came[is_send][number] = at
        self.queue_of[is_send][number] = queue
        line = self.lines[queue]
        line.append(entry)
        if len(line) == 1:
            self.settle(entry)

    def settle(self, first: Post) -> None:
        """Say when a transfer is on the wire if both of its ends have come and it is the first of both its queues;
        then those behind it.
        """
        following = [first]
        while following:
            number, (channel, microbatch), cost, *_ = following.pop()
            ends = self.queue_of[0][number], self.queue_of[1][number]
            if -1 in ends or self.arrived[number] is not None:
                continue
            if self.lines[ends[0]][0].number != number or self.lines[ends[1]][0].number != number:
                continue
            posted, sent = self.came[0][number], self.came[1][number]
            begin = max(posted, sent, self.off_wire[ends[0]], self.off_wire[ends[1]])
            end = begin + cost.busy_seconds
            arrival = self.arrived[number] = end + cost.latency_seconds
            came = max(posted, sent)
            ready = max(came, self.idle_since.get(channel, 0.0))
            self.idle_since[channel] = end
            one = Transfer(channel, microbatch, sent, posted, begin, end, arrival)
            self.transfers.append((begin, end, came == begin, ready, one))
            for queue in ends:
                self.off_wire[queue] = end
                line = self.lines[queue]
                line.popleft()
                if line:
                    following.append(line[0])
            if number in self.waiting:
                self.ready.append(self.waiting.pop(number))
