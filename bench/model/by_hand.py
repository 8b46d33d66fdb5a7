"""Two ways by which weights are moved today, written by hand, as seen by one rank.

Both know the map between the two systems piece by piece, and which ranks hold what; what they lack is a plan.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.model.cases import Setting
from tricomm import ShardingSpec
from tricomm.layout.intervals import Region
from tricomm.packing.copy_program import torch_dtype
from tricomm.rules import Piece, to_local, to_local_source, within, within_source

Tensors = Mapping[str, torch.Tensor]


class Transfer(NamedTuple):
    """A box that one rank gives to another: views of its shard of the source and of the other's of the destination."""

    sender: int
    receiver: int
    source: str
    destination: str
    piece: Piece
    held: Region
    needed: Region


def holders(spec: ShardingSpec) -> list[tuple[Region, list[int]]]:
    """Each shard once, and the ranks that have it."""
    found: dict[Region, list[int]] = {}
    for rank in spec.mesh.ranks:
        found.setdefault(spec.holding(rank), []).append(rank)
    return list(found.items())


def transfers_of(setting: Setting) -> list[list[Transfer]]:
    """Per destination tensor, who gives what to whom; holders take turns by receiver."""
    found = []
    for tensor in setting.rules.tensors:
        destination = setting.destination[tensor.name]
        of_tensor: list[Transfer] = []
        for piece in tensor.pieces:
            if piece.tensor is None:
                continue
            source = tensor.sources[piece.tensor]
            shards = holders(setting.source[source])
            for number, receiver in enumerate(destination.mesh.ranks):
                needed = destination.holding(receiver)
                of_tensor += [
                    Transfer(ranks[number % len(ranks)], receiver, source, tensor.name, part, held, needed)
                    for here in within(piece, needed)
                    for held, ranks in shards
                    for part in within_source(here, held)
                ]
        found.append(of_tensor)
    return found


def read(transfer: Transfer, shard: torch.Tensor) -> torch.Tensor:
    """The view of the sender's shard."""
    part = to_local_source(transfer.piece, transfer.held)
    return view(shard, part.shape, part.source_strided(shard.stride()))


def written(piece: Piece, needed: Region, shard: torch.Tensor) -> torch.Tensor:
    """The view of a receiver's shard, which has a region of the destination, where a piece belongs."""
    part = to_local(piece, needed)
    return view(shard, part.shape, part.strided(shard.stride()))


def view(tensor: torch.Tensor, shape: tuple[int, ...], strided: tuple[int, tuple[int, ...]]) -> torch.Tensor:
    """A view by (offset, strides)."""
    offset, strides = strided
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def fills_of(rank: int, setting: Setting, out: Tensors) -> list[tuple[torch.Tensor, float]]:
    """What this rank writes of the rows that pad a vocabulary, and with which value."""
    found = []
    for tensor in setting.rules.tensors:
        spec = setting.destination[tensor.name]
        for piece in tensor.pieces:
            if piece.tensor is None and rank in spec.mesh:
                needed, value = spec.holding(rank), float(piece.value or 0)
                found += [(written(part, needed, out[tensor.name]), value) for part in within(piece, needed)]
    return found


