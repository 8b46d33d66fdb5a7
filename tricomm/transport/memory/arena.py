"""An arena: memory without a name that two processes share, handed over a socket, for which nobody needs a permission.

It consists of slabs, each of which holds one transfer at a time and is used again when that is done. Nothing of it
outlives the two processes.
"""

import fcntl
import mmap
import os
from typing import NamedTuple

import torch

PAGE_NBYTES = 4096


class SharedSlab(NamedTuple):
    """A slab, mapped in this process.

    Attributes:
        number: of the sender's slabs, from 1 on.
        memory: uint8; keeps the mapping.
    """

    number: int
    memory: torch.Tensor


def new_slab(number: int, nbytes: int) -> tuple[SharedSlab, int]:
    """A slab for at least so many bytes, and its file, which the caller closes when it is handed over."""
    size = max(PAGE_NBYTES, 1 << (nbytes - 1).bit_length())
    file = os.memfd_create("tricomm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size)
        # It never shrinks: to read behind its end would end the other process by a signal.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mapped_slab(number, file, size), file
    except BaseException:
        os.close(file)
        raise


def mapped_slab(number: int, file: int, nbytes: int) -> SharedSlab:
    """The slab that a file is, mapped here.

    Raises:
        ValueError: a file that may still shrink, or is too small.
    """
    if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(file).st_size < nbytes:
        raise ValueError(f"slab {number} is no sealed file of {nbytes} bytes")
    return SharedSlab(number, torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8))


class Arena:
    """The sender's slabs for one link."""

    def __init__(self) -> None:
        self._free: list[SharedSlab] = []
        self._count = 0

    def take(self, nbytes: int) -> tuple[SharedSlab, int | None]:
        """A free slab for so many bytes, and its file if it is new and is to be handed over."""
        fitting = [slab for slab in self._free if slab.memory.numel() >= nbytes]
        if fitting:
            slab = min(fitting, key=lambda one: one.memory.numel())
            self._free = [one for one in self._free if one is not slab]
            return slab, None
        self._count += 1
        return new_slab(self._count, nbytes)

    def give_back(self, slab: SharedSlab) -> None:
        """Its transfer is done."""
        self._free.append(slab)
