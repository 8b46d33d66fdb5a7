"""NCCL between some ranks, through torch's backend: connecting, groups of sends and receives, and what became of them.

**Waiting orders streams; it never blocks the host.** A call ends when all its groups are queued, and what the device
makes of them is told by a ``DeviceRun``, which the monitor watches to its end. torch's own watchdog, which counts from
when something was queued, ends the process and leaves a key on the user's store, is not started.
"""

import logging
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from tricomm.transport.accelerator import Accelerator, DeviceBackend, DeviceWork, Event, await_event
from tricomm.transport.base import ConnectionLostError, GroupLostError, Operation

LOG = logging.getLogger("tricomm")
DEPTH = (0, 2)
WITHOUT_WATCHDOG = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""What torch reads when a backend is made, and at no other time."""

MOST_CONNECTIONS = 16
"""torch has 32 streams of high priority on a device, which it gives out in turn; each of these takes two."""

GIVE_BACK_PAUSE_SECONDS = 0.05


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
        self._groups: deque[tuple[tuple[int, ...], DeviceWork]] = deque()
        self._posting: tuple[int, ...] = ()
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

    def append(self, peers: tuple[int, ...], work: DeviceWork) -> None:
        """Add a group that was queued, with the ranks that it is exchanged with."""
        self._groups.append((peers, work))

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
        return None if self.is_over() else ()

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections. Where a connection is lost nothing ever comes; who is at fault the monitor finds out, which
        then aborts.
        """
        await_event(self._here(), is_aborted)


class NcclConnections:
    """See Connections. Messages have no tags: they match in the order in which they are posted, and what tells calls
    apart is what ``Communicator.confirm`` compares, or afterwards a CallBoard.

    Args:
        accelerator: of the device.
        store: of these connections alone.
        rank: this rank.
        index: of each rank among those that connect.
        device: where the buffers are.
        timeout_seconds: for connecting.

    Raises:
        RuntimeError: torch's.
    """

    depth = DEPTH
    has_tags = False

    def __init__(
        self,
        accelerator: Accelerator,
        store: Any,
        rank: int,
        index: Mapping[int, int],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self._accelerator = accelerator
        self._index = index
        self._device = device
        self.run: DeviceRun | None = None
        _warn(self, accelerator, device)
        self.backend = connect(accelerator, store, index[rank], len(index), device, timedelta(seconds=timeout_seconds))
        self._release = weakref.finalize(self, _give_back_later, self.backend, device)
        self._release.atexit = False

    @property
    def is_idle(self) -> bool:
        """Whether the device has done all that was queued."""
        return self.run is None or self.run.is_over()

    def begin(self) -> DeviceRun:
        """See Connections."""
        self.run = DeviceRun(self._accelerator, self._device, self.run)
        return self.run

    def launch(self, work: Callable[[], object]) -> None:
        """See Transport."""
        self._accelerator.launch(work)

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections."""
        assert self.run is not None
        self.run.join(is_aborted)

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections; the plan keeps a round under 256 operations."""
        group = list(operations)
        if not group:
            return []
        assert self.run is not None
        peers = tuple(dict.fromkeys(operation.peer for operation in group))
        try:
            with self.run.posting(peers):
                work = post_group(self._accelerator, self.backend, self._device, self._index, group)
        except RuntimeError as error:
            raise ConnectionLostError(None, error) from error
        self.run.append(peers, work)
        return [(operation.peer, work) for operation in group]

    @staticmethod
    def wait(work: DeviceWork, limit: timedelta) -> None:
        """See Connections. It orders the current stream; the host goes on."""
        work.synchronize()

    def connected(self) -> None:
        """See Connections."""

    def abort(self) -> None:
        """See Connections. On a thread of its own: NCCL may wait until the device is idle, which it may not be before
        other communicators, too, have been aborted.
        """
        if self._release.detach() is not None:
            threading.Thread(target=_abort, args=(self.backend,), name="tricomm-abort", daemon=True).start()


class AliveConnections:
    """The connections of this process, to which threads add while others look."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # to look may collect garbage, whose end may look again
        self._found: weakref.WeakSet[NcclConnections] = weakref.WeakSet()

    def add(self, connections: NcclConnections) -> None:
        """Count it for as long as it lives."""
        with self._lock:
            self._found.add(connections)

    def on(self, device: torch.device) -> list[NcclConnections]:
        """Return those of a device."""
        with self._lock:
            return [one for one in self._found if one._device == device]


@cache
def _alive() -> AliveConnections:
    return AliveConnections()


def _warn(connections: NcclConnections, accelerator: Accelerator, device: torch.device) -> None:
    """Say what lets streams of a device wait for each other that have nothing to do with each other."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warnings.warn(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 leaves the device one hardware queue, in which streams wait for each other: "
            "a pipeline that receives while it sends can hang; set it to 32 before the process starts, or to nothing",
            RuntimeWarning,
            stacklevel=2,
        )
    alive = _alive()
    alive.add(connections)
    count = sum(one._accelerator is accelerator for one in alive.on(device))
    if count == MOST_CONNECTIONS + 1:
        warnings.warn(
            f"more than {MOST_CONNECTIONS} channels are connected on {device}, where torch has 32 streams, so that "
            "some share one and wait for each other; close Resharders and Links that are not needed, or let those of "
            "the same ranks share a channel",
            RuntimeWarning,
            stacklevel=2,
        )


