"""Pictures of a pipeline's timeline: an SVG to look at, and JSON for Perfetto (https://ui.perfetto.dev)."""

import json
from collections.abc import Iterator
from html import escape
from math import floor, log10

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
ACTIVATION, GRADIENT, WAIT, INK = "#4a7fb5", "#4f9a4a", "#d9534f", "#333333"

LEFT, RIGHT, TOP = 92, 24, 58
ROW, LANE, GAP = 26, 8, 5


def timeline_perfetto(timeline: Timeline) -> str:
    """The timeline as trace events: a process per position, a thread for compute and one per channel at each end.

    An arrow leads from each send to its receive. Times are in microseconds, as the format has them.
    """
    return json.dumps({"traceEvents": list(_events(timeline)), "displayTimeUnit": "ms"})


def _events(timeline: Timeline) -> Iterator[dict[str, object]]:
    schedule = timeline.schedule
    for position, spans in enumerate(timeline.compute):
        stages = ", ".join(map(str, schedule.stages_of(position)))
        yield {"ph": "M", "name": "process_name", "pid": position, "args": {"name": f"position {position}: {stages}"}}
        yield {"ph": "M", "name": "thread_name", "pid": position, "tid": 0, "args": {"name": "compute"}}
        for span in spans:
            yield {**_slice(str(span.action), span.begin, span.end), "pid": position, "tid": 0, "cat": "compute"}
        yield from _held(position, spans)
    for lane, channel in enumerate(schedule.channels, start=1):
        for stage, what in ((channel.sender, "send"), (channel.receiver, "receive")):
            place = {"pid": schedule.position_of(stage), "tid": lane}
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"{what} {channel}"}}
    lanes = {channel: lane for lane, channel in enumerate(schedule.channels, start=1)}
    for number, one in enumerate(timeline.transfers):
        name = f"{one.channel} microbatch {one.microbatch}"
        sender = {"pid": schedule.position_of(one.channel.sender), "tid": lanes[one.channel]}
        receiver = {"pid": schedule.position_of(one.channel.receiver), "tid": lanes[one.channel]}
        yield {**_slice(name, one.begin, one.end), **sender, "cat": "send"}
        yield {**_slice(name, one.begin, one.arrival), **receiver, "cat": "receive"}
        arrow = {"name": "transfer", "cat": "transfer", "id": number}
        yield {**arrow, "ph": "s", "ts": one.begin * 1e6, **sender}
        yield {**arrow, "ph": "f", "bp": "e", "ts": one.begin * 1e6, **receiver}


