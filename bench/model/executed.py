"""Whole models, executed: smaller ones on an emulated cluster of eight hosts with a NIC each.

Each way moves all tensors of a model from four trainers to four servers, in turns; the first time of each is checked
element by element. The bound is what no plan can beat at the rate of a hop as measured before.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from bench.cluster.calibrate import Calibration, calibrate
from bench.cluster.cluster import Cluster
from bench.model.by_hand import GatherBroadcastSlice, PointToPoint
from bench.model.cases import EXECUTED, EXECUTED_RANKS, Case, Setting
from tricomm import Plan, Resharder, ShardingSpec, Topology, local_shard, make_plan
from tricomm.packing.copy_program import torch_dtype

OURS = "Resharder"
POINT_TO_POINT = "isend/irecv per tensor"
GATHER = "gather + broadcast + slice"
SLOW = (GATHER,)
"""Sampled once after the first time, as they take many times the bound."""

STAGING_BYTES = 64 << 20

Shards = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Executed:
    """A model moved on an emulated cluster.

    Attributes:
        model, layouts: as in the case.
        tensors: on both sides.
        nbytes: of the trainer's tensors, each counted once.
        wire_nbytes: that the plan sends.
        bound_seconds: at the measured rate of a hop.
        seconds: median of each way, of the slowest rank.
        samples: of each way.
        staging_nbytes: the most that a rank had in packed chunks at once, by the plan.
    """

    model: str
    layouts: str
    tensors: tuple[int, int]
    nbytes: int
    wire_nbytes: int
    bound_seconds: float
    seconds: dict[str, float]
    samples: dict[str, list[float]]
    staging_nbytes: int

    @property
    def case(self) -> str:
        """What identifies it."""
        return self.model


# ---- what runs on the ranks

_KEPT: dict[str, Any] = {}


def prepare(rank: int, number: int, topology: Topology) -> None:
    """Make every way of a case, and check what each brings."""
    torch.set_num_threads(1)
    setting = EXECUTED[number].setting(EXECUTED_RANKS, EXECUTED_RANKS)
    given, expected, out = shards_for(rank, setting)
    mover = Resharder(
        setting.source, setting.destination, rules=setting.rules, topology=topology, staging_bytes=STAGING_BYTES
    )
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: mover(given, out=out),
        POINT_TO_POINT: PointToPoint(rank, setting, given, out),
        GATHER: GatherBroadcastSlice(rank, setting, given, out),
    }
    keep(ways, mover, out, expected, rank)


def shards_for(rank: int, setting: Setting) -> tuple[Shards, Shards, Shards]:
    """What a rank holds, what it is to have, and where that goes."""
    full, made = whole_tensors(setting)
    given, expected = shards_of(full, setting.source, rank), shards_of(made, setting.destination, rank)
    return given, expected, {name: torch.empty_like(tensor) for name, tensor in expected.items()}


def keep(
    ways: Mapping[str, Callable[[], object]],
    mover: Resharder[Any],
    out: Shards,
    expected: Shards,
    rank: int,
) -> None:
    """Check what each way brings, and keep them to be sampled."""
    for name, way in ways.items():
        for tensor in out.values():
            tensor.view(torch.uint8).fill_(0x55)
        way()
        for tensor_name, tensor in out.items():
            if not torch.equal(tensor, expected[tensor_name]):
                raise ValueError(f"{name}: {tensor_name} on rank {rank} has wrong elements")
    _KEPT.clear()
    _KEPT.update(ways=ways, mover=mover)


def whole_tensors(setting: Setting) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All of both sides: drawn, and made of these."""
    generator = torch.Generator().manual_seed(0)
    full = {
        name: torch.randint(-128, 128, spec.global_shape, dtype=torch.int8, generator=generator)
        for name, spec in setting.source.items()
    }
    cast = {name: tensor.to(torch_dtype(setting.source[name].element_type)) for name, tensor in full.items()}
    return cast, setting.rules.evaluate(cast)


