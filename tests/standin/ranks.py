"""Threads as ranks: a process group whose store, device and NCCL are stand-ins, and ranks that die or stop."""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.standin.device import Gate, Limits, Stream, World
from tests.standin.memory import Exports, StandInMemory
from tests.standin.nccl import Backend, Fabric
from tricomm.transport.group import context_of

HOST = torch.device("cpu")

PATIENT_SECONDS = 60.0
"""A timeout that no test waits for: on a machine that does other things besides, ranks are late and nothing fails."""


class Gone(BaseException):
    """The rank of this thread is dead, or all ranks are closed."""


def thread_name(rank: int) -> str:
    """Of the thread that is a rank, and not one of those that it starts."""
    return f"stand-in rank {rank}"


class RankStore(dist.Store):
    """The store as one rank sees it: a rank that is stopped or dead does nothing any more.

    Args:
        ranks: all of them.
        rank: whose.
    """

    def __init__(self, ranks: "Threads", rank: int) -> None:
        super().__init__()
        self.ranks, self.rank = ranks, rank

    def _store(self) -> Any:
        if self.rank in self.ranks.dead and threading.current_thread().name == thread_name(self.rank):
            # It unwinds, which no process does that is gone; what it lets go must not wait in the way.
            raise RuntimeError("the process of this rank is gone")
        with self.ranks.world.moved:
            while self.rank in self.ranks.frozen and not self.ranks.is_closed:
                self.ranks.world.moved.wait()
        if self.ranks.is_closed:
            raise RuntimeError("the store is closed")
        return self.ranks.store

    def set(self, key: str, value: Any) -> None:
        self._store().set(key, value)

    def get(self, key: str) -> bytes:
        return self._store().get(key)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store().wait(keys, *timeout)

    def check(self, keys: list[str]) -> bool:
        return self._store().check(keys)

    def add(self, key: str, value: int) -> int:
        return self._store().add(key, value)

    def deleteKey(self, key: str) -> bool:  # noqa: N802 - torch's name
        return self._store().delete_key(key)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return self._store().compare_set(key, expected, desired)