class PointToPoint:
    """Tensor by tensor: isend and irecv of what each pair of ranks has in common, packed and unpacked.

    Args:
        rank: this one.
        setting: who holds what.
        given, out: this rank's shards.
    """

    def __init__(self, rank: int, setting: Setting, given: Tensors, out: Tensors) -> None:
        self._rank, self._given, self._out = rank, given, out
        self._fills = fills_of(rank, setting, out)
        self._per_tensor: list[list[tuple[int, bool, list[Transfer]]]] = []
        for of_tensor in transfers_of(setting):
            pairs: dict[tuple[int, int], list[Transfer]] = {}
            for transfer in of_tensor:
                if rank in (transfer.sender, transfer.receiver):
                    pairs.setdefault((transfer.sender, transfer.receiver), []).append(transfer)
            self._per_tensor.append(
                [(to if sender == rank else sender, sender == rank, one) for (sender, to), one in pairs.items()]
            )

    def __call__(self) -> None:
        """Move all tensors."""
        for place, value in self._fills:
            place.fill_(value)
        for of_tensor in self._per_tensor:
            works: list[Any] = []
            unpacked = []
            for peer, is_send, transfers in of_tensor:
                if is_send:
                    packed = torch.cat([read(one, self._given[one.source]).reshape(-1) for one in transfers])
                    works.append(dist.isend(packed.view(torch.uint8), peer))
                else:
                    numel = sum(one.piece.numel for one in transfers)
                    buffer = torch.empty(numel, dtype=self._out[transfers[0].destination].dtype)
                    works.append(dist.irecv(buffer.view(torch.uint8), peer))
                    unpacked.append((transfers, buffer))
            for work in works:
                work.wait()
            for transfers, buffer in unpacked:
                offset = 0
                for one in transfers:
                    place = written(one.piece, one.needed, self._out[one.destination])
                    place.copy_(buffer[offset : offset + place.numel()].view(place.shape))
                    offset += place.numel()


class GatherBroadcastSlice:
    """Tensor by tensor of the trainer: gathered on its first rank, sent to all servers, each of which takes its part.

    Every rank makes it, for a group is made.

    Args:
        rank: this one.
        setting: who holds what.
        given, out: this rank's shards.
    """

    def __init__(self, rank: int, setting: Setting, given: Tensors, out: Tensors) -> None:
        self._rank, self._setting, self._given, self._out = rank, setting, given, out
        self._fills = fills_of(rank, setting, out)
        trainers = {one for spec in setting.source.values() for one in spec.mesh.ranks}
        servers = {one for spec in setting.destination.values() for one in spec.mesh.ranks}
        self._first = min(trainers)
        self._members = {self._first, *servers}
        self._group = dist.new_group(sorted(self._members))
        self._taken: dict[str, list[tuple[Piece, str, Region]]] = {name: [] for name in setting.source}
        for tensor in setting.rules.tensors:
            spec = setting.destination[tensor.name]
            if rank not in spec.mesh:
                continue
            for piece in tensor.pieces:
                if piece.tensor is not None:
                    needed = spec.holding(rank)
                    self._taken[tensor.sources[piece.tensor]] += [
                        (part, tensor.name, needed) for part in within(piece, needed)
                    ]

    def __call__(self) -> None:
        """Move all tensors."""
        for place, value in self._fills:
            place.fill_(value)
        for name, spec in self._setting.source.items():
            full = torch.empty(spec.global_shape, dtype=torch_dtype(spec.element_type))
            self._gather(name, spec, full)
            if self._rank not in self._members:
                continue
            dist.broadcast(full.view(-1).view(torch.uint8), self._first, self._group)
            for part, destination, needed in self._taken[name]:
                place = written(part, needed, self._out[destination])
                place.copy_(view(full, part.shape, part.source_strided(full.stride())))

    def _gather(self, name: str, spec: ShardingSpec, full: torch.Tensor) -> None:
        """Bring a tensor to the first rank; of replicas, one sends."""
        works: list[Any] = []
        received = []
        for held, ranks in holders(spec):
            sender = self._first if self._first in ranks else ranks[0]
            if sender == self._rank == self._first:
                _place(full, held, self._given[name])
            elif sender == self._rank:
                works.append(dist.isend(self._given[name].reshape(-1).view(torch.uint8), self._first))
            elif self._rank == self._first:
                buffer = torch.empty(spec.local_shape(sender), dtype=full.dtype)
                works.append(dist.irecv(buffer.view(-1).view(torch.uint8), sender))
                received.append((held, buffer))
        for work in works:
            work.wait()
        for held, buffer in received:
            _place(full, held, buffer)


def _place(full: torch.Tensor, held: Region, shard: torch.Tensor) -> None:
    """Write a shard where it belongs."""
    if all(len(intervals) == 1 for intervals in held):
        full[tuple([slice(*intervals[0]) for intervals in held])] = shard
    else:
        indices = [torch.cat([torch.arange(start, stop) for start, stop in intervals]) for intervals in held]
        full[torch.meshgrid(*indices, indexing="ij")] = shard