def _give_back_later(backend: DeviceBackend, device: torch.device) -> None:
    """Give a communicator back, on a thread of its own, when no other one has anything under way on the device.

    Who frees its memory waits for all kernels of the device, receives too, and lets nobody else launch any meanwhile.
    The thread that drops the last reference may be the monitor's, or one that is about to send.
    """

    def give_back() -> None:
        while not all(one.is_idle for one in _alive().on(device)):
            time.sleep(GIVE_BACK_PAUSE_SECONDS)
        try:
            backend.shutdown()
        except RuntimeError as error:
            LOG.info("while NCCL was shut down: %s", error)

    threading.Thread(target=give_back, name="tricomm-give-back", daemon=True).start()


def _abort(backend: DeviceBackend) -> None:
    try:
        backend.abort()
    except RuntimeError as error:
        LOG.info("while NCCL was aborted: %s", error)


def connect(
    accelerator: Accelerator, store: Any, rank: int, size: int, device: torch.device, timeout: timedelta
) -> DeviceBackend:
    """A backend whose communicator stands; returns when every rank has come.

    Args:
        accelerator: of the device.
        store: of these ranks alone.
        rank, size: among these ranks.
        device: this rank's, with its index.
        timeout: for connecting.

    Raises:
        RuntimeError: torch's; a rank did not come, or NCCL could not connect.
    """
    with _without_watchdog():
        backend = accelerator.new_backend(store, rank, size, timeout)
    # A first collective would do it too, but does not say when the others are there, and its buffers would stay.
    backend.eager_connect_single_device(device)
    return backend


@cache
def _environment() -> threading.Lock:
    return threading.Lock()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Within it backends are made of which torch watches nothing by itself; the user's own are as they were."""
    with _environment():
        before = {name: os.environ.get(name) for name in WITHOUT_WATCHDOG}
        os.environ.update(WITHOUT_WATCHDOG)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def post_group(
    accelerator: Accelerator,
    backend: DeviceBackend,
    device: torch.device,
    index: Mapping[int, int],
    operations: Sequence[Operation],
) -> DeviceWork:
    """Queue sends and receives as one group on the current stream; torch's work for all of them.

    Args:
        accelerator: of the device.
        backend: of ``connect``.
        device: where the buffers are.
        index: of each rank in the backend.
        operations: at least one, 256 at most.

    Raises:
        RuntimeError: torch's; the group is closed, what of it was queued may run, and the backend is of no more use.
    """
    with accelerator.on_device(device):
        backend._start_coalescing()
        try:
            for is_send, peer, buffer, _ in operations:
                (backend.send if is_send else backend.recv)([buffer], index[peer], 0)
        except BaseException:
            # NCCL counts open groups in each thread: with one left open, nothing that is called later would start.
            with suppress(RuntimeError):
                backend._end_coalescing()
            with suppress(RuntimeError):
                backend._group_end()  # torch leaves it open where NCCL refused an operation in it
            raise
        work: DeviceWork = backend._end_coalescing()
        return work
