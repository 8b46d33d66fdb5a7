"""Pipelines on an emulated cluster whose hops take time: our schedules against torch's and Megatron's.

    python -m bench.pipeline [--hops 0 0.5 1 1.5 2] [--microbatches 8] [--devices 1] [--json PATH] [--plot PATH]

Each stage is a host with a NIC of its own. Compute is a SLEEP of a stated length, in the forward, in the gradient of
the inputs and in that of the weights, so that two cores can play many devices; transfers are real. Messages are sized
so that one hop takes the given multiple of the forward, at the measured rate. All methods of a case take turns.

A host has one NIC, which sends activations to the one side and gradients to the other: where 2 hops of one microbatch
take longer than its F + B, the NIC and not the schedule sets the pace, and more microbatches only make it plainer.

"signal" is our schedule with messages of one number: nothing with real messages can be faster in that order, and
filling and draining the pipeline costs 2 (S - 1) hops more. Needs root and iproute2 (see bench.cluster).
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.calibrate import Calibration, calibrate
from bench.cluster import Cluster, parse_bits_per_second
from bench.network import ClusterError
from bench.pipeline_ranks import Method, Sample, Setting, hop, prepare, sample, slept
from bench.pipeline_work import Seconds
from tricomm import Topology, make_plan
from tricomm.pipeline import Channel, Costs, Limits, Schedule, StageCost, TransferCost, simulate, tune

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
        hop_forwards: the hop that was asked for, in forwards.
        hop_seconds: the hop as measured alone, from the start of the send to the data's use.
        seconds: median of the samples.
        samples: from when the first rank began to when the last one ended.
        peaks: the most microbatches each stage held.
        predicted_seconds: by the simulator; None for peers.
        schedule: ours, by its parameters.
        busy_seconds: what the sleeps of the last sample lasted in all, on each stage.
    """

    method: str
    microbatches: int
    devices: int
    hop_forwards: float
    hop_seconds: float
    seconds: float
    samples: tuple[float, ...]
    peaks: tuple[int, ...]
    predicted_seconds: float | None
    schedule: str | None
    busy_seconds: tuple[float, ...]


def costs_of(setting: Setting, lasting: Seconds, numel: int, hop_seconds: float) -> Costs:
    """What the tuner is told: sleeps as they last alone, hops as they are planned, and as long as one takes alone.

    A host sends activations to the one side and gradients to the other through one NIC.
    """
    nbytes = numel * 4
    middle = StageCost(lasting.forward, lasting.input_gradient, lasting.weight_gradient, nbytes)
    # The inputs of the first stage need no gradient: both torch and the executor do all of its backward in W.
    first = StageCost(lasting.forward, 0.0, lasting.backward, nbytes)
    layouts = setting.layouts(numel)
    transfers = {}
    for stage in range(setting.stages - 1):
        for sender, receiver in ((stage, stage + 1), (stage + 1, stage)):
            plan = make_plan(layouts[sender], layouts[receiver], topology=setting.topology)
            planned = TransferCost.of_plan(plan)
            latency = max(0.0, hop_seconds - planned.busy_seconds)
            transfers[Channel(sender, receiver)] = replace(planned, latency_seconds=latency)
    return Costs((first, *[middle] * (setting.stages - 1)), transfers)


def tuned(costs: Costs, microbatches: int, activations: int) -> tuple[str, Schedule]:
    """What the tuner chooses under a limit of microbatches held, in words and as a value."""
    best = tune(lambda _: costs, [microbatches], limits=Limits(activations=activations)).best
    return f"{best.name}, receives {best.receives_ahead} ahead", best.schedule


