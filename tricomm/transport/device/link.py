"""Link: one pair of ranks of one host whose tensors are on devices. Devices signal each other, and no host waits.

A sender packs a transfer into its arena at the place that both ends know (``tricomm.packing.staging``), and its stream
writes READY; the stream of the receiver waits for that, reads from there, and writes DONE, for which the sender's
stream waits before anything else goes to that place. Transfers of a direction count from 1, on both ends alike.

A local socket tells that the peer is there, hands over new parts of the arena, and nothing in a call. Who aborts tells
ABORTED before it lets its own streams go, which may write over what others still read: so a receiver counts what it
has read only if that word was not set *afterwards*.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from tricomm.transport.accelerator import Accelerator
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.device.flags import Flag, Flags
from tricomm.transport.device.memory import DeviceMemory, DeviceMemoryError
from tricomm.transport.device.run import DeviceRun
from tricomm.transport.memory.protocol import Closed, Message, Opened, Region, Sources
from tricomm.transport.memory.signals import LinkClosedError, Signals

LOOK_MILLISECONDS = 5.0
"""For how long to wait for a message at once; meanwhile the monitor cannot look."""


M = TypeVar("M", Region, Sources, Opened)


class Arrival:
    """A counter that a stream waits for, which the host can read without the driver: see Awaited."""

    def __init__(self, link: "DeviceLink", flag: Flag, count: int) -> None:
        self._link, self._flag, self._count = link, flag, count

    def is_completed(self) -> bool:
        """See Awaited."""
        return self._link.flags.has_come(self._flag, self._count) or not self._link.stands()

    def wait(self) -> None:
        """See Awaited."""
        if not self._link.flags.has_come(self._flag, self._count):
            raise LinkClosedError(f"the link to rank {self._link.peer} is closed")


class Posted:
    """A transfer that was posted: what to queue when it is waited for."""

    __slots__ = ("count", "group", "link", "operation")

    def __init__(self, link: "DeviceLink", operation: Operation, count: int, group: int) -> None:
        self.link, self.operation, self.count, self.group = link, operation, count, group


class DeviceLink:
    """One end of the link of this rank with another. The thread that runs uses it, and the monitor's looks.

    Args:
        accelerator, memory, device: of this rank.
        signals: the local socket.
        flags: the words of the pair.
    """

    def __init__(
        self, accelerator: Accelerator, memory: DeviceMemory, device: torch.device, signals: Signals, flags: Flags
    ) -> None:
        self.peer = signals.peer
        self.signals = signals
        self.flags = flags
        self._accelerator, self._memory, self._device = accelerator, memory, device
        self._counts = {True: 0, False: 0}
        self._read: set[int] = set()
        self._all_read = 0
        """All up to this one were read."""
        self.arenas = {is_send: torch.empty(0, dtype=torch.uint8, device=device) for is_send in (True, False)}
        """What the peer reads, and what is read of it."""
        self._come: dict[type, deque[tuple[Any, bytes]]] = {kind: deque() for kind in (Region, Sources, Opened)}
        """Messages that nobody has taken yet, each with what stands in the file that came with it."""
        self._closed: set[int] = set()
        self.opened: list[int] = []
        """Addresses of the peer's memory here."""
        self._lock = threading.Lock()

    # ---- a call

    def post(self, operation: Operation, run: DeviceRun, group: int) -> Posted:
        """Begin a transfer: what is sent is packed by now. Its bytes are copied where they are not in the arena yet."""
        is_send, peer, *_ = operation
        self._counts[is_send] = count = self._counts[is_send] + 1
        if is_send:
            if not operation.is_direct:
                self._pack(operation)
            self.flags.write(self._stream, Flag.READY, count)
        run.append((peer,), Arrival(self, Flag.DONE if is_send else Flag.READY, count))
        run.check_last(peer, self.check)
        return Posted(self, operation, count, group)

    def wait(self, posted: Posted) -> bool:
        """Let the stream go on when a transfer has come, or was read; true if it is still to be unpacked from where it
        is, after which ``read`` says so.
        """
        operation = posted.operation
        if operation.is_send:
            self.flags.wait(self._stream, Flag.DONE, posted.count)
            return False
        self.flags.wait(self._stream, Flag.READY, posted.count)
        if operation.is_direct:
            return True
        out_of = self._place(operation)
        if out_of.data_ptr() == operation.buffer.data_ptr():
            return True
        self._copy(operation.buffer, out_of)
        self.read(posted.count)
        return False

    def read(self, count: int) -> None:
        """Tell the peer that a transfer was read, by all that was queued so far, as soon as all before it were, too."""
        self._read.add(count)
        before = self._all_read
        while self._all_read + 1 in self._read:
            self._all_read += 1
            self._read.discard(self._all_read)
        if self._all_read != before:
            self.flags.write(self._stream, Flag.DONE, self._all_read)

    @property
    def _stream(self) -> Any:
        return self._accelerator.current_stream(self._device)

    def _place(self, operation: Operation) -> torch.Tensor:
        nbytes = operation.buffer.numel()
        return self.arenas[operation.is_send].narrow(0, operation.place, nbytes)

    def _pack(self, operation: Operation) -> None:
        into = self._place(operation)
        if into.data_ptr() != operation.buffer.data_ptr():
            self._copy(into, operation.buffer)

    def _copy(self, into: torch.Tensor, out_of: torch.Tensor) -> None:
        self._accelerator.launch(partial(into.copy_, out_of))

    # ---- the arena

    def give(self, handle: bytes, address: int, offset: int, nbytes: int) -> None:
        """Use another part of this rank's arena from the next transfer on, and let the peer know.

        Args:
            handle: of the allocation.
            address: of it.
            offset, nbytes: of the part.

        Raises:
            LinkClosedError: the link is closed.
        """
        self.arenas[True] = self._memory.tensor(address + offset, nbytes)
        self.tell(Region(handle, offset, nbytes))

    def take(self, nbytes: int, interrupted: Callable[[], None]) -> None:
        """Wait until the peer has given a part of its arena that is large enough, which it does in the same call.

        Raises:
            ConnectionLostError: the link is closed, or the driver refuses.
        """
        while self.arenas[False].numel() < nbytes:
            region, _ = self.receive(Region, interrupted)
            try:
                self.open(region)
            except DeviceMemoryError as error:
                raise ConnectionLostError(self.peer, error) from error

    def open(self, region: Region) -> None:
        """Read from a part of the peer's arena from now on."""
        address = self._memory.opened(region.handle)
        self.opened.append(address)
        self.arenas[False] = self._memory.tensor(address + region.offset, region.nbytes)

    # ---- messages

    def receive(self, kind: type[M], interrupted: Callable[[], None]) -> tuple[M, bytes]:
        """Wait for a message of a kind, which the peer sends in the same call; with what its file has.

        Raises:
            ConnectionLostError: the link is closed.
        """
        come = self._come[kind]
        while not come:
            interrupted()
            if self.look(LOOK_MILLISECONDS) and not come:
                raise ConnectionLostError(self.peer, LinkClosedError(f"the link to rank {self.peer} is closed"))
        return come.popleft()

    def tell(self, message: Message, file: int | None = None) -> None:
        """Send a message, from any thread; see Signals.

        Raises:
            LinkClosedError: the link is closed.
        """
        with self._lock:
            self.signals.tell(message, file)

    def look(self, milliseconds: float) -> bool:
        """Take what comes until then; true if the link has ended."""
        with self._lock:
            is_over = self.signals.wait(milliseconds)
            for message, files in self.signals.come():
                if isinstance(message, Closed):
                    self._closed.add(message.number)
                elif type(message) in self._come:
                    self._come[type(message)].append((message, b"".join(map(_content, files))))
        return is_over

    def has_closed(self, number: int) -> bool:
        """Whether the peer has closed what was told it under a number."""
        return number in self._closed

    # ---- the end

    def stands(self) -> bool:
        """Whether the peer is there, as far as is known; asked from any thread."""
        with self._lock:
            return not self.signals.is_closed()

    def check(self) -> None:
        """Raise if what was read of the peer does not count."""
        if self.flags.theirs(Flag.ABORTED):
            raise LinkClosedError(f"rank {self.peer} aborted before all was read")

    @property
    def is_used(self) -> bool:
        """Whether anything went to the peer or came from it."""
        return any(self._counts.values())

    def counts(self) -> bool:
        """Whether it can still be used."""
        return not self.flags.theirs(Flag.ABORTED) and self.stands()

    def require(self) -> None:
        """Raise if it cannot be used any more."""
        self.check()
        if not self.stands():
            raise LinkClosedError(f"the link to rank {self.peer} is closed")

    def end(self) -> None:
        """End the link for both. The peer learns that what it reads does not count; only after that it may change."""
        self.flags.tell(Flag.ABORTED)
        self.signals.close()

    def is_unmapped(self) -> bool:
        """Whether the peer has nothing of this rank's memory open, or its process has ended."""
        return bool(self.flags.theirs(Flag.UNMAPPED)) or self.signals.is_process_over()

    def unmap(self) -> None:
        """Give back what this rank has of the peer's memory."""
        while self.opened:
            self._memory.close(self.opened.pop())
        self.flags.tell(Flag.UNMAPPED)


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)
