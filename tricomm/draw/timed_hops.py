"""What a picture of a plan shows: its hops at their simulated times, and bars that stand for them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from tricomm.layout.topology import Topology
from tricomm.plan import Move, Plan
from tricomm.plan.cost import HopTimes, hop_times
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
    times = HopTimes(*(begin + column for column in hop_times(move, topology)))
    posted, arrival = times.posted.tolist(), times.arrival.tolist()
    out = list(zip(times.out_begin.tolist(), times.out_end.tolist(), strict=True))
    is_local = [topology.host(hop.source) == topology.host(hop.destination) for hop in move.hops]
    entering = zip(times.into_begin.tolist(), times.into_end.tolist(), strict=True)
    links = [
        (local, hop.destination if local else topology.nic(hop.destination))
        for hop, local in zip(move.hops, is_local, strict=True)
    ]
    comes = (times.arrival - topology.latency_seconds).tolist()
    into = _entering(links, list(zip(entering, times.out_end.tolist(), comes, strict=True)))
    result: list[TimedHop] = []
    for index, hop in enumerate(move.hops):
        message = messages[hop.message]
        result.append(
            TimedHop(
                hop.source,
                hop.destination,
                message.chain[0],
                hop.chunk,
                len(message.chunks),
                message.chunk_nbytes(hop.chunk),
                is_local[index],
                (posted[index] - topology.overhead_seconds, posted[index]),
                out[index],
                into[index],
                arrival[index],
            )
        )
    return result


def _entering(links: Sequence[Hashable], entering: Sequence[tuple[Span, float, float]]) -> list[Span]:
    """When each hop is drawn to enter: as late as it arrives, and never two at once by the same link.

    Both ends of a hop are simulated by themselves, so that one whose link is free enters "before" it leaves; and those
    that arrive together are simulated in any order, and drawn in that in which they leave.

    Args:
        links: by which each enters.
        entering: of each, (simulated span, when its last byte leaves, when that comes).

    Example:
        >>> _entering(["nic", "nic", "other"], [((0, 2), 5, 6), ((2, 4), 3, 6), ((0, 2), 2, 3)])
        [(4, 6), (2, 4), (1, 3)]
    """
    result = [span for span, _, _ in entering]
    free: dict[Hashable, float] = {}
    for index in sorted(range(len(links)), key=lambda index: entering[index][:0:-1], reverse=True):
        (begin, end), _, comes = entering[index]
        last = min(comes, free.get(links[index], comes))
        result[index] = (last - (end - begin), last)
        free[links[index]] = last - (end - begin)
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
