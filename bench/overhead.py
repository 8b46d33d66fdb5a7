"""What a reshard costs beyond the bytes: ``python -m bench.overhead [--json PATH] [--repeats N]``.

Four gloo processes on this machine move row blocks on ranks 0 and 1 into column blocks on ranks 2 and 3. All
methods take turns in one run, so that whatever else the machine does hits them alike; what counts is the ratio
between them. No time is asserted. What memory is worth, way by way, follows: see ``bench.one_host``.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from bench import one_host
from bench.reshard.baselines import (
    BY_MEMORY,
    BYTES_ONLY,
    CHECKPOINT,
    COMPLETE,
    RANKS,
    RESHARDER,
    Setting,
    make_methods,
)
from bench.turns import p10, slowest, take_turns
from tricomm.launch import Ranks

SMALL_REPEATS = 400
LARGE_REPEATS = 20
CHECKPOINT_REPEATS = 3
MEMORY_DIRECTORY = "/dev/shm"
PAUSE_SECONDS = 0.003


@dataclass(frozen=True)
class Case:
    """A size to measure.

    Attributes:
        name: as it is printed.
        side: the tensor is float32 of shape (side, side).
        repeats: how many samples of each method.
        target_ratio: how many times the hand-written time the warm Resharder may take.
        memory_ratio: the same of one that reads the sender's memory.
        with_checkpoint: whether DCP takes part.
        starts_cold: whether all ranks begin at an instant some ms after the barrier, and not with it. The barrier runs
            the code, the connections and the threads that isend and irecv run next, so that they are in the caches.
    """

    name: str
    side: int
    repeats: int
    target_ratio: float
    memory_ratio: float
    with_checkpoint: bool
    starts_cold: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return self.side * self.side * torch.float32.itemsize


@dataclass(frozen=True)
class Row:
    """The samples of one method in one case; a sample is the time of the slowest rank."""

    name: str
    samples_seconds: list[float]

    @property
    def median_seconds(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples_seconds)

    @property
    def p10_seconds(self) -> float:
        """The 10 % quantile of the samples, interpolated."""
        return p10(self.samples_seconds)


def measure_rank(rank: int, case: Case, directory: str) -> dict[str, list[float]]:
    """Check and then time every method on this rank; runs on all ranks at once.

    Args:
        rank: this rank.
        case: what to measure.
        directory: an empty directory in memory, for DCP.

    Returns:
        For each method the seconds of each of its calls on this rank.

    Raises:
        ValueError: a method gave a wrong result.
    """
    setting = Setting(rank, case.side)
    methods = make_methods(setting, Path(directory) if case.with_checkpoint else None)
    for name, method in methods.items():
        setting.require_correct(method, name)
    begin = await_instant if case.starts_cold else None
    return take_turns(methods, case.repeats, {CHECKPOINT: CHECKPOINT_REPEATS}, begin)


def await_instant() -> None:
    """Return on all ranks at once, some ms after they have agreed on it: the ranks of a machine have one clock."""
    instant = torch.tensor([time.monotonic() + PAUSE_SECONDS], dtype=torch.float64)
    dist.broadcast(instant, 0)
    while (left := float(instant) - time.monotonic()) > 0:
        time.sleep(left)


def measure_case(ranks: Ranks, case: Case) -> list[Row]:
    """Measure one case on running processes; one row a method."""
    with TemporaryDirectory(prefix="tricomm-bench-", dir=MEMORY_DIRECTORY) as directory:
        of_ranks = ranks.run(measure_rank, case, directory)
    return [Row(name, samples) for name, samples in slowest(of_ranks).items()]


def format_case(case: Case, rows: Sequence[Row]) -> str:
    """The table of a case, and its target, as text."""
    median_seconds = {row.name: row.median_seconds for row in rows}
    lines = [
        f"{case.name}, float32 ({case.side}, {case.side}): Shard(0) on ranks 0,1 -> Shard(1) on ranks 2,3",
        f"  {'method':<37}{'median ms':>10}{'p10 ms':>10}{'GB/s':>8}{'/ bytes only':>14}{'/ complete':>12}{'calls':>7}",
    ]
    for row in rows:
        median = row.median_seconds
        lines.append(
            f"  {row.name:<37}{median * 1e3:>10.3f}{row.p10_seconds * 1e3:>10.3f}{case.nbytes / median / 1e9:>8.3f}"
            f"{median / median_seconds[BYTES_ONLY]:>14.2f}{median / median_seconds[COMPLETE]:>12.2f}"
            f"{len(row.samples_seconds):>7}"
        )
    p10_seconds = {row.name: row.p10_seconds for row in rows}
    # With fewer cores than ranks a sample may include a scheduler's time slice of several ms, more than a small
    # call itself takes; the 10 % quantile is free of that.
    for method, ratio in ((RESHARDER, case.target_ratio), (BY_MEMORY, case.memory_ratio)):
        lines.append(
            f"  target: warm {method} at most {ratio:.2f} x '{COMPLETE}'; this run "
            f"{median_seconds[method] / median_seconds[COMPLETE]:.2f} x by the medians, "
            f"{p10_seconds[method] / p10_seconds[COMPLETE]:.2f} x by the 10 % quantiles"
        )
    return "\n".join(lines)


def describe_hardware() -> dict[str, Any]:
    """The machine and the software that the figures belong to."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }


def as_json(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """A case and its samples as values that JSON has."""
    return {
        "case": case.name,
        "nbytes": case.nbytes,
        "target_ratio": case.target_ratio,
        "memory_ratio": case.memory_ratio,
        "methods": [
            {
                "name": row.name,
                "median_seconds": row.median_seconds,
                "p10_seconds": row.p10_seconds,
                "samples_seconds": row.samples_seconds,
            }
            for row in rows
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases, print a table for each, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description="The cost of a reshard in one run.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every sample to this file")
    parser.add_argument("--repeats", type=int, default=LARGE_REPEATS, help="samples of the 64 MiB case (%(default)s)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    cases = [
        Case("64 MiB", 4096, options.repeats, target_ratio=1.05, memory_ratio=0.45, with_checkpoint=True),
        Case("4 KiB", 32, SMALL_REPEATS, target_ratio=1.2, memory_ratio=0.7, with_checkpoint=False),
        Case("4 KiB, cold", 32, SMALL_REPEATS, 1.2, 0.7, with_checkpoint=False, starts_cold=True),
    ]
    hardware = describe_hardware()
    results = []
    with Ranks(RANKS) as ranks:
        for case in cases:
            rows = measure_case(ranks, case)
            print(format_case(case, rows), end="\n\n", flush=True)
            results.append(as_json(case, rows))
        by_memory = one_host.measure(ranks, options.repeats)
        print(one_host.format_all(by_memory), end="\n\n", flush=True)
    print(
        f"hardware: {hardware['cpu']}, {hardware['cores']} cores for {RANKS} processes; torch {hardware['torch']}, "
        f"Python {hardware['python']}; load average before {hardware['load_average_before']:.2f}"
    )
    if options.json is not None:
        found = {"hardware": hardware, "cases": results, "one host": by_memory}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
