"""Pack and unpack in plain torch: the definition of both, and the path for tensors that no kernel serves."""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Protocol

import torch

from tricomm.kernels.boxes import Boxes
from tricomm.kernels.table import WIDEST_NBYTES, StridedBox, coalesced, widened

Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""(into, out of): what ``into.copy_(out_of)`` is to be called on, in order."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BoxTable(Protocol):
    """What pack and unpack read of a table."""

    @property
    def boxes(self) -> Boxes:
        """Which parts of which tensors go where."""

    @property
    def cast(self) -> tuple[torch.dtype, torch.dtype] | None:
        """(dtype of the tensors, dtype of the buffers), or None to move bits."""


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its element size, so that a copy moves bits (complex128 stays as it is)."""
    word = _WORDS.get(tensor.element_size())
    return tensor if word is None or tensor.dtype == word else tensor.view(word)


def view(tensor: torch.Tensor, shape: Sequence[int], offset: int, strides: Sequence[int]) -> torch.Tensor:
    """A strided view that starts ``offset`` elements behind the tensor's first."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def alignment_nbytes(*tensors: torch.Tensor) -> int:
    """The power of 2, up to 16 bytes, at a multiple of which all the tensors begin, in memory and in their storage."""
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr() | int(tensor.storage_offset()) * tensor.element_size()
    return bits & -bits


class InWords(dict[int, torch.Tensor]):
    """Tensors that begin where one begins, by the bytes of their integers; 0 is the tensor itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__({0: tensor})

    def __missing__(self, nbytes: int) -> torch.Tensor:
        tensor = self[0]
        if nbytes == tensor.element_size():
            found = words(tensor)
        else:
            # Views of it start from one word: the storage, not the shape, is what limits them.
            one_word = view(tensor, (max(1, nbytes // tensor.element_size()),), 0, (1,))
            found = words(one_word).view(_WORDS[nbytes])
        self[nbytes] = found
        return found


def paired_views(
    tensor: InWords, boxes: Sequence[StridedBox], packed: InWords, base_nbytes: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(view of the tensor, view of the buffer) for each box: what one copies to the other.

    Args:
        tensor, packed: any strides; their dtypes matter only for boxes that are cast.
        boxes: where each box lies on both sides; their words must suit the alignment of both.
        base_nbytes: where in ``packed`` the boxes' packed offsets count from.
    """
    for box in boxes:
        of_packed = packed[box.word_nbytes]
        base = base_nbytes // of_packed.element_size()
        yield (
            view(tensor[box.word_nbytes], box.shape, box.tensor_offset, box.tensor_strides),
            view(of_packed, box.shape, base + box.packed_offset, box.packed_strides),
        )


def pack(tensors: Sequence[torch.Tensor], table: BoxTable, out: Sequence[torch.Tensor]) -> None:
    """Copy the boxes of a table out of tensors into packed buffers, with torch's cast if it has one."""
    for of_tensor, of_packed in _pairs(tensors, table, out):
        of_packed.copy_(of_tensor)


def unpack(buffers: Sequence[torch.Tensor], table: BoxTable, tensors: Sequence[torch.Tensor]) -> None:
    """The reverse of :func:`pack`. Boxes must not overlap in the tensors."""
    for of_tensor, of_packed in _pairs(tensors, table, buffers):
        of_tensor.copy_(of_packed)


def _pairs(
    tensors: Sequence[torch.Tensor], table: BoxTable, buffers: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The views of each box, one after the other."""
    boxes = table.boxes
    if table.cast is not None:
        buffers = [buffer.view(table.cast[1]) for buffer in buffers]
    columns = (boxes.tensor, boxes.buffer, boxes.shape, boxes.tensor_itemsize, boxes.packed_itemsize)
    places = (boxes.tensor_place, boxes.tensor_strides, boxes.packed_place, boxes.packed_strides)
    every = zip(*(column.tolist() for column in (*columns, *places)), strict=True)
    for tensor, buffer, shape, size, packed_size, place, strides, packed_place, packed_strides in every:
        if 0 in shape:
            continue
        sides = tensors[tensor], buffers[buffer]
        if table.cast is None:
            # Words of elements, or of parts of them where an address or a stride is no multiple of an element.
            alignment = alignment_nbytes(*sides)
            word = gcd(size, WIDEST_NBYTES, alignment, place, packed_place, *strides, *packed_strides)
            extents, first, second = coalesced(
                (*shape, size // word),
                [stride // word for stride in (*strides, word)],
                [stride // word for stride in (*packed_strides, word)],
            )
            box = widened(StridedBox(extents, place // word, first, packed_place // word, second, word), alignment)
        else:
            extents, first, second = coalesced(
                shape, [stride // size for stride in strides], [stride // packed_size for stride in packed_strides]
            )
            box = StridedBox(extents, place // size, first, packed_place // packed_size, second, 0)
        yield from paired_views(InWords(sides[0]), (box,), InWords(sides[1]))
