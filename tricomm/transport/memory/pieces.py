"""Pieces of many bytes: how they are copied into slabs, once for several peers that get the same.

Those peers take turns, so that what one has read is still in the caches when the others read it. A link that is ahead
of others waits for them, but not for long: then what they did not take yet is packed again for them. So it takes no
longer than to send to each by itself, whatever another peer does.
"""

import ctypes
import os
import weakref

from tricomm.packing import runs as in_runs
from tricomm.packing.runs import Pieces, one_run
from tricomm.transport.base import Operation
from tricomm.transport.memory.arena import SharedSlab, new_slab
from tricomm.transport.memory.reading import read_runs


def pack_piece(operation: Operation, place: int, nbytes: int, slab: SharedSlab) -> None:
    """Copy a piece that begins at a byte of an operation into a slab."""
    _, _, buffer, runs, *_ = operation
    if runs is None:
        ctypes.memmove(slab.address, buffer.data_ptr() + place, nbytes)
    elif isinstance(runs, Pieces):
        runs.copy(place // in_runs.PIECE_NBYTES, slab.memory)
    else:
        read_runs(os.getpid(), one_run(slab.address, nbytes), runs)


IN_STEP = 4
"""As many pieces of what several peers get are kept for those that are behind."""


class Slot:
    """A slab that several links may offer.

    Attributes:
        slab: whose number each link gives anew.
        file: of the slab, for links that do not know it yet; closed with this.
        common, index: which piece was packed last, if it is still sent.
        readers: offers of it that are not read yet.
        left: how many links are still to offer it.
    """

    __slots__ = ("__weakref__", "common", "file", "index", "left", "readers", "slab")

    def __init__(self, nbytes: int) -> None:
        self.slab, self.file = new_slab(0, nbytes)
        weakref.finalize(self, os.close, self.file).atexit = False
        self.common: weakref.ref[Common] | None = None
        self.index = self.readers = self.left = 0

    @property
    def is_awaited(self) -> bool:
        """Whether a link is still to offer what is there."""
        return self.left > 0 and self.common is not None and self.common() is not None


class Pool:
    """The slots of a rank's links.

    Args:
        size: how many are enough for all of them: as many as can be read at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._slots: list[Slot] = []

    def find(self, common: "Common", index: int) -> Slot | None:
        """Where a piece is packed."""
        for one in self._slots:
            if one.index == index and one.common is not None and one.common() is common:
                return one
        return None

    def take(self, nbytes: int, waits: bool) -> Slot | None:
        """A slot that nobody reads; None if there is none but those that others are behind for, and one ``waits``."""
        free = [one for one in self._slots if not one.readers and one.slab.memory.numel() >= nbytes]
        best = min(free, key=lambda one: one.is_awaited, default=None)
        if best is not None and not best.is_awaited:
            return best
        if len(self._slots) >= IN_STEP and waits:
            return None
        if best is None or len(self._slots) < self._size:
            best = Slot(nbytes)
            self._slots.append(best)
        return best


class Common:
    """Bytes that go to several peers.

    Args:
        operation: one of those that send them.
        pool: where they are packed.
        count: how many links send them.

    Attributes:
        waits: whether links that are ahead wait for others.
    """

    __slots__ = ("__weakref__", "_count", "_operation", "_pool", "_reached", "waits")

    def __init__(self, operation: Operation, pool: Pool, count: int) -> None:
        self._operation, self._pool, self._count = operation, pool, count
        self._reached, self.waits = 0, True

    def packed(self, place: int, nbytes: int) -> Slot | None:
        """Where the piece is that begins at a byte, for one of the links; None if it waits for others."""
        size = in_runs.PIECE_NBYTES
        index = place // size
        slot = self._pool.find(self, index)
        if slot is None:
            slot = self._pool.take(size, self.waits)
            if slot is None:
                return None
            slot.common = None  # should it not be packed to the end
            pack_piece(self._operation, place, nbytes, slot.slab)
            slot.common, slot.index = weakref.ref(self), index
            slot.left = self._count if index >= self._reached else 1
            self._reached = max(self._reached, index + 1)
        slot.left -= 1
        return slot