def measure(ranks: Any, setting: Setting, calibration: Calibration, options: Any) -> list[Row]:
    """All hop times."""
    rows: list[Row] = []
    lasting = ranks.run(slept, setting.seconds)[0]
    print(f"sleeps last F {lasting.forward:.4f} s, I {lasting.input_gradient:.4f} s, W {lasting.weight_gradient:.4f} s")
    smallest = setting.devices * setting.devices
    for forwards in options.hops:
        wire_seconds = forwards * setting.seconds.forward
        numel = max(1, round(wire_seconds * calibration.hop_bytes_per_second / 4 / smallest)) * smallest
        spans = ranks.run(hop, setting, numel)
        arrivals = spans[: 2 * setting.devices]
        hop_seconds = statistics.median(
            max(end for _, end in turn) - min(begin for begin, _ in turn) for turn in zip(*arrivals, strict=True)
        )
        costs = costs_of(setting, lasting, numel, hop_seconds)
        name, schedule = tuned(costs, setting.microbatches, options.activations or 2 * setting.stages - 1)
        methods = methods_of(setting, numel, smallest, schedule)
        ranks.run(prepare, setting, methods)
        samples: dict[str, list[list[Sample]]] = {method.name: [] for method in methods}
        for turn in range(options.repeats + 1):
            for method in methods:
                taken = ranks.run(sample, method.name)
                if turn:  # the first connects and touches memory
                    samples[method.name].append(taken)
        predicted = simulate(schedule, costs).makespan_seconds
        without = simulate(schedule, costs.without_transfers()).makespan_seconds
        of_ours = {OURS: predicted, IN_TORCH: predicted, SIGNAL: without}
        for method in methods:
            rows.append(
                row_of(
                    method.name,
                    samples[method.name],
                    setting,
                    (forwards, hop_seconds),
                    of_ours.get(method.name),
                    name if method.schedule else None,
                )
            )
        print("\n".join(table(rows[-len(methods) :]).splitlines()[2:]), flush=True)
    return rows


def methods_of(setting: Setting, numel: int, smallest: int, schedule: Schedule) -> list[Method]:
    """What is compared; torch sends from one rank to one rank, so it has no entry where a stage has several."""
    methods = [
        Method(SIGNAL, "executor", smallest, schedule),
        Method(OURS, "executor", numel, schedule),
        Method(IN_TORCH, "adapter", numel, schedule),
        Method(LEADER, "leader", numel),
    ]
    if setting.devices == 1:
        methods += [Method(name, "torch", numel, torch_schedule=kind) for name, kind in TORCH.items()]
    return methods


def row_of(
    name: str,
    samples: list[list[Sample]],
    setting: Setting,
    hop_times: tuple[float, float],
    predicted: float | None,
    schedule: str | None,
) -> Row:
    """What the ranks' samples say together."""
    times = tuple(max(one.end for one in taken) - min(one.begin for one in taken) for taken in samples)
    last = samples[-1][:: setting.devices]
    busy = tuple(sum(end - begin for _, begin, end in one.spans) for one in last)
    return Row(
        name,
        setting.microbatches,
        setting.devices,
        *hop_times,
        statistics.median(times),
        times,
        tuple(max(taken[rank].peak for taken in samples) for rank in range(0, len(samples[0]), setting.devices)),
        predicted,
        schedule,
        busy,
    )


# ---- what is shown


