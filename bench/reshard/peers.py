"""How others move a sharded tensor, as one rank sees it.

A method is a class that is made once per case on every rank and called for each sample. The hand-written one does the
whole job, as its user would have to; the others move as many bytes as the real thing between the right ranks and pack
nothing, so that they are at their best: their buffers hold nothing of interest.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from tricomm import LeastLoaded, SendRecv, make_plan
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.program import Transfer
from tricomm.plan.tasks import unit_tasks


@lru_cache(maxsize=256)
def group_of(ranks: tuple[int, ...]) -> Any:
    """A process group, made once; every rank must ask for the same ones in the same order."""
    return dist.new_group(list(ranks))


@lru_cache
def directions() -> tuple[Any, Any]:
    """Two groups of all ranks: gloo runs a pair of ranks half duplex."""
    everyone = list(range(dist.get_world_size()))
    return dist.new_group(everyone), dist.new_group(everyone)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _room(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


class _OneMessagePerPair:
    """Each receiver gets every slice from the holder that sends least so far, one message per pair, all at once."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
        plan = make_plan(source, destination, strategy=SendRecv(chunk_bytes=1 << 40), balance=LeastLoaded())
        self.rank = rank
        self.groups = directions()
        self.program = plan.for_rank(rank)[0]

    def buffers(self, sends: bool) -> list[tuple[Transfer, torch.Tensor]]:
        """A buffer for each message that this rank sends, or receives."""
        return [
            (transfer, _room(transfer.nbytes))
            for step in self.program.rounds
            for transfer in (step.sends if sends else step.receives)
        ]

    def send(self, transfer: Transfer, buffer: torch.Tensor) -> Any:
        """Start it."""
        return dist.isend(buffer, transfer.peer, group=self.groups[self.rank < transfer.peer])

    def receive(self, transfer: Transfer, buffer: torch.Tensor) -> Any:
        """Start it."""
        return dist.irecv(buffer, transfer.peer, group=self.groups[transfer.peer < self.rank])


