"""NCCL, and torch's backend over it, on devices of ``tests.standin.device``.

Rules, beside those of devices:
6. To wait orders a stream; the host goes on.
7. Groups of a communicator are done in the order in which they were queued, on a stream of its own, at high priority.
8. Messages of two ranks match in the order in which they are queued. A send is done when it was received.
9. A pair of ranks connects when it is first used, and the host waits for that.
10. To abort ends what waits on this rank, on no other, and then waits for the device to be idle.
11. A rank that died is noticed late: after a while works tell of it, if somebody asks; kernels wait for ever.
12. A group that was begun is open until it is ended, on this thread; nothing is queued before, of any communicator.
    Where an operation in it was refused, torch does not end it.
13. Kernels of several communicators begin in any order, unless NCCL_LAUNCH_ORDER_IMPLICIT is set.
14. A backend has a watchdog, unless TORCH_NCCL_BLOCKING_WAIT is set when it is made. It counts from when a group was
    queued; then it leaves a key on the user's store and ends the process.
15. A broadcast is one kernel on each rank of a communicator, and ends when all have come. The n-th of one rank meets
    the n-th of each other. The first waits on the host until all ranks have queued it: they connect to a ring.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from tests.standin.device import HIGH, Command, Device, Event, Stream, World

Pair = tuple[int, int]


class Fabric:
    """What the ranks of a communicator share: who has come, and messages that wait for their other ends.

    Args:
        world: of the devices.
        size: how many ranks.
    """

    def __init__(self, world: World, size: int) -> None:
        self.world = world
        self.size = size
        self.backends: dict[int, Backend] = {}
        self.connecting: set[Pair] = set()
        self.sends: dict[Pair, deque[Message]] = {}
        self.receives: dict[Pair, deque[Message]] = {}
        self.in_ring: set[int] = set()
        self.broadcasts: dict[int, dict[int, Broadcast]] = {}
        """By number and rank."""

    def match(self) -> None:
        """Carry out the messages whose both ends are on a device, and broadcasts to which all have come."""
        for number in [number for number, come in self.broadcasts.items() if len(come) == self.size]:
            come = self.broadcasts.pop(number)
            roots, sizes = {one.root for one in come.values()}, {one.tensor.numel() for one in come.values()}
            assert len(roots) == len(sizes) == 1, "broadcasts differ, where NCCL would hang"
            for one in come.values():
                one.tensor.copy_(come[one.root].tensor)
                one.left = 0
                one.end_if_done()
        for pair, sends in self.sends.items():
            receives = self.receives.get(pair, deque())
            while sends and receives:
                send, receive = sends.popleft(), receives.popleft()
                assert send.tensor.numel() == receive.tensor.numel(), f"{pair}: sizes differ, where NCCL would hang"
                receive.tensor.copy_(send.tensor)
                send.group.left -= 1
                receive.group.left -= 1
                for group in (send.group, receive.group):
                    group.end_if_done()


class Message:
    """One end of a message."""

    def __init__(self, group: "Group", tensor: torch.Tensor) -> None:
        self.group = group
        self.tensor = tensor


class Group(Command):
    """A group of sends and receives: one kernel, which waits on the device until all its messages have crossed."""

    is_computing = False

    def __init__(self, stream: Stream, backend: "Backend", operations: list[tuple[bool, int, torch.Tensor]]) -> None:
        super().__init__(stream)
        self.backend = backend
        self.operations = operations
        self.left = len(operations)
        self.has_begun = False
        self.group_before = stream.device.last_group if stream.device.limits.implicit_order else None
        stream.device.last_group = self

    def is_ready(self) -> bool:
        if self.group_before is not None and self.group_before.has_begun:
            self.group_before = None
        return self.is_next and self.group_before is None

    def leave(self) -> None:
        self.stream.device.ready.append(self)

    def begin(self) -> None:
        self.has_begun = True
        if self.backend.is_aborted:
            self.done = True
            return
        self.stream.device.running.append(self)
        self.come(self.backend.fabric, self.backend.rank)
        self.backend.fabric.match()

    def come(self, fabric: Fabric, here: int) -> None:
        """Give to the others what they may wait for."""
        for is_send, peer, tensor in self.operations:
            pair = (here, peer) if is_send else (peer, here)
            (fabric.sends if is_send else fabric.receives).setdefault(pair, deque()).append(Message(self, tensor))

    def end_if_done(self) -> None:
        """Leave the device once all has crossed."""
        if self.left == 0 and not self.done:
            self.done = True
            self.stream.device.running.remove(self)

    def drop(self) -> None:
        """Leave the device with nothing done."""
        fabric = self.backend.fabric
        for table in (fabric.sends, fabric.receives):
            for pair, messages in table.items():
                table[pair] = deque(message for message in messages if message.group is not self)
        for come in fabric.broadcasts.values():
            if come.get(self.backend.rank) is self:
                del come[self.backend.rank]
        self.left = 0
        self.end_if_done()


class Broadcast(Group):
    """A broadcast: one kernel, which waits until all ranks of its communicator have come."""

    def __init__(self, stream: Stream, backend: "Backend", root: int, tensor: torch.Tensor) -> None:
        super().__init__(stream, backend, [(backend.rank == root, root, tensor)])
        self.root, self.tensor = root, tensor
        self.number = backend.broadcasts
        backend.broadcasts += 1

    def come(self, fabric: Fabric, here: int) -> None:
        fabric.broadcasts.setdefault(self.number, {})[here] = self


class Work:
    """torch's work of a group."""

    def __init__(self, backend: "Backend", event: Event) -> None:
        self._backend = backend
        self._event = event

    def synchronize(self) -> None:
        """See DeviceWork."""
        self._backend.device.current.wait_event(self._event)

    def is_completed(self) -> bool:
        """See DeviceWork."""
        return self._backend.error() is not None or self._event.query()

    def wait(self) -> bool:
        """See DeviceWork. As torch's, it blocks the host where the backend has no watchdog."""
        self.synchronize()
        while not self._backend.has_watchdog and not self.is_completed():
            time.sleep(0.001)
        error = self._backend.error()
        if error is not None:
            raise RuntimeError(error)
        return True


