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


def pack(tensor: torch.Tensor, boxes: Sequence[StridedBox], packed: torch.Tensor) -> None:
    """Copy boxes of a tensor into a contiguous 1-d buffer, with torch's cast if the dtypes differ.

    Args:
        tensor: any strides; dtype of the source. For a bit-exact move pass ``words`` of both.
        boxes: where each box lies on both sides.
        packed: 1-d, contiguous.
    """
    for box in boxes:
        view(packed, box.shape, box.packed_offset, box.packed_strides).copy_(
            view(tensor, box.shape, box.tensor_offset, box.tensor_strides)
        )


def unpack(packed: torch.Tensor, boxes: Sequence[StridedBox], tensor: torch.Tensor) -> None:
    """The reverse of :func:`pack`. Boxes must not overlap in the tensor."""
    for box in boxes:
        view(tensor, box.shape, box.tensor_offset, box.tensor_strides).copy_(
            view(packed, box.shape, box.packed_offset, box.packed_strides)
        )
