"""What a picture of a plan shows: its hops at their simulated times, and bars that stand for them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from tricomm.layout.topology import Topology
from tricomm.plan import Move, Plan
from tricomm.plan.cost import hop_times
from tricomm.plan.describe import format_nbytes, format_seconds

Span = tuple[float, float]
"""(begin, end) in seconds from the beginning of the plan."""


class TimedHop(NamedTuple):
    """A hop and when it happens.

    Attributes:
        source, destination: ranks.
        origin: the rank whose data it is: the first of the message's chain.
        chunk, chunks: which of how many of the message's.
        nbytes: of the chunk.
        is_local: within a host.
        posting: of the send.
        out, into: on the links by which it leaves and enters.
        arrival: when the destination has it, in seconds from the beginning of the plan.
    """

    source: int
    destination: int
    origin: int
    chunk: int
    chunks: int
    nbytes: int
    is_local: bool
    posting: Span
    out: Span
    into: Span
    arrival: float

    @property
    def tip(self) -> str:
        """What a browser shows under the mouse."""
        chunk = f", chunk {self.chunk} of {self.chunks}" if self.chunks > 1 else ""
        data = f", data of rank {self.origin}" if self.origin != self.source else ""
        return (
            f"rank {self.source} to rank {self.destination}: {format_nbytes(self.nbytes)}{chunk}{data}, "
            f"leaves at {format_seconds(self.out[0])}, arrives at {format_seconds(self.arrival)}"
        )


def timed_hops(plan: Plan, topology: Topology) -> tuple[list[TimedHop], list[float]]:
    """Simulate the moves of a plan one after the other.

    Returns:
        the hops of all, and when each move begins.
    """
    hops: list[TimedHop] = []
    begins: list[float] = []
    now = 0.0
    for move in plan.moves:
        of_move = _timed(move, topology, now)
        begins.append(now)
        now = max([now, *(hop.arrival for hop in of_move)])
        hops += of_move
    return hops, begins


def _timed(move: Move, topology: Topology, begin: float) -> list[TimedHop]:
    messages = move.messages[:]
    times = zip(*((begin + column).tolist() for column in hop_times(move, topology)), strict=True)
    result: list[TimedHop] = []
    for hop, (posted, out_begin, out_end, into_begin, into_end, arrival) in zip(move.hops, times, strict=True):
        message = messages[hop.message]
        # Both links are simulated by themselves: one that is free enters "before" it leaves, and is drawn as it ends.
        late = max(arrival - topology.latency_seconds - into_end, 0.0)
        result.append(
            TimedHop(
                hop.source,
                hop.destination,
                message.chain[0],
                hop.chunk,
                len(message.chunks),
                message.chunk_nbytes(hop.chunk),
                topology.host(hop.source) == topology.host(hop.destination),
                (posted - topology.overhead_seconds, posted),
                (out_begin, out_end),
                (into_begin + late, into_end + late),
                arrival,
            )
        )
    return result


class Bar(NamedTuple):
    """A bar in a rank's row.

    Attributes:
        rank, track: where; track 0 is of sends, 1 of receives.
        colour, is_local: how.
        span: seconds.
        opacity: at most 1.
        labels: words for inside, the longest first.
        tip: what a browser shows under the mouse.
    """

    rank: int
    track: int
    colour: str
    is_local: bool
    span: Span
    opacity: float
    labels: tuple[str, ...]
    tip: str


def bars_of(hops: Iterable[TimedHop], colour_of: Callable[[int], str]) -> list[Bar]:
    """Make two bars for each hop: where it leaves and where it enters."""
    result: list[Bar] = []
    for hop in hops:
        opacity = 1 - 0.6 * hop.chunk / hop.chunks
        for rank, track, span, peer in (
            (hop.source, 0, hop.out, f"to {hop.destination}"),
            (hop.destination, 1, hop.into, f"from {hop.source}"),
        ):
            labels = (
                (peer,) if hop.chunks == 1 else (f"{peer}: chunk {hop.chunk}", f"{peer}: {hop.chunk}", f"{hop.chunk}")
            )
            result.append(Bar(rank, track, colour_of(hop.origin), hop.is_local, span, opacity, labels, hop.tip))
    return result


def joined(bars: Iterable[Bar], gap_seconds: float) -> list[Bar]:
    """Join bars of one row, track and colour that are less than a gap apart."""
    groups: dict[tuple[int, int, str, bool], list[list[Bar]]] = {}
    for bar in sorted(bars, key=lambda bar: bar.span):
        runs = groups.setdefault(bar[:4], [[]])
        if runs[-1] and bar.span[0] - max(one.span[1] for one in runs[-1][-8:]) > gap_seconds:
            runs.append([])
        runs[-1].append(bar)
    return [
        run[0]._replace(
            span=(run[0].span[0], max(bar.span[1] for bar in run)),
            opacity=1.0 if len(run) > 1 else run[0].opacity,
            labels=(),
            tip=run[0].tip if len(run) == 1 else f"{len(run)} hops",
        )
        for runs in groups.values()
        for run in runs
    ]