@dataclass(frozen=True)
class Verdict:
    """One hop time against the targets.

    Attributes:
        bound_seconds: signal + 2 (S - 1) hops.
        ratio: ours over it.
        fastest_peer, peer_ratio: the fastest other method, and its time over ours.
        simulator_error: predicted over measured, less one.
    """

    hop_forwards: float
    bound_seconds: float
    ratio: float
    fastest_peer: str
    peer_ratio: float
    simulator_error: float


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One for each case."""
    found = []
    for key in dict.fromkeys((row.devices, row.microbatches, row.hop_forwards) for row in rows):
        case = {row.method: row for row in rows if (row.devices, row.microbatches, row.hop_forwards) == key}
        ours, signal = case[OURS], case[SIGNAL]
        bound = signal.seconds + 2 * (len(ours.peaks) - 1) * ours.hop_seconds
        peer = min((row for name, row in case.items() if name not in (OURS, SIGNAL, IN_TORCH)), key=lambda r: r.seconds)
        assert ours.predicted_seconds is not None
        found.append(
            Verdict(
                key[2],
                bound,
                ours.seconds / bound,
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
    ours = {(r.devices, r.microbatches, r.hop_forwards): r.seconds for r in rows if r.method == OURS}
    for row in rows:
        over = row.seconds / ours[row.devices, row.microbatches, row.hop_forwards]
        error = "" if row.predicted_seconds is None else f"{row.predicted_seconds / row.seconds - 1:+.1%}"
        name = row.method if row.schedule is None else f"{row.method}: {row.schedule}"
        lines.append(
            f"| {row.hop_forwards:g} | {row.hop_seconds * 1e3:.1f} ms | {name} | {row.seconds:.3f} s | {over:.2f} | "
            f"{' '.join(map(str, row.peaks))} | {error} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row], seconds: Seconds) -> str:
    """Each hop time against the targets."""
    hidden = (seconds.forward + seconds.backward + seconds.weight_gradient) / 2 / seconds.forward
    lines = [
        f"Targets: up to {hidden:g} F ours / (signal + 2 (S - 1) hops) <= {TARGET_RATIO}; fastest peer / ours >= "
        f"{TARGET_PEER}, and above 1 where the hop is; simulator within {TARGET_SIMULATOR:.0%}.",
        "",
        "| hop / F | signal + 2 (S - 1) hops | ours over it | fastest peer | over ours | simulator | a NIC sends |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in verdicts(rows):
        wanted = TARGET_PEER if one.hop_forwards == 0 else 1.0
        lines.append(
            f"| {one.hop_forwards:g} | {one.bound_seconds:.3f} s | {_marked(one.ratio, one.ratio <= TARGET_RATIO)} | "
            f"{one.fastest_peer} | {_marked(one.peer_ratio, one.peer_ratio >= wanted)} | "
            f"{one.simulator_error:+.1%}{'' if abs(one.simulator_error) <= TARGET_SIMULATOR else ' MISSED'} | "
            f"{2 * one.hop_forwards * seconds.forward / (seconds.forward + seconds.backward):.0%} of F + B |"
        )
    return "\n".join(lines)


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
    bound = sorted((one.hop_forwards, one.bound_seconds) for one in verdicts(rows))
    axes.plot(*zip(*bound, strict=True), "k--", linewidth=1, label="signal + fill and drain, 2 (S - 1) hops")
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
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept: list[Row] = []
    if all(before.get(key) == about[key] for key in ("machine", "torch", "seconds", "nic_bits_per_second")):
        ours = {(row.devices, row.microbatches, row.hop_forwards) for row in rows}
        kept = [_row_from(one) for one in before["rows"]]
        kept = [row for row in kept if (row.devices, row.microbatches, row.hop_forwards) not in ours]
    order = {name: number for number, name in enumerate((SIGNAL, OURS, IN_TORCH, LEADER, *TORCH))}
    together = sorted(
        [*kept, *rows], key=lambda row: (row.devices, row.microbatches, row.hop_forwards, order[row.method])
    )
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in together]}, indent=1) + "\n")
    return together


def _row_from(fields: dict[str, Any]) -> Row:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Row(**values)


def run(options: Any) -> tuple[list[Row], Setting, str]:
    """Start the cluster and measure."""
    with Cluster.uniform(options.stages, options.devices, options.nic) as cluster, cluster.ranks() as ranks:
        calibration = calibrate(cluster, ranks, seconds=0.2, repeats=3)
        print(calibration, file=sys.stderr, flush=True)
        topology = Topology(
            cluster.host_names,
            calibration.hop_bytes_per_second,
            intra_bytes_per_second=calibration.intra_bytes_per_second or calibration.hop_bytes_per_second * 10,
            latency_seconds=calibration.latency_seconds,
        )
        milliseconds = [one / 1e3 for one in options.sleep]
        setting = Setting(options.stages, options.devices, options.microbatches, Seconds(*milliseconds), topology)
        return measure(ranks, setting, calibration, options), setting, str(calibration)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hops", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2], help="in forwards (%(default)s)")
    parser.add_argument(
        "--sleep", type=float, nargs=3, default=[30, 30, 30], metavar="MS", help="F, I, W (%(default)s)"
    )
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="of each stage; 2 cut the tensors differently in turn")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--activations", type=int, help="that ours may hold; as many as torch's eager order, 2 S - 1, if left out"
    )
    parser.add_argument("--nic", type=parse_bits_per_second, default=parse_bits_per_second("100mbit"))
    parser.add_argument("--repeats", type=int, default=3, help="steps of each method, after one (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="add all samples to those there of the same set-up")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a picture there (needs the extra 'bench')")
    options = parser.parse_args(arguments)
    print(
        f"compute is a sleep: F, I, W = {options.sleep} ms; {options.stages} stages of {options.devices}, "
        f"{options.microbatches} microbatches"
    )
    try:
        rows, setting, calibration = run(options)
    except ClusterError as error:
        print(f"bench.pipeline: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        about = {
            "machine": platform.platform(),
            "torch": torch.__version__,
            "compute": "a sleep, of these seconds",
            "seconds": asdict(setting.seconds),
            "nic_bits_per_second": options.nic,
            "calibration": calibration,
        }
        rows = save(rows, about, options.json)
    rows = [row for row in rows if (row.devices, row.microbatches) == (options.devices, options.microbatches)]
    print(f"\n{table(rows)}\n\n{summary(rows, setting.seconds)}")
    if options.plot is not None:
        draw(rows, setting.seconds, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