class HandP2P(_OneMessagePerPair):
    """What an engineer writes by hand: post receives, pack and send, copy what stays here, unpack what comes."""

    def __init__(
        self,
        rank: int,
        source: ShardingSpec,
        destination: ShardingSpec,
        shard: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        super().__init__(rank, source, destination)
        self.sends = [(*message, _boxes(shard, *message)) for message in self.buffers(sends=True)]
        self.receives = [(*message, _boxes(out, *message)) for message in self.buffers(sends=False)]
        self.stays = [
            (_box(out, copy.destination_start, copy.shape), _box(shard, copy.source_start, copy.shape))
            for copy in self.program.copies
        ]

    def __call__(self) -> None:
        """Everything at once."""
        arriving = [self.receive(transfer, buffer) for transfer, buffer, _ in self.receives]
        leaving = []
        for transfer, buffer, boxes in self.sends:
            for packed, part in boxes:
                packed.copy_(part)
            leaving.append(self.send(transfer, buffer))
        for into, out_of in self.stays:
            into.copy_(out_of)
        for work, (_, _, boxes) in zip(arriving, self.receives, strict=True):
            work.wait()
            for packed, part in boxes:
                part.copy_(packed)
        _wait(leaving)


class PackedP2P(_OneMessagePerPair):
    """The same messages of bytes that somebody has packed already and nobody unpacks: what the network needs."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec, *_: torch.Tensor | None) -> None:
        super().__init__(rank, source, destination)
        self.sends = self.buffers(sends=True)
        self.receives = self.buffers(sends=False)

    def __call__(self) -> None:
        """Post everything, then wait."""
        arriving = [self.receive(*message) for message in self.receives]
        _wait([*arriving, *(self.send(*message) for message in self.sends)])


def _box(tensor: torch.Tensor | None, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """A view of a box."""
    assert tensor is not None
    return tensor[tuple(slice(first, first + extent) for first, extent in zip(start, shape, strict=True))]


def _boxes(
    tensor: torch.Tensor | None, transfer: Transfer, buffer: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(view of the buffer, view of the tensor) of every box of a message."""
    assert tensor is not None
    elements = buffer.view(tensor.dtype)
    pairs = []
    for region in transfer.regions:
        first = region.offset_nbytes // tensor.dtype.itemsize
        packed = elements[first : first + math.prod(region.shape)].view(region.shape)
        for box in region.boxes:
            pairs.append((_box(packed, box.packed_start, box.shape), _box(tensor, box.local_start, box.shape)))
    return pairs


class BlockingLoop:
    """One slice after the other, with send and recv that block, as a first version of everything does."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec, *_: torch.Tensor | None) -> None:
        self.rank = rank
        self.slices: list[tuple[int, int, torch.Tensor]] = []
        for task in unit_tasks(source, destination):
            for receiver in task.remote_receivers:
                if rank in (task.holders[0], receiver):
                    self.slices.append((task.holders[0], receiver, _room(task.nbytes)))

    def __call__(self) -> None:
        """Send or receive each slice."""
        for sender, receiver, buffer in self.slices:
            if self.rank == sender:
                dist.send(buffer, receiver)
            else:
                dist.recv(buffer, sender)


class _Gathered:
    """Who holds the tensor once, in how many bytes each, and who needs it."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec, *_: torch.Tensor | None) -> None:
        self.rank = rank
        self.nbytes = source.itemsize
        for extent in source.global_shape:
            self.nbytes *= extent
        owners: dict[Any, int] = {}
        for owner in source.mesh.ranks:
            owners.setdefault(source.holding(owner), owner)
        self.owners = tuple(owners.values())
        self.part = _room(self.nbytes // len(self.owners))
        self.receivers = tuple(destination.mesh.ranks)
        self.whole = _room(self.nbytes)

    def gather(self, leader: int) -> None:
        """Every owner but the leader sends it its part."""
        works = []
        if self.rank == leader:
            works = [dist.irecv(torch.empty_like(self.part), owner) for owner in self.owners if owner != leader]
        elif self.rank in self.owners:
            works = [dist.isend(self.part, leader)]
        _wait(works)


class GatherBroadcastSlice(_Gathered):
    """All of the tensor to one source rank, from there by broadcast to every receiver, which keeps its slice."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec, *_: torch.Tensor | None) -> None:
        super().__init__(rank, source, destination)
        self.leader = self.owners[0]
        self.group = group_of(tuple(sorted({self.leader, *self.receivers})))

    def __call__(self) -> None:
        """Gather, broadcast."""
        self.gather(self.leader)
        if self.rank == self.leader or self.rank in self.receivers:
            dist.broadcast(self.whole, self.leader, group=self.group)


class LeaderBroadcast(_Gathered):
    """Gather on a leader of the source, send to a leader of the destination, broadcast there (Megatron's bridge)."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec, *_: torch.Tensor | None) -> None:
        super().__init__(rank, source, destination)
        self.leader = self.owners[0]
        self.other = next(rank for rank in self.receivers if rank != self.leader)
        self.group = group_of(tuple(sorted(self.receivers)))

    def __call__(self) -> None:
        """Gather, send, broadcast."""
        self.gather(self.leader)
        if self.rank == self.leader:
            dist.send(self.whole, self.other)
        elif self.rank == self.other:
            dist.recv(self.whole, self.leader)
        if self.rank in self.receivers and len(self.receivers) > 1:
            dist.broadcast(self.whole, self.other, group=self.group)


PEERS: dict[str, Any] = {
    "hand-written p2p": HandP2P,
    "p2p of packed bytes": PackedP2P,
    "blocking loop": BlockingLoop,
    "gather + broadcast + slice": GatherBroadcastSlice,
    "leader + broadcast": LeaderBroadcast,
}

COMPLETE = "hand-written p2p"
"""The peer that delivers the tensor."""
