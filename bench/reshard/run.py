"""Reshards on an emulated cluster, against the physical limit and against peers.

    python -m bench.reshard [--suite paper|ours|all] [--nic 200mbit] [--seconds 2] [--grid] [--json PATH]

Each cluster is calibrated first; the bound of a case is its bytes over the measured rate of one hop. All methods of
a case take turns in one run. Needs root and iproute2 (see bench.cluster).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cluster.calibrate import Calibration, calibrate
from bench.cluster.cli import parse_bits_per_second
from bench.cluster.cluster import Cluster
from bench.cluster.network import ClusterError
from bench.reshard.cases import CASES, Case, Shape
from bench.reshard.measure import (
    LEAST_OF_OTHERS,
    LEAST_SAMPLES,
    PARTS,
    Samples,
    first_of_peer,
    prepare,
    sample_in_turns,
)
from bench.reshard.peers import PEERS
from bench.results_file import earlier, other_rows
from tricomm import (
    Auto,
    Broadcast,
    Ensemble,
    GlobalAllGather,
    LeastLoaded,
    LocalAllGather,
    Naive,
    Plan,
    RandomizedGreedy,
    Search,
    SendRecv,
    ShardingSpec,
    Split,
    Topology,
    make_plan,
)
from tricomm.plan import SenderPolicy, Strategy

OURS = "Auto, Split"
PAPER = "paper: Broadcast, Ensemble"
MEASURED: dict[str, tuple[Strategy | Auto, SenderPolicy]] = {
    OURS: (Auto(), Split()),
    PAPER: (Broadcast(), Ensemble()),
}
STRATEGIES: tuple[Strategy, ...] = (SendRecv(), LocalAllGather(), GlobalAllGather(), Broadcast())
BALANCES: tuple[SenderPolicy, ...] = (Naive(), LeastLoaded(), Search(), RandomizedGreedy(), Ensemble(), Split())
GRID: dict[str, tuple[Strategy | Auto, SenderPolicy]] = {
    f"{type(strategy).__name__}, {type(balance).__name__}": (strategy, balance)
    for strategy in STRATEGIES
    for balance in BALANCES
}
ROW_MULTIPLE = 240
PRELOADED = ("bench.cluster.flows", "bench.reshard.measure")


@dataclass(frozen=True)
class Row:
    """One method in one case.

    Attributes:
        case, suite, method: which.
        seconds: median of the samples.
        samples: of the slowest rank.
        bound_seconds: the NIC-bound optimum at the measured rate.
        predicted_seconds: by the simulator; None for peers.
        nic_imbalance: bytes of the busiest NIC over their mean, sending and receiving; None for peers.
        routed: what Auto chose.
    """

    case: str
    suite: str
    method: str
    seconds: float
    samples: tuple[float, ...]
    bound_seconds: float
    predicted_seconds: float | None
    nic_imbalance: tuple[float, float] | None
    routed: str | None


def topology_of(cluster: Cluster, shape: Shape, calibration: Calibration) -> Topology:
    """The cluster as the planner sees it, at the measured rates."""
    nominal = calibration.hop_bytes_per_second / min(shape.rates)
    return Topology(
        cluster.host_names,
        {f"host{host}": nominal * rate for host, rate in enumerate(shape.rates)},
        nics_per_host=shape.nics,
        intra_bytes_per_second=calibration.intra_bytes_per_second or nominal * 10,
        latency_seconds=calibration.latency_seconds,
        overhead_seconds=calibration.overhead_seconds,
    )


def bound_seconds(specs: tuple[ShardingSpec, ShardingSpec], topology: Topology) -> float:
    """The NIC-bound optimum."""
    return make_plan(*specs, topology=topology, strategy=SendRecv()).lower_bound_seconds()


def scaled(case: Case, topology: Topology, seconds: float) -> tuple[ShardingSpec, ShardingSpec]:
    """The case's specs with as many rows as make the bound last so long."""
    bound = bound_seconds(case.make(ROW_MULTIPLE), topology)
    return case.make(max(1, round(seconds / bound)) * ROW_MULTIPLE)


def nic_imbalance(plan: Plan) -> tuple[float, float]:
    """Bytes of the busiest NIC over the mean of those in use: (sending, receiving)."""
    topology = plan.topology
    sides: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for move in plan.moves:
        for hop in move.hops:
            if topology.host(hop.source) != topology.host(hop.destination):
                nbytes = move.messages[hop.message].chunk_nbytes(hop.chunk)
                sides[0][topology.nic(hop.source)] += nbytes
                sides[1][topology.nic(hop.destination)] += nbytes
    send, receive = (max(side.values()) / statistics.mean(side.values()) if side else 1.0 for side in sides)
    return send, receive


def measure_case(case: Case, ranks: Any, topology: Topology, options: Any) -> list[Row]:
    """All methods of a case: peers find out how much they need to move, then all take turns."""
    specs = scaled(case, topology, options.seconds)
    arguments: dict[str, dict[str, Any]] = {
        name: {"strategy": strategy, "balance": balance, "topology": topology}
        for name, (strategy, balance) in {**MEASURED, **(GRID if options.grid else {})}.items()
    }
    plans = {name: make_plan(*specs, **one) for name, one in arguments.items()}
    parts = [scaled(case, topology, options.seconds / part) for part in PARTS]
    ranks.run(prepare, specs, parts[1], arguments)
    samples = {name: Samples(plans[OURS].lower_bound_seconds(), []) for name in plans}
    limits = {name: (LEAST_SAMPLES if name == OURS else LEAST_OF_OTHERS, options.repeats) for name in plans}
    if options.peer_repeats:
        bounded = [(part, bound_seconds(part, topology)) for part in parts]
        samples |= {name: first_of_peer(ranks, name, bounded) for name in PEERS}
        limits |= dict.fromkeys(PEERS, (LEAST_OF_OTHERS, options.peer_repeats))
    sample_in_turns(ranks, samples, limits)
    return [row_of(case, name, found, plans.get(name)) for name, found in samples.items()]


