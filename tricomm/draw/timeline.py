"""Draw a pipeline's timeline: an SVG to look at, and JSON for Perfetto (https://ui.perfetto.dev)."""

import json
from collections.abc import Iterator
from html import escape
from math import isfinite

from tricomm.draw.svg import PANEL, axis, box, check_width, legend, sheet
from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.costs.timeline import Span, Timeline
from tricomm.pipeline.schedule.actions import Channel, Kind

COLOURS = {
    Kind.FORWARD: "#7fb2e5",
    Kind.BACKWARD: "#8fc98b",
    Kind.INPUT_GRADIENT: "#8fc98b",
    Kind.WEIGHT_GRADIENT: "#f2c46d",
}
NAMES = {
    Kind.FORWARD: "F forward",
    Kind.BACKWARD: "B backward",
    Kind.INPUT_GRADIENT: "I gradient of inputs",
    Kind.WEIGHT_GRADIENT: "W gradient of weights",
}
ACTIVATION, GRADIENT, WAIT = "#4a7fb5", "#4f9a4a", "#d9534f"

LEFT, RIGHT, TOP = 92, 24, 58
ROW, LANE, GAP = 26, 8, 5


@checks_kinds
def timeline_perfetto(timeline: Timeline) -> str:
    """The timeline as trace events: a process per pipeline rank, a thread for compute and one per channel at each end.

    An arrow leads from each send to its receive. Times are in microseconds, as the format has them.

    Example:
        >>> from tricomm.pipeline import Costs, gpipe, simulate
        >>> timeline = simulate(gpipe(2, 4), Costs.uniform(2, 1.0, 1.0, 1.0))
        >>> trace = json.loads(timeline_perfetto(timeline))
        >>> trace["traceEvents"][0]["args"]["name"]
        'pipeline rank 0: 0'
    """
    return json.dumps({"traceEvents": list(_events(timeline)), "displayTimeUnit": "ms"})


def _events(timeline: Timeline) -> Iterator[dict[str, object]]:
    schedule = timeline.schedule
    for pipeline_rank, spans in enumerate(timeline.compute):
        stages = ", ".join(map(str, schedule.stages_of(pipeline_rank)))
        yield {
            "ph": "M",
            "name": "process_name",
            "pid": pipeline_rank,
            "args": {"name": f"pipeline rank {pipeline_rank}: {stages}"},
        }
        yield {"ph": "M", "name": "thread_name", "pid": pipeline_rank, "tid": 0, "args": {"name": "compute"}}
        for span in spans:
            yield {**_slice(str(span.action), span.begin, span.end), "pid": pipeline_rank, "tid": 0, "cat": "compute"}
        yield from _held(pipeline_rank, spans)
    for lane, channel in enumerate(schedule.channels, start=1):
        for stage, what in ((channel.sender, "send"), (channel.receiver, "receive")):
            place = {"pid": schedule.pipeline_rank_of(stage), "tid": lane}
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"{what} {channel}"}}
    lanes = {channel: lane for lane, channel in enumerate(schedule.channels, start=1)}
    for number, one in enumerate(timeline.transfers):
        name = f"{one.channel} microbatch {one.microbatch}"
        sender = {"pid": schedule.pipeline_rank_of(one.channel.sender), "tid": lanes[one.channel]}
        receiver = {"pid": schedule.pipeline_rank_of(one.channel.receiver), "tid": lanes[one.channel]}
        yield {**_slice(name, one.begin, one.end), **sender, "cat": "send"}
        yield {**_slice(name, one.begin, one.arrival), **receiver, "cat": "receive"}
        arrow = {"name": "transfer", "cat": "transfer", "id": number}
        yield {**arrow, "ph": "s", "ts": one.begin * 1e6, **sender}
        yield {**arrow, "ph": "f", "bp": "e", "ts": one.begin * 1e6, **receiver}


