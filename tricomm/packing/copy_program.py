"""From a rank's program and the strides of its tensors to a copy program: what is packed, what travels in place.

A chunk that is one run of memory and needs no cast travels straight from or into the tensor. Every other chunk
passes through the staging buffer, where it gets a place for exactly the rounds in which it is alive.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch

from tricomm.errors import PlanError
from tricomm.kernels import pack as kernels
from tricomm.kernels.boxes import PlacedBox, boxes_of
from tricomm.kernels.table import StridedBox, coalesced, offset_of, strided_box, widened
from tricomm.packing.staging import Direction, StagedTransfer, TensorBox, lay_out, use_arenas
from tricomm.plan.program import Box, BoxTransfers, Copy, PackedRegion, RankProgram, Transfer

Cast = tuple[torch.dtype, torch.dtype]
"""Of the tensor, and of the packed elements."""


class LocalTensor(NamedTuple):
    """What a copy program depends on of a tensor.

    Attributes:
        dtype: of its elements.
        strides: in elements.
        alignment_nbytes: at a multiple of which it begins.
    """

    dtype: torch.dtype
    strides: tuple[int, ...]
    alignment_nbytes: int


class Side(NamedTuple):
    """What a rank holds at one end of a move: the tensors of each stack in which it has part, one stack after another.

    Attributes:
        tensors: all of them.
        firsts: by number of a stack, which of them is its first.
        counts: by number of a stack, how many it has.
    """

    tensors: tuple[LocalTensor, ...]
    firsts: Mapping[int, int]
    counts: Mapping[int, int]

    def rows(self, stack: int, start: Sequence[int], shape: Sequence[int]) -> "Iterator[Row]":
        """The boxes of tensors that a box of a stack is: dim 0 of a stack of several counts its tensors."""
        if self.counts[stack] == 1:
            yield Row(self.firsts[stack], 0, tuple(start), tuple(shape))
            return
        for row in range(shape[0]):
            yield Row(self.firsts[stack] + start[0] + row, row, tuple(start[1:]), tuple(shape[1:]))


def side_of(tensors: tuple[LocalTensor, ...], shapes: Mapping[int, object], counts: Sequence[int]) -> Side:
    """The side with these tensors.

    Args:
        tensors: one stack after another.
        shapes: by number of each stack in which the rank has part, ascending.
        counts: of the tensors of every stack.
    """
    firsts, first = {}, 0
    for stack in shapes:
        firsts[stack] = first
        first += counts[stack]
    return Side(tensors, firsts, {stack: counts[stack] for stack in shapes})


class Row(NamedTuple):
    """A box of one tensor, as a part of a box of a stack.

    Attributes:
        tensor: its number among those of the side.
        row: its number in the box of the stack.
        start, shape: of the box in the tensor.
    """

    tensor: int
    row: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Launch(NamedTuple):
    """Boxes that one launch of a kernel copies.

    Attributes:
        table: of the boxes.
        tensors: numbers of those that they are of, in the order in which the table counts them.
        others: what they go to or come from: for local copies, tensors; else numbers of packed buffers, of which 0 is
            staging, and the others are arenas, see ``CopyProgram.arenas``.
    """

    table: kernels.Table
    tensors: tuple[int, ...]
    others: tuple[int, ...]


Launches = tuple[Launch, ...]
"""One for the boxes that move as bits, and one for those of each cast."""


@dataclass(frozen=True)
class CopyProgram:
    """A program bound to strides, dtypes and a depth of pipelining. Holds no tensor.

    Attributes:
        source, destination: the tensors of either side.
        sends, receives: per round.
        copies: boxes of the source and, in place of a buffer, of the destination.
        staging_nbytes: size of the staging buffer that the rank needs.
        receives_ahead: how many rounds early receives are posted.
        rounds_open: how many rounds may be in flight before the oldest is waited for.
        arenas: bytes that arenas must have, by direction, in the order in which buffers count them, from 1 on.
    """

    source: Side
    destination: Side
    sends: tuple[tuple[StagedTransfer, ...], ...]
    receives: tuple[tuple[StagedTransfer, ...], ...]
    copies: tuple[TensorBox, ...]
    staging_nbytes: int
    receives_ahead: int
    rounds_open: int
    arenas: Mapping[Direction, int] = field(default_factory=dict)

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
    def buffers(self) -> Mapping[Direction, int]:
        """Numbers of the arenas among the packed buffers."""
        return {way: number for number, way in enumerate(self.arenas, 1)}

    def buffer_of(self, transfer: StagedTransfer, is_send: bool) -> int:
        """The number of the packed buffer of a transfer."""
        return self.buffers[is_send, transfer.peer] if transfer.is_in_arena else 0

    @cached_property
    def kernel_tables(self) -> tuple[tuple[Launches, ...], tuple[Launches, ...], Launches]:
        """What launches pack in each round, what they unpack, and the local copies."""

        def of_rounds(steps: tuple[tuple[StagedTransfer, ...], ...], side: Side, is_send: bool) -> tuple[Launches, ...]:
            placed = (
                [
                    (box._replace(other=self.buffer_of(t, is_send)) if t.is_in_arena else box, t.packed_place)
                    for t in step
                    for box in t.boxes
                ]
                for step in steps
            )
            return tuple(_launches(boxes, side) for boxes in placed)

        copies = _launches([(box, 0) for box in self.copies], self.source)
        return of_rounds(self.sends, self.source, True), of_rounds(self.receives, self.destination, False), copies


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"this torch {torch.__version__} has no dtype {name}; use a newer torch")
    return dtype


def make_copy_program(
    program: RankProgram,
    source: Side,
    destination: Side,
    wire_dtypes: Sequence[torch.dtype],
    depth: tuple[int, int],
    budget_nbytes: int,
    arenas: Collection[Direction] = (),
) -> CopyProgram:
    """Bind a program.

    Args:
        program: of this rank.
        source, destination: its tensors.
        wire_dtypes: of the stacks, by number.
        depth: (receives ahead, rounds open) that the transport would like; less is used if the staging budget
            asks for it.
        budget_nbytes: the most that the staging buffer may have.
        arenas: where chunks cross in arenas, which are packed and unpacked there.

    Raises:
        PlanError: not even one round fits into the staging budget.
    """
    sends = [[_place(t, source, wire_dtypes) for t in _packed_once(step.sends)] for step in program.rounds]
    receives = [[_place(t, destination, wire_dtypes) for t in step.receives] for step in program.rounds]
    ahead, window = depth
    nbytes = use_arenas(sends, receives, arenas, window) if arenas else {}
    while True:
        staging_nbytes = lay_out(sends, receives, ahead, window)
        if staging_nbytes <= budget_nbytes or (ahead, window) == (0, 0):
            break
        ahead, window = ahead // 2, window // 2
    if staging_nbytes > budget_nbytes:
        raise PlanError(
            f"one round of rank {program.rank} stages {staging_nbytes} bytes, and staging_bytes is {budget_nbytes}; "
            f"raise staging_bytes or give the strategy a smaller chunk_bytes"
        )
    return CopyProgram(
        source,
        destination,
        tuple(map(tuple, sends)),
        tuple(map(tuple, receives)),
        tuple(box for copy in program.copies for box in between(copy, source, destination)),
        staging_nbytes,
        ahead,
        window,
        nbytes,
    )


def _packed_once(sends: Sequence[Transfer]) -> Sequence[Transfer]:
    """The sends of a round, of which those of one chunk in one call share what the first of them packs."""
    if isinstance(sends, BoxTransfers):
        return sends
    first: dict[tuple[int, int], int] = {}
    for at, one in enumerate(sends):
        first.setdefault(one.key, at)
    return [one._replace(regions=()) if one.group and first[one.key] != at else one for at, one in enumerate(sends)]


def _place(transfer: Transfer, side: Side, wire_dtypes: Sequence[torch.dtype]) -> StagedTransfer:
    """Where a chunk lies, without a place in the staging buffer yet (-1 says that it needs one)."""
    if not transfer.regions:
        return StagedTransfer(transfer.peer, transfer.key, transfer.nbytes, None, None, (), True, transfer.group)
    boxes = [
        box
        for region in transfer.regions
        for one in region.boxes
        for box in _boxes(region, one, side, wire_dtypes[region.stack])
    ]
    only = boxes[0]
    dtype = side.tensors[only.tensor].dtype
    if len(boxes) == 1 and dtype == only.packed and only.box.is_one_run:
        direct = only.tensor, only.box.tensor_offset * dtype.itemsize
        return StagedTransfer(transfer.peer, transfer.key, transfer.nbytes, direct, None, (), False, transfer.group)
    # The staging buffer begins at a multiple of more than any tensor does.
    wide = tuple(one._replace(box=widened(one.box, side.tensors[one.tensor].alignment_nbytes)) for one in boxes)
    return StagedTransfer(transfer.peer, transfer.key, transfer.nbytes, None, -1, wide, False, transfer.group)


def _boxes(region: PackedRegion, box: Box, side: Side, wire: torch.dtype) -> Iterator[TensorBox]:
    """The boxes of tensors that a box of a packed region is."""
    several = side.counts[region.stack] > 1
    packed_start, packed_shape = box.packed_start[several:], region.shape[several:]
    each = prod(packed_shape)
    for number, row, start, shape in side.rows(region.stack, box.local_start, box.shape):
        tensor = side.tensors[number]
        first = region.offset_nbytes // wire.itemsize + (each * (box.packed_start[0] + row) if several else 0)
        itemsize = wire.itemsize if tensor.dtype == wire else 0
        placed = strided_box(shape, start, tensor.strides, first, packed_start, packed_shape, itemsize)
        yield TensorBox(number, placed, wire)


def between(copy: Copy, source: Side, destination: Side) -> Iterator[TensorBox]:
    """The boxes of pairs of tensors that a copy is, of this rank's own or out of those of another."""
    pairs = zip(
        source.rows(copy.stack, copy.source_start, copy.shape),
        destination.rows(copy.stack, copy.destination_start, copy.shape),
        strict=True,
    )
    for here, there in pairs:
        first, second = source.tensors[here.tensor], destination.tensors[there.tensor]
        shape, strides, other_strides = coalesced(here.shape, first.strides, second.strides)
        itemsize = first.dtype.itemsize if first.dtype == second.dtype else 0
        starts = offset_of(here.start, first.strides), offset_of(there.start, second.strides)
        box = StridedBox(shape, starts[0], strides, starts[1], other_strides, itemsize)
        box = widened(box, min(first.alignment_nbytes, second.alignment_nbytes))
        yield TensorBox(here.tensor, box, second.dtype, there.tensor)


