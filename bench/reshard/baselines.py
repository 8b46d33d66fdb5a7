"""The ways to move a tensor that the benchmark compares, tricomm's own among them, as seen by one rank.

All of them turn two row blocks on ranks 0 and 1 into two column blocks on ranks 2 and 3.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DTensorShard

import tricomm
from tricomm import Mesh, Resharder, Shard, ShardingSpec

SOURCE_RANKS = (0, 1)
DESTINATION_RANKS = (2, 3)
RANKS = 4

BYTES_ONLY = "hand: bytes only"
COMPLETE = "hand: complete"
RESHARDER = "tricomm.Resharder"
BY_MEMORY = "tricomm.Resharder memory"
CHECKPOINT = "torch.distributed.checkpoint"


class Setting:
    """What one rank holds in a case. Every method reads the same shard and writes to the same ``out``.

    Attributes:
        shard: float32, shape (side / 2, side), the row block of a source rank; None elsewhere.
        out: float32, shape (side, side / 2), room for the column block of a destination rank; None elsewhere.
        expected: what ``out`` has to hold; None where out is None.
    """

    def __init__(self, rank: int, side: int) -> None:
        self.rank = rank
        self.side = side
        self.shard: torch.Tensor | None = None
        self.out: torch.Tensor | None = None
        self.expected: torch.Tensor | None = None
        # float32 counts exactly up to 2 ** 24, which is as many elements as the large case has.
        full = torch.arange(side * side, dtype=torch.float32).reshape(side, side)
        half = side // 2
        if rank in SOURCE_RANKS:
            self.shard = full[_block(SOURCE_RANKS.index(rank), half)].clone()
        else:
            self.expected = full[:, _block(DESTINATION_RANKS.index(rank), half)].clone()
            self.out = torch.empty_like(self.expected)

    def require_correct(self, method: Callable[[], object], name: str) -> None:
        """Run a method once and compare what it wrote, element by element.

        Raises:
            ValueError: an element is wrong or was not written.
        """
        if self.out is not None:
            self.out.fill_(torch.nan)
        method()
        if self.out is not None and self.expected is not None and not torch.equal(self.out, self.expected):
            wrong = int((self.out != self.expected).sum())
            raise ValueError(f"{name}: {wrong} elements on rank {self.rank} are not those of the global tensor")


def _block(index: int, length: int) -> slice:
    return slice(index * length, (index + 1) * length)


class Hand:
    """Plain isend and irecv, one message from each source rank to each destination rank.

    Args:
        packs: whether a call packs the columns; else the buffers stay as they were packed here. A receiver
            never unpacks: the rows that one source rank sends are contiguous in ``out``.
    """

    def __init__(self, setting: Setting, packs: bool) -> None:
        self.packs = packs
        self.sends: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.receives: list[tuple[int, torch.Tensor]] = []
        half = setting.side // 2
        if setting.shard is not None:
            for index, peer in enumerate(DESTINATION_RANKS):
                columns = setting.shard[:, _block(index, half)]
                self.sends.append((peer, columns, columns.contiguous()))
        if setting.out is not None:
            for index, peer in enumerate(SOURCE_RANKS):
                self.receives.append((peer, setting.out[_block(index, half)]))

    def __call__(self) -> None:
        """Send and receive."""
        works = [dist.irecv(rows, peer) for peer, rows in self.receives]
        for peer, columns, packed in self.sends:
            if self.packs:
                packed.copy_(columns)
            works.append(dist.isend(packed, peer))
        for work in works:
            assert work is not None
            work.wait()


class GatherBroadcastSlice:
    """All of the tensor on rank 0, from there to every destination rank, which keeps its columns."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.group = dist.new_group([SOURCE_RANKS[0], *DESTINATION_RANKS])
        self.half = setting.side // 2
        self.full: torch.Tensor | None = None
        if setting.rank != SOURCE_RANKS[1]:
            self.full = torch.zeros(setting.side, setting.side)

    def __call__(self) -> None:
        """Gather, broadcast, slice."""
        setting, half, full = self.setting, self.half, self.full
        if full is None:
            assert setting.shard is not None
            dist.send(setting.shard, SOURCE_RANKS[0])
            return
        if setting.shard is not None:
            full[_block(0, half)].copy_(setting.shard)
            dist.recv(full[_block(1, half)], SOURCE_RANKS[1])
        dist.broadcast(full, SOURCE_RANKS[0], group=self.group)
        if setting.out is not None:
            setting.out.copy_(full[:, _block(DESTINATION_RANKS.index(setting.rank), half)])


class Checkpoint:
    """torch.distributed.checkpoint through files in memory: the source ranks save, then the others load.

    Args:
        directory: an empty one in memory; every rank names the same, and the caller removes it.
    """

    def __init__(self, setting: Setting, directory: Path) -> None:
        self.directory = directory
        self.calls = 0
        # The mesh tells a DTensor where it lies, and brings the group that DCP runs on. To make a group is a call
        # of all ranks, so all make both.
        source = DeviceMesh("cpu", list(SOURCE_RANKS))
        destination = DeviceMesh("cpu", list(DESTINATION_RANKS))
        self.saves = setting.shard is not None
        mesh, placement = (source, DTensorShard(0)) if self.saves else (destination, DTensorShard(1))
        local = setting.shard if self.saves else setting.out
        assert local is not None
        self.state = {"tensor": DTensor.from_local(local, mesh, [placement], run_check=False)}
        self.group = mesh.get_group()

    def __call__(self) -> None:
        """Save, meet, load in place."""
        # A new directory each time: the one before may still be read by a slower rank.
        directory = self.directory / str(self.calls)
        self.calls += 1
        if self.saves:
            dcp.save(self.state, checkpoint_id=directory, process_group=self.group)
        # A loader cannot know by itself when the metadata is there.
        dist.barrier()
        if not self.saves:
            dcp.load(self.state, checkpoint_id=directory, process_group=self.group)


def make_methods(setting: Setting, directory: Path | None) -> dict[str, Callable[[], object]]:
    """Every method on this rank, by name; a collective call.

    Args:
        setting: what the rank holds.
        directory: for DCP, see :class:`Checkpoint`; None leaves DCP out.
    """
    shape = (setting.side, setting.side)
    source = ShardingSpec(Mesh(SOURCE_RANKS, ("x",)), (Shard(0),), shape, "float32")
    destination = ShardingSpec(Mesh(DESTINATION_RANKS, ("x",)), (Shard(1),))
    shard, out = setting.shard, setting.out
    warm = Resharder(source, destination, transport="network")
    confirming = Resharder(source, destination, transport="network", confirm=True)
    by_memory = Resharder(source, destination, transport="memory")
    by_memory_confirming = Resharder(source, destination, transport="memory", confirm=True)
    methods: dict[str, Callable[[], object]] = {
        BYTES_ONLY: Hand(setting, packs=False),
        COMPLETE: Hand(setting, packs=True),
        RESHARDER: lambda: warm(shard, out=out),
        "tricomm.Resharder confirm=True": lambda: confirming(shard, out=out),
        "tricomm.reshard": lambda: tricomm.reshard(shard, source, destination, out=out, transport="network"),
        BY_MEMORY: lambda: by_memory(shard, out=out),
        f"{BY_MEMORY} confirm=True": lambda: by_memory_confirming(shard, out=out),
        "tricomm.reshard memory": lambda: tricomm.reshard(shard, source, destination, out=out, transport="memory"),
        "gather + broadcast + slice": GatherBroadcastSlice(setting),
    }
    if directory is not None:
        methods[CHECKPOINT] = Checkpoint(setting, directory)
    return methods
