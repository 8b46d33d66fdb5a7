"""What is kept of a call for the next one: its tensors, bound, and how they were."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._C._dynamo.guards import TensorGuards

from tricomm.packing.holdings import Tensors
from tricomm.packing.runs import InPlace
from tricomm.transport.base import Arenas
from tricomm.transport.moving.steps import Bound

StagingProvider = Callable[[int], torch.Tensor]
"""Gives the staging buffer: a uint8 tensor of at least so many bytes, valid until the next call."""

Way = tuple[tuple[int, int], InPlace, Arenas]
"""The depth of a transport, where it takes more than buffers, and where both ranks have memory."""

_guards: Any = TensorGuards  # whose stub does not name the tensors that it takes

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

    Torch's guards of compiled code compare, in one call where each getter would be one: kind, dtype, shape, strides,
    requires_grad, and whether a call would go another way (negated, conjugated, of inference, in a transform).

    Args:
        tensor: plain and dense, of host memory.
        reference: to it.

    Attributes:
        has_version: whether autograd is told when it is written.
    """

    __slots__ = ("_address", "_is_as_it_was", "_reference", "has_version")

    def __init__(self, tensor: torch.Tensor, reference: Reference) -> None:
        self._reference, self._address = reference, tensor.data_ptr()
        sizes, strides = [[*tensor.shape]], [[*tensor.stride()]]
        self._is_as_it_was = _guards(tensor, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.has_version = not tensor.is_inference()

    def is_same(self, given: Any) -> bool:
        """Whether a call may take this for it without another look: all that may change under the same object."""
        known: Any = self._reference()
        return given is known and given.data_ptr() == self._address and self._is_as_it_was(given) is True


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
