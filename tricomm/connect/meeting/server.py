"""The sockets of a meeting: one listener, held from the first moment, and a thread that serves all connections."""

import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tricomm.connect.meeting.handshake import checked_secret
from tricomm.connect.meeting.host import Host
from tricomm.errors import ArgumentError, SpecError
from tricomm.kinds import explains_missing

LOG = logging.getLogger("tricomm")

PIECE_BYTES = 1 << 16
TICK_SECONDS = 0.25
BACKLOG = 1024


def parse_address(address: object) -> tuple[str, int]:
    """Return (host, port) of "tcp://host:port".

    Raises:
        SpecError: it is none; an ArgumentError if it is no text.

    Example:
        >>> parse_address("tcp://10.0.0.7:29600"), parse_address("tcp://[::1]:0")
        (('10.0.0.7', 29600), ('::1', 0))
    """
    remedy = 'write "tcp://10.0.0.7:29600", or port 0 to take a free one'
    if not isinstance(address, str):
        raise ArgumentError(f"address={address!r} is not a text; {remedy}")
    scheme, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "tcp" or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SpecError(f"address={address!r} is not tcp://host:port; {remedy}")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Write (host, port) as ``parse_address`` reads it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


@explains_missing
class Meeting:
    """Listen where ranks of separate jobs meet, in this process, until it is closed.

    One process does it, of either job or of none (``python -m tricomm meet``); all ranks, its own too, then call
    :func:`tricomm.connect` with its ``address``. When it goes, so does what it holds for the groups that met there:
    take one that outlives the jobs that restart.

    Args:
        address: "tcp://host:port", of this machine: connections to no other address of it are taken. Port 0 takes a
            free one.
        secret: that all who join must know, at least 16 bytes.

    Attributes:
        address: with the port.

    Raises:
        SpecError: an address that cannot be bound, or a secret that is too short.

    Example:
        >>> with Meeting("tcp://127.0.0.1:0", secret="a secret of one example") as meeting:
        ...     meeting.address.rpartition(":")[0]
        'tcp://127.0.0.1'
    """

    def __init__(self, address: str, *, secret: str | bytes) -> None:
        host, port = parse_address(address)
        state = Host(checked_secret(secret))
        try:
            family, kind, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind)
        except OSError as error:
            raise SpecError(f"address={address!r} is no address ({error}); write one of this machine") from None
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise SpecError(
                f"address={address!r} cannot be bound ({error}); name one of this machine, and port 0 for a free one"
            ) from None
        listener.setblocking(False)
        self.address = format_address(host, listener.getsockname()[1])
        loop = _Loop(listener, state)
        self._loop = loop
        self._thread = threading.Thread(target=loop.run, name="tricomm-meeting", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, loop.stop)
        close_in_children(loop, _Loop.forget)

    def close(self) -> None:
        """Stop listening, and end all connections.

        >>> meeting = Meeting("tcp://127.0.0.1:0", secret="a secret of one example")
        >>> meeting.close()
        """
        self._end()
        self._thread.join()

    def wait(self) -> None:
        """Serve until the process is interrupted.

        ::

            Meeting("tcp://10.0.0.1:29600", secret=secret).wait()  # in a process of its own
        """
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def close_in_children(owner: object, close: Callable[[Any], None]) -> None:
    """Let no forked child, such as a worker of a DataLoader, hold a connection open that its parent's death closes."""
    reference = weakref.ref(owner)

    def after_fork() -> None:
        found = reference()
        if found is not None:
            close(found)

    os.register_at_fork(after_in_child=after_fork)


class _Connection:
    """A socket, what is still to be sent on it, and its number."""

    __slots__ = ("number", "pending", "socket")

    def __init__(self, number: int, connected: socket.socket) -> None:
        self.number = number
        self.socket = connected
        self.pending = b""


class _Loop:
    """The thread of a meeting.

    Args:
        listener: it listens, and does not block.
        state: of the meeting.
    """

    def __init__(self, listener: socket.socket, state: Host) -> None:
        self._listener = listener
        self._state = state
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._connections: dict[int, _Connection] = {}
        self._next = 1
        self._is_ended = False
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def stop(self) -> None:
        """End the thread soon. May be called from any thread, again too."""
        self._is_ended = True
        try:
            self._waker.send(b"x")
        except OSError:
            return  # it has ended

    def forget(self) -> None:
        """In a forked child: close everything, without a word to anybody."""
        for one in (self._listener, self._wake, self._waker, *(held.socket for held in self._connections.values())):
            one.close()
        self._selector.close()

    def run(self) -> None:
        """Serve until the end."""
        next_tick = time.monotonic() + TICK_SECONDS
        while not self._is_ended:
            for key, events in self._selector.select(max(0.0, next_tick - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._serve(key.data, events)
            if time.monotonic() >= next_tick:
                for number, how in self._state.tick(time.monotonic()).items():
                    self._close(self._connections[number], how)
                next_tick = time.monotonic() + TICK_SECONDS
        for connection in list(self._connections.values()):
            self._close(connection, "was at a meeting that has ended")
        self._selector.close()
        for one in (self._listener, self._wake, self._waker):
            one.close()

    def _accept(self) -> None:
        try:
            connected, address = self._listener.accept()
        except OSError as error:
            LOG.warning("the meeting could not take a connection: %s", error)
            return
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = self._state.opened(self._next, f"{address[0]}:{address[1]}", time.monotonic())
        if greeting is None:
            connected.close()
            return
        connection = self._connections[self._next] = _Connection(self._next, connected)
        self._next += 1
        self._selector.register(connected, selectors.EVENT_READ, connection)
        self._send(connection, greeting)

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(connection, b"")
            return
        try:
            data = connection.socket.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._close(connection, f"lost its connection to the meeting ({error})")
            return
        if not data:
            self._close(connection, "died: its connection to the meeting closed; see its log")
            return
        answer, goes_on = self._state.received(connection.number, data, time.monotonic())
        if self._send(connection, answer) and not goes_on:
            self._close(connection, "said what the meeting does not understand")

    def _send(self, connection: _Connection, data: bytes) -> bool:
        """Send what can be sent, and listen to the peer again when all of it is; false if the connection is gone."""
        connection.pending += data
        try:
            if connection.pending:
                sent = connection.socket.send(connection.pending)
                connection.pending = connection.pending[sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._close(connection, f"lost its connection to the meeting ({error})")
            return False
        # One that does not read its answers is not read either, so that they do not pile up.
        events = selectors.EVENT_WRITE if connection.pending else selectors.EVENT_READ
        if self._selector.get_key(connection.socket).events != events:
            self._selector.modify(connection.socket, events, connection)
        return True

    def _close(self, connection: _Connection, how: str) -> None:
        del self._connections[connection.number]
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._state.closed(connection.number, how, time.monotonic())
