"""Runs on a device: what a call has queued there, which goes on when the call has returned."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tricomm.transport.accelerator import Accelerator, Awaited, Event, await_event
from tricomm.transport.base import GroupLostError
from tricomm.transport.device.alive import alive

Check = Callable[[], None]
"""Raises RuntimeError if what came from a rank does not count."""


class DeviceRun:
    """See Pending. The thread that runs appends to it, the monitor's thread takes away what is done.

    Args:
        accelerator: of the device.
        device: on whose current stream it begins.
        before: the run that it follows.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device, before: "DeviceRun | None" = None) -> None:
        self._accelerator = accelerator
        self._device = device
        if before is not None and before._end is not None:
            # Both use the same staging, and perhaps not the same stream.
            accelerator.current_stream(device).wait_event(before._end)
        self._begin: Event | None = self._here()
        self._end: Event | None = None
        self._groups: deque[tuple[tuple[int, ...], Awaited]] = deque()
        self._posting: tuple[int, ...] = ()
        self._checks: dict[int, Check] = {}
        self._has_counted = False
        """Whether all was done, and nothing was wrong with what had come: that stands, whatever ranks do later."""
        self._lock = threading.Lock()

    def _here(self) -> Event:
        event: Event = self._accelerator.current_stream(self._device).record_event()
        return event

    @contextmanager
    def posting(self, peers: tuple[int, ...]) -> Iterator[None]:
        """Surround what may wait for ranks on the host: NCCL connects a pair when it is first used."""
        self._posting = peers
        try:
            yield
        finally:
            self._posting = ()

    def append(self, peers: tuple[int, ...], work: Awaited) -> None:
        """Add a group that was queued, with the ranks that it is exchanged with."""
        self._groups.append((peers, work))

    def check_last(self, peer: int, check: Check) -> None:
        """When the device has done all, look whether what came from a rank still counts."""
        self._checks[peer] = check

    def close(self) -> None:
        """See Pending."""
        self._end = self._here()

    def is_over(self) -> bool:
        """Whether the device has done all of it."""
        return self._end is not None and self._end.query()

    def is_begun(self) -> bool:
        """See Pending."""
        if self._begin is not None and self._begin.query():
            self._begin = None
        return self._begin is None

    def awaited(self) -> tuple[int, ...] | None:
        """See Pending."""
        with self._lock:
            while self._groups:
                peers, work = self._groups[0]
                try:
                    if not work.is_completed():
                        return peers
                    work.wait()
                except RuntimeError as error:
                    raise GroupLostError(peers, error) from error
                self._groups.popleft()
        if self._posting:
            return self._posting
        if self._has_counted:
            return None
        if not self.is_over():
            return ()
        for peer, check in self._checks.items():
            try:
                check()
            except RuntimeError as error:
                raise GroupLostError((peer,), error) from error
        self._has_counted = True
        return None

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections. Where a connection is lost nothing ever comes; who is at fault the monitor finds out, which
        then aborts.
        """
        await_event(self._here(), is_aborted)
        await_event(_Checked(list(self._checks.values())), is_aborted)


class _Checked:
    """An Event: all that has come counts. Where it does not, its rank has said why, which the monitor reads."""

    def __init__(self, checks: list[Check]) -> None:
        self._checks = checks

    def query(self) -> bool:
        try:
            for check in self._checks:
                check()
        except RuntimeError:
            return False
        return True


class DeviceRuns:
    """The runs of a communicator on a device, one after the other.

    Args:
        accelerator: of the device.
        device: this rank's.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self._accelerator = accelerator
        self._device = device
        self.last: DeviceRun | None = None

    @property
    def are_over(self) -> bool:
        """Whether the device has done all that was queued."""
        return self.last is None or self.last.is_over()

    def begin(self) -> DeviceRun:
        """See Connections."""
        with alive().beginning():
            self.last = DeviceRun(self._accelerator, self._device, self.last)
        return self.last
