"""Link: one pair of ranks of one host. A local socket carries signals, memory the bytes; see ``protocol``.

The socket keeps the order of messages and tells the end of its peer; where a forked child holds the peer's end too, a
pidfd in the same poll tells the death. Whatever thread calls ``close``, both ends wake.
"""

import os
import select
import socket
import time
import weakref
from collections import deque
from contextlib import suppress
from datetime import timedelta

import torch

from tricomm.packing.runs import Runs, one_run, runs_in
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.memory.arena import Arena, SharedSlab, mapped_slab
from tricomm.transport.memory.protocol import (
    MAX_MESSAGE_NBYTES,
    RECEIVING,
    SENDING,
    Action,
    Done,
    Event,
    Message,
    Ready,
    Receiving,
    Sending,
    Slab,
    decode,
    encode,
)
from tricomm.transport.memory.reading import UnreadableError, read_run, read_runs
from tricomm.transport.memory.rungs import Rung

HALF_CLOSED = getattr(select, "POLLRDHUP", 0)
"""Linux has it, and links are made nowhere else."""

GONE = select.POLLHUP | HALF_CLOSED | select.POLLERR | select.POLLNVAL
FLAGS = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
BUFFER_NBYTES = 1 << 20
Backlog = deque[tuple[bytes, int | None]]
"""Messages that wait for room in a socket, with the file that goes with each."""

CROWDED_MILLISECONDS = 1.0
"""How long to wait between two tries to tell what did not fit into a socket."""


class LinkClosedError(RuntimeError):
    """The other end of a link closed, or this one, or its process has ended."""


