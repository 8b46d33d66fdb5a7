"""Pack and unpack in plain torch: the definition of both, and the path for tensors that no kernel serves."""

from collections.abc import Sequence

import torch
from tricomm.kernels.table import StridedBox

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its element size, so that a copy moves bits (complex128 stays as it is)."""
    word = _WORDS.get(tensor.element_size())
    return tensor if word is None or tensor.dtype == word else tensor.view(word)


def view(tensor: torch.Tensor, shape: Sequence[int], offset: int, strides: Sequence[int]) -> torch.Tensor:
    """A strided view that starts ``offset`` elements behind the tensor's first."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


class BoundBoxes:
    """Boxes bound to one packed buffer, whose views are made once and serve any number of tensors.

    Args:
        boxes: where each box lies on both sides. They must not overlap in a tensor that is unpacked into.
        packed: 1-d, contiguous.
    """

    def __init__(self, boxes: Sequence[StridedBox], packed: torch.Tensor) -> None:
        self._pairs = tuple(
            (
                view(packed, box.shape, box.packed_offset, box.packed_strides),
                box.shape,
                box.tensor_strides,
                box.tensor_offset,
            )
            for box in boxes
        )

    def pack(self, tensor: torch.Tensor) -> None:
        """Copy the boxes of a tensor into the buffer, with torch's cast if the dtypes differ."""
        first = tensor.storage_offset()
        for packed, shape, strides, offset in self._pairs:
            packed.copy_(tensor.as_strided(shape, strides, first + offset))

    def unpack(self, tensor: torch.Tensor) -> None:
        """Copy the buffer into the boxes of a tensor, with torch's cast if the dtypes differ."""
        first = tensor.storage_offset()
        for packed, shape, strides, offset in self._pairs:
            tensor.as_strided(shape, strides, first + offset).copy_(packed)


def pack(tensor: torch.Tensor, boxes: Sequence[StridedBox], packed: torch.Tensor) -> None:
    """Copy boxes of a tensor of any strides into a contiguous 1-d buffer; to move bits pass ``words`` of both."""
    BoundBoxes(boxes, packed).pack(tensor)


def unpack(packed: torch.Tensor, boxes: Sequence[StridedBox], tensor: torch.Tensor) -> None:
    """The reverse of :func:`pack`."""
    BoundBoxes(boxes, packed).unpack(tensor)
