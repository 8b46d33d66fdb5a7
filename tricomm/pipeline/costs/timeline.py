"""Timeline: when a schedule's actions and transfers begin and end, and what follows from that."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import NamedTuple

from tricomm.errors import PlanError
from tricomm.kinds import explains_kinds
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.schedule.actions import Action, Channel, Kind
from tricomm.pipeline.schedule.schedule import Schedule


class Span(NamedTuple):
    """A compute action on the clock, in seconds."""

    action: Action
    begin: float
    end: float


class Transfer(NamedTuple):
    """A transfer on the clock, in seconds.

    Attributes:
        sent, posted: when the sender and the receiver came to it.
        begin, end: when it was on the wire.
        arrival: when its data could be used.
    """

    channel: Channel
    microbatch: int
    sent: float
    posted: float
    begin: float
    end: float
    arrival: float


class Step(NamedTuple):
    """A part of the critical path: a compute action, or a channel, from ``begin`` to ``end``."""

    what: Action | Channel
    begin: float
    end: float


class Wait(NamedTuple):
    """A pipeline rank waits for a transfer, from ``begin`` to ``end``."""

    pipeline_rank: int
    channel: Channel
    begin: float
    end: float


class Peak(NamedTuple):
    """The most that a pipeline rank holds at once.

    Attributes:
        activations: microbatches between F and the end of their backward, over all stages of the pipeline rank.
        receives: receive buffers, from the post to the end of the backward.
        nbytes: activations, receive buffers and sends that are not off the wire, at the worst moment.
    """

    activations: int
    receives: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a simulation gives; ``tricomm.draw`` draws it (``timeline_svg``) or makes a trace of it
    (``timeline_perfetto``).

    Attributes:
        schedule, costs: what was simulated; sends and receives are in the schedule.
        compute: per pipeline rank, its compute actions in order.
        transfers: of all channels, in the order in which they began; of those that began at one moment, in the order in
            which they ended.

    Example:
        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 4), Costs.uniform(2, 1.0, 1.0, 1.0))
        >>> timeline.makespan_seconds, timeline.busy_seconds(0), round(timeline.bubble_fraction, 2)
        (15.0, 12.0, 0.2)
    """

    schedule: Schedule
    costs: Costs
    compute: tuple[tuple[Span, ...], ...]
    transfers: tuple[Transfer, ...]

    @property
    def makespan_seconds(self) -> float:
        """From the start to the end of the last compute action.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> timeline.makespan_seconds
        10.0
        """
        return max(spans[-1].end for spans in self.compute)

    @explains_kinds
    def busy_seconds(self, pipeline_rank: int) -> float:
        """For how long a pipeline rank computes.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> timeline.busy_seconds(0)
        6.0
        """
        self.schedule.stages_of(pipeline_rank)  # or there is no such one
        return sum(span.end - span.begin for span in self.compute[pipeline_rank])

    @property
    def bubble_fraction(self) -> float:
        """The part of all pipeline ranks' time in which they do not compute.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> round(timeline.bubble_fraction, 2)
        0.4
        """
        busy = sum(self.busy_seconds(pipeline_rank) for pipeline_rank in range(self.schedule.pipeline_ranks))
        return 1 - busy / (self.makespan_seconds * self.schedule.pipeline_ranks) if self.makespan_seconds else 0.0

    def waits(self) -> Iterator[Wait]:
        """Where a pipeline rank has nothing to do but wait for data that has been computed.

        While it idles before an action, the wait counts from the moment at which the data that comes last was
        computed; before that it waits for the computation, which is bubble and not communication.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> next(timeline.waits())
        Wait(pipeline_rank=0, channel=Channel(sender=1, receiver=0), begin=5.5, end=6.0)
        """
        arrivals = {(one.channel, one.microbatch): one for one in self.transfers}
        for pipeline_rank, spans in enumerate(self.compute):
            idle_since = 0.0
            for span in spans:
                last = self._last_input(span.action, arrivals)
                if last is not None and last.arrival > idle_since:
                    yield Wait(pipeline_rank, last.channel, max(idle_since, last.sent), last.arrival)
                idle_since = span.end

    def exposed_seconds(self) -> dict[Channel, float]:
        """Per channel, the sum of the waits for it, fill and drain of the pipeline among them.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> {str(channel): seconds for channel, seconds in timeline.exposed_seconds().items()}
        {'0>1': 0.5, '1>0': 0.5}
        """
        exposed = dict.fromkeys(self.schedule.channels, 0.0)
        for wait in self.waits():
            exposed[wait.channel] += wait.end - wait.begin
        return exposed

    def peaks(self) -> tuple[Peak, ...]:
        """Per pipeline rank, the most that it holds at once.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> timeline.peaks()[0]
        Peak(activations=2, receives=2, nbytes=0)
        """
        place = self.schedule.pipeline_rank_by_stage
        freed = {
            (span.action.stage, span.action.microbatch): span.end
            for spans in self.compute
            for span in spans
            if self.schedule.ends_microbatch(span.action)
        }
        nbytes = {channel: self.costs.transfer(channel).nbytes for channel in self.schedule.channels}
        receives: list[list[Held]] = [[] for _ in self.compute]
        sends: list[list[Held]] = [[] for _ in self.compute]
        for one in self.transfers:
            sender, receiver = one.channel
            until = freed[receiver, one.microbatch]
            receives[place[receiver]].append((one.posted, until, nbytes[one.channel]))
            sends[place[sender]].append((one.sent, one.end, nbytes[one.channel]))
        peaks = []
        for spans, received, sent in zip(self.compute, receives, sends, strict=True):
            activations: list[Held] = []
            for begin, action in ((span.begin, span.action) for span in spans if span.action.kind is Kind.FORWARD):
                until = freed[action.stage, action.microbatch]
                activations.append((begin, until, self.costs.stages[action.stage].activation_nbytes))
            together = [*activations, *received, *sent]
            peaks.append(Peak(_most(activations, False), _most(received, False), _most(together, True)))
        return tuple(peaks)

    def critical_path(self) -> tuple[Step, ...]:
        """A chain of compute actions and transfers without a gap, from the start to the end: the end comes earlier
        only if one of them is shorter. A transfer counts from when it went on the wire.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> print(*(step.what for step in timeline.critical_path()))
        0F0 0>1 1F0 1F1 1B0 1>0 0B0 0B1
        """
        arrivals = {(one.channel, one.microbatch): one for one in self.transfers}
        ended: dict[float, list[Transfer]] = {}
        for one in self.transfers:
            ended.setdefault(one.end, []).append(one)
        before = {second.action: first for spans in self.compute for first, second in pairwise(spans)}
        node: Span | Transfer | None = max((spans[-1] for spans in self.compute), key=lambda span: span.end)
        until = self.makespan_seconds
        path: list[Step] = []
        while node is not None:
            path.append(Step(node.action if isinstance(node, Span) else node.channel, node.begin, until))
            until = node.begin
            if isinstance(node, Span):
                previous, last = before.get(node.action), self._last_input(node.action, arrivals)
                node = previous if last is None or (previous and previous.end >= last.arrival) else last
            else:
                node = self._before_transfer(node, ended.get(node.begin, ()))
        return tuple(reversed(path))

    def critical_seconds(self) -> dict[Channel, float]:
        """Per channel, the seconds of the critical path that it takes. A hop that hides behind compute is there once,
        in the fill or the drain of the pipeline.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> {str(channel): seconds for channel, seconds in timeline.critical_seconds().items()}
        {'0>1': 0.5, '1>0': 0.5}
        """
        seconds = dict.fromkeys(self.schedule.channels, 0.0)
        for step in self.critical_path():
            if isinstance(step.what, Channel):
                seconds[step.what] += step.end - step.begin
        return seconds

    def hop_seconds(self) -> dict[Channel, float]:
        """Per channel, the mean time from the start of a transfer to its arrival.

        >>> from tricomm.pipeline import gpipe, simulate
        >>> timeline = simulate(gpipe(2, 2), Costs.uniform(2, 1, 1, 1, hop=0.5))
        >>> {str(channel): seconds for channel, seconds in timeline.hop_seconds().items()}
        {'0>1': 0.5, '1>0': 0.5}
        """
        seconds = dict.fromkeys(self.schedule.channels, 0.0)
        for one in self.transfers:
            seconds[one.channel] += (one.arrival - one.begin) / self.schedule.microbatches
        return seconds

    def _before_transfer(self, one: Transfer, ended: Sequence[Transfer]) -> Span | Transfer | None:
        """What a transfer waited for: the list of an end, or a transfer that stood before it in a queue, of those that
        ended when it began.
        """
        if one.begin > max(one.sent, one.posted):
            ends = {self.schedule.pipeline_rank_of(stage) for stage in one.channel}
            # Those before it only: where some take no time, several may begin and end at one moment.
            queued = [
                other
                for other in takewhile(lambda other: other != one, ended)
                if ends & {self.schedule.pipeline_rank_of(stage) for stage in other.channel}
            ]
            return min(queued, key=lambda other: (other.channel != one.channel, not self._share_an_end(one, other)))
        stage = one.channel.sender if one.sent >= one.posted else one.channel.receiver
        spans = self.compute[self.schedule.pipeline_rank_of(stage)]
        computed = spans[bisect_left(spans, one.begin, key=_end) : bisect_right(spans, one.begin, key=_end)]
        return max(computed, key=lambda span: span.begin, default=None)

    def _share_an_end(self, one: Transfer, other: Transfer) -> bool:
        """Whether both leave from one pipeline rank, or both come to one."""
        place = self.schedule.pipeline_rank_of
        ends, others = tuple(map(place, one.channel)), tuple(map(place, other.channel))
        return ends[0] == others[0] or ends[1] == others[1]

    def _last_input(self, action: Action, arrivals: dict[tuple[Channel, int], Transfer]) -> Transfer | None:
        """The transfer that an action waits for longest."""
        found = [
            arrivals[channel, action.microbatch]
            for channel in self.schedule.inputs(action)
            if (channel, action.microbatch) in arrivals
        ]
        return max(found, key=lambda one: one.arrival, default=None)

    def __str__(self) -> str:
        return "\n".join(describe(self))


