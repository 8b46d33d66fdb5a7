"""Runs: where the bytes of a chunk are in tensors, for transports that need no copy of them in one piece."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch

from tricomm.packing.staging import TensorBox

MIN_RUN_NBYTES = 2048
"""On average: shorter runs are packed, as the kernel takes longer to find each than to copy it."""

ROW_NBYTES = 16
"""Of a run in a table, which is the kernel's iovec: an address and a number of bytes."""


class Runs(NamedTuple):
    """Runs of memory of this process, which together are some bytes in their order.

    Attributes:
        table: int64 [n, 2], contiguous: address and bytes of each.
        ends: where each ends among all the bytes.
    """

    table: torch.Tensor
    ends: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of all together."""
        return self.ends[-1]


def runs_in(table: torch.Tensor) -> Runs:
    """The runs that an int64 table [n, 2] names."""
    return Runs(table, tuple(accumulate(table[:, 1].tolist())))


def one_run(address: int, nbytes: int) -> Runs:
    """The bytes at an address."""
    return Runs(torch.tensor([[address, nbytes]], device="cpu"), (nbytes,))


def runs_of(boxes: Sequence[TensorBox], tensors: Sequence[torch.Tensor], nbytes: int) -> Runs | None:
    """The runs of a chunk in the tensors of one side, in packed order.

    Args:
        boxes: of the chunk, whose packed places count from its beginning.
        tensors: of the side.
        nbytes: of the chunk.

    Returns:
        None where boxes are cast, or their runs are shorter than MIN_RUN_NBYTES on average.
    """
    if not boxes or any(one.box.word_nbytes == 0 for one in boxes):
        return None
    if sum(prod(_outer(one)) for one in boxes) * MIN_RUN_NBYTES > nbytes:
        return None
    places = torch.cat([_placed(one, tensors[one.tensor].data_ptr()) for one in boxes])
    places = places[places[:, 0].argsort()]
    table = places[:, 1:].contiguous()
    found = runs_in(table)
    # Each run begins where the one before it ends, and all are the chunk: else it is not theirs alone.
    starts = torch.tensor([0, *found.ends[:-1]], device="cpu")
    return found if found.nbytes == nbytes and torch.equal(places[:, 0], starts) else None


def _has_long_rows(one: TensorBox) -> bool:
    """Whether the last dim of a box is contiguous on both sides."""
    box = one.box
    return bool(box.shape) and box.tensor_strides[-1] == box.packed_strides[-1] == 1


def _outer(one: TensorBox) -> tuple[int, ...]:
    """The extents over which the runs of a box are counted."""
    return one.box.shape[:-1] if _has_long_rows(one) else one.box.shape


def _placed(one: TensorBox, address: int) -> torch.Tensor:
    """(packed byte, address, bytes) of each run of a box, int64 [n, 3]."""
    box, outer = one.box, _outer(one)
    word = box.word_nbytes
    nbytes = word * (box.shape[-1] if _has_long_rows(one) else 1)
    places = torch.zeros(2, dtype=torch.int64, device="cpu")
    for extent, first, second in zip(outer, box.packed_strides, box.tensor_strides, strict=False):
        steps = torch.arange(extent, device="cpu")[:, None] * torch.tensor([first, second], device="cpu")
        places = (places[..., None, :] + steps).reshape(-1, 2)
    places = places.reshape(-1, 2) * word + torch.tensor(
        [box.packed_offset * word, address + box.tensor_offset * word], device="cpu"
    )
    return torch.cat([places, torch.full((len(places), 1), nbytes, device="cpu")], dim=1)
