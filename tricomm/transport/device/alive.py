"""Alive: the connections of this process between devices, over NCCL or by memory, and whether a device is idle."""

import threading
import weakref
from functools import cache
from typing import Protocol

import torch


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
        self._found: weakref.WeakSet[OnDevice] = weakref.WeakSet()

    def add(self, connections: OnDevice) -> None:
        """Count it for as long as it lives."""
        with self._lock:
            self._found.add(connections)

    def on(self, device: torch.device) -> list[OnDevice]:
        """Return those of a device."""
        with self._lock:
            return [one for one in self._found if one.device == device]

    def are_idle_on(self, device: torch.device) -> bool:
        """Whether a device has done all that any of them has queued there."""
        return all(one.is_idle for one in self.on(device))


@cache
def alive() -> AliveConnections:
    """Those of this process."""
    return AliveConnections()
