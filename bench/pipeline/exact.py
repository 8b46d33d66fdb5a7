"""How far tuned schedules are from the shortest that exist.

    python -m bench.pipeline.exact [--json PATH]

The optimum is proven by OR-tools CP-SAT (``pip install "tricomm[solver]"``) over all orders of each stage's actions
under a limit on the activations that a stage holds. The first table is the grid of the project's facts (F = I = W = 1);
the second draws stages, hops (latency and occupancy) and limits at random.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.pipeline.solver import solve
from tricomm.pipeline import Channel, Costs, Limits, StageCost, TransferCost, one_f_one_b, simulate, tune

GRID = [(4, 8), (4, 16), (8, 16)]
HOPS = (0.0, 0.5, 1.0, 2.0)
TRIALS = 1000


@dataclass(frozen=True)
class Row:
    """One problem.

    Attributes:
        stages, microbatches, activations: S, M and the limit.
        hop: what the hops are.
        split: whether the backward may be split.
        plain_seconds: of 1F1B with whole backwards, which holds no more than S.
        tuned_seconds, name: of the tuner's choice.
        exact_seconds, bound_seconds: of the solver, with all receives posted at the start; equal if proven.
        tuner_wall_seconds, solver_wall_seconds: how long each searched.
    """

    stages: int
    microbatches: int
    activations: int
    hop: str
    split: bool
    plain_seconds: float
    tuned_seconds: float
    name: str
    exact_seconds: float
    bound_seconds: float
    tuner_wall_seconds: float
    solver_wall_seconds: float

    @property
    def gap(self) -> float:
        """By which part the tuned schedule is longer than what no schedule undercuts."""
        return self.tuned_seconds / self.bound_seconds - 1


def measured(costs: Costs, microbatches: int, activations: int, hop: str, split: bool, limit: float) -> Row:
    """Tune and solve one problem."""
    begin = time.perf_counter()
    tuned = tune(
        lambda _: costs, [microbatches], limits=Limits(activations=activations), allow_split=split, trials=TRIALS
    )
    wall = time.perf_counter() - begin
    best = tuned.best
    exact = solve(costs, microbatches, memory=activations, split=split, limit_seconds=limit)
    plain = simulate(one_f_one_b(len(costs.stages), microbatches), costs).makespan_seconds
    return Row(
        len(costs.stages),
        microbatches,
        activations,
        hop,
        split,
        plain,
        best.makespan_seconds,
        str(best),
        exact.makespan_seconds,
        exact.bound_seconds,
        wall,
        exact.solver_seconds,
    )


def grid(limit: float) -> Iterator[Row]:
    """The facts' grid: room for S activations, and for 2 S - 1."""
    for stages, microbatches in GRID:
        for activations in (stages, 2 * stages - 1):
            for hop in HOPS:
                costs = Costs.uniform(stages, 1, 1, 1, hop)
                yield measured(costs, microbatches, activations, f"{hop:g}", True, limit)


def drawn(count: int, seed: int, limit: float) -> Iterator[Row]:
    """Random problems; with one seed always the same."""
    rng = random.Random(seed)
    for _ in range(count):
        stages = rng.choice([2, 3, 4, 6])
        microbatches = rng.choice([stages, 2 * stages, 3 * stages, 12])
        base = [rng.choice([1, 2, 3]) for _ in range(3)]
        uneven = rng.random() < 0.5
        each = tuple(
            StageCost(*(one + (rng.choice([0, 0, 1]) if uneven else 0) for one in base)) for _ in range(stages)
        )
        same = TransferCost(rng.choice([0, 0.5, 1, 2, 3, 5]))
        channels = [Channel(*pair) for s in range(stages - 1) for pair in ((s, s + 1), (s + 1, s))]
        hops = {
            channel: TransferCost(rng.choice([0, 0.5, 1, 2, 4]), rng.choice([0, 0, 0.5, 1])) if uneven else same
            for channel in channels
        }
        activations = rng.choice(
            [max(1, stages - 1), stages, stages + 1, 3 * stages // 2, 2 * stages - 1, 3 * stages - 2]
        )
        hop = "uneven" if uneven else f"{same.busy_seconds:g}"
        yield measured(Costs(each, hops), microbatches, activations, hop, rng.random() < 0.75, limit)


def line(row: Row) -> str:
    """Markdown."""
    exact = f"{row.exact_seconds:g}" + ("" if row.exact_seconds <= row.bound_seconds * 1.000001 else " (not proven)")
    backward = "split" if row.split else "whole"
    return (
        f"| {row.stages} | {row.microbatches} | {row.activations} | {row.hop} | {backward} | {row.plain_seconds:g} | "
        f"{row.tuned_seconds:g} | {row.name} | {exact} | {row.gap:.1%} | "
        f"{row.tuner_wall_seconds:.1f} | {row.solver_wall_seconds:.1f} |"
    )


def show(rows: Iterator[Row]) -> list[Row]:
    """A table, row by row."""
    print("| S | M | limit | hop | backward | 1F1B | tuned | by | optimum | gap | tuner s | solver s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    found = []
    for row in rows:
        print(line(row), flush=True)
        found.append(row)
    gaps = sorted(row.gap for row in found)
    above = sum(gap > 0.02 for gap in gaps)
    print(
        f"gap: mean {sum(gaps) / len(gaps):.2%}, largest {gaps[-1]:.2%}, above 2 %: {above} of {len(gaps)}\n",
        flush=True,
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline.exact", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drawn", type=int, default=60, help="random problems (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="of the solver, for each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    rows = show(grid(options.limit_seconds))
    if options.drawn:
        rows += show(drawn(options.drawn, options.seed, options.limit_seconds))
    if options.json is not None:
        options.json.write_text(json.dumps([{**asdict(row), "gap": row.gap} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
