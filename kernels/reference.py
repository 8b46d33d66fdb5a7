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


def paired_views(
    tensor: torch.Tensor, boxes: Sequence[StridedBox], packed: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """(view of the tensor, view of the buffer) for each box: what one copies to the other.

    Args:
        tensor: any strides.
        boxes: where each box lies on both sides.
        packed: 1-d, contiguous.
    """
    return tuple(
        (
            view(tensor, box.shape, box.tensor_offset, box.tensor_strides),
            view(packed, box.shape, box.packed_offset, box.packed_strides),
        )
        for box in boxes
    )


def pack(tensor: torch.Tensor, boxes: Sequence[StridedBox], packed: torch.Tensor) -> None:
    """Copy boxes of a tensor into a contiguous 1-d buffer, with torch's cast; to move bits pass ``words`` of both."""
    for of_tensor, of_packed in paired_views(tensor, boxes, packed):
        of_packed.copy_(of_tensor)


def unpack(packed: torch.Tensor, boxes: Sequence[StridedBox], tensor: torch.Tensor) -> None:
    """The reverse of :func:`pack`. Boxes must not overlap in the tensor."""
    for of_tensor, of_packed in paired_views(tensor, boxes, packed):
        of_tensor.copy_(of_packed)
