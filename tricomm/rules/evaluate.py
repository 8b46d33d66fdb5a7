"""The pieces of a bound map carried out on whole tensors in one process: the definition of what a map means.

Takes numpy arrays and torch tensors alike, by what they have in common, and imports no torch.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.dtype import dtype_name
from tricomm.rules.boxes import Piece
from tricomm.rules.checks import Shape


def evaluated(
    where: str, shape: Shape, dtype: str | None, pieces: tuple[Piece, ...], arrays: list[Any], like: Any
) -> Any:
    """A destination array.

    Args:
        where: named in errors.
        shape: of the destination.
        dtype: of the destination, or None for that of its first source.
        pieces: what it consists of.
        arrays: its sources, in the order in which the pieces count them.
        like: an array of the kind and on the device that is wanted.
    """
    if dtype is None and not arrays:
        raise SpecError(f"{where} is made of fills alone and has no dtype; write fill(...).to('float32') or the like")
    result = _empty(where, shape, dtype or dtype_name(arrays[0].dtype), arrays[0] if arrays else like)
    for piece in pieces:
        there = _view(result, piece.shape, piece.start, [(digit.dim, digit.step) for digit in piece.digits])
        if piece.tensor is None:
            there[...] = piece.value
        else:
            steps = [(digit.source_dim, digit.source_step) for digit in piece.digits]
            there[...] = _view(arrays[piece.tensor], piece.shape, piece.source_start, steps)
    return result


def described(arrays: Mapping[str, Any]) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shape and dtype of every array."""
    for name, array in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ArgumentError(f"source {name!r} is {array!r}; give a numpy array or a torch tensor")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return shapes, {name: dtype_name(array.dtype) for name, array in arrays.items()}


def checked(arrays: Mapping[str, Any], name: str, shape: Shape, dtype: str | None) -> Any:
    """One of some arrays, of the shape and dtype that a map was bound to."""
    if name not in arrays:
        raise SpecError(f"source {name!r} is missing among the {len(arrays)} arrays; pass it by that name")
    array = np.asarray(arrays[name]) if isinstance(arrays[name], np.generic) else arrays[name]
    if tuple(array.shape) != shape or (dtype is not None and dtype_name(array.dtype) != dtype):
        raise SpecError(
            f"source {name!r} is {tuple(array.shape)} {dtype_name(array.dtype)}, but the map was bound to "
            f"{shape} {dtype or ''}; bind it anew".replace(" ;", ";")
        )
    return array.detach() if hasattr(array, "detach") else array


def _empty(where: str, shape: Shape, dtype: str, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        try:
            return np.empty(shape, np.dtype(dtype))
        except TypeError:
            raise SpecError(f"{where} has dtype {dtype}, which numpy has not; evaluate torch tensors instead") from None
    library = sys.modules[type(like).__module__.partition(".")[0]]
    return like.new_empty(shape, dtype=getattr(library, dtype))


def _view(array: Any, shape: Shape, start: Shape, steps: list[tuple[int, int]]) -> Any:
    """The elements of a piece in an array of any strides. A negative dim stays where it is."""
    if isinstance(array, np.ndarray):
        strides = [0 if dim < 0 else step * array.strides[dim] for dim, step in steps]
        begin: Any = array[(*[slice(first, None) for first in start], Ellipsis)]  # type: ignore[arg-type]
        return np.lib.stride_tricks.as_strided(begin, shape, strides)
    stride = array.stride()
    offset = array.storage_offset() + sum(map(int.__mul__, start, stride))
    return array.as_strided(shape, [0 if dim < 0 else step * stride[dim] for dim, step in steps], offset)
