"""Whole models through files, as a trainer's checkpoint is read by a server today, beside ours: on this machine alone.

``torch.distributed.checkpoint`` writes each shard of the trainer under a key of its own and reads those that a rank of
the server has a part of, whole, since its readers cut by their own placements and know no map; then each takes its
part.
Nothing is forced to the disk: files stay in the page cache, so that a shared file system is flattered.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from bench.model.by_hand import PointToPoint, Tensors, fills_of, holders, read, transfers_of, written
from bench.model.cases import EXECUTED, EXECUTED_RANKS, Case, Setting
from bench.model.executed import (
    OURS,
    POINT_TO_POINT,
    STAGING_BYTES,
    keep,
    planned_on,
    sample,
    shards_for,
    staged,
)
from tricomm import Resharder, Topology
from tricomm.launch import Ranks

MEMORY = 'Resharder, transport="auto"'
CHECKPOINT = "torch.distributed.checkpoint"


@dataclass(frozen=True, slots=True)
class OnLoopback:
    """A model moved between processes of this machine.

    Attributes:
        model, layouts: as in the case.
        nbytes: of the server's shards, all ranks together.
        seconds: median of each way, of the slowest rank.
        samples: of each way.
        staging_nbytes: the most that a rank had in packed chunks, and of the checkpoint, what a rank read at once.
    """

    model: str
    layouts: str
    nbytes: int
    seconds: dict[str, float]
    samples: dict[str, list[float]]
    staging_nbytes: dict[str, int]

    @property
    def case(self) -> str:
        """What identifies it."""
        return self.model


class Checkpoint:
    """Save by the trainer's ranks, load by the server's. Every rank makes it, for groups are made.

    Args:
        rank: this one.
        setting: who holds what.
        given, out: this rank's shards.
        folder: of the files.
    """

    def __init__(self, rank: int, setting: Setting, given: Tensors, out: Tensors, folder: str) -> None:
        self._given, self._out, self._folder = given, out, folder
        self._fills = fills_of(rank, setting, out)
        trainers = sorted({one for spec in setting.source.values() for one in spec.mesh.ranks})
        self._is_trainer = rank in trainers
        self._trainers = dist.new_group(trainers)
        self._servers = dist.new_group(
            sorted({one for spec in setting.destination.values() for one in spec.mesh.ranks})
        )
        number_of = {
            name: {held: number for number, (held, _) in enumerate(holders(spec))}
            for name, spec in setting.source.items()
        }
        self._saved = {
            f"{name}@{number_of[name][spec.holding(rank)]}": name
            for name, spec in setting.source.items()
            if rank in spec.mesh
        }
        mine = [one for of_tensor in transfers_of(setting) for one in of_tensor if one.receiver == rank]
        self._taken = [(f"{one.source}@{number_of[one.source][one.held]}", one) for one in mine]
        shapes = {key: setting.source[one.source].local_shape(one.sender) for key, one in self._taken}
        dtypes = {key: out[one.destination].dtype for key, one in self._taken}
        self._loaded = {key: (shape, dtypes[key]) for key, shape in shapes.items()}

    @property
    def staging_nbytes(self) -> int:
        """Bytes that this rank reads at once."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self._loaded.values())

    def __call__(self) -> None:
        """Move all tensors."""
        from torch.distributed import checkpoint

        if self._is_trainer:
            writer = checkpoint.FileSystemWriter(self._folder, sync_files=False, overwrite=True)
            state = {key: self._given[name] for key, name in self._saved.items()}
            checkpoint.save(state, storage_writer=writer, process_group=self._trainers)
        dist.barrier()
        if self._is_trainer:
            return
        for place, value in self._fills:
            place.fill_(value)
        found = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in self._loaded.items()}
        reader = checkpoint.FileSystemReader(self._folder)
        checkpoint.load(found, storage_reader=reader, process_group=self._servers)
        for key, one in self._taken:
            written(one.piece, one.needed, self._out[one.destination]).copy_(read(one, found[key]))


def prepare(rank: int, number: int, folder: str) -> int:
    """Make every way of a case, and check what each brings; returns what the checkpoint stages here."""
    torch.set_num_threads(1)
    setting = EXECUTED[number].setting(EXECUTED_RANKS, EXECUTED_RANKS)
    given, expected, out = shards_for(rank, setting)
    here = Topology(["here"] * 2 * EXECUTED_RANKS)
    through_files = Checkpoint(rank, setting, given, out, folder)

    def mover(transport: str) -> Resharder[dict[str, torch.Tensor]]:
        how: Any = {"topology": here, "staging_bytes": STAGING_BYTES, "transport": transport}
        return Resharder(setting.source, setting.destination, rules=setting.rules, **how)

    over_sockets, from_memory = mover("network"), mover("auto")
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: over_sockets(given, out=out),
        MEMORY: lambda: from_memory(given, out=out),
        POINT_TO_POINT: PointToPoint(rank, setting, given, out),
        CHECKPOINT: through_files,
    }
    keep(ways, over_sockets, out, expected, rank)
    return through_files.staging_nbytes


def on_loopback(repeats: int, only: str | None) -> list[OnLoopback]:
    """Every case, or one."""
    with Ranks(2 * EXECUTED_RANKS, preload=("bench.model.loopback",)) as ranks:
        return [
            _measured(case, number, ranks, repeats) for number, case in enumerate(EXECUTED) if only in (None, case.name)
        ]


def _measured(case: Case, number: int, ranks: Ranks, repeats: int) -> OnLoopback:
    setting = case.setting(EXECUTED_RANKS, EXECUTED_RANKS)
    items = planned_on(setting, Topology(["here"] * 2 * EXECUTED_RANKS)).ends.destinations
    with tempfile.TemporaryDirectory() as folder:
        read_at_once = max(ranks.run(prepare, number, folder))
        samples: dict[str, list[float]] = {OURS: [], MEMORY: [], POINT_TO_POINT: [], CHECKPOINT: []}
        for _ in range(repeats):
            for way, times in samples.items():
                spans = ranks.run(sample, way)
                times.append(max(end for _, end in spans) - max(began for began, _ in spans))
    packed = max(nbytes for nbytes, _ in ranks.run(staged))
    seconds = {way: statistics.median(times) for way, times in samples.items()}
    nbytes = sum(prod(one.spec.local_shape(rank)) * one.spec.itemsize for one in items for rank in one.spec.mesh.ranks)
    staging = {OURS: packed, CHECKPOINT: read_at_once}
    found = OnLoopback(case.name, setting.layouts, nbytes, seconds, samples, staging)
    print(found, file=sys.stderr, flush=True)
    return found


def table(rows: list[OnLoopback]) -> str:
    """Markdown."""
    lines = [
        f"| model | MB | {OURS} | {MEMORY} | {POINT_TO_POINT} | {CHECKPOINT} | staged: ours, checkpoint |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        shown = " | ".join(f"{row.seconds[way]:.3f} s" for way in (OURS, MEMORY, POINT_TO_POINT, CHECKPOINT))
        staged_mb = ", ".join(f"{nbytes / 1e6:.1f} MB" for nbytes in row.staging_nbytes.values())
        lines.append(f"| {row.model} | {row.nbytes / 1e6:.0f} | {shown} | {staged_mb} |")
    return "\n".join(lines)
