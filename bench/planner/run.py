"""What planning costs.

    python -m bench.planner [--json PATH]

For one rank: its plan and program, every transfer of the program as an object, the copy programs and views that packing
makes of it before data can move, the digest that ranks compare, and the peak of what all but these allocate; against
ranks, for several layouts, and for the tensors of whole models. For all ranks: planning, proof and print. Every
figure is of a plan that was not made before, with all caches empty.
"""

import argparse
import gc
import json
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from bench.planner import cases, fan_out, irregular, quality
from tricomm import Topology, make_plan
from tricomm.kernels.reference import alignment_nbytes
from tricomm.packing.binding import bind
from tricomm.packing.copy_program import LocalTensor, Side, make_copy_program, side_of, torch_dtype
from tricomm.plan import Plan, RankProgram

RESULTS = Path(__file__).resolve().parent.parent / "results" / "planner.json"
SIZES = (64, 256, 1024, 4096, 16384)
FLEET_SIZES = (64, 256, 1024, 4096, 16384)
FLEET_TARGETS = {256: 0.005, 1024: 0.010, 4096: 0.030, 16384: 0.120}
TARGET_SECONDS = {
    **{(what, size): seconds for what in cases.FLEETS for size, seconds in FLEET_TARGETS.items()},
    ("rows to columns", 4096): 0.050,
    ("rows to columns", 16384): 0.250,
    ("Llama 70B, 64 to 32 ranks", 723): 0.5,
    ("Llama 70B, 64 to 4 x 8 ranks", 723): 0.5,
    ("mixture of experts, 256 to 128 ranks", 45395): 5.0,
    ("a set: Llama 70B, 512 to 64 x 8 ranks", 723): 1.0,
    ("a set: mixture of experts, 256 to 128 ranks", 45395): 5.0,
    ("a set: mixture of experts, 1024 to 256 ranks", 45395): 5.0,
}


@dataclass(frozen=True)
class Row:
    """One size of one case.

    Attributes:
        what: is planned.
        size: ranks of each side, or tensors.
        transfers: chunks that the rank sends and receives (hops, for a plan of all ranks).
        seconds: per step, the least of the repeats.
        peak_nbytes: of what Python and numpy allocated, in a run of its own.
    """

    what: str
    size: int
    transfers: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_nbytes: int = 0


Steps = dict[str, float]


def forget() -> None:
    """Empty every cache of tricomm's."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tricomm"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    gc.collect()


@contextmanager
def timed(steps: Steps, name: str) -> Iterator[None]:
    """Add the seconds for which a block kept a processor busy."""
    begin = time.process_time()
    yield
    steps[name] = steps.get(name, 0.0) + time.process_time() - begin


def transfers_of(programs: Sequence[RankProgram]) -> int:
    """Make every transfer, and count them."""
    return sum(len(list(side)) for p in programs for step in p.rounds for side in (step.sends, step.receives))


def bound(plan: Plan, programs: Sequence[RankProgram]) -> None:
    """What PlanExecution does before the first call: a copy program, and views of tensors in host memory."""
    for move, program in zip(plan.moves, programs, strict=True):
        counts = [len(stack.items) for stack in move.stacks]
        sides: list[Side] = []
        every: list[list[torch.Tensor]] = []
        for shapes, end in ((program.source_shapes, "source"), (program.destination_shapes, "destination")):
            tensors: list[torch.Tensor] = []
            for number, shape in shapes.items():
                dtype = torch_dtype(getattr(move.stacks[number], end).element_type)
                stack = torch.empty(shape, dtype=dtype)
                tensors += [stack] if counts[number] == 1 else stack.unbind(0)
            local = tuple(LocalTensor(tensor.dtype, tensor.stride(), alignment_nbytes()) for tensor in tensors)
            sides.append(side_of(local, shapes, counts))
            every.append(tensors)
        wires = [torch_dtype(stack.wire_dtype) for stack in move.stacks]
        copies = make_copy_program(program, sides[0], sides[1], wires, (4, 4), plan.staging_nbytes)
        bind(copies, every[0], every[1], torch.empty(copies.staging_nbytes, dtype=torch.uint8))


def one_rank(
    pairs: Sequence[cases.Pair], topology: Topology | None, with_tables: bool, rank: int = 0
) -> tuple[Steps, int]:
    """A rank's programs of some tensors."""
    steps: Steps = {}
    made: list[tuple[Plan, tuple[RankProgram, ...]]] = []
    with timed(steps, "plan and program"):
        for source, destination in pairs:
            # An expert that others train and serve is no plan of this rank.
            if rank in source.mesh or rank in destination.mesh:
                plan = make_plan(source, destination, topology=topology, rank=rank)
                made.append((plan, plan.for_rank(rank)))
    count = 0
    with timed(steps, "as objects"):
        for _, programs in made:
            count += transfers_of(programs)
    with timed(steps, "digest"):
        for plan, _ in made[:1]:
            plan.digest()
    if with_tables:
        with timed(steps, "tables"):
            for plan, programs in made:
                bound(plan, programs)
    return steps, count


