"""From a copy program to what a run touches: the tensors' bytes, and the copies into and out of the staging buffer.

Where kernels run, one launch copies for all transfers of a round in one direction; elsewhere torch copies view by view.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from tricomm.kernels import pack as kernels
from tricomm.kernels.reference import InWords, paired_views, view
from tricomm.packing import runs as in_runs
from tricomm.packing.copy_program import CopyProgram, Launches, Side
from tricomm.packing.runs import NOTHING_IN_PLACE, InPlace, Pieces, Runs, runs_of
from tricomm.packing.staging import Direction, StagedTransfer, TensorBox

NO_ARENAS: Mapping[Direction, torch.Tensor] = MappingProxyType({})

Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""(into, out of): what ``into.copy_(out_of)`` is to be called on, in order."""


class Copies(Protocol):
    """Something to copy before bytes are sent, or after they have come."""

    def run(self) -> None:
        """Copy; on a device, on the current stream."""
        ...


class TorchCopies(NamedTuple):
    """Copies that torch does, one view after the other."""

    pairs: Pairs

    def run(self) -> None:
        """See Copies."""
        for into, out_of in self.pairs:
            into.copy_(out_of)


class InferenceCopies(NamedTuple):
    """Copies into what inference mode has made: it is written in that mode only, which is a matter of threads."""

    copies: TorchCopies

    def run(self) -> None:
        """See Copies."""
        with torch.inference_mode():
            self.copies.run()


class KernelCopies(NamedTuple):
    """Copies that one launch of a kernel does.

    Attributes:
        table: what.
        packs: whether from the tensors into the buffers, or back.
        tensors, buffers: the two sides.
    """

    table: kernels.Table
    packs: bool
    tensors: tuple[torch.Tensor, ...]
    buffers: tuple[torch.Tensor, ...]

    def run(self) -> None:
        """See Copies."""
        if self.packs:
            kernels.pack(self.tensors, self.table, self.buffers)
        else:
            kernels.unpack(self.buffers, self.table, self.tensors)


class SeveralCopies(NamedTuple):
    """Copies one after the other."""

    copies: tuple[Copies, ...]

    def run(self) -> None:
        """See Copies."""
        for one in self.copies:
            one.run()


NOTHING = TorchCopies(())


def copies_of(pairs: Pairs) -> Copies:
    """What copies these pairs, of which the first stands for all."""
    if not pairs:
        return NOTHING
    copies = TorchCopies(pairs)
    return InferenceCopies(copies) if pairs[0][0].is_inference() else copies


class BoundTransfer(NamedTuple):
    """A transfer as tensors: its bytes, and what to copy before they are sent or after they have come.

    One launch for all transfers of a round stands at the first of the sends, which are read as a group before any is
    posted, and at the last of the receives, which are waited for in order. Where ``runs`` say where the bytes are in
    the tensors themselves, or are pieces that copy themselves, there is nothing else to copy, and the buffer is not
    used. ``place`` is the byte of the pair's arena where it crosses, if they have one.
    """

    peer: int
    buffer: torch.Tensor
    copies: Copies
    runs: Runs | Pieces | None = None
    group: tuple[int, ...] = ()
    place: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """A copy program bound to tensors and a staging buffer: nothing is left to compute when a call comes.

    Attributes:
        sends, receives: per round.
        local: what the rank has already.
    """

    program: CopyProgram
    sends: tuple[tuple[BoundTransfer, ...], ...]
    receives: tuple[tuple[BoundTransfer, ...], ...]
    local: Copies


def several(copies: Sequence[Copies]) -> Copies:
    """All of them as one."""
    some = tuple(one for one in copies if one is not NOTHING)
    return some[0] if len(some) == 1 else SeveralCopies(some)


