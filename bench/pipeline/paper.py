"""The paper's end-to-end setting by simulation at full size.

    python -m bench.pipeline.paper [--json PATH]

Hops are planned by tricomm's planner and timed by its simulator on hosts with NICs of 10 Gb/s; stages take the time of
their operations at a stated rate of the device. Nothing runs, and nothing is fitted: every assumption is printed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from bench.pipeline.paper_models import ASSUMPTIONS, Model, Tensor, gpt, u_transformer
from tricomm import (
    Auto,
    Broadcast,
    Ensemble,
    LocalAllGather,
    Mesh,
    Naive,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Split,
    Topology,
    make_plan,
)
from tricomm.layout.dtype import ITEMSIZE
from tricomm.pipeline import (
    Channel,
    Costs,
    Limits,
    Queues,
    StageCost,
    Timeline,
    TransferCost,
    eager_one_f_one_b,
    one_f_one_b,
    simulate,
    tune,
    with_communication,
)
from tricomm.plan import SenderPolicy, Strategy

NIC_BYTES_PER_SECOND = 1.25e9
INTRA_BYTES_PER_SECOND = 40e9
LATENCY_SECONDS = OVERHEAD_SECONDS = 30e-6
PEAK_FLOPS = {"float16": 125e12, "float32": 15.7e12}
UTILISATIONS = {"float16": (0.3, 0.4, 0.5), "float32": (0.4, 0.5, 0.6)}
"""Of a V100's peak; the middle one is the nominal case."""

PAPER = {"float16": "+10 %", "float32": "+50 %"}
"""What the paper's abstract claims for GPT and for the U-Transformer."""


@dataclass(frozen=True)
class Setting:
    """A model on a cluster.

    Attributes:
        model: its stages and cuts.
        batch, microbatches: samples of a step, and into how many it is split.
        layout: of boundary tensors in a stage: how many ranks cut the batch, and how many hold copies.
        hosts: per stage, the host of its ranks.
    """

    model: Model
    batch: int
    microbatches: int
    layout: tuple[int, int]
    hosts: tuple[str, ...]

    @property
    def devices(self) -> int:
        """Of one stage."""
        return self.layout[0] * self.layout[1]

    @property
    def name(self) -> str:
        """Short."""
        cut, copies = self.layout
        stages = f"{len(self.hosts)} stages of dp {cut} x {copies} copies"
        return f"{self.model.name}, {stages}, {self.microbatches} microbatches"


GPT_1B = gpt("GPT-3 1.3B", 2048, 24, 2)
GPT_2B = gpt("GPT-3 2.6B", 2560, 32, 2)
GPT_2B_DEEP = gpt("GPT-3 2.6B", 2560, 32, 4)
U_1B = u_transformer("U-Transformer 1B", 480, 7)
U_2B = u_transformer("U-Transformer 2B", 672, 8)

SETTINGS = (
    Setting(GPT_1B, 64, 4, (1, 2), ("a", "b")),
    Setting(GPT_2B, 32, 4, (2, 2), ("a", "b")),
    Setting(GPT_2B, 1024, 64, (2, 2), ("a", "b")),
    Setting(GPT_2B_DEEP, 1024, 128, (2, 1), ("a", "a", "b", "b")),
    Setting(U_1B, 2048, 32, (2, 1), ("a", "b")),
    Setting(U_1B, 2048, 32, (1, 2), ("a", "b")),
    Setting(U_2B, 2048, 32, (4, 1), ("a", "b")),
    Setting(U_2B, 2048, 32, (1, 4), ("a", "b")),
)


@dataclass(frozen=True)
class Row:
    """One setting at one rate.

    Attributes:
        setting, utilisation: which.
        stage_seconds: F + B of each stage, for one microbatch.
        hop_seconds: of the slowest hop, one microbatch in one direction, by each plan.
        samples_per_second: by each system.
        tuned: what the tuner chose.
        paper: the claim beside which this stands.
    """

    setting: str
    utilisation: float
    stage_seconds: tuple[float, ...]
    hop_seconds: dict[str, float]
    samples_per_second: dict[str, float]
    tuned: str
    paper: str

    def gain(self, system: str, over: str) -> float:
        """Throughput gained, as a part."""
        return self.samples_per_second[system] / self.samples_per_second[over] - 1


