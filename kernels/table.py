"""The table of a pack or unpack: boxes of a strided tensor and their places in a packed buffer."""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

WIDEST_NBYTES = 8
"""Of the integers that torch has."""


class StridedBox(NamedTuple):
    """A box of a tensor and of a packed buffer, in words, with as few dims as possible.

    Attributes:
        shape: extents; () for one word.
        tensor_offset, tensor_strides: where the box lies in the tensor, from its first element on.
        packed_offset, packed_strides: where it lies in the packed buffer.
        word_nbytes: bytes of a word; 0 if words are elements that are cast.
    """

    shape: tuple[int, ...]
    tensor_offset: int
    tensor_strides: tuple[int, ...]
    packed_offset: int
    packed_strides: tuple[int, ...]
    word_nbytes: int

    @property
    def is_one_run(self) -> bool:
        """Whether the box is contiguous on both sides, so that it needs no packing."""
        return len(self.shape) == 0 or (
            len(self.shape) == 1 and self.tensor_strides == (1,) and self.packed_strides == (1,)
        )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def offset_of(start: Sequence[int], strides: Sequence[int]) -> int:
    """The offset of a coordinate, in elements."""
    return sum(s * stride for s, stride in zip(start, strides, strict=True))


def coalesced(
    shape: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, strides, strides) of the same elements in the same order, without dims of one element and with
    neighbouring dims joined where both sides allow it.
    """
    dims: list[tuple[int, int, int]] = []
    for extent, a, b in zip(shape, first, second, strict=True):
        if extent == 1:
            continue
        if dims and dims[-1][1] == a * extent and dims[-1][2] == b * extent:
            dims[-1] = (dims[-1][0] * extent, a, b)
        else:
            dims.append((extent, a, b))
    return (
        tuple(dim[0] for dim in dims),
        tuple(dim[1] for dim in dims),
        tuple(dim[2] for dim in dims),
    )


def strided_box(
    shape: Sequence[int],
    tensor_start: Sequence[int],
    tensor_strides: Sequence[int],
    packed_base: int,
    packed_start: Sequence[int],
    packed_shape: Sequence[int],
    itemsize: int,
) -> StridedBox:
    """The box at ``tensor_start`` of a strided tensor and at ``packed_start`` of a row-major ``packed_shape``
    that begins at element ``packed_base`` of the buffer; all in elements, of ``itemsize`` bytes (0 if they are cast).
    """
    packed_strides = contiguous_strides(packed_shape)
    extents, first, second = coalesced(shape, tensor_strides, packed_strides)
    return StridedBox(
        extents,
        offset_of(tensor_start, tensor_strides),
        first,
        packed_base + offset_of(packed_start, packed_strides),
        second,
        itemsize,
    )


def widened(box: StridedBox, alignment_nbytes: int) -> StridedBox:
    """The same bytes in the widest integers, of 8 bytes at most, that places, strides and the run allow.

    Args:
        box: one whose words are moved as bits.
        alignment_nbytes: what the tensor's and the buffer's first elements are at a multiple of.
    """
    size = box.word_nbytes
    if size not in (1, 2, 4) or not box.shape or box.tensor_strides[-1] != 1 or box.packed_strides[-1] != 1:
        return box
    outer = (*box.tensor_strides[:-1], *box.packed_strides[:-1])
    times = gcd(
        WIDEST_NBYTES // size, alignment_nbytes // size, box.shape[-1], box.tensor_offset, box.packed_offset, *outer
    )
    if times == 1:
        return box
    shape, first, second = coalesced(
        (*box.shape[:-1], box.shape[-1] // times),
        (*(stride // times for stride in box.tensor_strides[:-1]), 1),
        (*(stride // times for stride in box.packed_strides[:-1]), 1),
    )
    return StridedBox(shape, box.tensor_offset // times, first, box.packed_offset // times, second, size * times)
