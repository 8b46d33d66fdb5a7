"""One process's connection to a meeting: requests and answers, one at a time, and a thread that shows it is alive."""

import logging
import socket
import threading
import time
import weakref
from collections.abc import Callable

from tricomm.connect.meeting import handshake, host
from tricomm.connect.meeting.handshake import Seals
from tricomm.connect.meeting.join import Join, Missing, Paired, Refused, Status, decode_status, describe_missing
from tricomm.connect.meeting.server import close_in_children, format_address, parse_address
from tricomm.connect.meeting.wire import LENGTH, MAX_BODY_BYTES, SEAL_BYTES, Reader, WireError, Writer, framed
from tricomm.errors import TransportError
from tricomm.transport.coordination.store import GroupOverError

LOG = logging.getLogger("tricomm")

ANSWER_SECONDS = 20.0
"""The meeting answers every request at once; one that does not for so long hangs or is cut off."""

BEAT_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 0.005
LONGEST_PAUSE_SECONDS = 0.25
PAUSE_GROWTH = 1.4
FIRST_TOLD_SECONDS = 2.0
"""A rank that waits for so long says for whom, and again whenever it has waited twice as long, or that changes."""


class AbsentError(TransportError):
    """Not all have come in time."""


class Connection:
    """A socket to a meeting whose two ends have shown each other that they know the secret.

    Args:
        address: (host, port).
        secret: of the meeting.
        deadline: until when to try.

    Raises:
        TransportError: nobody listens there until then, or the secret is wrong.
    """

    def __init__(self, address: tuple[str, int], secret: bytes, deadline: float) -> None:
        self.name = format_address(*address)
        self.broken = ""
        """Why it cannot be used any more."""
        self._lock = threading.Lock()
        self._socket = self._reach(address, deadline)
        try:
            self._seals = self._greet(secret)
        except (OSError, WireError) as error:
            self._socket.close()
            raise TransportError(f"the meeting at {self.name} cannot be joined: {error}") from error

    def _reach(self, address: tuple[str, int], deadline: float) -> socket.socket:
        began, pause = time.monotonic(), 0.05
        while True:
            try:
                remaining = max(0.05, deadline - time.monotonic())
                found = socket.create_connection(address, timeout=min(remaining, ANSWER_SECONDS))
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found.settimeout(ANSWER_SECONDS)
                return found
            except OSError as error:
                if time.monotonic() + pause > deadline:
                    raise TransportError(
                        f"nobody takes connections at {self.name} ({error}), tried for "
                        f"{time.monotonic() - began:.1f} s; start `python -m tricomm meet` or a tricomm.Meeting there, "
                        "or see whether the address is right"
                    ) from error
            time.sleep(pause)
            pause = min(PAUSE_GROWTH * pause, 0.5)

    def _greet(self, secret: bytes) -> Seals:
        theirs = handshake.nonce_of_greeting(self._exactly(handshake.GREETING_BYTES))
        ours = handshake.new_nonce()
        self._socket.sendall(framed(handshake.answer(secret, theirs, ours)))
        found = handshake.confirm(secret, theirs, ours, self._frame(handshake.PROOF_BYTES))
        if found is None:
            raise WireError("it refused the secret; give all processes the same one")
        return found

    def _exactly(self, count: int) -> bytes:
        """Receive so many bytes; memory is taken as they come."""
        parts: list[bytes] = []
        while count:
            part = self._socket.recv(min(count, 1 << 16))
            if not part:
                raise OSError("it closed the connection")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _frame(self, limit: int) -> bytes:
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > limit:
            raise WireError(f"a frame of {length} bytes is announced, and the most is {limit}; the meeting is broken")
        return self._exactly(length)

    def ask(self, body: bytes) -> bytes:
        """Send a request and return its answer.

        Raises:
            GroupOverError: the meeting is gone, or does not answer.
        """
        with self._lock:
            if self.broken:
                raise GroupOverError(self.broken)
            try:
                self._socket.sendall(framed(self._seals.seal(body)))
                return self._seals.open(self._frame(MAX_BODY_BYTES + SEAL_BYTES))
            except (OSError, WireError) as error:
                self.broken = (
                    f"the meeting at {self.name} is gone ({error or type(error).__name__}): its process has ended, "
                    "hangs or is cut off; start it again and connect() anew"
                )
                self._socket.close()
                raise GroupOverError(self.broken) from error
            except BaseException:
                # The answer is still to come, and would be taken for that of the next question.
                self.broken = f"this process was interrupted while it asked the meeting at {self.name}; connect() anew"
                self._socket.close()
                raise

    def end(self) -> None:
        """Leave in peace and close. May be called again, and at the end of the process."""
        if self.broken or not self._lock.acquire(timeout=1.0):
            return
        try:
            if not self.broken:
                self.broken = f"this process has left the meeting at {self.name}"
                self._socket.settimeout(1.0)
                self._socket.sendall(framed(self._seals.seal(bytes([host.LEAVE]))))
                self._frame(MAX_BODY_BYTES)
        except (OSError, WireError):
            pass  # it is gone itself
        finally:
            self._socket.close()
            self._lock.release()

    def forget(self) -> None:
        """In a forked child: close without a word, and let go what a thread of the parent may hold."""
        self._lock = threading.Lock()
        self.broken = "this process was forked from one that is at a meeting; connect() from it, as somebody else"
        self._socket.close()