def stage_spec(setting: Setting, stage: int, tensor: Tensor) -> ShardingSpec:
    """A boundary tensor of one microbatch on the ranks of a stage."""
    cut, copies = setting.layout
    first = stage * setting.devices
    mesh = Mesh([[first + row * copies + column for column in range(copies)] for row in range(cut)], ("dp", "copies"))
    shape = (setting.batch // setting.microbatches, tensor.rows, tensor.columns)
    return ShardingSpec(mesh, (Shard(0), Replicate()), shape, setting.model.dtype)


@lru_cache
def hops(setting: Setting, strategy: Strategy | Auto, balance: SenderPolicy) -> dict[Channel, TransferCost]:
    """Each direction of each cut: its tensors in turn, as planned and simulated on the whole cluster."""
    ranks = [host for host in setting.hosts for _ in range(setting.devices)]
    topology = Topology(
        tuple(ranks),
        NIC_BYTES_PER_SECOND,
        intra_bytes_per_second=INTRA_BYTES_PER_SECOND,
        latency_seconds=LATENCY_SECONDS,
        overhead_seconds=OVERHEAD_SECONDS,
    )

    def one_way(source: int, destination: int, tensor: Tensor) -> TransferCost:
        specs = stage_spec(setting, source, tensor), stage_spec(setting, destination, tensor)
        return TransferCost.of_plan(make_plan(*specs, topology=topology, strategy=strategy, balance=balance))

    found = {}
    for stage, tensors in enumerate(setting.model.cuts):
        for source, destination in ((stage, stage + 1), (stage + 1, stage)):
            cost = TransferCost.in_turn([one_way(source, destination, tensor) for tensor in tensors])
            found[Channel(source, destination)] = cost
    return found


def stage_costs(setting: Setting, utilisation: float) -> tuple[StageCost, ...]:
    """Seconds of a microbatch: recomputation makes the gradient of inputs twice a forward."""
    model, samples = setting.model, setting.batch // setting.microbatches
    rate = PEAK_FLOPS[model.dtype] * utilisation * setting.devices
    costs = []
    for stage, (flops, plain) in enumerate(zip(model.forward_flops, model.plain_flops, strict=True)):
        forward, kept = samples * flops / rate, samples * plain / rate
        boundary = sum(tensor.rows * tensor.columns for tensor in model.cuts[max(0, stage - 1)])
        nbytes = boundary * samples * ITEMSIZE[model.dtype] // setting.layout[0]
        costs.append(StageCost(forward + kept, 2 * forward + kept, forward + kept, nbytes))
    return tuple(costs)


Systems = Iterator[tuple[str, Timeline]]


def systems(setting: Setting, stages: tuple[StageCost, ...]) -> Systems:
    """Every system but tricomm's: the baselines, the paper's method without weight delay, and hops of no time."""
    count, microbatches = len(stages), setting.microbatches
    waiting = with_communication(one_f_one_b(count, microbatches), receives_ahead=0)
    plain = with_communication(one_f_one_b(count, microbatches))
    eager = with_communication(eager_one_f_one_b(count, microbatches), receives_ahead=2)
    plans: list[tuple[str, Strategy, SenderPolicy]] = [
        ("Send/Recv", SendRecv(), Naive()),
        ("Alpa", LocalAllGather(), Naive()),
        ("Broadcast", Broadcast(), Ensemble()),
    ]
    for name, strategy, balance in plans:
        yield name, simulate(waiting, Costs(stages, hops(setting, strategy, balance)), queues=Queues.BLOCKING)
    broadcast = Costs(stages, hops(setting, Broadcast(), Ensemble()))
    yield "Broadcast, overlapped 1F1B", simulate(plain, broadcast)
    yield "Broadcast, eager 1F1B", simulate(eager, broadcast)
    yield "Signal (1F1B, hops of 0 s)", simulate(plain, Costs(stages))


def measured(setting: Setting, utilisation: float) -> Row:
    """Simulate all systems."""
    stages = stage_costs(setting, utilisation)
    rates = {name: setting.batch / timeline.makespan_seconds for name, timeline in systems(setting, stages)}
    costs = Costs(stages, hops(setting, Auto(), Split()))
    limits = Limits(activations=2 * len(stages) - 1)  # what the paper's eager 1F1B holds
    tuned = tune(lambda _: costs, [setting.microbatches], limits=limits)
    rates["tricomm"] = setting.batch / tuned.best.makespan_seconds
    whole = tune(lambda _: costs, [setting.microbatches], limits=limits, allow_split=False)
    rates["tricomm, whole backward"] = setting.batch / whole.best.makespan_seconds
    slowest = {
        name: max(cost.seconds for cost in hops(setting, strategy, balance).values())
        for name, strategy, balance in (
            ("Send/Recv", SendRecv(), Naive()),
            ("Alpa", LocalAllGather(), Naive()),
            ("Broadcast", Broadcast(), Ensemble()),
            ("tricomm", Auto(), Split()),
        )
    }
    totals = tuple(stage.total_seconds for stage in stages)
    return Row(setting.name, utilisation, totals, slowest, rates, str(tuned), PAPER[setting.model.dtype])


def show(row: Row) -> None:
    """One setting, in full."""
    print(f"\n{row.setting}, devices at {row.utilisation:.0%} of their peak")
    computes = ", ".join(f"{seconds:.3f}" for seconds in row.stage_seconds)
    hop = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row.hop_seconds.items())
    print(f"  a microbatch: stages compute {computes} s; the slowest hop one way: {hop} s")
    for name, rate in row.samples_per_second.items():
        print(f"  {name:<28} {rate:10.2f} samples/s  {row.gain(name, 'Send/Recv'):+7.1%} over Send/Recv")
    print("  " + row.tuned.replace("\n", "\n  "))


