"""A device: streams, events, kernels, and a limited number of hardware queues.

Rules:
1. What a stream has to do happens in order; streams are ordered against each other by events alone.
2. Every stream has one of a few hardware queues. A queue hands out what stands in it in the order in which the host
   queued it, whatever the stream, and not before its turn in its stream has come: what stands behind it waits, too.
3. One computing kernel runs at a time, and none of any kind begins beside it. Then the one of the highest priority
   begins.
4. Kernels that wait for messages stay on the device, beside others. There is room for so many.
5. A kernel is loaded when it is launched for the first time, which waits on the host for all that run; meanwhile the
   device answers nobody. To free memory waits in the same way.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HIGH, NORMAL = -1, 0
POOL = 32
"""torch makes so many streams of a priority on a device, and gives them out in turn."""


@dataclass(frozen=True)
class Limits:
    """What a device has.

    Attributes:
        queues: hardware queues (CUDA_DEVICE_MAX_CONNECTIONS; CUDA's default is 8).
        room: for kernels that wait for messages.
        error_seconds: after which NCCL notices that a rank is gone; None is never.
        loads: whether kernels with a name are loaded.
        implicit_order: whether NCCL lets kernels begin in the order in which the host queued them, whatever their
            communicators (NCCL_LAUNCH_ORDER_IMPLICIT).
    """

    queues: int = 32
    room: int = 32
    error_seconds: float | None = 0.2
    implicit_order: bool = False
    loads: bool = False


class Command:
    """Something that a stream has to do. Subclasses say when it can begin."""

    def __init__(self, stream: "Stream") -> None:
        self.stream = stream
        self.before = stream.tail
        self.done = False
        stream.tail = self

    @property
    def is_next(self) -> bool:
        """Whether all before it in its stream is done."""
        if self.before is not None and self.before.done:
            self.before = None  # or every command of a stream would be kept
        return self.before is None

    def is_ready(self) -> bool:
        """Whether it can leave its queue."""
        return self.is_next

    def leave(self) -> None:
        """Leave the queue."""
        self.done = True


class Event(Command):
    """A place in a stream. A device that is switched off has done all: or who waits for that would do so for ever."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        with self.stream.device.world.moved:
            self.stream.device.answer()
            return self.done or self.stream.device.world.is_closed


class Wait(Command):
    """What follows in the stream begins after an event."""

    def __init__(self, stream: "Stream", event: Event) -> None:
        super().__init__(stream)
        self.event = event

    def is_ready(self) -> bool:
        return self.is_next and self.event.done


class Kernel(Command):
    """Computes: carries out some work, at its end.

    Args:
        stream: on which.
        work: what it computes.
        gate: if not None, it ends when that is opened.
        seconds: if not 0, it takes so long.
    """

    is_computing = True

    def __init__(
        self, stream: "Stream", work: Callable[[], object], gate: "Gate | None" = None, seconds: float = 0.0
    ) -> None:
        super().__init__(stream)
        self.work = work
        self.gate = gate
        self.seconds = seconds

    def leave(self) -> None:
        self.stream.device.ready.append(self)

    def begin(self) -> None:
        """It has the device."""
        device = self.stream.device
        if self.seconds:
            self.gate = Gate(device.world)
            self.gate.open_after(self.seconds)
        if self.gate is None or self.gate.is_open:
            self.work()
            self.done = True
        else:
            self.gate.kernels.append(self)
            device.running.append(self)

    def end(self) -> None:
        """It is done."""
        self.stream.device.running.remove(self)
        self.work()
        self.done = True


class Gate:
    """Kernels end when it is opened: how long a computation takes, without a clock.

    Args:
        world: in which.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.is_open = False
        self.opened = 0.0
        self.kernels: list[Kernel] = []

    def open(self) -> None:
        """Let those that wait end, and those to come."""
        with self.world.moved:
            self.opened = self.opened if self.is_open else time.monotonic()
            self.is_open = True
            while self.kernels:
                self.kernels.pop().end()
            self.world.pump()

    def open_after(self, seconds: float) -> None:
        """Open it later."""
        timer = threading.Timer(seconds, self.open)
        timer.daemon = True
        timer.start()


class Stream:
    """See Accelerator's.

    Args:
        device: on which.
        priority: of its kernels.
    """

    def __init__(self, device: "Device", priority: int) -> None:
        self.device = device
        self.priority = priority
        self.tail: Command | None = None
        self.queue = device.queues[device.streams % len(device.queues)]
        device.streams += 1

    def push(self, command: Command) -> None:
        """Queue it; with the world's lock held."""
        self.queue.append(command)
        self.device.world.pump()

    def record_event(self) -> Event:
        """See Accelerator's."""
        with self.device.world.moved:
            self.device.answer()
            event = Event(self)
            self.push(event)
            return event

    def wait_event(self, event: Event) -> None:
        """See Accelerator's."""
        with self.device.world.moved:
            self.device.answer()
            self.push(Wait(self, event))

    def launch(
        self, work: Callable[[], object], gate: Gate | None = None, seconds: float = 0.0, name: str = ""
    ) -> None:
        """Queue a kernel that computes; "" is loaded already."""
        with self.device.world.moved:
            self.device.load(name)
            self.push(Kernel(self, work, gate, seconds))


class Device:
    """One rank's.

    Args:
        world: of all.
        limits: what it has.
    """

    def __init__(self, world: "World", limits: Limits) -> None:
        self.world = world
        self.limits = limits
        self.queues: list[deque[Command]] = [deque() for _ in range(limits.queues)]
        self.streams = 0
        self.ready: list[Any] = []
        self.running: list[Any] = []
        self.holding: set[Any] = set()
        """What holds streams until a word comes."""
        self.last_group: Any = None
        """Of any communicator."""
        self.loaded = {""}
        self.is_loading = False
        self.default = Stream(self, NORMAL)
        self._pool: list[Stream] = []
        self._given = 0
        self._current = threading.local()

    def new_stream(self, priority: int = HIGH) -> Stream:
        """One of the pool's high priority streams, or a new one."""
        if priority != HIGH:
            with self.world.moved:
                return Stream(self, priority)
        with self.world.moved:
            if len(self._pool) < POOL:
                self._pool.append(Stream(self, HIGH))
            self._given += 1
            return self._pool[(self._given - 1) % POOL]

    @property
    def current(self) -> Stream:
        """The current stream of this thread."""
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one of this thread."""
        before = self.current
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def load(self, name: str) -> None:
        """Load a kernel; with the world's lock held."""
        self.answer()
        if name in self.loaded or not self.limits.loads:
            return
        self.loaded.add(name)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait for all that run, and answer nobody meanwhile; with the world's lock held."""
        self.is_loading = True
        while (self.running or self.holding) and not self.world.is_closed:
            self.world.moved.wait()
        self.is_loading = False
        self.world.moved.notify_all()

    def answer(self) -> None:
        """Return when the driver has time for the host; with the world's lock held."""
        while self.is_loading and not self.world.is_closed:
            self.world.moved.wait()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return not self.running and not self.holding

    def advance(self) -> bool:
        """Let go what can go; whether anything did."""
        moved = False
        for queue in self.queues:
            while queue and queue[0].is_ready():
                queue.popleft().leave()
                moved = True
        while self.ready:
            if any(kernel.is_computing for kernel in self.running):
                break
            first = min(self.ready, key=lambda kernel: kernel.stream.priority)
            if not first.is_computing and sum(not one.is_computing for one in self.running) >= self.limits.room:
                first = next((one for one in self.ready if one.is_computing), None)
                if first is None:
                    break
            self.ready.remove(first)
            first.begin()
            moved = True
        return moved


class World:
    """All devices, and the lock under which anything happens.

    Args:
        size: how many.
        limits: of each.
    """

    def __init__(self, size: int, limits: Limits) -> None:
        self.moved = threading.Condition(threading.RLock())
        self.limits = limits
        self.devices = [Device(self, limits) for _ in range(size)]
        self.is_closed = False
        self.has_changed = False
        """Whether a device has written what others may wait for."""
        self._is_pumping = False

    def pump(self) -> None:
        """Let everything happen that can, and wake who waits for it; with the lock held."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            moved = True
            while moved:
                moved = self.has_changed = False
                for device in self.devices:
                    moved |= device.advance()
                moved |= self.has_changed
        finally:
            self._is_pumping = False
        self.moved.notify_all()
