"""How others move a sharded tensor, as one rank sees it: bytes only, no packing, so that they are at their best.

A method is a class that is made once per case on every rank and called for each sample. It moves as many bytes as
the real thing between the right ranks; the buffers hold nothing of interest.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from tricomm import Naive, Plan, SendRecv, make_plan
from tricomm.plan.tasks import unit_tasks
from tricomm.sharding import ShardingSpec


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


class HandP2P:
    """Each receiver gets every slice from the first rank that holds it, one message per pair, all at once."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
        plan: Plan = make_plan(source, destination, strategy=SendRecv(), balance=Naive())
        self.rank = rank
        self.groups = directions()
        self.messages: list[tuple[int, int, torch.Tensor]] = [
            (message.chain[0], message.chain[1], _room(message.numel * source.itemsize))
            for message in plan.moves[0].messages
            if rank in message.chain
        ]

    def __call__(self) -> None:
        """Post everything, then wait."""
        works = []
        for sender, receiver, buffer in self.messages:
            group = self.groups[sender < receiver]
            if self.rank == sender:
                works.append(dist.isend(buffer, receiver, group=group))
            else:
                works.append(dist.irecv(buffer, sender, group=group))
        _wait(works)


class BlockingLoop:
    """One slice after the other, with send and recv that block, as a first version of everything does."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
        self.rank = rank
        self.slices: list[tuple[int, int, torch.Tensor]] = []
        for task in unit_tasks(source, destination):
            for receiver in task.receivers:
                if rank in (task.holders[0], receiver):
                    self.slices.append((task.holders[0], receiver, _room(task.numel * source.itemsize)))

    def __call__(self) -> None:
        """Send or receive each slice."""
        for sender, receiver, buffer in self.slices:
            if self.rank == sender:
                dist.send(buffer, receiver)
            else:
                dist.recv(buffer, sender)


class _Gathered:
    """Who holds the tensor once, in how many bytes each, and who needs it."""

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
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

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
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

    def __init__(self, rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
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
    "blocking loop": BlockingLoop,
    "gather + broadcast + slice": GatherBroadcastSlice,
    "leader + broadcast": LeaderBroadcast,
}