def table(rows: Sequence[Row]) -> str:
    """Markdown: gains beside the paper's."""
    lines = [
        "| setting | peak | paper's method over Send/Recv | over Alpa | over Broadcast | tricomm over Send/Recv | "
        "over Alpa | over Broadcast | the paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    bases = ("Send/Recv", "Alpa", "Broadcast")
    for row in rows:
        ours = " | ".join(f"{row.gain('tricomm', base):+.0%}" for base in bases)
        paper = " | ".join(f"{row.gain('Broadcast, eager 1F1B', base):+.0%}" for base in bases)
        lines.append(f"| {row.setting} | {row.utilisation:.0%} | {paper} | {ours} | {row.paper} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline.paper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--nominal", action="store_true", help="the middle rate of the devices only")
    options = parser.parse_args(arguments)
    print("Simulated, at full size. Assumptions:")
    for text in ASSUMPTIONS:
        print(f"- {text}")
    peaks = ", ".join(f"{name} {peak / 1e12:g}" for name, peak in PEAK_FLOPS.items())
    print(f"- a V100 has these TFLOP/s at its peak: {peaks}; at what part of it it works is stated with each figure")
    for model in dict.fromkeys(setting.model for setting in SETTINGS):
        flops = ", ".join(f"{flops / 1e9:.0f}" for flops in model.forward_flops)
        crossing = sum(tensor.rows * tensor.columns for tensor in model.cuts[0]) * ITEMSIZE[model.dtype]
        print(
            f"- {model.name}: {model.parameters / 1e6:.0f} M parameters; forward {flops} GFLOP a sample and stage; ",
            end="",
        )
        print(f"{crossing / 1e6:.2f} MB a sample cross a cut, in {len(model.cuts[0])} tensors")
    rows = []
    for setting in SETTINGS:
        utilisations = UTILISATIONS[setting.model.dtype]
        for utilisation in utilisations[1:2] if options.nominal else utilisations:
            rows.append(measured(setting, utilisation))
            show(rows[-1])
    print("\nGain in throughput:\n")
    print(table(rows))
    if options.json is not None:
        content = {"assumptions": ASSUMPTIONS, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