def row_of(case: Case, method: str, samples: Samples, plan: Plan | None) -> Row:
    """The figures of a method; those of its plan where it has one."""
    return Row(
        case.name,
        case.suite,
        method,
        statistics.median(samples.seconds),
        tuple(samples.seconds),
        samples.bound_seconds,
        None if plan is None else plan.simulated_seconds(),
        None if plan is None else nic_imbalance(plan),
        None if plan is None else type(plan.moves[0].strategies[0]).__name__,
    )


def table(rows: Sequence[Row]) -> str:
    """One line per case, in Markdown."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.method] = row
    methods = [OURS, PAPER, *PEERS]
    lines = [
        "| case | bound | Auto, Split | simulator | routed | " + " | ".join(methods[1:]) + " |",
        "|---" * (4 + len(methods)) + "|",
    ]
    for name, found in by_case.items():
        ours = found[OURS]
        predicted = ours.predicted_seconds or 0.0
        cells = [
            f"{found[method].seconds / found[method].bound_seconds:.2f}" if method in found else ""
            for method in methods[1:]
        ]
        lines.append(
            f"| {name} | {ours.bound_seconds:.3f} s | **{ours.seconds / ours.bound_seconds:.3f}** | "
            f"{predicted / ours.seconds - 1:+.1%} | {ours.routed} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars per case and method, as multiples of the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    methods = [method for method in (OURS, PAPER, *PEERS) if any(row.method == method for row in rows)]
    figure, axes = pyplot.subplots(figsize=(max(8.0, 0.7 * len(cases)), 4.5), layout="constrained")
    for number, method in enumerate(methods):
        ratios = [next(r.seconds / r.bound_seconds for r in rows if (r.case, r.method) == (c, method)) for c in cases]
        places = [index + (number - len(methods) / 2 + 0.5) * 0.8 / len(methods) for index in range(len(cases))]
        axes.bar(places, ratios, 0.8 / len(methods), label=method)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.margins(x=0.01)
    axes.set_ylabel("time / NIC-bound optimum")
    axes.set_xticks(range(len(cases)), cases, rotation=40, ha="right", fontsize=8)
    figure.legend(loc="outside upper center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=120)


def save(rows: Sequence[Row], calibrations: dict[str, str], nic: int, path: Path) -> list[Row]:
    """Write the rows, with those of other cases that the file has from the same set-up; all of them."""
    about = {"machine": platform.platform(), "torch": torch.__version__, "nic_bits_per_second": nic}
    before = earlier(path, about)
    order = {case.name: number for number, case in enumerate(CASES)}
    together = sorted([*rows, *other_rows(before, Row, rows)], key=lambda row: order[row.case])
    calibrations = {**before.get("calibrations", {}), **calibrations}
    content = {**about, "calibrations": calibrations, "rows": [asdict(row) for row in together]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return together


def run(options: Any) -> tuple[list[Row], dict[str, str]]:
    """Every case of a suite, cluster by cluster."""
    suites = {"paper": {"one-to-many", "many-to-many"}, "ours": {"ours"}}.get(options.suite)
    cases = [case for case in CASES if (suites is None or case.suite in suites) and options.only in case.name]
    rows: list[Row] = []
    calibrations: dict[str, str] = {}
    for shape in dict.fromkeys(case.cluster for case in cases):
        with Cluster(shape.hosts(options.nic)) as cluster, cluster.ranks(preload=PRELOADED) as ranks:
            calibration = calibrate(cluster, ranks)
            calibrations[repr(shape)] = str(calibration)
            print(f"\n{shape}\n{calibration}", file=sys.stderr, flush=True)
            topology = topology_of(cluster, shape, calibration)
            for case in (case for case in cases if case.cluster == shape):
                begin = time.monotonic()
                of_case = measure_case(case, ranks, topology, options)
                rows += of_case
                line = table(of_case).splitlines()[-1]
                print(f"{line} measured in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return rows, calibrations


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.reshard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=("paper", "ours", "all"), default="all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--nic", type=parse_bits_per_second, default=parse_bits_per_second("200mbit"))
    parser.add_argument("--seconds", type=float, default=2.0, help="that the bound of a case takes (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each method at most (%(default)s)")
    parser.add_argument(
        "--peer-repeats", type=int, default=3, help="samples of each peer at most; 0 leaves peers out (%(default)s)"
    )
    parser.add_argument("--grid", action="store_true", help="every strategy with every sender policy")
    parser.add_argument("--json", type=Path, metavar="PATH", help="add all samples to those there of other cases")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a picture there (needs the extra 'bench')")
    options = parser.parse_args(arguments)
    try:
        rows, calibrations = run(options)
    except ClusterError as error:
        print(f"bench.reshard: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if options.json is not None:
        rows = save(rows, calibrations, options.nic, options.json)
    if options.plot is not None:
        draw(rows, options.plot)
    return 0
