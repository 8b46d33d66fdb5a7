"""Pipelines on an emulated cluster whose hops take time: our schedules against torch's and Megatron's.

    python -m bench.pipeline [--hops 0 0.5 1 1.5 2] [--microbatches 8] [--devices 1] [--links] [--json PATH]

Each stage is a host with a NIC of its own. Compute is a SLEEP of a stated length, in the forward, in the gradient of
the inputs and in that of the weights, so that two cores can play many devices; transfers are real. Messages are sized
so that one hop takes the given multiple of the forward, at the measured rate. All methods of a case take turns.

A host has one NIC, which sends activations to the one side and gradients to the other: where 2 hops of one microbatch
take longer than its F + B, the NIC and not the schedule sets the pace, and more microbatches only make it plainer. With
``--links`` a host has a link of that rate for each neighbour (a NIC for each, or a torus), and no two hops meet.

"signal" is our schedule with messages of one number: nothing with real messages can be faster in that order, and
filling and draining the pipeline costs 2 (S - 1) hops more. Needs root and iproute2 (see bench.cluster).
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.cluster.calibrate import Calibration, calibrate
from bench.cluster.cli import parse_bits_per_second
from bench.cluster.cluster import Cluster
from bench.cluster.network import ClusterError
from bench.pipeline.ranks import Method, Sample, Setting, hop, prepare, sample, slept
from bench.pipeline.report import IN_TORCH, LEADER, OURS, SIGNAL, TORCH, Row, draw, save, summary, table
from bench.pipeline.work import Seconds
from tricomm import Topology, make_plan
from tricomm.pipeline import Channel, Costs, Limits, Queues, Schedule, StageCost, TransferCost, simulate, tune


def costs_of(setting: Setting, lasting: Seconds, numel: int, hop_seconds: float) -> Costs:
    """What the tuner is told: sleeps as they last alone, hops as they are planned, and as long as one takes alone.

    A host sends activations to the one side and gradients to the other through one NIC, unless it has links.
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
            loads = () if setting.has_links else planned.loads
            transfers[Channel(sender, receiver)] = replace(planned, latency_seconds=latency, loads=loads)
    return Costs((first, *[middle] * (setting.stages - 1)), transfers)


def wire_bound_seconds(costs: Costs, microbatches: int) -> float:
    """No schedule is shorter: for the most loaded end of a NIC or link, the time before its first byte can come, that
    of all its bytes, and what follows after its last byte, at best a gradient on its way back to the first stage.
    """
    last = len(costs.stages) - 1
    forth = [costs.transfer(Channel(stage, stage + 1)) for stage in range(last)]
    back = [costs.transfer(Channel(stage + 1, stage)) for stage in range(last)]
    tails = [costs.stages[0].backward_seconds]  # from when a stage has a gradient
    for stage in range(1, last + 1):
        tails.append(costs.stages[stage].input_gradient_seconds + back[stage - 1].busy_seconds + tails[-1])
    bound = arrival = 0.0
    for stage in range(last + 1):
        if stage:
            arrival += costs.stages[stage - 1].forward_seconds + forth[stage - 1].busy_seconds
        sends = forth[stage : stage + 1] + back[max(0, stage - 1) : stage]
        receives = forth[max(0, stage - 1) : stage] + back[stage : stage + 1]
        ends = [
            (arrival + costs.stages[stage].forward_seconds, sends, tails[stage - 1] if stage else 0.0),
            (arrival - forth[stage - 1].busy_seconds if stage else 0.0, receives, tails[stage]),
        ]
        for begin, transfers, after in ends:
            busy = [one.busy_seconds for one in transfers]
            load = sum(busy) if all(one.loads for one in transfers) else max(busy)
            bound = max(bound, begin + microbatches * load + after)
    return bound


def measure(ranks: Any, setting: Setting, calibration: Calibration, options: Any) -> list[Row]:
    """All hop times."""
    rows: list[Row] = []
    lasting = ranks.run(slept, setting.seconds)[0]
    print(f"sleeps last F {lasting.forward:.4f} s, I {lasting.input_gradient:.4f} s, W {lasting.weight_gradient:.4f} s")
    for forwards in options.hops:
        found = measure_hop(ranks, setting, calibration, options, lasting, forwards)
        print("\n".join(table(found).splitlines()[2:]), flush=True)
        rows += found
    return rows