class Backend:
    """torch's, of one rank.

    Args:
        accelerator: of this rank.
        store: shared by the ranks of the communicator alone.
        rank, size: among them.
        timeout: for connecting, and of the watchdog.
    """

    def __init__(self, accelerator: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self.accelerator = accelerator
        self.device: Device = accelerator.device
        self.world = self.device.world
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.has_watchdog = os.environ.get("TORCH_NCCL_BLOCKING_WAIT") != "1"
        self.is_aborted = self.is_dead = False
        self.connected: set[Pair] = set()
        self.broadcasts = 0
        """How many were queued."""
        self._open = threading.local()
        self._refused = False
        self.stream = self.device.new_stream(HIGH)

    def eager_connect_single_device(self, device: torch.device) -> None:
        """See DeviceBackend."""
        self.fabric = self.accelerator.ranks.fabric_of(self.store, self.size)
        deadline = time.monotonic() + self.timeout.total_seconds()
        with self.world.moved:
            self.fabric.backends[self.rank] = self
            self.world.moved.notify_all()
            while len(self.fabric.backends) < self.size:
                if not self.world.moved.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError("NCCL error: wait timeout in the store")
        self.accelerator.backends.append(self)

    def _start_coalescing(self) -> None:
        self._open.operations = []
        self.accelerator.opened.depth = self._depth + 1

    @property
    def _depth(self) -> int:
        """How many groups are open on this thread."""
        return getattr(self.accelerator.opened, "depth", 0)

    def _group_end(self) -> None:
        if not self._depth:
            raise RuntimeError("NCCL error: not in a group call")
        self.accelerator.opened.depth -= 1

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> None:
        """See DeviceBackend."""
        self._add(True, rank, tensors[0])

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> None:
        """See DeviceBackend."""
        self._add(False, rank, tensors[0])

    def _add(self, is_send: bool, rank: int, tensor: torch.Tensor) -> None:
        if self.is_aborted:
            raise RuntimeError("NCCL communicator was aborted")
        if not 0 <= rank < self.size or rank == self.rank:
            self._refused = True
            raise RuntimeError(f"NCCL error: invalid argument: rank {rank}")
        assert tensor.numel() > 0
        assert tensor.is_contiguous()
        self._open.operations.append((is_send, rank, tensor))

    def _end_coalescing(self) -> Work:
        operations, self._open.operations = self._open.operations, None
        if self._refused:
            raise RuntimeError("NCCL error: invalid argument")
        self._group_end()
        if not operations:
            raise RuntimeError("NCCL error: an empty group")
        with self.world.moved:
            self._connect(operations)
            start = self.device.current.record_event()
            self.stream.wait_event(start)
            if self._depth:  # nothing is queued, and nobody is told
                return Work(self, self.stream.record_event())
            group = Group(self.stream, self, operations)
            self.stream.push(group)
            work = Work(self, self.stream.record_event())
        if self.has_watchdog:
            self._watch(work)
        return work

    def _connect(self, operations: list[tuple[bool, int, torch.Tensor]]) -> None:
        """Wait on the host for the other end of every pair that is used for the first time."""
        pairs = {(self.rank, peer) for _, peer, _ in operations} - self.connected
        self.fabric.connecting |= pairs
        self.world.moved.notify_all()
        self._await(lambda: all((peer, here) in self.fabric.connecting for here, peer in pairs))
        self.connected |= pairs

    def _await(self, check: Callable[[], bool]) -> None:
        """Wait on the host for what others do, or for an abort."""
        while not check():
            self.world.moved.wait()
            if self.is_aborted:
                raise RuntimeError("NCCL communicator was aborted")
            if self.is_dead:
                raise RuntimeError("this rank is dead")

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work:
        """See DeviceBackend."""
        if self.is_aborted:
            raise RuntimeError("NCCL communicator was aborted")
        assert not self._depth
        assert tensors[0].is_contiguous()
        with self.world.moved:
            ring = self.fabric.in_ring
            ring.add(self.rank)
            self.world.moved.notify_all()
            self._await(lambda: len(ring) == self.size)
            self.stream.wait_event(self.device.current.record_event())
            self.stream.push(Broadcast(self.stream, self, options.rootRank, tensors[0]))
            work = Work(self, self.stream.record_event())
        if self.has_watchdog:
            self._watch(work)
        return work

    def _watch(self, work: Work) -> None:
        def look() -> None:
            ranks = self.accelerator.ranks
            if not work.is_completed() and not ranks.is_closed and self.accelerator.rank not in ranks.frozen:
                ranks.store.set("exception_dump", b"")
                self.accelerator.ranks.kill(self.accelerator.rank)

        timer = threading.Timer(self.timeout.total_seconds(), look)
        timer.daemon = True
        timer.start()

    def error(self) -> str | None:
        """What NCCL noticed."""
        with self.world.moved:
            if self.is_aborted:
                return "NCCL communicator was aborted"
            dead = [one.died for one in self.fabric.backends.values() if one.is_dead]
            seconds = self.world.limits.error_seconds
            if dead and seconds is not None and time.monotonic() >= min(dead) + seconds:
                return "NCCL error: remote process exited or there was a network error"
            return None

    def abort(self) -> None:
        """See DeviceBackend."""
        with self.world.moved:
            self.is_aborted = True
            for kernel in [one for one in self.device.running if isinstance(one, Group) and one.backend is self]:
                kernel.drop()
            self.world.pump()
            while not self.device.is_idle and not self.accelerator.ranks.is_closed:
                self.world.moved.wait()

    def die(self) -> None:
        """The process is gone, and its kernels with it; with the world's lock held."""
        self.is_dead, self.died = True, time.monotonic()
        for kernel in [one for one in self.device.running if isinstance(one, Group) and one.backend is self]:
            kernel.drop()

    def shutdown(self) -> None:
        """See DeviceBackend. It frees memory."""
        with self.world.moved:
            if self.device.limits.loads:
                self.device.answer()
                self.device.wait_idle()
