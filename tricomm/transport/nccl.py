"""NCCL between some ranks, through torch's backend: connecting, groups of sends and receives, and what became of them.

**Waiting orders streams; it never blocks the host.** A call ends when all its groups are queued, and what the device
makes of them is told by a ``DeviceRun``, which the monitor watches to its end. torch's own watchdog, which counts from
when something was queued, ends the process and leaves a key on the user's store, is not started.
"""

import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from tricomm.transport.accelerator import (
    Accelerator,
    DeviceBackend,
    DeviceWork,
    await_event,
    broadcast_options,
    prefixed,
)
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.coordination.background import in_background, wait_until
from tricomm.transport.device.alive import alive
from tricomm.transport.device.run import DeviceRun, DeviceRuns
from tricomm.transport.device.subgroups import Subgroups

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
        runs: of all connections of the communicator; None if there are no others.

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
        runs: DeviceRuns | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._index = index
        self.device = device
        self._runs = DeviceRuns(accelerator, device) if runs is None else runs
        _warn(self, accelerator, device)
        self._rank, self._store, self._timeout = rank, store, timedelta(seconds=timeout_seconds)
        self.backend = connect(accelerator, store, index[rank], len(index), device, self._timeout)
        self._backends = [self.backend]
        """Of all ranks, and of groups of them; also one that connects."""
        self._subgroups = Subgroups(rank, tuple(sorted(index)), self.backend)
        self._order: Any = None
        """A stream on which groups of several communicators follow each other."""
        self._release = weakref.finalize(self, _give_back_later, self._backends, device)
        self._release.atexit = False

    @property
    def is_idle(self) -> bool:
        """Whether the device has done all that was queued."""
        return self._runs.are_over

    @property
    def run(self) -> DeviceRun | None:
        """The last one."""
        return self._runs.last

    def begin(self) -> DeviceRun:
        """See Connections."""
        return self._runs.begin()

    def launch(self, work: Callable[[], object]) -> None:
        """See Transport."""
        self._accelerator.launch(work)

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections."""
        assert self.run is not None
        self.run.join(is_aborted)

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections; the plan keeps a round under 256 operations.

        Messages go first, then what goes to several ranks in one call, in the order of the groups: all ranks queue
        whatever they have in common in the same order, also if that is of several communicators.
        """
        given = list(operations)
        together = {one.group: one for one in given if one.group and self._subgroups.backend_of(one.group)}
        messages = [one for one in given if one.group not in together]
        work: DeviceWork | None = None
        works: dict[tuple[int, ...], DeviceWork] = {}
        if messages:
            peers = tuple(dict.fromkeys(operation.peer for operation in messages))
            work = self._queued(
                peers, partial(post_group, self._accelerator, self.backend, self.device, self._index, messages)
            )
        for group in sorted(together):
            found = self._subgroups.backend_of(group)
            assert found is not None
            backend, root = found
            peers = tuple(rank for rank in group if rank != self._rank)
            buffer = together[group].buffer
            works[group] = self._queued(
                peers, partial(post_broadcast, self._accelerator, backend, self.device, root, buffer)
            )
        return [(one.peer, works.get(one.group, work)) for one in given]

    def _queued(self, peers: tuple[int, ...], post: Callable[[], DeviceWork]) -> DeviceWork:
        """Queue what is exchanged with some ranks, after what was queued before on any communicator."""
        assert self.run is not None
        try:
            with self.run.posting(peers):
                if self._order is None:
                    work = post()
                else:
                    self._order.wait_event(self._accelerator.current_stream(self.device).record_event())
                    with self._accelerator.on_stream(self._order):
                        work = post()
                        work.synchronize()
        except RuntimeError as error:
            raise ConnectionLostError(None, error) from error
        self.run.append(peers, work)
        return work

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections."""
        try:
            self._subgroups.require(groups, self._connected, self._dropped)
        except RuntimeError as error:
            raise ConnectionLostError(None, error) from error
        if self._order is None and self._subgroups.are_there:
            self._order = self._accelerator.new_stream(self.device)

    def _connected(self, number: int, ranks: tuple[int, ...]) -> DeviceBackend:
        """A communicator of some ranks, this one among them.

        While NCCL connects nothing ends the wait for a rank that does not come; so all come to the store first.
        """
        assert self.run is not None
        store, keys = prefixed(self._store, f"group {number}"), [f"here/{rank}" for rank in ranks]
        with self.run.posting(tuple(rank for rank in ranks if rank != self._rank)):
            store.set(f"here/{self._rank}", "1")
            await_event(_Come(store, keys), lambda: not self._release.alive)
            if self._release.alive:
                index, size = ranks.index(self._rank), len(ranks)
                backend = connect(
                    self._accelerator, store, index, size, self.device, self._timeout, self._backends.append
                )
        if not self._release.alive:
            self._abort_all()  # also what came too late for whoever aborted
            raise RuntimeError(f"aborted while ranks {list(ranks)} connected")
        return backend

    def _dropped(self, backend: DeviceBackend) -> None:
        self._backends.remove(backend)
        _give_back_later([backend], self.device)

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
            self._abort_all()

    def _abort_all(self) -> None:
        for backend in tuple(self._backends):
            in_background("tricomm-abort", partial(_abort, backend))


class _Come(NamedTuple):
    """Whether ranks have come: an event on a store."""

    store: Any
    keys: list[str]

    def query(self) -> bool:
        """See Event."""
        there: bool = self.store.check(self.keys)
        return there


def _warn(connections: NcclConnections, accelerator: Accelerator, device: torch.device) -> None:
    """Say what lets streams of a device wait for each other that have nothing to do with each other."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warnings.warn(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 leaves the device one hardware queue, in which streams wait for each other: "
            "a pipeline that receives while it sends can hang; set it to 32 before the process starts, or to nothing",
            RuntimeWarning,
            stacklevel=2,
        )
    found = alive()
    found.add(connections)
    count = sum(isinstance(one, NcclConnections) and one._accelerator is accelerator for one in found.on(device))
    if count == MOST_CONNECTIONS + 1:
        warnings.warn(
            f"more than {MOST_CONNECTIONS} channels are connected on {device}, where torch has 32 streams, so that "
            "some share one and wait for each other; close Resharders and Links that are not needed, or let those of "
            "the same ranks share a channel",
            RuntimeWarning,
            stacklevel=2,
        )