def measure_hop(
    ranks: Any, setting: Setting, calibration: Calibration, options: Any, lasting: Seconds, forwards: float
) -> list[Row]:
    """All methods, with hops that take so many forwards; schedules are tuned for what the hop really takes."""
    smallest = setting.devices * setting.devices
    wire_seconds = forwards * setting.seconds.forward
    numel = max(1, round(wire_seconds * calibration.hop_bytes_per_second / 4 / smallest)) * smallest
    arrivals = ranks.run(hop, setting, numel)[: 2 * setting.devices]
    hop_seconds = statistics.median(
        max(end for _, end in once) - min(begin for begin, _ in once) for once in zip(*arrivals, strict=True)
    )
    costs = costs_of(setting, lasting, numel, hop_seconds)
    limits = Limits(activations=options.activations)
    best = tune(lambda _: costs, [setting.microbatches], limits=limits).best
    methods = methods_of(setting, numel, smallest, best.schedule, best.queues)
    ranks.run(prepare, setting, methods)
    samples = samples_in_turn(ranks, methods, options.repeats)
    without = simulate(best.schedule, costs.without_transfers(), queues=best.queues).makespan_seconds
    of_ours = {OURS: best.makespan_seconds, IN_TORCH: best.makespan_seconds, SIGNAL: without}
    return [
        row_of(
            method.name,
            samples[method.name],
            setting,
            (forwards, hop_seconds),
            of_ours.get(method.name),
            wire_bound_seconds(costs, setting.microbatches),
            str(best) if method.schedule else None,
        )
        for method in methods
    ]


def samples_in_turn(ranks: Any, methods: Sequence[Method], repeats: int) -> dict[str, list[list[Sample]]]:
    """What the ranks saw of each method, without its first step, which connects and touches memory."""
    samples: dict[str, list[list[Sample]]] = {method.name: [] for method in methods}
    for repeat in range(repeats + 1):
        for method in methods:
            taken = ranks.run(sample, method.name)
            if repeat:
                samples[method.name].append(taken)
    return samples


def methods_of(
    setting: Setting, numel: int, smallest: int, schedule: Schedule, queues: Queues = Queues.PER_CHANNEL
) -> list[Method]:
    """What is compared; torch sends from one rank to one rank, so it has no entry where a stage has several."""
    methods = [
        Method(SIGNAL, "executor", smallest, schedule, queues),
        Method(OURS, "executor", numel, schedule, queues),
        Method(IN_TORCH, "adapter", numel, schedule, queues),
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
    wire_bound: float,
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
        setting.has_links,
        *hop_times,
        statistics.median(times),
        times,
        tuple(max(taken[rank].peak for taken in samples) for rank in range(0, len(samples[0]), setting.devices)),
        predicted,
        wire_bound,
        schedule,
        busy,
    )


def run(options: Any) -> tuple[list[Row], Setting, str]:
    """Start the cluster and measure."""
    hosts = Cluster.uniform(options.stages, options.devices, options.nic, has_links=options.links)
    with hosts as cluster, cluster.ranks() as ranks:
        calibration = calibrate(cluster, ranks, seconds=0.2, repeats=3)
        print(calibration, file=sys.stderr, flush=True)
        topology = Topology(
            cluster.host_names,
            calibration.hop_bytes_per_second,
            intra_bytes_per_second=calibration.intra_bytes_per_second or calibration.hop_bytes_per_second * 10,
            latency_seconds=calibration.latency_seconds,
            overhead_seconds=calibration.overhead_seconds,
        )
        milliseconds = [one / 1e3 for one in options.sleep]
        setting = Setting(
            options.stages, options.devices, options.microbatches, Seconds(*milliseconds), topology, options.links
        )
        return measure(ranks, setting, calibration, options), setting, str(calibration)


def set_up_of(setting: Setting, calibration: str, options: Any) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "compute": "a sleep, of these seconds",
        "seconds": asdict(setting.seconds),
        "nic_bits_per_second": options.nic,
        "calibration": calibration,
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hops", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2], help="in forwards (%(default)s)")
    parser.add_argument(
        "--sleep", type=float, nargs=3, default=[30, 30, 30], metavar="MS", help="F, I, W (%(default)s)"
    )
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="of each stage; 2 cut the tensors differently in turn")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--activations", type=int, help="that ours may hold at most, such as 2 S - 1, which torch's eager order holds"
    )
    parser.add_argument("--links", action="store_true", help="a link for each neighbour of a host, not one NIC")
    parser.add_argument("--nic", type=parse_bits_per_second, default=parse_bits_per_second("100mbit"))
    parser.add_argument("--repeats", type=int, default=3, help="steps of each method, after one (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="add all samples to those there of the same set-up")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a picture there (needs the extra 'bench')")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = make_parser().parse_args(arguments)
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
        rows = save(rows, set_up_of(setting, calibration, options), options.json)
    shown = (options.devices, options.microbatches, options.links)
    rows = [row for row in rows if row.case[:3] == shown]
    print(f"\n{table(rows)}\n\n{summary(rows, setting.seconds)}")
    if options.plot is not None:
        draw(rows, setting.seconds, options.plot)
    return 0