def shards_of(whole: Mapping[str, torch.Tensor], specs: Mapping[str, ShardingSpec], rank: int) -> Shards:
    """What a rank has of some tensors."""
    return {name: local_shard(whole[name], spec, rank).clone() for name, spec in specs.items() if rank in spec.mesh}


def sample(rank: int, way: str) -> tuple[float, float]:
    """Move once; when it began here and when it ended."""
    dist.barrier()
    began = time.monotonic()
    _KEPT["ways"][way]()
    return began, time.monotonic()


def staged(rank: int) -> tuple[int, int]:
    """(bytes staged at most, bytes sent by a call) on this rank."""
    stats = _KEPT["mover"].stats
    return stats.staging_nbytes, stats.nbytes // max(stats.calls, 1)


# ---- what runs here


def executed(bits_per_second: float, repeats: int, only: str | None) -> list[Executed]:
    """Every case, or one, on one cluster."""
    with Cluster.uniform(2 * EXECUTED_RANKS, 1, bits_per_second) as cluster, cluster.ranks() as ranks:
        calibration = calibrate(cluster, ranks)
        print(calibration, file=sys.stderr, flush=True)
        topology = topology_of(cluster, calibration)
        return [
            _measured(case, number, ranks, topology, repeats)
            for number, case in enumerate(EXECUTED)
            if only in (None, case.name)
        ]


def topology_of(cluster: Cluster, calibration: Calibration) -> Topology:
    """The cluster as the planner sees it, at the measured rates."""
    return Topology(
        cluster.host_names,
        calibration.hop_bytes_per_second,
        latency_seconds=calibration.latency_seconds,
        overhead_seconds=calibration.overhead_seconds,
    )


def _measured(case: Case, number: int, ranks: Any, topology: Topology, repeats: int) -> Executed:
    setting = case.setting(EXECUTED_RANKS, EXECUTED_RANKS)
    plan = planned_on(setting, topology)
    ranks.run(prepare, number, topology)
    samples: dict[str, list[float]] = {OURS: [], POINT_TO_POINT: [], GATHER: []}
    for repeat in range(repeats):
        for way, times in samples.items():
            if repeat and way in SLOW:
                continue
            spans = ranks.run(sample, way)
            times.append(max(end for _, end in spans) - max(began for began, _ in spans))
    seconds = {way: statistics.median(times) for way, times in samples.items()}
    staging = max(nbytes for nbytes, _ in ranks.run(staged))
    sources = [one.spec for one in plan.ends.sources]
    nbytes = sum(prod(spec.global_shape) * torch_dtype(spec.element_type).itemsize for spec in sources)
    found = Executed(
        case.name,
        setting.layouts,
        (len(setting.source), len(setting.destination)),
        nbytes,
        plan.wire_nbytes,
        plan.lower_bound_seconds(),
        seconds,
        samples,
        staging,
    )
    print(found, file=sys.stderr, flush=True)
    return found


def planned_on(setting: Setting, topology: Topology) -> Plan:
    """The plan of all ranks."""
    return make_plan(
        setting.source, setting.destination, topology=topology, staging_bytes=STAGING_BYTES, rules=setting.rules
    )


def table(rows: list[Executed]) -> str:
    """Markdown."""
    lines = [
        "| model | layouts | tensors | MB | bound | Resharder | per tensor | gather, broadcast | staged at most |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        ratios = {way: f"{seconds / row.bound_seconds:.2f}" for way, seconds in row.seconds.items()}
        lines.append(
            f"| {row.model} | {row.layouts} | {row.tensors[0]:,} -> {row.tensors[1]:,} | {row.nbytes / 1e6:.0f} "
            f"| {row.bound_seconds:.3f} s | **{ratios[OURS]}** | {ratios[POINT_TO_POINT]} | {ratios[GATHER]} "
            f"| {row.staging_nbytes / 1e6:.1f} MB |"
        )
    return "\n".join(lines)