def _slice(name: str, begin: float, end: float) -> dict[str, object]:
    return {"ph": "X", "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}


def _held(pipeline_rank: int, spans: tuple[Span, ...]) -> Iterator[dict[str, object]]:
    """A counter of the activations that are held."""
    held = 0
    for span in spans:
        if span.action.kind is Kind.FORWARD:
            held, time = held + 1, span.begin
        elif span.action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            held, time = held - 1, span.end
        else:
            continue
        yield {"ph": "C", "name": "activations", "pid": pipeline_rank, "ts": time * 1e6, "args": {"held": held}}


@checks_kinds
def timeline_svg(timeline: Timeline, *, title: str = "", width: int = 1400, until_seconds: float | None = None) -> str:
    """The timeline as an SVG: a row of compute per pipeline rank and, below it, a lane for each direction of its edges.

    Red is where a pipeline rank has nothing to do but wait for data that has been computed.

    Args:
        timeline: of a simulation.
        title: above it; "" says how long it takes.
        width: in pixels.
        until_seconds: end of the time axis, to put pictures of several schedules on one scale; None is the makespan.

    Raises:
        PlanError: a picture without room for anything, or an axis without an end.

    Example:
        >>> from tricomm.pipeline import Costs, gpipe, simulate
        >>> timeline = simulate(gpipe(2, 4), Costs.uniform(2, 1.0, 1.0, 1.0))
        >>> picture = timeline_svg(timeline)
        >>> picture[:4], picture.count("stage ")
        ('<svg', 2)
    """
    check_width(width, LEFT + RIGHT)
    if until_seconds is not None and not (isfinite(until_seconds) and until_seconds > 0):
        raise PlanError(f"until_seconds={until_seconds!r} must be a finite time above 0; leave it out for the makespan")
    return "\n".join(_Drawing(timeline, title, width, until_seconds or timeline.makespan_seconds).lines())


class _Drawing:
    """One picture; ``lines`` are its elements."""

    def __init__(self, timeline: Timeline, title: str, width: int, until: float) -> None:
        self.timeline, self.width, self.until = timeline, width, until
        self.title = title or f"{timeline.makespan_seconds:.4g} s, bubble {timeline.bubble_fraction:.0%}"
        self.scale = (width - LEFT - RIGHT) / until
        self.row_of: dict[int, int] = {}
        self.lane_of: dict[Channel, int] = {}
        schedule = timeline.schedule
        y = TOP
        for pipeline_rank in range(schedule.pipeline_ranks):
            self.row_of[pipeline_rank] = y
            y += ROW + GAP
            for channel in schedule.channels:
                if schedule.pipeline_rank_of(channel.edge.source) == pipeline_rank:
                    self.lane_of[channel] = y
                    y += LANE + 3
            y += GAP
        self.bottom = y
        self.height = y + 34

    def lines(self) -> Iterator[str]:
        return sheet(self.width, self.height, self.title, LEFT, self.elements())

    def elements(self) -> Iterator[str]:
        yield from self.legend()
        yield from axis(LEFT, self.width - RIGHT, self.until, TOP - 6, self.bottom, "seconds")
        for pipeline_rank in range(self.timeline.schedule.pipeline_ranks):
            yield from self.pipeline_rank(pipeline_rank)
        for channel, y in self.lane_of.items():
            yield from self.lane(channel, y)

    def x(self, seconds: float) -> float:
        return LEFT + seconds * self.scale

    def legend(self) -> Iterator[str]:
        used = {span.action.kind for spans in self.timeline.compute for span in spans}
        entries = [(COLOURS[kind], name) for kind, name in NAMES.items() if kind in used]
        if self.lane_of:
            entries += [(ACTIVATION, "activation on the wire"), (GRADIENT, "gradient on the wire")]
            entries += [(WAIT, "waits for a transfer")]
        return legend(LEFT, 32, entries)

    def pipeline_rank(self, pipeline_rank: int) -> Iterator[str]:
        schedule = self.timeline.schedule
        stages = schedule.stages_of(pipeline_rank)
        y = self.row_of[pipeline_rank]
        name = ("stage " if len(stages) == 1 else "stages ") + ", ".join(map(str, stages))
        yield f'<text x="{LEFT - 10}" y="{y + ROW - 9}" text-anchor="end">{name}</text>'
        begin, end = self.x(0), self.x(self.timeline.makespan_seconds)
        yield f'<rect x="{begin}" y="{y}" width="{end - begin:.1f}" height="{ROW}" fill="{PANEL}"/>'
        for wait in self.timeline.waits():
            if wait.pipeline_rank == pipeline_rank:
                yield box(self.x(wait.begin), y + ROW - 5, self.x(wait.end), 5, WAIT, "")
        for span in self.timeline.compute[pipeline_rank]:
            shade = stages.index(span.action.stage) / max(1, len(stages))
            yield from self.compute(span, y, shade)

    def compute(self, span: Span, y: int, shade: float) -> Iterator[str]:
        left, right = self.x(span.begin), self.x(span.end)
        yield box(left, y, right, ROW, COLOURS[span.action.kind], str(span.action), 1 - shade / 2)
        label = str(span.action.microbatch)
        if right - left > 7 * len(label) + 3:
            yield f'<text x="{(left + right) / 2:.1f}" y="{y + ROW - 9}" text-anchor="middle">{label}</text>'

    def lane(self, channel: Channel, y: int) -> Iterator[str]:
        colour = ACTIVATION if channel.is_forward else GRADIENT
        yield f'<text x="{LEFT - 10}" y="{y + LANE}" text-anchor="end" font-size="9">{escape(str(channel))}</text>'
        for one in self.timeline.transfers:
            if one.channel == channel and one.arrival > one.begin:
                yield box(self.x(one.begin), y, self.x(one.arrival), LANE, colour, f"{channel} {one.microbatch}")