def one_rank_of_set(pairs: Sequence[cases.Pair], topology: Topology, rank: int) -> tuple[Steps, int]:
    """A rank's program of some tensors that share messages."""
    steps: Steps = {}
    sources, destinations = ({f"tensor {at}": pair[end] for at, pair in enumerate(pairs)} for end in (0, 1))
    with timed(steps, "plan and program"):
        plan = make_plan(sources, destinations, topology=topology, rank=rank)
        programs = plan.for_rank(rank)
    with timed(steps, "as objects"):
        count = transfers_of(programs)
    with timed(steps, "digest"):
        plan.digest()
    return steps, count


def all_ranks(pair: cases.Pair) -> tuple[Steps, int]:
    """The plan of all ranks."""
    steps: Steps = {}
    with timed(steps, "plan and program"):
        plan = make_plan(*pair)
    with timed(steps, "verify"):
        plan.verify()
    with timed(steps, "print"):
        str(plan)
    return steps, sum(len(move.hops) for move in plan.moves)


def measured(what: str, size: int, once: Callable[[], tuple[Steps, int]], repeats: int, peak: bool = True) -> Row:
    """Time a planner with empty caches, and take its peak."""
    runs: list[Steps] = []
    transfers = 0
    for _ in range(repeats):
        forget()
        steps, transfers = once()
        runs.append(steps)
    seconds = {name: min(run[name] for run in runs) for name in runs[0]}
    peak_nbytes = 0
    if peak:
        forget()
        tracemalloc.start()
        once()
        peak_nbytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    row = Row(what, size, transfers, seconds, peak_nbytes)
    print(row, file=sys.stderr, flush=True)
    return row


