"""Draw a plan: who sends what to whom over time."""

from collections.abc import Iterator, Sequence
from html import escape

from tricomm.draw.svg import FAINT, INK, PANEL, axis, box, check_width, legend, sheet
from tricomm.draw.timed_hops import Bar, TimedHop, bars_of, joined, timed_hops
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan import Plan
from tricomm.plan.describe import format_nbytes, format_seconds
from tricomm.plan.network.hosts import Hosts, by_host

COLOURS = (
    *("#7fb2e5", "#f2c46d", "#8fc98b", "#e39490", "#b49ad8"),
    *("#6cc3bd", "#e3a0c8", "#bcb768", "#d6a27c", "#9fb0c3"),
)
POST, BOUND = "#d2d2d2", "#d9534f"
MAX_RANKS, MAX_ARROWS, MAX_HOPS = 64, 120, 3000
MIN_GAP = 6
"""Pixels between bars below which they are joined where hops are too many."""

LEFT, RIGHT, GAP, WIDEST_TEXT = 128, 24, 12, 190
TRACKS = ((12, 14), (24, 10), (40, 7), (MAX_RANKS, 5))
"""(most ranks, height of a track): a rank has two, for what it sends and for what it receives."""


@checks_kinds
def plan_svg(plan: Plan, *, title: str = "", width: int = 1400, topology: Topology | None = None) -> str:
    """Draw a plan as an SVG: a lane per host, a row per rank, a bar per hop at its simulated times.

    The upper bars of a row are what the rank sends, the lower ones what it receives, each for as long as it keeps the
    NIC busy: what shares a NIC stands one after the other, though it may go at once. Sends and receives are timed by
    themselves, so that a hop may be drawn to enter before it leaves; when it arrives is as simulated. Colours say whose
    data it is, arrows lead to where and when it arrives. Chunks of a message get paler one by one; bars of half the
    height stay within a host.

    Of more than 64 ranks those of the first hosts are drawn; with more than 120 hops or 24 ranks arrows are left out,
    and with more than 3000 hops bars that almost touch are joined. A line below the picture says so.

    Args:
        plan: of all ranks.
        title: above it; "" says how long it takes.
        width: in pixels.
        topology: hosts and rates; the plan's own if None.

    Raises:
        PlanError: the plan was built for one rank only, or a picture without room for anything.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> picture = plan_svg(make_plan(rows, columns))
        >>> picture[:4], picture.count("rank 0 to rank 3: 32 B")  # where it leaves, and where it enters
        ('<svg', 2)
    """
    check_width(width, LEFT + RIGHT)
    return "\n".join(_Drawing(plan, title, width, topology or plan.topology).lines())