class Group(dist.ProcessGroup):
    """A process group of torch's, of which only rank, size and store are used."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._store = store

    def get_group_store(self) -> dist.Store:
        return self._store


class StandIn:
    """See Accelerator: that of one rank.

    Args:
        ranks: all of them.
        rank: whose.
        store: as the rank sees it.
    """

    def __init__(self, ranks: "Threads", rank: int, store: dist.Store) -> None:
        self.ranks, self.rank, self.store = ranks, rank, store
        self.device = ranks.world.devices[rank]
        self.backends: list[Backend] = []
        self.opened = threading.local()
        self.kept: list[tuple[torch.Tensor, Stream]] = []
        """What the allocator was told."""
        self._memory = StandInMemory(self.device, rank, ranks.exports)

    def current_stream(self, device: torch.device) -> Stream:
        return self.device.current

    def new_stream(self, device: torch.device) -> Stream:
        return self.device.new_stream()

    def on_stream(self, stream: Stream) -> AbstractContextManager[None]:
        return self.device.on(stream)

    def on_device(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.kept.append((tensor, stream))

    def launch(self, work: Callable[[], object]) -> None:
        self.device.current.launch(work, name="pack or unpack")

    def memory(self, device: torch.device) -> StandInMemory:
        return self._memory

    def new_backend(self, store: Any, rank: int, size: int, timeout: timedelta) -> Backend:
        return Backend(self, store, rank, size, timeout)


class Threads:
    """``size`` ranks, each a thread while it has something to run. Use it as a context manager.

    Args:
        size: how many.
        limits: of each device.
        timeout_seconds: of ``run``.
        transport: of Resharders.
        stays_in_place: likewise.
    """

    def __init__(
        self,
        size: int,
        limits: Limits = Limits(),  # noqa: B008
        timeout_seconds: float = 30.0,
        transport: str = "network",
        stays_in_place: bool = False,
    ) -> None:
        self.transport, self.stays_in_place = transport, stays_in_place
        self.size = size
        self.world = World(size, limits)
        self.store = dist.HashStore()
        self.timeout_seconds = timeout_seconds
        self.frozen: set[int] = set()
        self.dead: set[int] = set()
        self.kept: list[Any] = []
        """What ranks hold that are stopped."""
        self.is_closed = False
        self.exports = Exports()
        self._stores = [RankStore(self, rank) for rank in range(size)]
        self.groups = [Group(store, rank, size) for rank, store in enumerate(self._stores)]
        self.standins = [StandIn(self, rank, store) for rank, store in enumerate(self._stores)]
        self._fabrics: dict[str, Fabric] = {}
        self.barrier = threading.Barrier(size, timeout=timeout_seconds)
        """For the test itself, between the threads."""
        for group, standin in zip(self.groups, self.standins, strict=True):
            context_of(group).accelerator_of = lambda _, found=standin: found

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: object) -> None:
        with self.world.moved:
            self.is_closed = self.world.is_closed = True
            for standin in self.standins:
                for backend in standin.backends:
                    backend.is_aborted = True
            self.world.moved.notify_all()
        self.kept.clear()
        for group in self.groups:
            shared = context_of(group).monitor.watched
            shared.end(os.getpid())
            if shared.thread is not None:
                shared.thread.join(2)

    def options(self, rank: int) -> dict[str, Any]:
        """What a Resharder needs to know of its rank."""
        return {"group": self.groups[rank], "device": HOST, "transport": self.transport} | (
            {"stays_in_place": True} if self.stays_in_place else {}
        )

    def fabric_of(self, store: Any, size: int) -> Fabric:
        """What the ranks that share a store share."""
        name = "fabric"
        if not store.check([name]):
            store.compare_set(name, "", str(id(store)))
        key = bytes(store.get(name)).decode()
        with self.world.moved:
            return self._fabrics.setdefault(key, Fabric(self.world, size))

    def start(self, function: Callable[..., Any], *arguments: Any) -> list["Result"]:
        """Begin ``function(rank, *arguments)`` on every rank."""
        self.barrier.reset()
        return [Result(rank, self.barrier, function, arguments) for rank in range(self.size)]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of all ranks, in order; the first error of any."""
        results = self.start(function, *arguments)
        deadline = time.monotonic() + self.timeout_seconds
        while any(result.is_running for result in results) and time.monotonic() < deadline:
            if any(result.error for result in results):
                time.sleep(0.1)  # for others to fail by themselves
                break
            time.sleep(0.002)
        errors = [f"rank {result.rank}: {result.error}" for result in results if result.error]
        errors += [f"rank {result.rank} did not come to its end" for result in results if result.is_running]
        assert not errors, "\n".join(errors)
        return [result.value for result in results]

    def finish(self, rank: int, seconds: float = PATIENT_SECONDS) -> None:
        """Wait on the host until the device of a rank has done all that its current stream has to do."""
        event, deadline = self.standins[rank].device.current.record_event(), time.monotonic() + seconds
        while not event.query():
            assert time.monotonic() < deadline, f"the device of rank {rank} hangs"
            time.sleep(0.001)

    def gate(self) -> Gate:
        """A new one."""
        return Gate(self.world)

    # ---- what happens to ranks

    def stop(self, rank: int) -> None:
        """Its process does nothing for the host any more; what its device has to do, it does."""
        with self.world.moved:
            self.frozen.add(rank)

    def kill(self, rank: int) -> None:
        """Its process is gone, and its kernels with it."""
        with self.world.moved:
            self.frozen.add(rank)
            self.dead.add(rank)
            device = self.world.devices[rank]
            for backend in self.standins[rank].backends:
                backend.die()
            for queue in device.queues:
                queue.clear()
            device.ready.clear()
            device.holding.clear()
            self.world.pump()

    @contextmanager
    def keys_are_ours(self) -> Iterator[None]:
        """Nothing is left on the user's store but under our own name."""
        before = set(self.store.list_keys())
        yield
        left = {key for key in set(self.store.list_keys()) - before if not key.startswith("tricomm/")}
        assert not left, f"left on the user's store: {sorted(left)}"


class Result:
    """What a rank's thread gives."""

    def __init__(
        self, rank: int, barrier: threading.Barrier, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        self.rank = rank
        self._barrier = barrier
        self.value: Any = None
        self.error = ""
        self._thread = threading.Thread(
            target=self._run, args=(function, arguments), name=thread_name(rank), daemon=True
        )
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self.value = function(self.rank, *arguments)
        except BaseException:
            self.error = traceback.format_exc()
            self._barrier.abort()
