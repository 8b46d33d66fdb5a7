"""What planning costs: ``python -m bench.planner [--json PATH]``.

Time and peak memory of one rank's program against ranks (rows to columns, so that every rank meets every other), and of
the global plan of the same; and of planning many tensors. Every figure is of a plan that was not made before.
"""

import argparse
import gc
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
from tricomm.plan.plan import _make_plan
from tricomm.sharding import layout

TARGET_SECONDS = {4096: 0.050, 16384: 0.250}


@dataclass(frozen=True)
class Row:
    """One size.

    Attributes:
        what: is planned.
        size: ranks of each side, or tensors.
        seconds: median of the repeats.
        peak_nbytes: of what Python allocated, in a run of its own.
    """

    what: str
    size: int
    seconds: float
    peak_nbytes: int


def measured(what: str, size: int, plan: Callable[[], object], repeats: int) -> Row:
    """Time a planner without what earlier calls have left in caches."""

    def once() -> float:
        _make_plan.cache_clear()
        layout.cache_clear()
        gc.collect()
        begin = time.perf_counter()
        plan()
        return time.perf_counter() - begin

    once()
    seconds = statistics.median(once() for _ in range(repeats))
    tracemalloc.start()
    once()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Row(what, size, seconds, peak)


def rows_to_columns(ranks: int) -> tuple[ShardingSpec, ShardingSpec]:
    """A tensor of (2 ranks, 2 ranks) elements from one mesh of so many ranks to another."""
    shape = (2 * ranks, 2 * ranks)
    source = ShardingSpec(Mesh(range(ranks), ("x",)), (Shard(0),), shape, "float32")
    return source, ShardingSpec(Mesh(range(ranks, 2 * ranks), ("x",)), (Shard(1),), shape, "float32")


def replicated(ranks: int) -> tuple[ShardingSpec, ShardingSpec]:
    """Copies on two hosts' worth of ranks to rows of as many, each row needed twice."""
    half = ranks // 2
    source = Mesh([list(range(half)), list(range(half, ranks))], ("dp", "tp"))
    destination = Mesh([list(range(ranks, ranks + half)), list(range(ranks + half, 2 * ranks))], ("dp", "tp"))
    shape = (2 * ranks, 64)
    return (
        ShardingSpec(source, (Replicate(), Shard(0)), shape, "float32"),
        ShardingSpec(destination, (Replicate(), Shard(1)), shape, "float32"),
    )


def one_rank(ranks: int) -> object:
    """The program of rank 0."""
    source, destination = rows_to_columns(ranks)
    return make_plan(source, destination, rank=0).for_rank(0)


def tensors(count: int) -> object:
    """One rank's programs of many tensors, whose shapes differ."""
    source, destination = Mesh([list(range(8)), list(range(8, 16))], ("dp", "tp")), Mesh(range(16, 24), ("tp",))
    programs = []
    for index in range(count):
        shape = (1024 + 8 * index, 1024)
        plan = make_plan(
            ShardingSpec(source, (Shard(1), Shard(0)), shape, "float32"),
            ShardingSpec(destination, (Shard(0),), shape, "float32"),
            rank=0,
        )
        programs.append(plan.for_rank(0))
    return programs


def run(largest: int, repeats: int) -> list[Row]:
    """All rows."""
    sizes = [size for size in (64, 256, 1024, 4096, 16384) if size <= largest]
    rows = [measured("one rank of all-to-all", size, partial(one_rank, size), repeats) for size in sizes]
    for size in (16, 64, 128):
        rows.append(measured("all ranks of all-to-all", size, partial(make_plan, *rows_to_columns(size)), 1))
    for size in (16, 32, 64):
        rows.append(measured("all ranks, replicated", size, partial(make_plan, *replicated(size)), 1))
    for count in (10, 100, 723):
        rows.append(measured("tensors, 16 to 8 ranks", count, partial(tensors, count), 1))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| what | size | seconds | growth | peak memory | target |", "|---|---|---|---|---|---|"]
    before: Row | None = None
    for row in rows:
        growth = ""
        if before is not None and before.what == row.what:
            growth = f"{row.seconds / before.seconds:.1f} x for {row.size / before.size:.0f} x"
        target = TARGET_SECONDS.get(row.size) if row.what.startswith("one rank") else None
        lines.append(
            f"| {row.what} | {row.size} | {row.seconds * 1e3:.1f} ms | {growth} | {row.peak_nbytes / 1e6:.1f} MB | "
            f"{'' if target is None else f'{target * 1e3:.0f} ms'} |"
        )
        before = row
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--largest", type=int, default=16384, help="most ranks of a side (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    rows = run(options.largest, options.repeats)
    print(table(rows))
    if options.json is not None:
        content = {"machine": platform.platform(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
