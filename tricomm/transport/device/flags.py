"""Flags: words that both processes of a pair and both their devices see, in a page without a name.

A device writes a word when it has come so far in its stream, and the other waits for it there, without the hosts; and a
host can let go what its own device waits for, by a store. Counters go round at 2**32.
"""

import ctypes
import threading
from enum import IntEnum
from functools import cache
from typing import Any

from tricomm.transport.device.memory import DeviceMemory
from tricomm.transport.memory.arena import PAGE_NBYTES, SharedSlab

APART_NBYTES = 64
"""Between two words: a cache line, so that writers do not disturb each other."""

FIRST_NBYTE = 256
"""What stands before was a nonce."""

ROUND = 1 << 32
FAR_AHEAD = 1 << 30
"""So much further than anything waited for is a word that lets go."""


class Flag(IntEnum):
    """What a word tells of the rank that writes it."""

    READY = 0
    """Its device: so many transfers can be read."""
    DONE = 1
    """Its device: so many transfers were read."""
    ABORTED = 2
    """Its host: what it gave may change from now on."""
    UNMAPPED = 3
    """Its host: it has nothing of the peer's memory open any more."""
    PROBED = 4
    """Its device, while it connects."""


@cache
def _registered() -> dict[int, SharedSlab]:
    """Pages that a driver has, by address: they stay mapped until it gives them back, whoever forgets their Flags. What
    the system maps there next could not be registered.
    """
    return {}


class Flags:
    """The words of one pair of ranks.

    Args:
        memory: of this rank's device.
        page: the same file in both processes.
        is_lower: whether this rank is the lower one of the pair.
    """

    def __init__(self, memory: DeviceMemory, page: SharedSlab, is_lower: bool) -> None:
        self._memory = memory
        self._page = page
        self._device_address: int | None = memory.register(page.address, PAGE_NBYTES)
        _registered()[page.address] = page
        self._ours, self._theirs = (0, len(Flag)) if is_lower else (len(Flag), 0)
        self._awaited = {Flag.READY: 0, Flag.DONE: 0}
        """What streams here were told to wait for at most, in words of the peer."""
        self._lock = threading.Lock()
        """Taken between two stores whose order matters: not every processor keeps it otherwise."""

    def _byte(self, flag: Flag, is_ours: bool) -> int:
        return FIRST_NBYTE + APART_NBYTES * ((self._ours if is_ours else self._theirs) + flag)

    def _word(self, flag: Flag, is_ours: bool) -> ctypes.c_uint32:
        """Read and written at once: a device may look meanwhile."""
        return ctypes.c_uint32.from_address(self._page.address + self._byte(flag, is_ours))

    def _read(self, flag: Flag, is_ours: bool) -> int:
        return self._word(flag, is_ours).value

    def _store(self, flag: Flag, is_ours: bool, value: int) -> None:
        with self._lock:
            self._word(flag, is_ours).value = value % ROUND
        self._memory.stored()

    def theirs(self, flag: Flag) -> int:
        """What the peer's word says now."""
        return self._read(flag, is_ours=False)

    def tell(self, flag: Flag) -> None:
        """Set a word of this rank's host."""
        self._store(flag, True, 1)

    def has_come(self, flag: Flag, count: int) -> bool:
        """Whether the peer's counter is there."""
        return (self.theirs(flag) - count) % ROUND < ROUND // 2

    def write(self, stream: Any, flag: Flag, count: int) -> None:
        """Let a stream set this rank's counter."""
        assert self._device_address is not None
        self._memory.write_value(stream, self._device_address + self._byte(flag, True), count % ROUND)

    def wait(self, stream: Any, flag: Flag, count: int) -> None:
        """Let a stream wait for the peer's counter."""
        assert self._device_address is not None
        self._awaited[flag] = max(self._awaited[flag], count)
        self._memory.wait_value(stream, self._device_address + self._byte(flag, False), count % ROUND)

    def let_go(self) -> None:
        """Let all go on that streams here wait for. What the peer's device writes later may hold them again."""
        for flag, count in self._awaited.items():
            if not self.has_come(flag, count):
                self._store(flag, False, count + FAR_AHEAD)

    def close(self) -> None:
        """Take the page from the device, which has nothing to do with it any more."""
        if self._device_address is not None:
            self._device_address = None
            self._memory.unregister(self._page.address)
            del _registered()[self._page.address]
