"""The Resharders of this process by a text that a graph can hold."""

import weakref
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch

_count_modes = torch._C._len_torch_dispatch_stack  # a call has no time to look it up

STANDING = frozenset(
    (
        "FakeTensorMode",
        "FunctionalTensorMode",
        "ProxyTorchDispatchMode",
        "_CachedTorchDispatchMode",
        "_CachingTorchDispatchMode",
    )
)
"""Modes of torch in which operators stand for what they do."""


class InGraph(NamedTuple):
    """What a graph has to know of a Resharder; constants, which torch.compile guards.

    Attributes:
        key: which one it is in this process.
        has_source: whether this rank is on the source mesh.
        has_result: whether this rank is on the destination mesh.
        has_gradient: whether all ranks are on both meshes, so that each has a part in the way back.
        shape, dtype, device: of this rank's result, or of an empty one.
        source_dtype: of what it gives.
        is_taped: whether its calls stand on a tape.
    """

    key: str
    has_source: bool
    has_result: bool
    has_gradient: bool
    shape: tuple[int, ...]
    dtype: Any
    device: Any
    source_dtype: Any
    is_taped: bool


@cache
def _movers() -> "weakref.WeakValueDictionary[str, Any]":
    return weakref.WeakValueDictionary()


@cache
def _numbers() -> "count[int]":
    return count()


def register(mover: Any) -> str:
    """Give a Resharder a key; it is forgotten with the Resharder."""
    key = f"mover {next(_numbers())}"
    _movers()[key] = mover
    return key


def find(key: str) -> Any:
    """The Resharder of a key.

    Raises:
        KeyError: it is gone; whoever compiled the graph is to keep it.
    """
    return _movers()[key]


def is_traced(tensor: Any) -> bool:
    """Whether a call is to go through the operator though nothing is compiled: its tensor is a fake one, or a mode of
    torch makes operators stand for what they do, as fake tensors and selective checkpoints do. Modes that only watch,
    such as counters, see what the call does itself; so does a meta tensor, which does not say that shapes are meant,
    while other ranks may wait for its data. Nor does a real tensor in a FakeTensorMode, which the mode refuses.
    """
    if _count_modes() and (standing := [mode for mode in _modes() if type(mode).__name__ in STANDING]):
        is_real = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        return not is_real or not all(_is_fake_mode(mode) and not mode.allow_non_fake_inputs for mode in standing)
    return type(tensor).__name__ == "FakeTensor"


def is_in_fake_mode() -> bool:
    """Whether a FakeTensorMode of torch is at work on this thread, in which nothing is copied."""
    return bool(_count_modes()) and any(map(_is_fake_mode, _modes()))


def _is_fake_mode(mode: Any) -> bool:
    return type(mode).__name__ == "FakeTensorMode"


def _modes() -> list[Any]:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes: list[Any] = _get_current_dispatch_mode_stack()
    return modes
