"""Boxes of many tensors and their places in packed buffers, as columns of integers: what a table is made from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomm.kernels.table import StridedBox

PACKED_ALIGNMENT_NBYTES = 16
"""Where ``boxes_in_order`` lets boxes begin in a buffer; the gaps are part of the wire format."""

Columns = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """n boxes of at most ``rank`` dims, row-major; extents in elements, places and strides in bytes, all int64.

    Attributes:
        shape: (n, rank); boxes of fewer dims have leading 1s.
        tensor, buffer: (n,), which tensor and which packed buffer.
        tensor_place, packed_place: (n,), from the first element of the tensor, and of the buffer, to that of the box.
        tensor_strides, packed_strides: (n, rank).
        tensor_itemsize, packed_itemsize: (n,); they differ only where elements are cast.
    """

    shape: Columns
    tensor: Columns
    tensor_place: Columns
    tensor_strides: Columns
    tensor_itemsize: Columns
    buffer: Columns
    packed_place: Columns
    packed_strides: Columns
    packed_itemsize: Columns

    def __len__(self) -> int:
        return len(self.shape)

    def reach_nbytes(self, packed: bool) -> list[int]:
        """How many bytes from its first element on each tensor, or buffer, must have."""
        place, strides, itemsize, which = (
            (self.packed_place, self.packed_strides, self.packed_itemsize, self.buffer)
            if packed
            else (self.tensor_place, self.tensor_strides, self.tensor_itemsize, self.tensor)
        )
        reach = np.where((self.shape == 0).any(1), 0, place + ((self.shape - 1) * strides).sum(1) + itemsize)
        of_each = np.zeros(int(which.max(initial=-1)) + 1, np.int64)
        np.maximum.at(of_each, which, reach)
        return of_each.tolist()


def boxes_in_order(
    tensors: Sequence[torch.Tensor],
    which: Columns,
    starts: Columns,
    shapes: Columns,
    packed_dtype: torch.dtype | None = None,
) -> tuple[Boxes, int]:
    """Boxes packed row-major one behind the other into one buffer, each from a multiple of 16 bytes on.

    Args:
        tensors: any strides and dtypes.
        which: (n,), the tensor of each box.
        starts, shapes: (n, rank), of each box in its tensor, with leading zeros and ones where the tensor has fewer
            dims.
        packed_dtype: what elements are cast to; None leaves each as it is.

    Returns:
        The boxes, and the bytes that the buffer must have.

    Raises:
        ValueError: a box reaches out of its tensor.
    """
    which, starts, shapes = (np.asarray(column, np.int64) for column in (which, starts, shapes))
    rank = shapes.shape[1]
    extents, strides, itemsizes = _of_tensors(tensors, rank)
    outside = (starts < 0) | (shapes < 0) | (starts + shapes > extents[which])
    if outside.any():
        box = int(np.flatnonzero(outside.any(1))[0])
        raise ValueError(
            f"box {box} from {tuple(starts[box].tolist())} of shape {tuple(shapes[box].tolist())} reaches out of "
            f"tensor {which[box]} of shape {tuple(tensors[which[box]].shape)}; give boxes inside of their tensors"
        )
    itemsize = itemsizes[which]
    packed_itemsize = itemsize if packed_dtype is None else np.full_like(itemsize, packed_dtype.itemsize)
    packed_strides = np.empty_like(shapes)
    step = packed_itemsize.copy()
    for dim in reversed(range(rank)):
        packed_strides[:, dim] = step
        step *= shapes[:, dim]
    ends = np.cumsum(-(-step // PACKED_ALIGNMENT_NBYTES) * PACKED_ALIGNMENT_NBYTES)
    places = np.concatenate([np.zeros(1, np.int64), ends])
    tensor_strides = strides[which] * itemsize[:, None]
    boxes = Boxes(
        shapes,
        which,
        (starts * tensor_strides).sum(1),
        tensor_strides,
        itemsize,
        np.zeros_like(which),
        places[:-1],
        packed_strides,
        packed_itemsize,
    )
    return boxes, int(places[-1])


class PlacedBox(NamedTuple):
    """A box, and where it belongs.

    Attributes:
        box: in words.
        tensor: number of its tensor.
        buffer: number of its packed buffer.
        place_nbytes: the byte of the buffer that its packed offset counts from.
    """

    box: StridedBox
    tensor: int = 0
    buffer: int = 0
    place_nbytes: int = 0


def boxes_of(placed: Sequence[PlacedBox], cast: tuple[int, int] = (0, 0)) -> Boxes:
    """Boxes of some tensors and buffers.

    Args:
        placed: the boxes.
        cast: bytes of an element of the tensors and of the buffers, for boxes whose words are cast.
    """
    count = len(placed)
    rank = max((len(one.box.shape) for one in placed), default=0)

    def each(values: Iterable[int]) -> Columns:
        return np.fromiter(values, np.int64, count)

    units = each(one.box.word_nbytes for one in placed)
    tensor_units, packed_units = (np.where(units > 0, units, size) for size in cast)
    return Boxes(
        _columns([one.box.shape for one in placed], rank, 1),
        each(one.tensor for one in placed),
        each(one.box.tensor_offset for one in placed) * tensor_units,
        _columns([one.box.tensor_strides for one in placed], rank, 0) * tensor_units[:, None],
        tensor_units,
        each(one.buffer for one in placed),
        each(one.box.packed_offset for one in placed) * packed_units + each(one.place_nbytes for one in placed),
        _columns([one.box.packed_strides for one in placed], rank, 0) * packed_units[:, None],
        packed_units,
    )


def _of_tensors(tensors: Sequence[torch.Tensor], rank: int) -> tuple[Columns, Columns, Columns]:
    """(len(tensors), rank) extents and strides, with ones and zeros in front, and bytes of an element."""
    of = torch.Tensor
    # One pass, as each tensor is new to the cache, and no list of tuples, which the garbage collector would go
    # through again and again.
    heads = zip(map(of.dim, tensors), map(of.element_size, tensors), strict=True)
    parts = chain.from_iterable(zip(heads, map(of.size, tensors), map(of.stride, tensors), strict=True))
    flat = np.fromiter(chain.from_iterable(parts), np.int64)
    width = 2 + 2 * rank
    if flat.size == width * len(tensors) and (flat[::width] == rank).all():
        rows = flat.reshape(len(tensors), width)
        return rows[:, 2 : 2 + rank], rows[:, 2 + rank :], rows[:, 1]
    return (
        _columns([tensor.shape for tensor in tensors], rank, 1),
        _columns([tensor.stride() for tensor in tensors], rank, 0),
        np.fromiter(map(of.element_size, tensors), np.int64, len(tensors)),
    )


def _columns(rows: Sequence[Sequence[int]], rank: int, fill: int) -> Columns:
    """(len(rows), rank) from tuples, filled in front."""
    rows = [(fill,) * (rank - len(row)) + tuple(row) for row in rows]
    return np.array(rows, np.int64).reshape(len(rows), rank)