def _launches(placed: Sequence[tuple[TensorBox, int]], side: Side) -> Launches:
    """One of the boxes that move as bits, and one for each cast that a kernel does.

    Args:
        placed: boxes, and the byte that their packed offsets count from.
        side: whose tensors they are of.
    """
    by_cast: dict[Cast | None, list[tuple[TensorBox, int]]] = {}
    for one, place in placed:
        cast = cast_of(one, side)
        if cast is None or kernels.casts(*cast):
            by_cast.setdefault(cast, []).append((one, place))
    return tuple(_launch(boxes, cast) for cast, boxes in by_cast.items())


def _launch(placed: Sequence[tuple[TensorBox, int]], cast: Cast | None) -> Launch:
    tensors = {number: at for at, number in enumerate(dict.fromkeys(one.tensor for one, _ in placed))}
    others = {number: at for at, number in enumerate(dict.fromkeys(one.other for one, _ in placed))}
    boxes = [PlacedBox(one.box, tensors[one.tensor], others[one.other], place) for one, place in placed]
    sizes = (0, 0) if cast is None else (cast[0].itemsize, cast[1].itemsize)
    return Launch(kernels.Table(boxes_of(boxes, sizes), cast=cast), tuple(tensors), tuple(others))


def cast_of(one: TensorBox, side: Side) -> Cast | None:
    """(dtype of the tensor, dtype of the packed elements) if they differ."""
    dtype = side.tensors[one.tensor].dtype
    return None if dtype == one.packed else (dtype, one.packed)
