"""Gloo: connections between some ranks for tensors in host memory.

gloo runs a pair of ranks half duplex, so there are two backends, one per direction. Each direction has a gloo device,
with the thread that does the sending and receiving, and all communicators of a group share the two: such a thread looks
for work 100 times a second even when there is none.

A message has a *tag*, the identity of the Resharder that sends it: gloo keeps a queue for each pair and tag, and no
bytes move before both sides have asked for that tag. So messages of different Resharders never meet, whatever their
sizes and in whatever order they are asked for; those of one Resharder follow each other.
"""

import ctypes
import operator
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from tricomm.transport.base import ConnectionLostError, Operation

DEPTH = (4, 4)
"""Receives ahead, rounds open. Connections share a NIC unevenly, and a rank that waits for the slowest of two rounds
leaves others without anything to receive: where all send to all that was 1.25 of the NIC's bound, with four 1.02; with
eight, chains of many small chunks are slower than with four (1.11 and 1.05)."""
CLOSING_TAG = (1 << 31) - 1
"""Tag of the receive that closes a connection; no data has it."""

MAX_TAG = CLOSING_TAG - 1
CONNECT_TIMEOUTS = 5
"""For how many of its timeouts gloo waits for a rank that has told its address and then does not connect."""

MIN_CONNECT_SECONDS = 0.01
CONNECT_SHARE = 0.9
"""Of the timeout. gloo does not say who is missing; in the rest of it the monitor does, which knows who is silent."""

PAUSE_SECONDS = 0.01


class PatientStore(dist.Store):
    """A store that waits for keys by asking again and again, and counts what it sets.

    gloo waits for other ranks' addresses inside of the store's client, which all threads of a process share: a thread
    that waits there locks out the one whose call the other side waits for.

    Args:
        store: the real one, of these connections alone.
        interrupted: raises if the waiting is to end.
    """

    def __init__(self, store: Any, interrupted: Callable[[], None]) -> None:
        super().__init__()
        self._store = store
        self._interrupted = interrupted
        self._keys: list[str] = []

    def set(self, key: str, value: Any) -> None:
        """See torch's Store."""
        self._keys.append(key)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """See torch's Store."""
        self.wait([key])
        return bytes(self._store.get(key))

    def wait(self, keys: Sequence[str], *timeout: Any) -> None:
        """See torch's Store; ends by a deadline only if ``interrupted`` does it."""
        pause = 100e-6
        while not self._store.check(list(keys)):
            self._interrupted()
            time.sleep(pause)
            pause = min(1.25 * pause, 0.02)

    def check(self, keys: Sequence[str]) -> bool:
        """See torch's Store."""
        return bool(self._store.check(list(keys)))

    def add(self, key: str, value: int) -> int:
        """See torch's Store."""
        return int(self._store.add(key, value))

    def close(self) -> None:
        """Delete what this rank has set, which all ranks have read, and let go of who could interrupt it: it holds what
        holds this store.
        """
        self._interrupted = _go_on
        for key in self._keys:
            self._store.delete_key(key)
        self._keys.clear()


def _go_on() -> None:
    """Interrupt nothing."""


class GlooDevices:
    """The gloo devices of messages down and up in rank, made when they are first used."""

    def __init__(self) -> None:
        self._devices: tuple[list[Any], list[Any]] | None = None

    def get(self) -> tuple[list[Any], list[Any]]:
        """Return (down, up)."""
        if self._devices is None:
            _of_this_process().add(self)
            self._devices = (_new_devices(), _new_devices())
        return self._devices


class GlooConnections:
    """See Connections.

    Args:
        store: of these connections alone.
        rank: this rank.
        index: of each rank among those that connect.
        devices: of the group.
        timeout_seconds: for connecting.
        interrupted: raises if the connecting is to end.

    Raises:
        RuntimeError: gloo's.
    """

    depth = DEPTH
    has_tags = True
    begin = None

    def __init__(
        self,
        store: Any,
        rank: int,
        index: Mapping[int, int],
        devices: GlooDevices,
        timeout_seconds: float,
        interrupted: Callable[[], None],
    ) -> None:
        self._rank = rank
        self._index = index
        self._store = PatientStore(store, interrupted)
        _of_this_process().add(self)
        begin = time.monotonic()
        end = begin + CONNECT_SHARE * timeout_seconds
        self._backends: list[Any] = []
        for way, of_way in zip(("down", "up"), devices.get(), strict=True):
            left = max(end - time.monotonic(), MIN_CONNECT_SECONDS)
            options = _options(of_way, timedelta(seconds=left / CONNECT_TIMEOUTS))
            try:
                backend = dist.ProcessGroupGloo(dist.PrefixStore(way, self._store), index[rank], len(index), options)
            except RuntimeError:
                while end <= time.monotonic() < begin + timeout_seconds:
                    interrupted()
                    time.sleep(PAUSE_SECONDS)
                raise
            backend._set_default_timeout(timedelta(seconds=timeout_seconds))
            self._backends.append(backend)

    launch: Any = staticmethod(operator.call)

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections. Works are waited for, each by itself."""

    def prepare(self, operation: Operation, is_confirmed: bool) -> Callable[[int], Any]:
        """See Prepares."""
        is_send, peer, buffer, *_ = operation
        backend = self._backends[is_send == (peer > self._rank)]
        return partial(backend.send if is_send else backend.recv, [buffer], self._index[peer])

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections."""
        here, index, backends = self._rank, self._index, self._backends
        works: list[tuple[int, Any]] = []
        # Packing happens as the iterable is read, outside of what counts as the peer's failure.
        for is_send, peer, buffer, *_ in operations:
            # One backend for messages up in rank and one for those down.
            backend = backends[is_send == (peer > here)]
            try:
                work = (backend.send if is_send else backend.recv)([buffer], index[peer], tag)
            except RuntimeError as error:
                raise ConnectionLostError(peer, error) from error
            works.append((peer, work))
        return works

    wait = staticmethod(dist.Work.wait)

    def connected(self) -> None:
        """See Connections."""
        self._store.close()

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections: a tree of messages is no faster than these."""

    def abort(self) -> None:
        """See Connections. gloo has no call for it, but a receive that times out closes its pair on both sides."""
        nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
        for backend in self._backends:
            for rank, index in self._index.items():
                if rank == self._rank:
                    continue
                try:
                    backend.recv([nothing], index, CLOSING_TAG).wait(timedelta(milliseconds=1))
                except RuntimeError:
                    continue  # closed, which is what was wanted


@cache
def _of_this_process() -> "weakref.WeakSet[Any]":
    """What has gloo's threads, which a forked child does not have.

    There gloo would wait for them for ever when it ends. So a child never ends what it has of its parent's.
    """
    found: weakref.WeakSet[Any] = weakref.WeakSet()

    def keep_for_ever() -> None:
        for one in list(found):
            # Nothing in Python outlives the end of the interpreter but what has a reference that nobody gives back.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))

    os.register_at_fork(after_in_child=keep_for_ever)
    return found


def _new_devices() -> list[Any]:
    """A gloo device per network interface that GLOO_SOCKET_IFNAME names, as torch makes them for a group of its own."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names]


def _options(devices: list[Any], timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = devices
    options._timeout = timeout
    options._threads = 1  # they run collectives, of which there are none here
    return options
