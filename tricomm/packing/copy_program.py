"""From a rank's program and the strides of its tensors to a copy program: what is packed, what travels in place.

A chunk that is one run of memory and needs no cast travels straight from or into the tensor. Every other chunk
passes through the staging buffer, where it gets a place for exactly the rounds in which it is alive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tricomm.errors import ArgumentError, PlanError, SpecError
from tricomm.kernels import pack as kernels
from tricomm.kernels.boxes import boxes_of
from tricomm.kernels.table import StridedBox, coalesced, offset_of, strided_box, widened
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.arguments import check_spec
from tricomm.plan.program import Copy, RankProgram, Transfer

ALIGNMENT_NBYTES = 64


class StagedTransfer(NamedTuple):
    """A transfer with its place.

    Attributes:
        peer, key: as in Transfer.
        numel: elements.
        direct_offset: element of the local tensor where the chunk begins, or None if it is staged.
        staging_offset: byte of the staging buffer where the chunk begins, or None if it is not staged.
        boxes: how to pack or unpack a staged chunk.
        relay: whether this is a send of what was received under the same key.
    """

    peer: int
    key: tuple[int, int]
    numel: int
    direct_offset: int | None
    staging_offset: int | None
    boxes: tuple[StridedBox, ...]
    relay: bool


@dataclass(frozen=True)
class CopyProgram:
    """A program bound to strides, dtypes and a depth of pipelining. Holds no tensor.

    Attributes:
        dtypes: of the source, the wire and the destination.
        sends, receives: per round.
        copies: boxes of the source and, in place of a buffer, of the destination.
        staging_nbytes: size of the staging buffer that the rank needs.
        receives_ahead: how many rounds early receives are posted.
        rounds_open: how many rounds may be in flight before the oldest is waited for.
    """

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    sends: tuple[tuple[StagedTransfer, ...], ...]
    receives: tuple[tuple[StagedTransfer, ...], ...]
    copies: tuple[StridedBox, ...]
    staging_nbytes: int
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
        return sum(t.staging_offset is not None and not t.relay for step in every for t in step)

    @cached_property
    def kernel_tables(self) -> tuple[tuple[kernels.Table, ...], tuple[kernels.Table, ...], kernels.Table]:
        """What one launch packs in each round, what one unpacks, and the local copies."""
        source, wire, destination = self.dtypes

        def of_rounds(steps: tuple[tuple[StagedTransfer, ...], ...], dtype: torch.dtype) -> tuple[kernels.Table, ...]:
            placed = ([(box, t.staging_offset or 0) for t in step for box in t.boxes] for step in steps)
            return tuple(_kernel_table(boxes, dtype, wire) for boxes in placed)

        sends, receives = of_rounds(self.sends, source), of_rounds(self.receives, destination)
        return sends, receives, _kernel_table([(box, 0) for box in self.copies], source, destination)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"this torch {torch.__version__} has no dtype {name}; use a newer torch")
    return dtype


def make_copy_program(
    program: RankProgram,
    dtypes: tuple[str, str, str],
    strides: tuple[Sequence[int], Sequence[int]],
    alignments: tuple[int, int],
    depth: tuple[int, int],
    budget_nbytes: int,
) -> CopyProgram:
    """Bind a program.

    Args:
        program: of this rank.
        dtypes: names of the source, wire and destination dtype.
        strides: of the source and destination tensor, in elements; () where there is none.
        alignments: bytes at a multiple of which each of them begins.
        depth: (receives ahead, rounds open) that the transport would like; less is used if the staging budget
            asks for it.
        budget_nbytes: the most that the staging buffer may have.

    Raises:
        PlanError: not even one round fits into the staging budget.
    """
    source_dtype, wire_dtype, destination_dtype = dtypes
    itemsize = torch_dtype(wire_dtype).itemsize
    moved = [itemsize if dtype == wire_dtype else 0 for dtype in (source_dtype, destination_dtype)]
    sends = [[_place(t, strides[0], moved[0], alignments[0]) for t in step.sends] for step in program.rounds]
    receives = [[_place(t, strides[1], moved[1], alignments[1]) for t in step.receives] for step in program.rounds]
    ahead, window = depth
    while True:
        staging_nbytes = _lay_out(sends, receives, itemsize, ahead, window)
        if staging_nbytes <= budget_nbytes or (ahead, window) == (0, 0):
            break
        ahead, window = ahead // 2, window // 2
    if staging_nbytes > budget_nbytes:
        raise PlanError(
            f"one round of rank {program.rank} stages {staging_nbytes} bytes, and staging_bytes is {budget_nbytes}; "
            f"raise staging_bytes or give the strategy a smaller chunk_bytes"
        )
    return CopyProgram(
        (torch_dtype(source_dtype), torch_dtype(wire_dtype), torch_dtype(destination_dtype)),
        tuple(map(tuple, sends)),
        tuple(map(tuple, receives)),
        tuple(
            _copy(copy, strides, itemsize if source_dtype == destination_dtype else 0, min(alignments))
            for copy in program.copies
        ),
        staging_nbytes,
        ahead,
        window,
    )


def _place(transfer: Transfer, strides: Sequence[int], itemsize: int, alignment_nbytes: int) -> StagedTransfer:
    """Where a chunk lies, without a place in the staging buffer yet (-1 says that it needs one).

    Args:
        transfer: the chunk.
        strides: of the tensor, in elements.
        itemsize: bytes of an element, 0 if elements are cast.
        alignment_nbytes: at a multiple of which the tensor begins; the staging buffer begins at one of more.
    """
    if not transfer.regions:
        return StagedTransfer(transfer.peer, transfer.key, transfer.numel, None, None, (), True)
    boxes = tuple(
        strided_box(box.shape, box.local_start, strides, region.offset, box.packed_start, region.shape, itemsize)
        for region in transfer.regions
        for box in region.boxes
    )
    direct = itemsize > 0 and len(boxes) == 1 and boxes[0].is_one_run
    return StagedTransfer(
        transfer.peer,
        transfer.key,
        transfer.numel,
        boxes[0].tensor_offset if direct else None,
        None if direct else -1,
        () if direct else tuple(widened(box, alignment_nbytes) for box in boxes),
        False,
    )


def _lay_out(
    sends: list[list[StagedTransfer]],
    receives: list[list[StagedTransfer]],
    itemsize: int,
    ahead: int,
    window: int,
) -> int:
    """Give every staged chunk a place in the staging buffer for the rounds in which it is alive; return its size.

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
            if transfer.staging_offset is not None:
                last = max(index, last_relay.get(transfer.key, 0)) + window
                alive.append((max(0, index - ahead), last, transfer.numel, receives[index], at))
        for at, transfer in enumerate(sends[index]):
            if transfer.staging_offset is not None:
                alive.append((index, index + window, transfer.numel, sends[index], at))
    alive.sort(key=lambda item: item[:2])
    taken: list[tuple[int, int, int]] = []
    size, now = 0, -1
    refused = 0  # if not 0, no gap is as large as this
    for first, last, numel, step, at in alive:
        nbytes = -(-numel * itemsize // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
        if first != now:
            now, refused = first, 0
            taken = [(start, stop, until) for start, stop, until in taken if until >= first]
        offset = taken[-1][1] if taken else 0
        place = len(taken)
        if not refused or nbytes < refused:
            place, offset = _first_gap(taken, nbytes)
            refused = nbytes if place == len(taken) else refused
        taken.insert(place, (offset, offset + nbytes, last))
        step[at] = step[at]._replace(staging_offset=offset)
        size = max(size, offset + nbytes)
    return size


def _first_gap(taken: Sequence[tuple[int, int, int]], nbytes: int) -> tuple[int, int]:
    """(index among what is taken, byte) of the first place that is large enough; behind everything if no gap is."""
    offset = 0
    for index, (start, stop, _) in enumerate(taken):
        if start - offset >= nbytes:
            return index, offset
        offset = stop
    return len(taken), offset


def _copy(copy: Copy, strides: tuple[Sequence[int], Sequence[int]], itemsize: int, alignment: int) -> StridedBox:
    shape, first, second = coalesced(copy.shape, *strides)
    box = StridedBox(
        shape,
        offset_of(copy.source_start, strides[0]),
        first,
        offset_of(copy.destination_start, strides[1]),
        second,
        itemsize,
    )
    return widened(box, alignment)


def _kernel_table(placed: Sequence[tuple[StridedBox, int]], tensor: torch.dtype, packed: torch.dtype) -> kernels.Table:
    """A table of boxes and the bytes that their packed offsets count from; of no boxes if no kernel does the cast."""
    if tensor != packed and not kernels.casts(tensor, packed):
        placed = ()
    cast = (tensor, packed) if tensor != packed and placed else None
    return kernels.Table(boxes_of(placed, (tensor.itemsize, packed.itemsize)), cast=cast)


def local_shard(tensor: torch.Tensor, spec: ShardingSpec, rank: int) -> torch.Tensor:
    """Cut out the shard that ``rank`` holds of a full tensor (for a Partial spec: its region, not a contribution).

    Args:
        tensor: the full tensor, ``spec.shape``.
        spec: the layout.
        rank: of its mesh.

    Raises:
        SpecError: the tensor does not have the spec's shape, or the rank is not on its mesh; an ArgumentError where an
            argument is of the wrong kind.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> columns = ShardingSpec(Mesh([0, 1], ("tp",)), [Shard(1)], (2, 6), "int64")
        >>> local_shard(torch.arange(12).reshape(2, 6), columns, rank=1)
        tensor([[ 3,  4,  5],
                [ 9, 10, 11]])
    """
    check_spec("spec", spec)
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"tensor={tensor!r} is not a torch.Tensor; pass the full tensor of {spec}")
    if tuple(tensor.shape) != spec.global_shape:
        raise SpecError(f"tensor of shape {tuple(tensor.shape)} is not the full tensor of {spec}; pass all of it")
    shard = tensor
    for dim, intervals in enumerate(spec.holding(rank)):
        pieces = [shard.narrow(dim, start, stop - start) for start, stop in intervals]
        shard = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else shard.narrow(dim, 0, 0)
    return shard.contiguous()