def bind(
    program: CopyProgram,
    sources: Sequence[torch.Tensor],
    destinations: Sequence[torch.Tensor],
    staging: torch.Tensor,
    in_place: InPlace = NOTHING_IN_PLACE,
    arenas: Mapping[Direction, torch.Tensor] = NO_ARENAS,
) -> Binding:
    """Make everything that a run needs.

    Args:
        program: made for tensors with these strides and alignments.
        sources, destinations: the rank's tensors, as its sides have them.
        staging: uint8, at least ``program.staging_nbytes``.
        in_place: where bytes need not be in one buffer. Torch copies there; a chunk that is relayed is in one always.
        arenas: uint8, of each of ``program.arenas`` at least what that says.
    """
    relayed = {t.key for step in program.sends for t in step if t.relay}
    buffers: dict[tuple[int, int], torch.Tensor] = {}
    pieces: dict[tuple[bool, tuple[TensorBox, ...]], Pieces] = {}  # what several get is packed once

    packed = (staging, *(arenas[way] for way in program.arenas))

    def buffer(transfer: StagedTransfer, tensors: Sequence[torch.Tensor], is_send: bool) -> torch.Tensor:
        found: torch.Tensor
        if transfer.relay:
            return buffers[transfer.key]
        if transfer.is_in_arena:
            found = arenas[is_send, transfer.peer].narrow(0, transfer.packed_place, transfer.nbytes)
        elif transfer.direct is not None:
            number, place_nbytes = transfer.direct
            tensor = tensors[number]
            size = tensor.element_size()
            words = view(tensor, (transfer.nbytes // size,), place_nbytes // size, (1,))
            found = words.view(torch.uint8)
        else:
            assert transfer.staging_offset is not None
            found = staging.narrow(0, transfer.staging_offset, transfer.nbytes)
        buffers[transfer.key] = found
        return found

    def bound(tensors: Sequence[torch.Tensor], is_send: bool) -> Iterator[tuple[BoundTransfer, ...]]:
        steps = program.sends if is_send else program.receives
        for step, copies in zip(steps, _copies(program, tensors, packed, is_send), strict=True):
            yield tuple(
                BoundTransfer(t.peer, buffer(t, tensors, is_send), before_or_after, None, t.group, t.place or 0)
                if (runs := found_runs(t, tensors, is_send)) is None
                else BoundTransfer(t.peer, buffer(t, tensors, is_send), NOTHING, runs, t.group)
                for t, before_or_after in zip(step, copies, strict=True)
            )

    def found_runs(transfer: StagedTransfer, tensors: Sequence[torch.Tensor], is_send: bool) -> Runs | Pieces | None:
        way = is_send, transfer.peer
        if transfer.key in relayed or not transfer.boxes or _has_kernels(staging.device):
            return None
        if transfer.nbytes > in_runs.PIECE_NBYTES:
            if way not in in_place.pieces:
                return None
            key = is_send, transfer.boxes
            if key not in pieces:
                pieces[key] = _pieces_of(transfer, tensors, program, is_send)
            return pieces[key]
        return runs_of(transfer.boxes, tensors, transfer.nbytes) if way in in_place.runs else None

    receives = tuple(bound(destinations, False))
    return Binding(program, tuple(bound(sources, True)), receives, local_copies(program, sources, destinations))


def _pieces_of(transfer: StagedTransfer, tensors: Sequence[torch.Tensor], program: CopyProgram, packs: bool) -> Pieces:
    side = program.source if packs else program.destination

    def copies(boxes: Sequence[TensorBox], memory: torch.Tensor, place_nbytes: int) -> Callable[[], None]:
        return Views(tensors, (memory,)).copies(boxes, side, 0, place_nbytes, packs).run

    return Pieces(transfer.boxes, transfer.nbytes, copies)


def _copies(
    program: CopyProgram, tensors: Sequence[torch.Tensor], packed: Sequence[torch.Tensor], packs: bool
) -> Iterator[tuple[Copies, ...]]:
    """What to copy for each transfer of each round of sends (``packs``) or receives; ``packed``: staging, arenas."""
    steps, side = (program.sends, program.source) if packs else (program.receives, program.destination)
    of_kernels: Sequence[Launches] = [()] * len(steps)
    if _has_kernels(packed[0].device):
        of_sends, of_receives, _ = program.kernel_tables
        of_kernels = of_sends if packs else of_receives
    views = Views(tensors, packed)
    for step, launches in zip(steps, of_kernels, strict=True):
        of_step = [
            views.copies(t.boxes, side, program.buffer_of(t, packs) if t.boxes else 0, t.packed_place, packs)
            for t in step
        ]
        if launches:
            at = 0 if packs else -1
            of_step[at] = several([*_launched(launches, packs, tensors, packed), of_step[at]])
        yield tuple(of_step)


def _has_kernels(device: torch.device) -> bool:
    """Whether kernels copy at all on a device."""
    return kernels.serves(device, torch.uint8, torch.uint8)


def _launched(
    launches: Launches, packs: bool, tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> Iterator[Copies]:
    for table, used, used_others in launches:
        yield KernelCopies(table, packs, tuple(tensors[at] for at in used), tuple(others[at] for at in used_others))


class Views:
    """Views of tensors and of packed buffers, for what torch copies.

    Args:
        tensors: of one side.
        packed: uint8, each.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> None:
        self._tensors, self._packed = tensors, packed
        self._of_tensors: dict[int, InWords] = {}
        self._of_packed: dict[tuple[int, torch.dtype], InWords] = {}

    def copies(self, boxes: Sequence[TensorBox], side: Side, buffer: int, place_nbytes: int, packs: bool) -> Copies:
        """The copies of boxes that no kernel does.

        Args:
            boxes: of a chunk.
            side: whose tensors they are of.
            buffer: number of the packed buffer.
            place_nbytes: where the chunk begins in it.
            packs: the direction.
        """
        pairs = []
        for one in boxes:
            if kernels.serves(self._packed[0].device, side.tensors[one.tensor].dtype, one.packed):
                continue
            tensor, packed = self._of_tensor(one.tensor), self._of_wire(buffer, one.packed)
            ((part, chunk),) = paired_views(tensor, (one.box,), packed, place_nbytes)
            pairs.append((chunk, part) if packs else (part, chunk))
        return copies_of(tuple(pairs))

    def _of_tensor(self, number: int) -> InWords:
        if number not in self._of_tensors:
            self._of_tensors[number] = InWords(self._tensors[number])
        return self._of_tensors[number]

    def _of_wire(self, number: int, dtype: torch.dtype) -> InWords:
        if (number, dtype) not in self._of_packed:
            packed = self._packed[number]
            whole = packed.numel() // dtype.itemsize * dtype.itemsize
            self._of_packed[number, dtype] = InWords(packed[:whole].view(dtype))
        return self._of_packed[number, dtype]


def local_copies(program: CopyProgram, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> Copies:
    """The copies from tensors to tensors."""
    if not program.copies:
        return NOTHING
    device = sources[0].device
    pairs = []
    for one in program.copies:
        if not kernels.serves(device, program.source.tensors[one.tensor].dtype, one.packed):
            here, there = InWords(sources[one.tensor]), InWords(destinations[one.other])
            ((out_of, into),) = paired_views(here, (one.box,), there)
            pairs.append((into, out_of))
    copies = copies_of(tuple(pairs))
    if not _has_kernels(device):
        return copies
    return several([*_launched(program.kernel_tables[2], True, sources, destinations), copies])