class Link:
    """One end of the link of this rank with another. One thread uses it at a time, but for ``close``.

    Args:
        peer: the other rank.
        end: a connected local socket that keeps the bounds of messages; the link's from now on.
        pid: of the peer's process as this one sees it; 0 if it does not.
        outgoing, incoming: how bytes go there and come from there.
    """

    def __init__(self, peer: int, end: socket.socket, pid: int, outgoing: Rung, incoming: Rung) -> None:
        self.peer = peer
        self.pid = pid
        self.outgoing = outgoing
        self.incoming = incoming
        self._socket = end
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_NBYTES)
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN | HALF_CLOSED)
        self._process = _opened(pid)
        if self._process is not None:
            self._poll.register(self._process, select.POLLIN)
        self._backlog: Backlog = deque()
        self._early: dict[int, deque[Ready]] = {}
        """Offers that came before anybody expected them, by tag."""
        self._expected: dict[int, deque[Expected]] = {}
        """What is expected and was not offered yet, by tag; in the order in which it was posted."""
        self._offers: dict[int, Offer] = {}
        self._count = 0
        self._arena = Arena()
        self._slabs: dict[int, SharedSlab] = {}
        weakref.finalize(self, _close, end, self._process, self._backlog, os.getpid()).atexit = False

    def rung(self, is_send: bool) -> Rung:
        """How bytes go in one direction."""
        return self.outgoing if is_send else self.incoming

    # ---- transfers

    def offer(self, operation: Operation, tag: int) -> "Offer":
        """Tell the peer that bytes may be read: those of the operation's buffer, or of its runs.

        Raises:
            ConnectionLostError: the link is closed.
        """
        self._count += 1
        _, _, buffer, runs = operation
        slab = None
        if self.outgoing is Rung.ARENA:
            slab = self._filled(buffer)
            ready = Ready(self._count, tag, buffer.numel(), 0, 0, slab.number)
        elif runs is None:
            ready = Ready(self._count, tag, buffer.numel(), buffer.data_ptr())
        else:
            ready = Ready(self._count, tag, runs.nbytes, runs.table.data_ptr(), len(runs.ends))
        found = self._offers[self._count] = Offer(operation, slab)
        self._tell_of(ready)
        return found

    def _filled(self, buffer: torch.Tensor) -> SharedSlab:
        """A slab of the arena with the bytes of a buffer, of which the peer knows."""
        slab, file = self._arena.take(buffer.numel())
        if file is not None:
            self._tell_of(Slab(slab.number, slab.memory.numel()), file)
        slab.memory[: buffer.numel()].copy_(buffer)
        return slab

    def _tell_of(self, message: Message, file: int | None = None) -> None:
        try:
            self._tell(message, file)
        except LinkClosedError as error:
            raise ConnectionLostError(self.peer, error) from error

    def expect(self, operation: Operation, tag: int) -> "Expected":
        """Something to wait for: the bytes that the peer offers next under a tag.

        Offers and what is expected match in the order in which they are posted, in whatever order they are waited for.
        """
        found = Expected(operation)
        early = self._early.get(tag)
        if early:
            found.ready = early.popleft()
        else:
            self._expected.setdefault(tag, deque()).append(found)
        return found

    def read(self, ready: Ready, operation: Operation) -> None:
        """Read what was offered into the operation's buffer, or its runs.

        Raises:
            UnreadableError: not all could be read.
        """
        _, _, buffer, runs = operation
        expected = buffer.numel() if runs is None else runs.nbytes
        if ready.nbytes != expected:
            text = f"{ready.nbytes} bytes came where {expected} were expected; the ranks do not follow the same plan"
            raise UnreadableError(0, text)
        if ready.slab:
            buffer.copy_(self._slabs[ready.slab].memory[: ready.nbytes])
        elif not ready.runs and runs is None:
            read_run(self.pid, buffer.data_ptr(), ready.address, ready.nbytes)
        else:
            here = one_run(buffer.data_ptr(), ready.nbytes) if runs is None else runs
            read_runs(self.pid, here, self._their_runs(ready))

    def _their_runs(self, ready: Ready) -> Runs:
        """The runs of an offer; their table is read from the peer too, each time, as nothing of it may be kept."""
        if not ready.runs:
            return one_run(ready.address, ready.nbytes)
        table = torch.empty(ready.runs, 2, dtype=torch.int64)
        read_run(self.pid, table.data_ptr(), ready.address, table.nbytes)
        found = runs_in(table)
        if found.nbytes != ready.nbytes:
            raise UnreadableError(0, f"the runs of {ready.nbytes} offered bytes have {found.nbytes}")
        return found

    def done(self, ready: Ready) -> None:
        """Tell the peer that what it offered was read. If it has closed, it learns from that."""
        try:
            self._tell(Done(ready.number))
        except LinkClosedError:
            return

    # ---- signals

    def _tell(self, message: Message, file: int | None = None) -> None:
        """Send a message, now or when there is room; the file is handed over with it, and closed."""
        self._backlog.append((encode(message), file))
        self.flush()

    def flush(self) -> bool:
        """Send what waits for room; true if nothing waits any more.

        Raises:
            LinkClosedError: the link is closed.
        """
        while self._backlog:
            data, file = self._backlog[0]
            try:
                if file is None:
                    self._socket.send(data, FLAGS)
                else:
                    socket.send_fds(self._socket, [data], [file], FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                _drop(self._backlog)
                raise LinkClosedError(f"the link to rank {self.peer} is closed: {error}") from error
            self._backlog.popleft()
            if file is not None:
                os.close(file)
        return True

    def look(self) -> None:
        """Take what messages have come."""
        while True:
            try:
                if self.incoming is Rung.ARENA:
                    data, files, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_NBYTES, 1, FLAGS)
                else:
                    data, files = self._socket.recv(MAX_MESSAGE_NBYTES, FLAGS), []
            except BlockingIOError:
                return
            except OSError:
                return  # reset: ``is_closed`` says so
            if not data:
                return
            match message := decode(data):
                case Ready():
                    expected = self._expected.get(message.tag)
                    if expected:
                        expected.popleft().ready = message
                    else:
                        self._early.setdefault(message.tag, deque()).append(message)
                case Done():
                    self._offers.pop(message.number).is_read = True
                case Slab():
                    self._slabs[message.slab] = mapped_slab(message.slab, files[0], message.nbytes)
            for file in files:
                os.close(file)

    def wait(self, milliseconds: float) -> bool:
        """Wait for a message, or the end of the link; true if it has ended. Messages may have come before that."""
        return any(event & GONE or file == self._process for file, event in self._poll.poll(milliseconds))

    def is_closed(self) -> bool:
        """Whether either end has closed, or the peer's process has ended."""
        return self.wait(0)

    @property
    def is_crowded(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._backlog)

    def give_back(self, slab: SharedSlab) -> None:
        """What was in it has been read."""
        self._arena.give_back(slab)

    def close(self) -> None:
        """End the link for both. May be called from any thread, again too."""
        with suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)