class Client:
    """One process at a meeting.

    Args:
        address: "tcp://host:port".
        secret: of the meeting.
        deadline: until when to try to reach it.
    """

    def __init__(self, address: str, secret: bytes, deadline: float) -> None:
        self.connection = Connection(parse_address(address), secret, deadline)
        self.watch: Callable[[Status], None] | None = None
        """Told how the epoch stands, about once a second, on a thread of its own."""
        close_in_children(self.connection, Connection.forget)
        self._stopped = threading.Event()
        weakref.finalize(self, _end, self._stopped, self.connection)
        self._thread = threading.Thread(
            target=_send_heartbeats,
            args=(weakref.ref(self), self.connection, self._stopped),
            name="tricomm-heartbeat",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Leave in peace."""
        _end(self._stopped, self.connection)

    def join(self, who: Join, deadline: float, on_waiting: Callable[[Missing], object] | None = None) -> Paired:
        """Return when all are there.

        Raises:
            TransportError: they are not until the deadline, or say what contradicts this one.
        """
        answer = self._status(self.connection.ask(bytes([host.JOIN]) + who.encoded()))
        pause, told, told_next = FIRST_PAUSE_SECONDS, "", FIRST_TOLD_SECONDS
        began = time.monotonic()
        while isinstance(answer, Missing):
            now = time.monotonic()
            if now >= deadline:
                self._withdraw()
                raise AbsentError(
                    f"{who} gave up after {now - began:.1f} s at the meeting {self.connection.name}, "
                    f"{describe_missing(answer, who.way_back)}; see "
                    "whether they were started, with this address, these sides and this secret"
                )
            whom = repr((answer.places, answer.busy, answer.note))
            if now - began >= told_next or (whom != told and now - began >= FIRST_TOLD_SECONDS):
                told, told_next = whom, max(FIRST_TOLD_SECONDS, 2 * (now - began))
                LOG.warning(
                    "%s at the meeting %s: %s", who, self.connection.name, describe_missing(answer, who.way_back)
                )
                if on_waiting is not None:
                    on_waiting(answer)
            time.sleep(max(0.0, min(pause, deadline - now)))
            pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)
            answer = self.poll()
        if isinstance(answer, Refused):
            raise TransportError(answer.text)
        return answer

    def _withdraw(self) -> None:
        """Wait no longer, so that others do not count on this one."""
        self.connection.ask(bytes([host.LEAVE]))

    def poll(self) -> Status:
        """Ask how it stands."""
        return self._status(self.connection.ask(bytes([host.POLL])))

    def peek(self, who: Join) -> Missing:
        """Ask who of those that somebody wants to meet is not waiting for him, without coming."""
        found = self._status(self.connection.ask(bytes([host.PEEK]) + who.encoded()))
        assert isinstance(found, Missing)
        return found

    def _status(self, answer: bytes) -> Status:
        return decode_status(bytes(self._accepted(answer)))

    def ask_store(self, operation: int, serial: int, fields: Callable[[Writer], object]) -> bytes | None:
        """Ask for something of the store of an epoch; None if there is no such key.

        Raises:
            GroupOverError: the epoch is over, for the reason that stands in it.
            TransportError: what was asked for cannot be done.
        """
        writer = Writer(operation).integer(serial)
        fields(writer)
        answer = self.connection.ask(writer.done())
        if answer[:1] == bytes([host.ABSENT]):
            return None
        return Reader(self._accepted(answer)).octets()

    @staticmethod
    def _accepted(answer: bytes) -> memoryview:
        """Return what follows the code of an answer that is no refusal."""
        reader = Reader(answer)
        code = reader.code()
        if code == host.OVER:
            raise GroupOverError(reader.text())
        if code == host.ERROR:
            raise TransportError(reader.text())
        if code != host.OK:
            raise WireError(f"{code} is no answer of a meeting")
        return memoryview(answer)[1:]


def _end(stopped: threading.Event, connection: Connection) -> None:
    stopped.set()
    connection.end()


def _send_heartbeats(client: "weakref.ref[Client]", connection: Connection, stopped: threading.Event) -> None:
    """The thread that shows that this process is alive, until its client goes."""
    while not stopped.wait(BEAT_SECONDS):
        try:
            answer = connection.ask(bytes([host.POLL]))
        except GroupOverError:
            return
        found = client()
        if found is None:
            return
        try:
            watch = found.watch
            if watch is not None and answer[:1] == bytes([host.OK]):
                watch(decode_status(answer[1:]))
        except TransportError as error:
            LOG.warning("at the meeting %s: %s", connection.name, error)
        del found, watch