def _slice(name: str, begin: float, end: float) -> dict[str, object]:
    return {"ph": "X", "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}


def _held(position: int, spans: tuple[Span, ...]) -> Iterator[dict[str, object]]:
    """A counter of the activations that are held."""
    held = 0
    for span in spans:
        if span.action.kind is Kind.FORWARD:
            held, time = held + 1, span.begin
        elif span.action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            held, time = held - 1, span.end
        else:
            continue
        yield {"ph": "C", "name": "activations", "pid": position, "ts": time * 1e6, "args": {"held": held}}


def timeline_svg(timeline: Timeline, *, title: str = "", width: int = 1400, until_seconds: float | None = None) -> str:
    """The timeline as an SVG: a row of compute per position and, below it, a lane for each direction of its edges.

    Red is where a position has nothing to do but wait for data that has been computed.

    Args:
        timeline: of a simulation.
        title: above it; "" says how long it takes.
        width: in pixels.
        until_seconds: end of the time axis, to put pictures of several schedules on one scale; None is the makespan.
    """
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
        for position in range(schedule.positions):
            self.row_of[position] = y
            y += ROW + GAP
            for channel in schedule.channels:
                if schedule.position_of(channel.edge.source) == position:
                    self.lane_of[channel] = y
                    y += LANE + 3
            y += GAP
        self.bottom = y
        self.height = y + 34

    def lines(self) -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" font-size="12" fill="{INK}">'
        )
        yield f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        yield f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(self.title)}</text>'
        yield from self.legend()
        yield from self.axis()
        for position in range(self.timeline.schedule.positions):
            yield from self.position(position)
        for channel, y in self.lane_of.items():
            yield from self.lane(channel, y)
        yield "</svg>"

    def x(self, seconds: float) -> float:
        return LEFT + seconds * self.scale

    def legend(self) -> Iterator[str]:
        used = {span.action.kind for spans in self.timeline.compute for span in spans}
        entries = [(COLOURS[kind], name) for kind, name in NAMES.items() if kind in used]
        if self.lane_of:
            entries += [(ACTIVATION, "activation on the wire"), (GRADIENT, "gradient on the wire")]
            entries += [(WAIT, "waits for a transfer")]
        x = LEFT
        for colour, name in entries:
            yield f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>'
            yield f'<text x="{x + 17}" y="42">{name}</text>'
            x += 36 + round(6.4 * len(name))

    def axis(self) -> Iterator[str]:
        step = _round_step(self.until / 12)
        for tick in range(floor(self.until / step) + 1):
            x = self.x(tick * step)
            yield f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{self.bottom}" stroke="#e4e4e4"/>'
            yield f'<text x="{x:.1f}" y="{self.bottom + 16}" text-anchor="middle">{tick * step:.6g}</text>'
        yield f'<text x="{LEFT - 10}" y="{self.bottom + 16}" text-anchor="end">seconds</text>'

    def position(self, position: int) -> Iterator[str]:
        schedule = self.timeline.schedule
        stages = schedule.stages_of(position)
        y = self.row_of[position]
        name = ("stage " if len(stages) == 1 else "stages ") + ", ".join(map(str, stages))
        yield f'<text x="{LEFT - 10}" y="{y + ROW - 9}" text-anchor="end">{name}</text>'
        begin, end = self.x(0), self.x(self.timeline.makespan_seconds)
        yield f'<rect x="{begin}" y="{y}" width="{end - begin:.1f}" height="{ROW}" fill="#f4f4f4"/>'
        for wait in self.timeline.waits():
            if wait.pipeline_rank == position:
                yield _box(self.x(wait.begin), y + ROW - 5, self.x(wait.end), 5, WAIT, "")
        for span in self.timeline.compute[position]:
            shade = stages.index(span.action.stage) / max(1, len(stages))
            yield from self.compute(span, y, shade)

    def compute(self, span: Span, y: int, shade: float) -> Iterator[str]:
        left, right = self.x(span.begin), self.x(span.end)
        yield _box(left, y, right, ROW, COLOURS[span.action.kind], str(span.action), 1 - shade / 2)
        label = str(span.action.microbatch)
        if right - left > 7 * len(label) + 3:
            yield f'<text x="{(left + right) / 2:.1f}" y="{y + ROW - 9}" text-anchor="middle">{label}</text>'

    def lane(self, channel: Channel, y: int) -> Iterator[str]:
        colour = ACTIVATION if channel.is_forward else GRADIENT
        yield f'<text x="{LEFT - 10}" y="{y + LANE}" text-anchor="end" font-size="9">{escape(str(channel))}</text>'
        for one in self.timeline.transfers:
            if one.channel == channel and one.arrival > one.begin:
                yield _box(self.x(one.begin), y, self.x(one.arrival), LANE, colour, f"{channel} {one.microbatch}")


def _box(left: float, y: float, right: float, height: float, colour: str, tip: str, opacity: float = 1.0) -> str:
    shape = f'x="{left:.2f}" y="{y}" width="{max(0.0, right - left):.2f}" height="{height}" fill="{colour}"'
    edge = ' stroke="white" stroke-width="0.7"' + (f' fill-opacity="{opacity:.2f}"' if opacity < 1 else "")
    return f"<rect {shape}{edge}><title>{escape(tip)}</title></rect>" if tip else f"<rect {shape}/>"


def _round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below."""
    power = 10.0 ** floor(log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