class _Drawing:
    """One picture; ``lines`` are its elements."""

    def __init__(self, plan: Plan, title: str, width: int, topology: Topology) -> None:
        self.plan, self.topology, self.width = plan, topology, width
        self.seconds, self.bound_seconds = plan.simulated_seconds(topology), plan.lower_bound_seconds(topology)
        self.title = title or (
            f"expected {format_seconds(self.seconds)}, NIC bound {format_seconds(self.bound_seconds)}, "
            f"{format_nbytes(plan.wire_nbytes)} on the wire"
        )
        self.until = max(self.seconds, self.bound_seconds, 1e-9) * 1.01
        self.scale = (width - LEFT - RIGHT) / self.until
        self.hosts = _shown(by_host(sorted(plan.participants, key=topology.host), topology))
        ranks = {rank for host in self.hosts for rank in host}
        every, self.begins = timed_hops(plan, topology)
        self.hops = [hop for hop in every if hop.source in ranks or hop.destination in ranks]
        self.track = next(height for most, height in TRACKS if len(ranks) <= most)
        self.has_arrows = self.track >= 10 and len(self.hops) <= MAX_ARROWS
        self.is_joined = len(self.hops) > MAX_HOPS
        self.names = _names(self.hops, topology)
        self.colour_of = {
            name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dict.fromkeys(self.names.values()))
        }
        self.legend = self._legend()
        self.top = 92 + 20 * len(self.legend)
        self.row_of: dict[int, int] = {}
        y = self.top
        for host in self.hosts:
            for rank in host:
                self.row_of[rank] = y
                y += 2 * self.track + (6 if self.track >= 10 else 3)
            y += GAP
        self.bottom = y
        self.notes = self._notes()
        self.height = y + 34 + 16 * len(self.notes)

    def lines(self) -> Iterator[str]:
        return sheet(self.width, self.height, self.title, LEFT, self.elements())

    def elements(self) -> Iterator[str]:
        yield from self.head()
        for host in self.hosts:
            yield from self.lane(host)
        yield from self.axis()
        if self.has_arrows:
            yield from self.arrows()
        yield from self.bars()
        yield from self.marks()
        for index, note in enumerate(self.notes):
            yield f'<text x="{LEFT}" y="{self.bottom + 40 + 16 * index}" fill="{FAINT}">{escape(note)}</text>'

    def x(self, seconds: float) -> float:
        return LEFT + seconds * self.scale

    def colour(self, origin: int) -> str:
        return self.colour_of[self.names[origin]]

    def head(self) -> Iterator[str]:
        moves = ", then ".join(
            f"{_counted(len(move.messages), 'message')} in {_counted(len(move.hops), 'hop')}"
            for move in self.plan.moves
        )
        every = [type(strategy).__name__ for move in self.plan.moves for strategy in move.strategies]
        strategies = " and ".join(dict.fromkeys(every))
        texts = (
            ("from", _counted_layouts(self.plan.ends.sources)),
            ("to", _counted_layouts(self.plan.ends.destinations)),
            ("by", f"{strategies}, {type(self.plan.balance).__name__}: {moves}"),
        )
        for index, (word, text) in enumerate(texts):
            y = 40 + 16 * index
            short = text if len(text) <= WIDEST_TEXT else text[: WIDEST_TEXT - 3] + "..."
            yield f'<text x="{LEFT}" y="{y}" fill="{FAINT}">{word}</text>'
            yield f'<text x="{LEFT + 36}" y="{y}" fill="{FAINT}">{escape(short)}</text>'
        for index, row in enumerate(self.legend):
            yield from legend(LEFT, 82 + 20 * index, row)

    def lane(self, host: Sequence[int]) -> Iterator[str]:
        y = self.row_of[host[0]] - 4
        height = self.row_of[host[-1]] + 2 * self.track + 5 - y
        yield f'<rect x="8" y="{y}" width="{self.width - 16}" height="{height}" rx="5" fill="{PANEL}"/>'
        name = self.topology.hosts[host[0]]
        if len(host) > 1 or name != f"rank{host[0]}":
            name = name if len(name) <= 9 else name[:8] + "..."
            yield f'<text x="16" y="{y + height / 2 + 4:.1f}" font-weight="bold">{escape(name)}</text>'
        size = 12 if self.track >= 10 else 9
        for rank in host:
            y = self.row_of[rank]
            yield (
                f'<text x="{LEFT - 8}" y="{y + self.track + size / 3:.1f}" text-anchor="end" font-size="{size}">'
                f"rank {rank}</text>"
            )
            for track in range(2):
                yield box(LEFT, y + track * (self.track + 1), self.x(self.until), self.track, "white", "")

    def axis(self) -> Iterator[str]:
        unit, seconds = next(
            one for one in (("seconds", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)) if self.until >= one[1]
        )
        return axis(LEFT, self.width - RIGHT, self.until / seconds, self.top - 6, self.bottom, unit)

    def bars(self) -> Iterator[str]:
        posts = [Bar(hop.source, 0, POST, False, hop.posting, 1.0, (), "") for hop in self.hops]
        bars = bars_of(self.hops, self.colour)
        if self.is_joined:
            posts, bars = (joined(some, MIN_GAP / self.scale) for some in (posts, bars))
        # What is posted while the NIC is busy hides behind its bars; what stays within a host is short and on top.
        for bar in (*posts, *sorted(bars, key=lambda bar: bar.is_local)):
            if bar.rank in self.row_of:
                yield from self.bar(bar)

    def bar(self, bar: Bar) -> Iterator[str]:
        left, right = (self.x(seconds) for seconds in bar.span)
        y, height = self.row_of[bar.rank] + bar.track * (self.track + 1), float(self.track)
        if bar.is_local:
            y, height = y + self.track // 2, height / 2
        right = max(right, left + 1.5) if bar.tip else right
        if right > left:
            yield box(left, y, right, height, bar.colour, bar.tip, bar.opacity)
        label = next((words for words in bar.labels if 6.2 * len(words) + 6 <= right - left and height >= 10), "")
        if label:
            yield (
                f'<text x="{(left + right) / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" font-size="11" '
                f'pointer-events="none">{label}</text>'
            )

    def arrows(self) -> Iterator[str]:
        for number, colour in enumerate(dict.fromkeys(self.colour_of.values())):
            yield (
                f'<marker id="arrow{number}" viewBox="0 0 6 6" refX="5.5" refY="3" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0.4 L5.5 3 L0 5.6 z" fill="{colour}"/></marker>'
            )
        numbers = {colour: number for number, colour in enumerate(dict.fromkeys(self.colour_of.values()))}
        for hop in self.hops:
            if hop.source in self.row_of and hop.destination in self.row_of:
                colour = self.colour(hop.origin)
                begin, end = self.row_of[hop.source], self.row_of[hop.destination]
                y1, y2 = (
                    (begin + self.track, end + self.track + 1) if end > begin else (begin, end + 2 * self.track + 1)
                )
                x2 = self.x(hop.arrival)
                yield (
                    f'<line x1="{self.x(hop.out[1]):.2f}" y1="{y1}" x2="{x2:.2f}" y2="{y2}" stroke="{colour}" '
                    f'stroke-width="1.2" marker-end="url(#arrow{numbers[colour]})"/>'
                )

    def marks(self) -> Iterator[str]:
        """The time that no plan can beat, and where a second move begins."""
        lines = [(self.bound_seconds, f'stroke="{BOUND}" stroke-dasharray="5 3"')]
        lines += [(begin, f'stroke="{INK}"') for begin in self.begins[1:]]
        for seconds, stroke in lines:
            x = self.x(seconds)
            yield f'<line x1="{x:.1f}" y1="{self.top - 6}" x2="{x:.1f}" y2="{self.bottom}" {stroke}/>'

    def _legend(self) -> list[list[tuple[str, str]]]:
        """Rows of (colour, words)."""
        names: dict[str, list[str]] = {}
        for name, colour in self.colour_of.items():
            names.setdefault(colour, []).append(name)
        entries = [
            (colour, "data of " + ", ".join(some[:3]) + (", ..." if len(some) > 3 else ""))
            for colour, some in names.items()
        ]
        if self.hops and self.topology.overhead_seconds > 0:
            entries.append((POST, "posts a send"))
        entries.append((BOUND, "NIC bound"))
        rows: list[list[tuple[str, str]]] = [[]]
        for entry in entries:
            if sum(36 + 6.4 * len(words) for _, words in (*rows[-1], entry)) > self.width - LEFT - RIGHT:
                rows.append([])
            rows[-1].append(entry)
        return rows

    def _notes(self) -> list[str]:
        if not self.hops:
            return ["Nothing travels between ranks."]
        words = ["Upper bars: sends, lower bars: receives"]
        if self.has_arrows:
            words.append("arrows: where and when it arrives")
        if any(hop.chunks > 1 for hop in self.hops):
            words.append("chunks of a message: numbered behind the colon or alone, paler one by one")
        if any(hop.is_local for hop in self.hops):
            words.append("half the height: within a host")
        notes = [
            "; ".join(words) + ".",
            "Each link is timed by itself; messages of a round share it, and may be drawn to enter before they leave.",
        ]
        shown, every = len(self.row_of), len(self.plan.participants)
        operations = dict.fromkeys(one.reduction.op for one in self.plan.classes if one.reduction is not None)
        if operations:
            notes.append(
                f"Black line: the contributions are where their {' or '.join(operations)} is taken; then that moves."
            )
        if shown < every:
            notes.append(
                f"{shown} of {every} ranks are drawn, those of the first hosts, with the hops from and to them."
            )
        if not self.has_arrows:
            notes.append(f"Arrows are left out of pictures of more than {MAX_ARROWS} hops or {TRACKS[1][0]} ranks.")
        if self.is_joined:
            notes.append(f"Of more than {MAX_HOPS} hops, those less than {MIN_GAP} pixels apart are joined to one bar.")
        return notes


def _shown(hosts: Hosts) -> list[tuple[int, ...]]:
    """The first hosts and ranks, as many as there is room for."""
    shown: list[tuple[int, ...]] = []
    for ranks in hosts:
        room = MAX_RANKS - sum(map(len, shown))
        shown += [ranks[:room]] if room else []
    return shown


def _names(hops: Sequence[TimedHop], topology: Topology) -> dict[int, str]:
    """What has a colour of its own, by the rank whose data it is: ranks, or their hosts where ranks are many."""
    origins = sorted({hop.origin for hop in hops})
    if len(origins) <= len(COLOURS):
        return {origin: f"rank {origin}" for origin in origins}
    return {origin: topology.hosts[origin] for origin in origins}


def _counted_layouts(side: Sequence[tuple[str, ShardingSpec]]) -> str:
    """How many tensors a side has, if they have names, and the layout of the first."""
    name, spec = side[0]
    return f"{len(side)} tensors such as {name!r}: {spec}" if name else str(spec)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
