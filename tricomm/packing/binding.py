"""From a copy program to what a run touches: the tensors' bytes, and the copies into and out of the staging buffer.

Where kernels run, one launch copies for all transfers of a round in one direction; elsewhere torch copies view by view.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from tricomm.kernels import pack as kernels
from tricomm.kernels.reference import InWords, paired_views, view
from tricomm.packing.copy_program import CopyProgram, StagedTransfer

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


def _copies_of(pairs: Pairs) -> Copies:
    copies = TorchCopies(pairs)
    return InferenceCopies(copies) if pairs and pairs[0][0].is_inference() else copies


class BoundTransfer(NamedTuple):
    """A transfer as tensors: its bytes, and what to copy before they are sent or after they have come.

    One launch for all transfers of a round stands at the first of the sends, which are read as a group before any is
    posted, and at the last of the receives, which are waited for in order.
    """

    peer: int
    buffer: torch.Tensor
    copies: Copies


@dataclass(frozen=True, slots=True)
class Binding:
    """A copy program bound to one pair of tensors and a staging buffer: nothing is left to compute when a call comes.

    Attributes:
        sends, receives: per round.
        local: what the rank has already.
    """

    program: CopyProgram
    sends: tuple[tuple[BoundTransfer, ...], ...]
    receives: tuple[tuple[BoundTransfer, ...], ...]
    local: Copies


def bind(
    program: CopyProgram, source: torch.Tensor | None, destination: torch.Tensor | None, staging: torch.Tensor
) -> Binding:
    """Make everything that a run needs.

    Args:
        program: made for tensors with these strides and alignments.
        source, destination: the rank's tensors, or None.
        staging: uint8, at least ``program.staging_nbytes``.
    """
    buffers: dict[tuple[int, int], torch.Tensor] = {}
    itemsize = program.dtypes[1].itemsize

    def buffer(transfer: StagedTransfer, tensor: torch.Tensor | None) -> torch.Tensor:
        if transfer.relay:
            return buffers[transfer.key]
        if transfer.direct_offset is not None:
            assert tensor is not None
            found: torch.Tensor = view(tensor, (transfer.numel,), transfer.direct_offset, (1,)).view(torch.uint8)
        else:
            assert transfer.staging_offset is not None
            found = staging.narrow(0, transfer.staging_offset, transfer.numel * itemsize)
        buffers[transfer.key] = found
        return found

    def bound(tensor: torch.Tensor | None, is_send: bool) -> Iterator[tuple[BoundTransfer, ...]]:
        steps = program.sends if is_send else program.receives
        for step, copies in zip(steps, _copies(program, tensor, staging, is_send), strict=True):
            yield tuple(
                BoundTransfer(t.peer, buffer(t, tensor), before_or_after)
                for t, before_or_after in zip(step, copies, strict=True)
            )

    receives = tuple(bound(destination, False))
    return Binding(program, tuple(bound(source, True)), receives, _local(program, source, destination))


def _copies(
    program: CopyProgram, tensor: torch.Tensor | None, staging: torch.Tensor, packs: bool
) -> Iterator[tuple[Copies, ...]]:
    """What to copy at each transfer of each round of sends (``packs``) or receives."""
    steps = program.sends if packs else program.receives
    if tensor is None:
        yield from ((NOTHING,) * len(step) for step in steps)
    elif kernels.serves(staging.device, program.dtypes[0 if packs else 2], program.dtypes[1]):
        of_sends, of_receives, _ = program.kernel_tables
        for step, table in zip(steps, of_sends if packs else of_receives, strict=True):
            of_step: list[Copies] = [NOTHING] * len(step)
            if len(table.boxes):
                of_step[0 if packs else -1] = KernelCopies(table, packs, tensor, staging)
            yield tuple(of_step)
    else:
        of_tensor, of_staging = InWords(tensor), InWords(staging.view(program.dtypes[1]))
        for step in steps:
            pairs = [paired_views(of_tensor, t.boxes, of_staging, t.staging_offset or 0) for t in step]
            yield tuple(
                _copies_of(tuple((packed, part) if packs else (part, packed) for part, packed in of_transfer))
                for of_transfer in pairs
            )


def _local(program: CopyProgram, source: torch.Tensor | None, destination: torch.Tensor | None) -> Copies:
    if not program.copies or source is None or destination is None:
        return NOTHING
    if kernels.serves(source.device, source.dtype, destination.dtype):
        return KernelCopies(program.kernel_tables[2], True, source, destination)
    pairs = paired_views(InWords(source), program.copies, InWords(destination))
    return _copies_of(tuple((into, out_of) for out_of, into in pairs))
