"""What bench.pipeline has found: rows, what met the targets, tables, the picture, the file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.pipeline.work import Seconds
from bench.results_file import earlier, other_rows

OURS = "tricomm"
IN_TORCH = "tricomm in torch's runtime"
SIGNAL = "signal"
LEADER = "leader + broadcast, 1F1B"
TORCH = {
    "torch GPipe": "ScheduleGPipe",
    "torch 1F1B": "Schedule1F1B",
    "torch Interleaved1F1B([stage])": "ScheduleInterleaved1F1B",
    "torch InterleavedZeroBubble([stage])": "ScheduleInterleavedZeroBubble",
}
TARGET_RATIO = 1.03
TARGET_PEER = 0.98
TARGET_SIMULATOR = 0.10


@dataclass(frozen=True)
class Row:
    """One method at one hop time.

    Attributes:
        method: which.
        microbatches, devices: of the case.
        has_links: whether hosts have a link for each neighbour, rather than one NIC for all.
        hop_forwards: the hop that was asked for, in forwards.
        hop_seconds: the hop as measured alone, from the start of the send to the data's use.
        seconds: median of the samples.
        samples: from when the first rank began to when the last one ended.
        peaks: the most microbatches each stage held.
        predicted_seconds: by the simulator; None for peers.
        wire_bound_seconds: what no order of the same work can beat, since one NIC carries so many bytes.
        schedule: ours, by its parameters.
        busy_seconds: what the sleeps of the last sample lasted in all, on each stage.
    """

    method: str
    microbatches: int
    devices: int
    has_links: bool
    hop_forwards: float
    hop_seconds: float
    seconds: float
    samples: tuple[float, ...]
    peaks: tuple[int, ...]
    predicted_seconds: float | None
    wire_bound_seconds: float
    schedule: str | None
    busy_seconds: tuple[float, ...]

    @property
    def case(self) -> tuple[int, int, bool, float]:
        """What the methods of a case have in common."""
        return self.devices, self.microbatches, self.has_links, self.hop_forwards


@dataclass(frozen=True)
class ExposureReport:
    """One hop time against the targets.

    Attributes:
        bound_seconds: signal + 2 (S - 1) hops.
        ratio: ours over it.
        wire_ratio: the bound of the NICs over it; above the target, no schedule reaches that.
        fastest_peer, peer_ratio: the fastest other method, and its time over ours.
        simulator_error: predicted over measured, less one.
    """

    hop_forwards: float
    bound_seconds: float
    ratio: float
    wire_ratio: float
    fastest_peer: str
    peer_ratio: float
    simulator_error: float


def exposures(rows: Sequence[Row]) -> list[ExposureReport]:
    """One for each case."""
    found = []
    for key in dict.fromkeys(row.case for row in rows):
        case = {row.method: row for row in rows if row.case == key}
        ours, signal = case[OURS], case[SIGNAL]
        bound = signal.seconds + 2 * (len(ours.peaks) - 1) * ours.hop_seconds
        peer = min((row for name, row in case.items() if name not in (OURS, SIGNAL, IN_TORCH)), key=lambda r: r.seconds)
        assert ours.predicted_seconds is not None
        found.append(
            ExposureReport(
                ours.hop_forwards,
                bound,
                ours.seconds / bound,
                ours.wire_bound_seconds / bound,
                peer.method,
                peer.seconds / ours.seconds,
                ours.predicted_seconds / ours.seconds - 1,
            )
        )
    return found


def table(rows: Sequence[Row]) -> str:
    """One line per hop time and method, in Markdown."""
    lines = [
        "| hop / F | hop | method | step | over ours | most microbatches held, by stage | simulator |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {row.case: row.seconds for row in rows if row.method == OURS}
    for row in rows:
        over = row.seconds / ours[row.case]
        error = "" if row.predicted_seconds is None else f"{row.predicted_seconds / row.seconds - 1:+.1%}"
        name = row.method if row.schedule is None else f"{row.method}: {row.schedule}"
        lines.append(
            f"| {row.hop_forwards:g} | {row.hop_seconds * 1e3:.1f} ms | {name} | {row.seconds:.3f} s | {over:.2f} | "
            f"{' '.join(map(str, row.peaks))} | {error} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row], seconds: Seconds) -> str:
    """Each hop time against the targets."""
    hidden = hidden_forwards(seconds)
    lines = [
        f"Targets: up to {hidden:g} F ours / (signal + 2 (S - 1) hops) <= {TARGET_RATIO}; fastest peer / ours >= "
        f"{TARGET_PEER}, and above 1 where the hop is; simulator within {TARGET_SIMULATOR:.0%}.",
        "",
        "| hop / F | signal + 2 (S - 1) hops | ours over it | wires alone over it | fastest peer | over ours | "
        "simulator |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in exposures(rows):
        wanted = TARGET_PEER if one.hop_forwards == 0 else 1.0
        is_asked = one.hop_forwards <= hidden
        lines.append(
            f"| {one.hop_forwards:g} | {one.bound_seconds:.3f} s | "
            f"{_marked(one.ratio, one.ratio <= TARGET_RATIO or not is_asked)} | {one.wire_ratio:.3f} | "
            f"{one.fastest_peer} | {_marked(one.peer_ratio, one.peer_ratio >= wanted)} | "
            f"{one.simulator_error:+.1%}{'' if abs(one.simulator_error) <= TARGET_SIMULATOR else ' MISSED'} |"
        )
    return "\n".join(lines)


def hidden_forwards(seconds: Seconds) -> float:
    """Up to which hop, in forwards, a split backward with a warm-up of one more depth hides it."""
    return (seconds.forward + seconds.backward + seconds.weight_gradient) / 2 / seconds.forward


def _marked(value: float, is_reached: bool) -> str:
    return f"{value:.3f}{'' if is_reached else ' MISSED'}"


def draw(rows: Sequence[Row], seconds: Seconds, path: Path) -> None:
    """A step's length over the hop's, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    for name in dict.fromkeys(row.method for row in rows):
        points = sorted((row.hop_forwards, row.seconds) for row in rows if row.method == name)
        is_ours = name in (OURS, IN_TORCH, SIGNAL)
        style = {OURS: "o-", IN_TORCH: "o--", SIGNAL: "k:"}.get(name, "s-")
        axes.plot(*zip(*points, strict=True), style, label=name, linewidth=2.2 if is_ours else 1.2, markersize=4)
    bound = sorted((one.hop_forwards, one.bound_seconds) for one in exposures(rows))
    axes.plot(*zip(*bound, strict=True), "k--", linewidth=1, label="signal + fill and drain, 2 (S - 1) hops")
    if not rows[0].has_links:
        full = (seconds.forward + seconds.backward) / 2 / seconds.forward
        axes.axvline(full, color="grey", linewidth=0.8)
        axes.annotate("2 hops = F + B:\na NIC sends without pause", (full, 0.05), fontsize=8, color="grey")
    axes.set_xlabel(
        f"one hop / one forward (F = {seconds.forward * 1e3:g} ms, slept; B = {seconds.backward / seconds.forward:g} F)"
    )
    axes.set_ylabel("step (s)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def save(rows: Sequence[Row], about: dict[str, Any], path: Path) -> list[Row]:
    """Write the rows, with those of other cases that the file has from the same set-up; all of them."""
    set_up = {key: about[key] for key in ("machine", "torch", "seconds", "nic_bits_per_second")}
    order = {name: number for number, name in enumerate((SIGNAL, OURS, IN_TORCH, LEADER, *TORCH))}
    kept = other_rows(earlier(path, set_up), Row, rows)
    together = sorted([*kept, *rows], key=lambda row: (row.case, order[row.method]))
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in together]}, indent=1) + "\n")
    return together
