"""An arena: memory without a name that two processes share, handed over a socket, for which nobody needs a permission.

It consists of slabs, each of which holds one transfer, or one piece of one, at a time and is used again when that is
done. Nothing of it outlives the two processes.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Any, NamedTuple

import torch

PAGE_NBYTES = 4096

# Linux's numbers: a Python that was built for an older C library has no names for them, and no memfd_create.
CLOSES_ON_EXEC, MAY_BE_SEALED = 1, 2
ADD_SEALS, GET_SEALS = 1033, 1034
SEALS_ITSELF, NEVER_SHRINKS, NEVER_GROWS = 1, 2, 4


class SharedSlab(NamedTuple):
    """A slab, mapped in this process.

    Attributes:
        number: of the sender's slabs, from 1 on.
        memory: uint8; keeps the mapping.
        address: of its first byte.
    """

    number: int
    memory: torch.Tensor
    address: int


def new_slab(number: int, nbytes: int) -> tuple[SharedSlab, int]:
    """A slab for at least so many bytes, and its file, which the caller closes when it is handed over."""
    size = _size_for(nbytes)
    file = new_file()
    try:
        os.ftruncate(file, size)
        # It never shrinks: to read behind its end would end the other process by a signal.
        fcntl.fcntl(file, ADD_SEALS, NEVER_SHRINKS | NEVER_GROWS | SEALS_ITSELF)
        return mapped_slab(number, file, size), file
    except BaseException:
        os.close(file)
        raise


def _size_for(nbytes: int) -> int:
    return max(PAGE_NBYTES, 1 << (nbytes - 1).bit_length())


def new_file() -> int:
    """A file without a name.

    Raises:
        OSError: the system has none.
    """
    make: Any = getattr(os, "memfd_create", None)
    if make is not None:
        return int(make("tricomm", CLOSES_ON_EXEC | MAY_BE_SEALED))
    make = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    file: int = -1 if make is None else make(b"tricomm", CLOSES_ON_EXEC | MAY_BE_SEALED)
    if file < 0:
        raise OSError(errno.ENOSYS if make is None else ctypes.get_errno(), "there is no memfd_create")
    return file


def mapped_slab(number: int, file: int, nbytes: int) -> SharedSlab:
    """The slab that a file is, mapped here.

    Raises:
        ValueError: a file that may still shrink, or is too small.
    """
    if not fcntl.fcntl(file, GET_SEALS) & NEVER_SHRINKS or os.fstat(file).st_size < nbytes:
        raise ValueError(f"slab {number} is no sealed file of {nbytes} bytes")
    memory = torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
    return SharedSlab(number, memory, memory.data_ptr())


class Arena:
    """The sender's slabs for one link."""

    def __init__(self) -> None:
        self._free: dict[int, list[SharedSlab]] = {}
        """By size, those last that were used last: their bytes are still in caches."""
        self._count = 0

    def take(self, nbytes: int) -> tuple[SharedSlab, int | None]:
        """A free slab for so many bytes, and its file if it is new and is to be handed over."""
        free = self.free(nbytes)
        if free:
            return free.pop(), None
        return new_slab(self.number(), nbytes)

    def free(self, nbytes: int) -> list[SharedSlab]:
        """The free slabs for so many bytes, from now on too; whoever has used one gives it back there."""
        return self._free.setdefault(_size_for(nbytes), [])

    def number(self) -> int:
        """Of a new slab, whosever it is."""
        self._count += 1
        return self._count

    def give_back(self, slab: SharedSlab) -> None:
        """Its transfer is done."""
        self._free.setdefault(slab.memory.numel(), []).append(slab)


class Ring:
    """The sender's slabs for the pieces of a link: few, each of which stays in the caches as it is used again."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._slabs: list[SharedSlab] = []
        self._taken: set[int] = set()

    def take(self, nbytes: int, most: int) -> tuple[SharedSlab, int | None] | None:
        """The first free slab, as in Arena; None as long as at least so many are taken."""
        if len(self._taken) >= most:
            return None
        file = None
        for slab in self._slabs:
            if slab.number not in self._taken:
                break
        else:
            slab, file = self._arena.take(nbytes)
            self._slabs.append(slab)
        self._taken.add(slab.number)
        return slab, file

    def give_back(self, slab: SharedSlab) -> None:
        """Its piece, or its transfer if it is no slab of the ring, is done."""
        if slab.number in self._taken:
            self._taken.remove(slab.number)
        else:
            self._arena.give_back(slab)
