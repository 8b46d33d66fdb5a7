"""What is kept of a call for the next one: its tensors, bound, and how they were."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tricomm.packing.holdings import Tensors
from tricomm.packing.runs import InPlace
from tricomm.transport.base import Arenas
from tricomm.transport.moving.steps import Bound

StagingProvider = Callable[[int], torch.Tensor]
"""Gives the staging buffer: a uint8 tensor of at least so many bytes, valid until the next call."""

Way = tuple[tuple[int, int], InPlace, Arenas]
"""The depth of a transport, where it takes more than buffers, and where both ranks have memory."""

Reference: TypeAlias = "weakref.ref[torch.Tensor]"


@dataclass(frozen=True, slots=True)
class CachedBinding:
    """The binding of the last call, good for the same tensors in the same place. It does not keep them alive."""

    tensors: Sequence[tuple[Reference, int, tuple[int, ...]]]
    staging: torch.Tensor
    staging_nbytes: int
    way: Way
    bound: Bound

    def is_of(self, sources: Tensors, destinations: Tensors, staging: StagingProvider, way: Way) -> bool:
        """Whether a call with these may use the binding."""
        every = (*sources, *destinations)
        if len(self.tensors) != len(every):
            return False
        # Where a tensor's elements are, and its strides, may change under the same object (set_, data).
        for tensor, (reference, address, strides) in zip(every, self.tensors, strict=True):
            if reference() is not tensor or tensor.data_ptr() != address or tensor.stride() != strides:
                return False
        return self.stands(staging, way)

    def stands(self, staging: StagingProvider, way: Way) -> bool:
        """Whether all but the tensors is what it was."""
        return self.way == way and (not self.staging_nbytes or staging(self.staging_nbytes) is self.staging)


class Unchanged:
    """A tensor that was checked, and says whether one that is given is the same, and as it was. It does not keep it.

    Args:
        tensor: plain and dense, of host memory.
        reference: to it.

    Attributes:
        has_version: whether autograd is told when it is written.
    """

    __slots__ = ("_address", "_dtype", "_is_complex", "_kind", "_reference", "_shape", "_strides", "has_version")

    def __init__(self, tensor: torch.Tensor, reference: Reference) -> None:
        self._reference, self._kind = reference, type(tensor)
        self._address, self._strides = tensor.data_ptr(), tensor.stride()
        self._shape, self._dtype, self._is_complex = tensor.shape, tensor.dtype, tensor.is_complex()
        self.has_version = not tensor.is_inference()

    def is_same(self, given: Any) -> bool:
        """Whether a call may take this for it without another look: all that may change under the same object."""
        return (
            given is self._reference()
            and type(given) is self._kind
            and given.data_ptr() == self._address
            and given.stride() == self._strides
            and given.shape == self._shape
            and given.dtype is self._dtype
            and not (given.requires_grad or given.is_neg() or (self._is_complex and given.is_conj()))
        )


class Kept:
    """What one rank keeps of its calls, as long as the tensors are there.

    Attributes:
        bindings: by the number of the move.
        is_bound_again: whether the last call found its binding here.
        repeat: the call that may come again, see tricomm.resharder.repeat.
    """

    __slots__ = ("__weakref__", "bindings", "is_bound_again", "repeat")

    def __init__(self) -> None:
        self.bindings: dict[int, CachedBinding] = {}
        self.is_bound_again = False
        self.repeat: Any = None

    def forget(self, index: int) -> None:
        """One of the tensors of a move is another, or gone."""
        self.repeat = None
        self.bindings.pop(index, None)

    def forgetting(self, index: int) -> Callable[[object], None]:
        """What references to the tensors of a move call when one is gone."""
        weak = weakref.ref(self)  # what is kept holds those, and would else keep itself

        def forget(_: object) -> None:
            kept = weak()
            if kept is not None:
                kept.forget(index)

        return forget

    def clear(self) -> None:
        """Forget all."""
        self.repeat = None
        self.bindings.clear()
