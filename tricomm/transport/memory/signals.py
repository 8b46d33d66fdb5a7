"""Signals: the messages of one pair of ranks of one host, over a local socket.

The socket keeps the order and the bounds of messages and tells the end of its peer; where a forked child holds the
peer's end too, a pidfd in the same poll tells the death. Whatever thread calls ``close``, both ends wake.
"""

import os
import select
import socket
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from tricomm.transport.memory.protocol import MAX_MESSAGE_NBYTES, Message, decode, encode

HALF_CLOSED = getattr(select, "POLLRDHUP", 0)
"""Linux has it, and links are made nowhere else."""

GONE = select.POLLHUP | HALF_CLOSED | select.POLLERR | select.POLLNVAL
FLAGS = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
BUFFER_NBYTES = 1 << 20
FILE_NBYTES = socket.CMSG_SPACE(array("i").itemsize)
NO_FILES: Sequence[int] = ()
Ancillary = Sequence[tuple[int, int, bytes]]
"""What a socket says beside a message."""

Backlog = deque[tuple[bytes, int | None]]
"""Messages that wait for room in a socket, with the file that goes with each."""


class LinkClosedError(RuntimeError):
    """The other end of a link closed, or this one, or its process has ended."""


class Signals:
    """One end. One thread uses it at a time, but for ``close``.

    Args:
        peer: the other rank.
        end: a connected local socket that keeps the bounds of messages; this object's from now on.
        pid: of the peer's process as this one sees it; 0 if it does not.
    """

    def __init__(self, peer: int, end: socket.socket, pid: int) -> None:
        self.peer = peer
        self._socket = end
        self.receive, self.send = end.recvmsg, end.send
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_NBYTES)
        poll = select.poll()
        poll.register(end, select.POLLIN | HALF_CLOSED)
        self._process = _opened(pid)
        if self._process is not None:
            poll.register(self._process, select.POLLIN)
        self.poll = poll.poll
        self.backlog: Backlog = deque()
        self._joint: tuple[tuple[int, ...], select.poll, dict[int, int]] | None = None
        """The peers of others that it was waited for with, and what waits for all. It holds none of them."""
        weakref.finalize(self, _close, end, self._process, self.backlog, os.getpid()).atexit = False

    def tell(self, message: Message, file: int | None = None) -> None:
        """Send a message, now or when there is room; the file is handed over with it, and closed.

        Raises:
            LinkClosedError: the link is closed.
        """
        data = encode(message)
        if file is None:
            self.say(data)
            return
        self.backlog.append((data, file))
        self.flush()

    def say(self, data: bytes) -> None:
        """As ``tell``, of a message that is encoded."""
        if not self.backlog:
            try:
                self.send(data, FLAGS)
            except OSError:
                pass  # no room; or closed, as ``flush`` says
            else:
                return
        self.backlog.append((data, None))
        self.flush()

    def flush(self) -> bool:
        """Send what waits for room; true if nothing waits any more.

        Raises:
            LinkClosedError: the link is closed.
        """
        while self.backlog:
            data, file = self.backlog[0]
            try:
                if file is None:
                    self.send(data, FLAGS)
                else:
                    socket.send_fds(self._socket, [data], [file], FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                _drop(self.backlog)
                raise LinkClosedError(f"the link to rank {self.peer} is closed: {error}") from error
            self.backlog.popleft()
            if file is not None:
                os.close(file)
        return True

    def come(self) -> Iterator[tuple[Message, Sequence[int]]]:
        """The messages that have come, each with the files handed over with it, which are closed afterwards."""
        while True:
            try:
                data, ancillary, _, _ = self.receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except OSError:
                return  # nothing is there; or reset: ``is_closed`` says so
            if not data:
                return
            if not ancillary:
                yield decode(data), NO_FILES
                continue
            files = files_in(ancillary)
            try:
                yield decode(data), files
            finally:
                for file in files:
                    os.close(file)

    def wait(self, milliseconds: float) -> bool:
        """Wait for a message, or the end of the link; true if it has ended. Messages may have come before that."""
        is_over = False
        for file, event in self.poll(milliseconds):
            is_over = is_over or bool(event & GONE) or file == self._process
        return is_over

    def wait_with(self, others: Mapping[int, "Signals"], milliseconds: float) -> dict[int, bool]:
        """Wait for a message of this link or others, by peer, or the end of one: by peer of which there is news,
        whether it is the end.
        """
        with_peers = tuple(others)
        if self._joint is None or self._joint[0] != with_peers:
            poll, peers = select.poll(), dict[int, int]()
            for one in (self, *others.values()):
                poll.register(one._socket, select.POLLIN | HALF_CLOSED)
                peers[one._socket.fileno()] = one.peer
                if one._process is not None:
                    poll.register(one._process, select.POLLIN)
                    peers[one._process] = ~one.peer  # what it tells is the end
            self._joint = with_peers, poll, peers
        _, poll, peers = self._joint
        news: dict[int, bool] = {}
        for file, event in poll.poll(milliseconds):
            peer = peers[file]
            if peer < 0 or event & GONE:
                news[peer if peer >= 0 else ~peer] = True
            else:
                news.setdefault(peer, False)
        return news

    def is_closed(self) -> bool:
        """Whether either end has closed, or the peer's process has ended."""
        return self.wait(0)

    def is_process_over(self) -> bool:
        """Whether the peer's process has ended, as far as can be seen: else, whether its end is closed."""
        if self._process is None:
            return self.is_closed()
        process = select.poll()
        process.register(self._process, select.POLLIN)
        return bool(process.poll(0))

    @property
    def is_crowded(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self.backlog)

    def close(self) -> None:
        """End the link for both. May be called from any thread, again too."""
        with suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)


def _opened(pid: int) -> int | None:
    """A pidfd of a process; None if there is none to be had, or it has ended: then the socket tells its end."""
    try:
        return os.pidfd_open(pid) if pid else None
    except (OSError, AttributeError):  # an old kernel, or a Python that was built for one
        return None


def files_in(ancillary: Ancillary) -> Sequence[int]:
    """The files that were handed over with a message; whoever has it closes them."""
    return [*array("i", b"".join(one for _, _, one in ancillary))]


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
