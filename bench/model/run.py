"""Whole models at full size, planned and simulated; no tensor is made. Or smaller ones, moved on an emulated cluster.

    python -m bench.model [--model NAME] [--largest RANKS] [--repeats N] [--json PATH]
    python -m bench.model --execute [--model NAME] [--nic 200mbit] [--repeats N] [--json PATH]
    python -m bench.model --loopback [--model NAME] [--repeats N] [--json PATH]

For each model and number of ranks: the seconds for which a rank of the server is busy with its part of the plan (rules
applied, planned, its program made; with all caches empty), then, of the plan of all ranks, messages, bytes against the
minimum, how evenly NICs are loaded, and the seconds that it takes in the simulator at 400 Gb/s for each GPU, beside the
time that no plan can beat.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.cluster.cli import parse_bits_per_second
from bench.model.cases import CASES, SIZES, Case, Setting
from bench.model.executed import Executed, executed
from bench.model.executed import table as table_of_executed
from bench.model.loopback import OnLoopback, on_loopback
from bench.model.loopback import table as table_on_loopback
from bench.planner.run import forget
from bench.results_file import earlier, other_rows
from tricomm import Plan, make_plan

RESULTS = Path(__file__).resolve().parent.parent / "results" / "model.json"
RESULTS_EXECUTED = RESULTS.with_name("model_executed.json")
STAGING_BYTES = 1 << 30
"""For packed chunks on a rank, whose part of a model has up to 88 GB."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model moved from so many ranks to others.

    Attributes:
        model, layouts, published: as in the case.
        trainers, servers: ranks of either side.
        tensors: on both sides.
        items: pieces that move as tensors.
        rules_seconds: binding both maps, and making one of them.
        plan_seconds: for which a rank is busy with its part, the least of the repeats.
        messages, hops: of all ranks.
        wire_nbytes, minimum_nbytes: of all ranks.
        receiving_balance: bytes that the busiest of the server's NICs receives over their mean.
        sending_balance: the same of what the trainer's NICs send; its layout says who holds what alone.
        simulated_seconds, bound_seconds: at 400 Gb/s for each GPU.
    """

    model: str
    layouts: str
    published: str
    trainers: int
    servers: int
    tensors: tuple[int, int]
    items: int
    rules_seconds: float
    plan_seconds: float
    messages: int
    hops: int
    wire_nbytes: int
    minimum_nbytes: int
    receiving_balance: float
    sending_balance: float
    simulated_seconds: float
    bound_seconds: float

    @property
    def case(self) -> tuple[str, int, int]:
        """What identifies it."""
        return self.model, self.trainers, self.servers


def planned(setting: Setting, rank: int | None) -> Plan:
    """The plan of a rank, or of all."""
    return make_plan(
        setting.source,
        setting.destination,
        topology=setting.topology,
        staging_bytes=STAGING_BYTES,
        rank=rank,
        rules=setting.rules,
    )


def seconds_of_rank(setting: Setting, rank: int) -> float:
    """For how long a rank is busy with its part, with nothing known from before."""
    forget()
    began = time.process_time()
    planned(setting, rank).for_rank(rank)
    return time.process_time() - began


def measured(case: Case, trainers: int, servers: int, repeats: int) -> Row:
    """One row."""
    began = time.process_time()
    setting = case.setting(trainers, servers)
    rules_seconds = time.process_time() - began
    rank = trainers + servers // 2
    plan_seconds = min(seconds_of_rank(setting, rank) for _ in range(repeats))
    forget()
    plan = planned(setting, None)
    sending, receiving = plan.nic_seconds()
    row = Row(
        case.name,
        setting.layouts,
        case.published,
        trainers,
        servers,
        (len(setting.source), len(setting.destination)),
        len(plan.items),
        rules_seconds,
        plan_seconds,
        sum(len(move.messages) for move in plan.moves),
        sum(len(move.hops) for move in plan.moves),
        plan.wire_nbytes,
        plan.minimum_nbytes,
        balance(receiving[trainers:]),
        balance(sending[:trainers]),
        plan.simulated_seconds(),
        plan.lower_bound_seconds(),
    )
    print(row, file=sys.stderr, flush=True)
    return row


def balance(seconds: np.ndarray) -> float:
    """The busiest NIC's load over the mean."""
    return float(seconds.max() / seconds.mean())


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | ranks | layouts | tensors | pieces | rules | a rank's plan | messages | GB on the wire / minimum "
        "| NICs, max / mean: receive, send | simulated | bound | published |",
        "|" + "---|" * 13,
    ]
    for row in rows:
        tensors = " -> ".join(f"{count:,}" for count in row.tensors)
        lines.append(
            f"| {row.model} | {row.trainers} -> {row.servers} | {row.layouts} | {tensors} | {row.items:,} "
            f"| {row.rules_seconds:.2f} s | {row.plan_seconds:.2f} s | {row.messages:,} "
            f"| {row.wire_nbytes / 1e9:.1f} / {row.minimum_nbytes / 1e9:.1f} "
            f"| {row.receiving_balance:.3f}, {row.sending_balance:.3f} | {row.simulated_seconds:.3f} s "
            f"| {row.bound_seconds:.3f} s | {row.published} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=[case.name for case in CASES], help="this one alone")
    parser.add_argument("--largest", type=int, default=256, help="most ranks of the trainer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of a rank's plan, or of a move (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="(model.json or model_executed.json in results)")
    parser.add_argument("--execute", action="store_true", help="move smaller models on an emulated cluster; needs root")
    parser.add_argument(
        "--nic", type=parse_bits_per_second, default=parse_bits_per_second("200mbit"), help="there (%(default)s)"
    )
    parser.add_argument("--loopback", action="store_true", help="the same between processes here, and by checkpoint")
    options = parser.parse_args(arguments)
    if options.loopback:
        rows = on_loopback(options.repeats, options.model)
        path = options.json or RESULTS.with_name("model_loopback.json")
        _save(path, {"machine": platform.platform()}, OnLoopback, rows, lambda row: 0)
    elif options.execute:
        _execute(options)
    else:
        _plan(options)


def _execute(options: argparse.Namespace) -> None:
    """Move smaller models."""
    rows = executed(options.nic, options.repeats, options.model)
    set_up = {"machine": platform.platform(), "nic_bits_per_second": options.nic}
    _save(options.json or RESULTS_EXECUTED, set_up, Executed, rows, lambda row: 0)


def _plan(options: argparse.Namespace) -> None:
    """Plan full ones."""
    rows = [
        measured(case, *size, options.repeats)
        for case in CASES
        if options.model in (None, case.name)
        for size in SIZES
        if size[0] <= options.largest
    ]
    _save(options.json or RESULTS, {"machine": platform.platform()}, Row, rows, lambda row: row.trainers)


def _save(path: Path, set_up: dict[str, Any], kind: Any, rows: Sequence[Any], order_of: Callable[[Any], int]) -> None:
    """Add rows to those that a file has of other cases, and print them all."""
    content = earlier(path, set_up)
    order = [case.name for case in CASES]
    every = sorted([*other_rows(content, kind, rows), *rows], key=lambda row: (order.index(row.model), order_of(row)))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**set_up, "rows": [asdict(row) for row in every]}, indent=1) + "\n")
    tables: dict[Any, Callable[[Any], str]] = {Row: table, Executed: table_of_executed, OnLoopback: table_on_loopback}
    print(tables[kind](every))
