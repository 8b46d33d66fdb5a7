"""From tables to what a run touches: the tensors' bytes, and the copies into and out of staging.

Where kernels run, one launch copies for all transfers of a round in one direction; elsewhere torch copies view by view.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from tricomm.kernels import pack as kernels
from tricomm.kernels.reference import InWords, paired_views, view
from tricomm.packing.tables import StagedTransfer, Tables

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


class KernelCopies(NamedTuple):
    """Copies that one launch of a kernel does.

    Attributes:
        table: what.
        packs: whether from the tensor into the buffer, or back.
        tensor, buffer: the two sides.
    """

    table: kernels.Table
    packs: bool
    tensor: torch.Tensor
    buffer: torch.Tensor

    def run(self) -> None:
        """See Copies."""
        if self.packs:
            kernels.pack((self.tensor,), self.table, self.buffer)
        else:
            kernels.unpack(self.buffer, self.table, (self.tensor,))


NOTHING = TorchCopies(())


class Slot(NamedTuple):
    """A transfer as tensors: its bytes, and what to copy before they are sent or after they have come.

    One launch for all transfers of a round stands at the first of the sends, which are read as a group before any is
    posted, and at the last of the receives, which are waited for in order.
    """

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
    """Make everything that a run needs.

    Args:
        tables: made for tensors with these strides and alignments.
        source, destination: the rank's tensors, or None.
        arena: uint8, at least ``tables.arena_nbytes``.
    """
    buffers: dict[tuple[int, int], torch.Tensor] = {}
    itemsize = tables.dtypes[1].itemsize

    def buffer(transfer: StagedTransfer, tensor: torch.Tensor | None) -> torch.Tensor:
        if transfer.relay:
            return buffers[transfer.key]
        if transfer.direct_offset is not None:
            assert tensor is not None
            found: torch.Tensor = view(tensor, (transfer.numel,), transfer.direct_offset, (1,)).view(torch.uint8)
        else:
            assert transfer.arena_offset is not None
            found = arena.narrow(0, transfer.arena_offset, transfer.numel * itemsize)
        buffers[transfer.key] = found
        return found

    def slots(tensor: torch.Tensor | None, is_send: bool) -> Iterator[tuple[Slot, ...]]:
        steps = tables.sends if is_send else tables.receives
        for step, copies in zip(steps, _copies(tables, tensor, arena, is_send), strict=True):
            yield tuple(Slot(t.peer, buffer(t, tensor), of_slot) for t, of_slot in zip(step, copies, strict=True))

    receives = tuple(slots(destination, False))
    return Binding(tables, tuple(slots(source, True)), receives, _local(tables, source, destination))


def _copies(
    tables: Tables, tensor: torch.Tensor | None, arena: torch.Tensor, packs: bool
) -> Iterator[tuple[Copies, ...]]:
    """What to copy at each transfer of each round of sends (``packs``) or receives."""
    steps = tables.sends if packs else tables.receives
    if tensor is None:
        yield from ((NOTHING,) * len(step) for step in steps)
    elif kernels.serves(arena.device, tables.dtypes[0 if packs else 2], tables.dtypes[1]):
        of_sends, of_receives, _ = tables.kernel_tables
        for step, table in zip(steps, of_sends if packs else of_receives, strict=True):
            of_step: list[Copies] = [NOTHING] * len(step)
            if len(table.boxes):
                of_step[0 if packs else -1] = KernelCopies(table, packs, tensor, arena)
            yield tuple(of_step)
    else:
        of_tensor, of_arena = InWords(tensor), InWords(arena.view(tables.dtypes[1]))
        for step in steps:
            pairs = [paired_views(of_tensor, t.boxes, of_arena, t.arena_offset or 0) for t in step]
            yield tuple(
                TorchCopies(tuple((packed, part) if packs else (part, packed) for part, packed in of_transfer))
                for of_transfer in pairs
            )


def _local(tables: Tables, source: torch.Tensor | None, destination: torch.Tensor | None) -> Copies:
    if not tables.copies or source is None or destination is None:
        return NOTHING
    if kernels.serves(source.device, source.dtype, destination.dtype):
        return KernelCopies(tables.kernel_tables[2], True, source, destination)
    pairs = paired_views(InWords(source), tables.copies, InWords(destination))
    return TorchCopies(tuple((into, out_of) for out_of, into in pairs))
