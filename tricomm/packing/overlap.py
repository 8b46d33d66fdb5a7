"""Which elements of tensors share memory: a question of elements, not of the ranges of bytes that they span.

Column 0 to 3 and column 4 to 7 of one buffer span nearly the same bytes and share none.
"""

from collections.abc import Sequence

import numpy as np
import torch

MAX_WORK = 1 << 20
"""Steps that numpy may take to find an overlap; above, there is taken to be one."""


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """True if some byte belongs to an element of both tensors.

    Example:
        >>> buffer = torch.zeros(4, 8)
        >>> share_memory(buffer[:, :4], buffer[:, 4:]), share_memory(buffer[:, :5], buffer[:, 4:])
        (False, True)
    """
    if not first.numel() or not second.numel() or first.device != second.device:
        return False
    (low, high), (other_low, other_high) = _byte_range(first), _byte_range(second)
    if high <= other_low or other_high <= low:
        return False
    if first.is_contiguous() and second.is_contiguous():
        return True
    return _overlap(_addresses(first), _addresses(second))


def find_shared(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Find a tensor to be written that shares memory with another one, or with one that is read.

    Returns:
        its number, and that of the other, counted over ``written`` and then ``read``; None if there is none.

    Example:
        >>> buffer = torch.zeros(4, 8)
        >>> find_shared([buffer[:, :4], buffer[:, 4:]], []), find_shared([buffer[:2]], [buffer[2:], buffer[1:]])
        (None, (0, 2))
    """
    every = [*written, *read]
    ranges = sorted((*_byte_range(tensor), number) for number, tensor in enumerate(every) if tensor.numel())
    open_ranges: list[tuple[int, int]] = []  # (end, number) of those that reach beyond where the next one begins
    for low, high, number in ranges:
        open_ranges = [(end, other) for end, other in open_ranges if end > low]
        for _, other in open_ranges:
            first, second = sorted((number, other))
            if first < len(written) and share_memory(every[first], every[second]):
                return first, second
        open_ranges.append((high, number))
    return None


def has_shared_elements(tensor: torch.Tensor) -> bool:
    """True if two elements of a tensor share memory.

    Example:
        >>> buffer = torch.zeros(12)
        >>> [has_shared_elements(buffer.as_strided((2, 3), strides)) for strides in ((3, 2), (2, 1))]
        [False, True]
    """
    if not tensor.numel() or tensor.is_contiguous():
        return False
    dims = [(stride, extent) for stride, extent in zip(tensor.stride(), tensor.shape, strict=True) if extent > 1]
    dims.sort()
    reach = 0
    for stride, extent in dims:
        if stride <= reach:
            break
        reach += (extent - 1) * stride
    else:
        return False  # every stride steps over all that the smaller ones reach
    # Two elements share a place if their first different index is that of some dim: one has 1 or more there where the
    # other has 0 (the rest of the difference is in the dims behind), and both places are the same.
    for at, (stride, extent) in enumerate(dims):
        behind = dims[at + 1 :]
        ahead = _Addresses(stride, [(stride, extent - 1), *behind], 1)
        if _overlap(ahead, _Addresses(0, behind, 1)):
            return True
    return False


class _Addresses:
    """Memory that is described and never read, as numpy sees it.

    Args:
        start: address of the first element.
        dims: (stride, extent) of each, in bytes.
        nbytes: of an element.
    """

    def __init__(self, start: int, dims: Sequence[tuple[int, int]], nbytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (start + 1, True),  # numpy takes address 0 for none
            "typestr": f"|V{nbytes}",
            "shape": tuple(extent for _, extent in dims),
            "strides": tuple(stride for stride, _ in dims),
        }


def _addresses(tensor: torch.Tensor) -> _Addresses:
    nbytes = tensor.element_size()
    dims = [(stride * nbytes, extent) for stride, extent in zip(tensor.stride(), tensor.shape, strict=True)]
    return _Addresses(tensor.data_ptr(), [(stride, extent) for stride, extent in dims if extent > 1], nbytes)


def _overlap(first: _Addresses, second: _Addresses) -> bool:
    try:
        return bool(np.shares_memory(np.asarray(first), np.asarray(second), MAX_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Of one that has elements."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()