class Patience:
    """Until when to wait, and which links may still have something to tell meanwhile."""

    def __init__(self, limit: timedelta, links: tuple[Link, ...]) -> None:
        self._deadline = time.monotonic() + limit.total_seconds()
        self._links = links

    def await_news(self, link: Link) -> bool:
        """Wait for news from a link; true if it has ended.

        Raises:
            LinkClosedError: the deadline is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise LinkClosedError(f"rank {link.peer} gave no sign within the limit")
        crowded = [one for one in self._links if one.is_crowded]
        for one in crowded:
            try:
                one.flush()
            except LinkClosedError:
                continue  # whoever waits for that one hears of it
        return link.wait(CROWDED_MILLISECONDS if crowded else 1000 * left)


class Offer:
    """Bytes that the peer may read. Its link holds it, and it does not hold its link."""

    __slots__ = ("_operation", "_slab", "is_read")

    def __init__(self, operation: Operation, slab: SharedSlab | None) -> None:
        self._operation = operation  # keeps alive what is read
        self._slab = slab
        self.is_read = False

    def wait(self, link: Link, patience: Patience) -> None:
        """Return when the peer has read them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        state, is_over = Sending.OFFERED, False
        while state is Sending.OFFERED:
            link.look()
            if self.is_read:
                state, _ = SENDING[state, Event.DONE]
            elif is_over:
                state, _ = SENDING[state, Event.CLOSED]
            else:
                is_over = patience.await_news(link)
        if state is Sending.LOST:
            raise LinkClosedError(f"the link to rank {link.peer} is closed")
        if self._slab is not None:
            link.give_back(self._slab)


class Expected:
    """Bytes that the peer is to offer. Its link holds it, and it does not hold its link."""

    __slots__ = ("_operation", "ready")

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self.ready: Ready | None = None

    def wait(self, link: Link, patience: Patience) -> None:
        """Return when they are here, and count.

        Raises:
            LinkClosedError: the link has ended before.
            UnreadableError: they cannot be read though the link stands.
        """
        state, action, is_over, problem = Receiving.WAITING, Action.LOOK, False, None
        while action not in (Action.TELL_DONE, Action.FAIL):
            if action is Action.LOOK:
                if self.ready is None:
                    link.look()
                if self.ready is None and not is_over:
                    is_over = patience.await_news(link)
                    continue
                event = Event.CLOSED if self.ready is None else Event.READY
            elif action is Action.READ:
                event, problem = self._read(link)
            else:
                event = Event.CLOSED if link.is_closed() else Event.STANDS
            state, action = RECEIVING[state, event]
        if state is Receiving.UNREADABLE:
            assert problem is not None
            raise problem
        if state is Receiving.LOST:
            raise LinkClosedError(f"the link to rank {link.peer} is closed")
        assert self.ready is not None
        link.done(self.ready)

    def _read(self, link: Link) -> tuple[Event, UnreadableError | None]:
        assert self.ready is not None
        try:
            link.read(self.ready, self._operation)
        except UnreadableError as error:
            return Event.NOT_ALL_READ, error
        return Event.ALL_READ, None


def _opened(pid: int) -> int | None:
    """A pidfd of a process; None if there is none to be had, or it has ended: then the socket tells its end."""
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


def _drop(backlog: Backlog) -> None:
    """Nobody takes what waits for room any more."""
    while backlog:
        _, file = backlog.popleft()
        if file is not None:
            os.close(file)


def _close(end: socket.socket, process: int | None, backlog: Backlog, owner: int) -> None:
    """Give the descriptors back; only whose link it is also ends it, and not a forked child that has a copy."""
    _drop(backlog)
    if os.getpid() == owner:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    end.close()
    if process is not None:
        os.close(process)
