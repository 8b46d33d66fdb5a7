"""From a rank's program and the strides of its tensors to tables: what is packed, what travels in place.

A chunk that is one run of memory and needs no cast travels straight from or into the tensor. Every other chunk
passes through the staging arena, where it gets a place for exactly the rounds in which it is alive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tricomm.errors import PlanError, SpecError
from tricomm.kernels.reference import paired_views, view, words
from tricomm.kernels.table import StridedBox, coalesced, offset_of, strided_box
from tricomm.plan.program import Copy, RankProgram, Transfer
from tricomm.sharding import ShardingSpec

ALIGNMENT_NBYTES = 64


class StagedTransfer(NamedTuple):
    """A transfer with its place.

    Attributes:
        peer, key: as in Transfer.
        numel: elements.
        direct_offset: element of the local tensor where the chunk begins, or None if it is staged.
        arena_offset: byte of the arena where the chunk begins, or None if it is not staged.
        boxes: how to pack or unpack a staged chunk.
        relay: whether this is a send of what was received under the same key.
    """

    peer: int
    key: tuple[int, int]
    numel: int
    direct_offset: int | None
    arena_offset: int | None
    boxes: tuple[StridedBox, ...]
    relay: bool


@dataclass(frozen=True)
class Tables:
    """A program bound to strides, dtypes and a depth of pipelining. Holds no tensor.

    Attributes:
        sends, receives: per round.
        copies: (shape, source offset, source strides, destination offset, destination strides).
        arena_nbytes: staging that the rank needs.
        receives_ahead: how many rounds early receives are posted.
        rounds_open: how many rounds may be in flight before the oldest is waited for.
    """

    wire_dtype: torch.dtype
    sends: tuple[tuple[StagedTransfer, ...], ...]
    receives: tuple[tuple[StagedTransfer, ...], ...]
    copies: tuple[tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]], ...]
    arena_nbytes: int
    receives_ahead: int
    rounds_open: int

    @cached_property
    def relays(self) -> bool:
        """Whether the rank forwards anything."""
        return any(transfer.relay for step in self.sends for transfer in step)

    @cached_property
    def staged_chunks(self) -> int:
        """How many chunks pass through staging."""
        every = (*self.sends, *self.receives)
        return sum(t.arena_offset is not None and not t.relay for step in every for t in step)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"this torch {torch.__version__} has no dtype {name}; use a newer torch")
    return dtype


def make_tables(
    program: RankProgram,
    dtypes: tuple[str, str, str],
    strides: tuple[Sequence[int], Sequence[int]],
    depth: tuple[int, int],
    staging_nbytes: int,
) -> Tables:
    """Bind a program.

    Args:
        program: of this rank.
        dtypes: names of the source, wire and destination dtype.
        strides: of the source and destination tensor, in elements; () where there is none.
        depth: (receives ahead, rounds open) that the transport would like; less is used if the staging budget
            asks for it.
        staging_nbytes: the budget.

    Raises:
        PlanError: not even one round fits into the staging budget.
    """
    source_dtype, wire_dtype, destination_dtype = dtypes
    itemsize = torch_dtype(wire_dtype).itemsize
    sends = [[_place(t, strides[0], source_dtype == wire_dtype) for t in step.sends] for step in program.rounds]
    receives = [
        [_place(t, strides[1], wire_dtype == destination_dtype) for t in step.receives] for step in program.rounds
    ]
    ahead, window = depth
    while True:
        arena_nbytes = _lay_out(sends, receives, itemsize, ahead, window)
        if arena_nbytes <= staging_nbytes or (ahead, window) == (0, 0):
            break
        ahead, window = ahead // 2, window // 2
    if arena_nbytes > staging_nbytes:
        raise PlanError(
            f"one round of rank {program.rank} stages {arena_nbytes} bytes, and staging_bytes is {staging_nbytes}; "
            f"raise staging_bytes or give the strategy a smaller chunk_bytes"
        )
    return Tables(
        torch_dtype(wire_dtype),
        tuple(map(tuple, sends)),
        tuple(map(tuple, receives)),
        tuple(_copy_row(copy, *strides) for copy in program.copies),
        arena_nbytes,
        ahead,
        window,
    )


def _place(transfer: Transfer, strides: Sequence[int], same_dtype: bool) -> StagedTransfer:
    """Where a chunk lies, without a place in the arena yet (-1 says that it needs one)."""
    if not transfer.regions:
        return StagedTransfer(transfer.peer, transfer.key, transfer.numel, None, None, (), True)
    boxes = tuple(
        strided_box(box.shape, box.local_start, strides, region.offset, box.packed_start, region.shape)
        for region in transfer.regions
        for box in region.boxes
    )
    direct = same_dtype and len(boxes) == 1 and boxes[0].is_one_run
    return StagedTransfer(
        transfer.peer,
        transfer.key,
        transfer.numel,
        boxes[0].tensor_offset if direct else None,
        None if direct else -1,
        () if direct else boxes,
        False,
    )


def _lay_out(
    sends: list[list[StagedTransfer]],
    receives: list[list[StagedTransfer]],
    itemsize: int,
    ahead: int,
    window: int,
) -> int:
    """Give every staged chunk a place in the arena for the rounds in which it is alive; return the arena's size.

    A receive is alive from the round in which it is posted until its round, and that of the last send that
    relays it, has been retired, ``window`` rounds later.
    """
    last_relay: dict[tuple[int, int], int] = {}
    for index, step in enumerate(sends):
        for transfer in step:
            if transfer.relay:
                last_relay[transfer.key] = index
    alive: list[tuple[int, int, int, list[StagedTransfer], int]] = []
    for index in range(len(sends)):
        for at, transfer in enumerate(receives[index]):
            if transfer.arena_offset is not None:
                last = max(index, last_relay.get(transfer.key, 0)) + window
                alive.append((max(0, index - ahead), last, transfer.numel, receives[index], at))
        for at, transfer in enumerate(sends[index]):
            if transfer.arena_offset is not None:
                alive.append((index, index + window, transfer.numel, sends[index], at))
    alive.sort(key=lambda item: item[:2])
    taken: list[tuple[int, int, int]] = []
    size = 0
    for first, last, numel, step, at in alive:
        nbytes = -(-numel * itemsize // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
        taken = [(start, stop, until) for start, stop, until in taken if until >= first]
        offset = 0
        for index, (start, stop, _) in enumerate(taken):
            if start - offset >= nbytes:
                taken.insert(index, (offset, offset + nbytes, last))
                break
            offset = stop
        else:
            taken.append((offset, offset + nbytes, last))
        step[at] = step[at]._replace(arena_offset=offset)
        size = max(size, offset + nbytes)
    return size


def _copy_row(
    copy: Copy, source_strides: Sequence[int], destination_strides: Sequence[int]
) -> tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]]:
    shape, first, second = coalesced(copy.shape, source_strides, destination_strides)
    return (
        shape,
        offset_of(copy.source_start, source_strides),
        first,
        offset_of(copy.destination_start, destination_strides),
        second,
    )


Copies = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""(into, out of): what ``into.copy_(out_of)`` is to be called on, in order."""


