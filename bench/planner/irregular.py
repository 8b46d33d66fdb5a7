"""Layouts without formulas, which every rank searches for: what that costs, what the planner says that it costs, and a
kept plan read again.
"""

import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.planner.cases import mesh
from tricomm import Auto, Plan, Replicate, Shard, ShardingSpec, make_plan
from tricomm.plan.routes.searched import (
    MOST_DELIVERIES,
    NBYTES_PER_DELIVERY,
    SECONDS_PER_DELIVERY,
    WORTH_SAYING,
    deliveries_of,
)
from tricomm.plan.tasks import unit_tasks

SIZES = (64, 128, 192, 256)


def layouts(ranks: int) -> tuple[ShardingSpec, ShardingSpec]:
    """Rows held twice, but for the first, held thrice, and the last, held once, to columns needed twice; so many ranks
    a side.
    """
    half, shape = ranks // 2, (4096, 4096)
    rows = ShardingSpec(mesh(0, dp=2, x=half), (Replicate(), Shard(0)), shape, "float32")
    held = {rank: rows.holding(rank % (ranks - 1)) for rank in range(ranks)}
    columns = ShardingSpec(mesh(ranks, dp=2, x=half), (Replicate(), Shard(1)), shape)
    return ShardingSpec.explicit(held, shape, "float32"), columns


def table(forget: Callable[[], None], sizes: Sequence[int] = SIZES) -> str:
    """Markdown; ``forget`` empties all caches."""
    lines = [
        f"A search among more than {WORTH_SAYING:,} deliveries says what it costs, among more than "
        f"{MOST_DELIVERIES:,} it is refused.",
        "",
        "| ranks of a side | deliveries | stated | searched | peak | kept, read again |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in sizes:
        source, destination = layouts(ranks)
        deliveries = deliveries_of([unit_tasks(source, destination, None, 0)])

        def planned(folder: str | None, pair: tuple[ShardingSpec, ShardingSpec] = (source, destination)) -> Plan:
            forget()
            return make_plan(*pair, strategy=Auto(cache=folder))

        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds = [_seconds(lambda: planned(folder)) for _ in range(2)]
            is_kept = any(Path(folder).iterdir())
            tracemalloc.start()
            planned(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        stated = f"{deliveries * SECONDS_PER_DELIVERY:.1f} s, {deliveries * NBYTES_PER_DELIVERY / 1e6:,.0f} MB"
        again = f"{seconds[1]:.2f} s" if is_kept else "not kept: it is fast"
        lines.append(f"| {ranks} | {deliveries:,} | {stated} | {seconds[0]:.2f} s | {peak / 1e6:,.0f} MB | {again} |")
    return "\n".join(lines)


def _seconds(function: Callable[[], object]) -> float:
    """For which it keeps a processor busy."""
    began = time.process_time()
    function()
    return time.process_time() - began