def run(largest: int, largest_global: int, repeats: int) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    layouts: tuple[tuple[str, Callable[[int], cases.Pair]], ...] = (
        ("rows to columns", cases.rows_to_columns),
        ("tiles, transposed mesh", cases.retiled),
        ("uneven rows", cases.uneven),
    )
    for what, make in layouts:
        for size in (size for size in SIZES if size <= largest):
            rows.append(measured(what, size, partial(one_rank, [make(size)], None, size <= 4096), repeats))
    for size in (16, 64, 128):
        rows.append(
            measured("held twice, needed twice", size, partial(one_rank, [cases.replicated(size)], None, True), 1)
        )
    for what, make in cases.FLEETS.items():
        for size in (size for size in FLEET_SIZES if size <= largest):
            pair = make(size)
            receiver = pair[1].mesh.ranks[size // 2]
            topology = cases.rails(max(*pair[0].mesh.ranks, *pair[1].mesh.ranks) + 1)
            rows.append(measured(what, size, partial(one_rank, [pair], topology, False, receiver), repeats))
    models = (
        ("tensors of distinct shapes, 16 to 8 ranks", list(cases.distinct_tensors(723)), None),
        ("Llama 70B, 64 to 32 ranks", list(cases.llama(1)), cases.rails(96)),
        ("Llama 70B, 64 to 4 x 8 ranks", list(cases.llama(4)), cases.rails(96)),
        ("mixture of experts, 256 to 128 ranks", list(cases.mixture_of_experts()), cases.rails(384)),
    )
    for what, pairs, hosts in models:
        few = len(pairs) < 1000
        once = partial(one_rank, pairs, hosts, False)
        rows.append(measured(what, len(pairs), once, repeats if few else 1, peak=few))
    rows += run_sets(min(repeats, 3))
    for size in (size for size in (16, 64, 128, 256, 1024) if size <= largest_global):
        rows.append(
            measured("all ranks, rows to columns", size, partial(all_ranks, cases.rows_to_columns(size)), 1, False)
        )
    return rows


def run_sets(repeats: int) -> list[Row]:
    """Rows of sets of tensors. The rank is on the destination, where it receives the most."""
    sets = (
        ("Llama 70B, 512 to 64 x 8 ranks", list(cases.llama_to_a_fleet()), 1024),
        ("mixture of experts, 256 to 128 ranks", list(cases.mixture_of_experts()), 384),
        ("mixture of experts, 1024 to 256 ranks", list(cases.mixture_of_experts(1024, 256)), 1280),
    )
    return [
        measured(
            f"a set: {what}", len(pairs), partial(one_rank_of_set, pairs, cases.rails(ranks), ranks - 100), repeats
        )
        for what, pairs, ranks in sets
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    steps = list(dict.fromkeys(name for row in rows for name in row.seconds))
    head = ["what", "size", "transfers", *steps, "growth", "peak", "target"]
    lines = [head, ["---"] * len(head)]
    before: Row | None = None
    for row in rows:
        growth = ""
        if before is not None and before.what == row.what:
            ratio = row.seconds[steps[0]] / before.seconds[steps[0]]
            growth = f"{ratio:.1f} x for {row.size / before.size:.0f} x"
        target = TARGET_SECONDS.get((row.what, row.size))
        times = [f"{row.seconds[name] * 1e3:.1f} ms" if name in row.seconds else "" for name in steps]
        peak = f"{row.peak_nbytes / 1e6:.1f} MB" if row.peak_nbytes else ""
        wanted = "" if target is None else f"{target * 1e3:.0f} ms"
        lines.append([row.what, f"{row.size:,}", f"{row.transfers:,}", *times, growth, peak, wanted])
        before = row
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--largest", type=int, default=16384, help="most ranks of a side, planned for one (%(default)s)"
    )
    parser.add_argument("--largest-global", type=int, default=256, help="the same, planned for all (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quality", type=int, metavar="N", help="N random layouts by formulas and by search, instead")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="of those layouts (%(default)s)")
    parser.add_argument("--fan-out", action="store_true", help="simulated fan-outs, instead")
    parser.add_argument("--irregular", action="store_true", help="layouts that are searched for, instead")
    parser.add_argument("--sets", action="store_true", help="sets of tensors alone, instead")
    parser.add_argument("--json", type=Path, metavar="PATH", default=RESULTS, help="(%(default)s)")
    options = parser.parse_args(arguments)
    if options.fan_out or options.irregular:
        print(fan_out.table() if options.fan_out else irregular.table(forget))
        return
    if options.quality:
        seeds = range(options.first_seed, options.first_seed + options.quality)
        print(quality.table(quality.measured(seeds)), quality.table_of_cases(), sep="\n\n")
        return
    if options.sets:
        print(table(run_sets(options.repeats)))
        return
    rows = run(options.largest, options.largest_global, options.repeats)
    print(table(rows))
    options.json.parent.mkdir(exist_ok=True)
    content = {"machine": platform.platform(), "rows": [asdict(row) for row in rows]}
    options.json.write_text(json.dumps(content, indent=1) + "\n")
