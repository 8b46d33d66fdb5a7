"""Staying: the source tensors of a Resharder that are the same in every call, where they were."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tricomm.errors import SpecError


class Where(NamedTuple):
    """Where the elements of a tensor are: the address of the first, and strides in elements."""

    address: int
    strides: tuple[int, ...]


class Staying:
    """The tensors of the first call of one rank, whose memory it keeps.

    Args:
        rank: whose.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._first: list[Where] | None = None
        self._storages: list[torch.UntypedStorage] = []

    def check(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Refuse tensors that are not those of the first call.

        Args:
            names: of them; "" of one that was given alone.
            tensors: those that were given.

        Raises:
            SpecError: one is elsewhere, or has other strides.
        """
        found = [Where(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        if self._first is None:
            self._first, self._storages = found, [tensor.untyped_storage() for tensor in tensors]
        if found == self._first:
            return
        name, before, now = next(one for one in zip(names, self._first, found, strict=True) if one[1] != one[2])
        which = f"tensor {name!r}" if name else "the tensor"
        what = "is at another address" if before.address != now.address else f"has strides {now.strides}"
        was = "" if before.address != now.address else f" {before.strides}"
        raise SpecError(
            f"{which} of rank {self._rank} {what} than in the first call{was}, and stays_in_place=True says that every "
            "call has the tensors of the first one, where they were; write into those (copy_), make another Resharder "
            "for others, or leave stays_in_place out"
        )

    def close(self) -> None:
        """Let go of the memory."""
        self._storages = []