def _give_back_later(backends: Sequence[DeviceBackend], device: torch.device) -> None:
    """Give communicators back, on a thread of its own, when no other one has anything under way on the device.

    Who frees its memory waits for all kernels of the device, receives too, and lets nobody else launch any meanwhile.
    The thread that drops the last reference may be the monitor's, or one that is about to send.
    """

    def give_back() -> None:
        wait_until(lambda: alive().are_idle_on(device))
        for backend in backends:
            try:
                backend.shutdown()
            except RuntimeError as error:
                LOG.info("while NCCL was shut down: %s", error)

    in_background("tricomm-give-back", give_back)


def _abort(backend: DeviceBackend) -> None:
    try:
        backend.abort()
    except RuntimeError as error:
        LOG.info("while NCCL was aborted: %s", error)


def connect(
    accelerator: Accelerator,
    store: Any,
    rank: int,
    size: int,
    device: torch.device,
    timeout: timedelta,
    note: Callable[[DeviceBackend], None] | None = None,
) -> DeviceBackend:
    """A backend whose communicator stands; returns when every rank has come.

    Args:
        accelerator: of the device.
        store: of these ranks alone.
        rank, size: among these ranks.
        device: this rank's, with its index.
        timeout: for connecting.
        note: told of the backend before it connects.

    Raises:
        RuntimeError: torch's; a rank did not come, or NCCL could not connect.
    """
    with _without_watchdog():
        backend = accelerator.new_backend(store, rank, size, timeout)
    if note is not None:
        note(backend)
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
            for is_send, peer, buffer, *_ in operations:
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


def post_broadcast(
    accelerator: Accelerator, backend: DeviceBackend, device: torch.device, root: int, buffer: torch.Tensor
) -> DeviceWork:
    """Queue a broadcast on the current stream; torch's work for it.

    Args:
        accelerator: of the device.
        backend: of ``connect``.
        device: where the buffer is.
        root: the rank in the backend whose bytes go to all others.
        buffer: 1-d contiguous, of as many bytes on all ranks.

    Raises:
        RuntimeError: torch's; the backend is of no more use.
    """
    with accelerator.on_device(device):
        work: DeviceWork = backend.broadcast([buffer], broadcast_options(root))
        return work
