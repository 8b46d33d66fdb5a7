"""Where the bytes of a chunk are in tensors, for transports that need no copy of them in one buffer.

*Runs* are for whoever reads them there. *Pieces* are parts of equal size, but for the last, that are copied one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch

from tricomm.kernels.table import StridedBox
from tricomm.packing.staging import Direction, TensorBox

PIECE_NBYTES = 1 << 21
"""Of each piece but the last; the same on all ranks. A chunk of at most so many bytes is not cut. Pieces stay in the
caches from their packing to their unpacking, and a word never lies in two of them."""

MEMORIES_KEPT = 4
"""In which a piece knows how it is copied: as many as links that send the same take turns with."""

MIN_RUN_NBYTES = 2048
"""On average: shorter runs are packed, as the kernel takes longer to find each than to copy it."""

ROW_NBYTES = 16
"""Of a run in a table, which is the kernel's iovec: an address and a number of bytes."""


class InPlace(NamedTuple):
    """Between which ranks what a transfer moves may be named in place of a buffer.

    Attributes:
        runs: where it may be runs of memory, as far as they are long.
        pieces: where it may be pieces, if it is more than one.
    """

    runs: frozenset[Direction] = frozenset()
    pieces: frozenset[Direction] = frozenset()


NOTHING_IN_PLACE = InPlace()


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


Copy = Callable[[], None]
"""Copies one piece, in the direction of its chunk."""


class Pieces:
    """A chunk as pieces, each copied between tensors and memory where it is in one run.

    Args:
        boxes: of the chunk, whose packed places count from its beginning.
        nbytes: of the chunk.
        copies: gives what copies some boxes, whose packed places count from a byte before or at the memory's first.
    """

    def __init__(
        self,
        boxes: Sequence[TensorBox],
        nbytes: int,
        copies: Callable[[Sequence[TensorBox], torch.Tensor, int], Copy],
    ) -> None:
        self.nbytes = nbytes
        self._copies = copies
        self._boxes: list[list[TensorBox]] = [[] for _ in range(0, nbytes, PIECE_NBYTES)]
        for one in boxes:
            for index, box in cut(one.box, PIECE_NBYTES // (one.box.word_nbytes or one.packed.itemsize)):
                self._boxes[index].append(one._replace(box=box))
        self._made: list[dict[int, tuple[torch.Tensor, Copy]]] = [{} for _ in self._boxes]
        """Of each piece by the number of the memory, which is kept so that no other has it."""

    def copy(self, index: int, memory: torch.Tensor) -> None:
        """Copy a piece, into the memory or out of it, uint8; fastest if the memory is one of few that it had before."""
        of_piece = self._made[index]
        made = of_piece.get(id(memory))
        if made is None:
            if len(of_piece) == MEMORIES_KEPT:
                of_piece.clear()
            made = of_piece[id(memory)] = memory, self._copies(self._boxes[index], memory, -index * PIECE_NBYTES)
        made[1]()


def cut(box: StridedBox, size: int) -> Iterator[tuple[int, StridedBox]]:
    """The parts of a box by the piece in which they are packed, when each piece has ``size`` of its words.

    Example:
        >>> box = StridedBox((3, 4), 0, (10, 1), 0, (4, 1), 1)
        >>> [(piece, part.shape, part.tensor_offset) for piece, part in cut(box, 6)]
        [(0, (4,), 0), (0, (2,), 10), (1, (2,), 12), (1, (4,), 20)]
    """
    shape, tensor_strides, packed_strides = [*box.shape], box.tensor_strides, box.packed_strides
    # The dim whose slices lie farthest from each other; of those, as many as are whole in a piece stay together.
    dim = max(range(len(shape)), key=packed_strides.__getitem__, default=-1)
    others = (*range(dim), *range(dim + 1, len(shape)))
    width = 1 + sum((shape[at] - 1) * packed_strides[at] for at in others)
    left, tensor_offset, packed_offset = (shape[dim] if shape else 1), box.tensor_offset, box.packed_offset
    while left:
        index = packed_offset // size
        step, other_step = (packed_strides[dim], tensor_strides[dim]) if shape else (1, 1)
        whole = min(left, ((index + 1) * size - packed_offset - width) // step + 1)
        if whole > 1:
            part = (*shape[:dim], whole, *shape[dim + 1 :])
            yield index, box._replace(shape=part, tensor_offset=tensor_offset, packed_offset=packed_offset)
        else:
            one = StridedBox(
                tuple(shape[at] for at in others),
                tensor_offset,
                tuple(tensor_strides[at] for at in others),
                packed_offset,
                tuple(packed_strides[at] for at in others),
                box.word_nbytes,
            )
            if whole == 1:
                yield index, one
            else:
                yield from cut(one, size)
                whole = 1
        left -= whole
        tensor_offset += whole * other_step
        packed_offset += whole * step
