"""Alive: the connections of this process between devices, over NCCL or by memory, and whether a device is idle."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch

from tricomm.transport.coordination.background import wait_until

QUIET_SECONDS = 1.0
"""How long runs wait at most while something is given back, which may wait for what others do after them."""


class OnDevice(Protocol):
    """Connections between devices."""

    @property
    def device(self) -> torch.device:
        """This rank's."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether it has done all that was queued."""
        ...


class AliveConnections:
    """The connections of this process, to which threads add while others look."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # to look may collect garbage, whose end may look again
        self._quiet = threading.RLock()
        """Held while something is done that waits for the device, and while a run begins."""
        self._quiet_until = 0.0
        self._found: weakref.WeakSet[OnDevice] = weakref.WeakSet()

    def add(self, connections: OnDevice) -> None:
        """Count it for as long as it lives."""
        with self._lock:
            self._found.add(connections)

    def on(self, device: torch.device) -> list[OnDevice]:
        """Return those of a device."""
        with self._lock:
            return [one for one in self._found if one.device == device]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let no run begin."""
        with self._quiet:
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            yield

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Begin a run, when it is not quiet."""
        has_turn = self._quiet.acquire(timeout=max(0.0, self._quiet_until - time.monotonic()))
        try:
            yield
        finally:
            if has_turn:
                self._quiet.release()

    def are_idle_on(self, device: torch.device) -> bool:
        """Whether a device has done all that any of them has queued there."""
        return all(one.is_idle for one in self.on(device))


@cache
def alive() -> AliveConnections:
    """Those of this process."""
    return AliveConnections()


def when_idle(is_idle: Callable[[], bool], work: Callable[[], object]) -> None:
    """Do something that waits for all that a device has to do, and may hold up who launches, when that is nothing; no
    run begins meanwhile.
    """

    def is_done() -> bool:
        if is_idle():  # asked without the lock first: a driver may not answer
            with alive().quiet():
                if is_idle():
                    work()
                    return True
        return False

    wait_until(is_done)