class Slot(NamedTuple):
    """A transfer as tensors: its bytes, and what to copy before they are sent or after they have come."""

    peer: int
    buffer: torch.Tensor
    copies: Copies


@dataclass(frozen=True, slots=True)
class Binding:
    """Tables bound to one pair of tensors and an arena: nothing is left to compute when a call comes.

    Attributes:
        sends, receives: per round.
        local: what the rank has already.
    """

    tables: Tables
    sends: tuple[tuple[Slot, ...], ...]
    receives: tuple[tuple[Slot, ...], ...]
    local: Copies


def bind(tables: Tables, source: torch.Tensor | None, destination: torch.Tensor | None, arena: torch.Tensor) -> Binding:
    """Make every view that a run needs.

    Bits are packed, unpacked and copied as integers; where a cast happens, both sides are typed.

    Args:
        tables: made for tensors with these strides.
        source, destination: the rank's tensors, or None.
        arena: uint8, at least ``tables.arena_nbytes``.
    """
    buffers: dict[tuple[int, int], torch.Tensor] = {}

    def slot(transfer: StagedTransfer, tensor: torch.Tensor | None, is_send: bool) -> Slot:
        if transfer.relay:
            return Slot(transfer.peer, buffers[transfer.key], ())
        assert tensor is not None
        copies: Copies = ()
        if transfer.direct_offset is not None:
            buffer = view(tensor, (transfer.numel,), transfer.direct_offset, (1,)).view(torch.uint8)
        else:
            assert transfer.arena_offset is not None
            buffer = arena.narrow(0, transfer.arena_offset, transfer.numel * tables.wire_dtype.itemsize)
            pairs = paired_views(*_alike(tensor, buffer.view(tables.wire_dtype), transfer.boxes))
            copies = tuple((packed, part) if is_send else (part, packed) for part, packed in pairs)
        buffers[transfer.key] = buffer
        return Slot(transfer.peer, buffer, copies)

    receives = tuple(tuple(slot(transfer, destination, False) for transfer in step) for step in tables.receives)
    sends = tuple(tuple(slot(transfer, source, True) for transfer in step) for step in tables.sends)
    local: Copies = ()
    if tables.copies and source is not None and destination is not None:
        moves_bits = source.dtype == destination.dtype
        here, there = (words(source), words(destination)) if moves_bits else (source, destination)
        local = tuple(
            (view(there, shape, there_offset, there_strides), view(here, shape, here_offset, here_strides))
            for shape, here_offset, here_strides, there_offset, there_strides in tables.copies
        )
    return Binding(tables, sends, receives, local)


def _alike(
    tensor: torch.Tensor, packed: torch.Tensor, boxes: tuple[StridedBox, ...]
) -> tuple[torch.Tensor, tuple[StridedBox, ...], torch.Tensor]:
    """Both as words if only bits move between them."""
    if tensor.dtype == packed.dtype:
        return words(tensor), boxes, words(packed)
    return tensor, boxes, packed


def local_shard(tensor: torch.Tensor, spec: ShardingSpec, rank: int) -> torch.Tensor:
    """The shard that ``rank`` holds of a full tensor (for a Partial spec: its region, not a contribution).

    Args:
        tensor: the full tensor, ``spec.shape``.

    Raises:
        SpecError: the tensor does not have the spec's shape.
    """
    if tuple(tensor.shape) != spec.global_shape:
        raise SpecError(f"tensor of shape {tuple(tensor.shape)} is not the full tensor of {spec}; pass all of it")
    shard = tensor
    for dim, intervals in enumerate(spec.holding(rank)):
        pieces = [shard.narrow(dim, start, stop - start) for start, stop in intervals]
        shard = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else shard.narrow(dim, 0, 0)
    return shard.contiguous()