def require_ended(schedule: Schedule, next_index: Sequence[int]) -> None:
    """Refuse a simulation that has come to no end, by the place in its list that each pipeline rank has come to.

    Raises:
        PlanError: the first pipeline rank that waits for ever.
    """
    for pipeline_rank, (actions, index) in enumerate(zip(schedule.lists, next_index, strict=True)):
        if index < len(actions):
            raise PlanError(
                f"{actions[index]} at pipeline rank {pipeline_rank} waits for ever; call check, which says for what"
            )


def _end(span: Span) -> float:
    return span.end


Held = tuple[float, float, int]
"""From when until when so many bytes are held."""


def _most(held: Sequence[Held], in_bytes: bool) -> int:
    """The most that is held at once; what ends at a moment is gone before what begins then."""
    if in_bytes and not any(nbytes for *_, nbytes in held):
        return 0
    changes: list[tuple[float, int]] = []
    for begin, end, nbytes in held:
        weight = nbytes if in_bytes else 1
        changes += [(begin, weight), (end, -weight)]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def describe(timeline: Timeline) -> Iterator[str]:
    """The figures of a timeline, a line each."""
    total = timeline.makespan_seconds
    yield f"{total:.6g} s, bubble {timeline.bubble_fraction:.1%}"
    for pipeline_rank, peak in enumerate(timeline.peaks()):
        busy = timeline.busy_seconds(pipeline_rank)
        text = f"  pipeline rank {pipeline_rank}: computes {busy:.6g} s ({busy / total:.0%}), "
        text += f"holds {peak.activations} activations and {peak.receives} receive buffers"
        yield text + (f", {peak.nbytes / 1e6:.6g} MB" if peak.nbytes else "")
    exposed, critical = timeline.exposed_seconds(), timeline.critical_seconds()
    for channel, seconds in timeline.hop_seconds().items():
        if seconds:
            yield (
                f"  channel {channel}: {timeline.schedule.microbatches} transfers of {seconds:.6g} s; its receiver "
                f"waits {exposed[channel]:.6g} s, and {critical[channel]:.6g} s are on the critical path"
            )
    on_wire = sum(critical.values())
    yield f"  critical path: {total - on_wire:.6g} s of compute, {on_wire:.6g} s of transfers"
