"""The meeting without its sockets: bytes of connections in, bytes out. See ``room`` for who meets whom and when.

| operation | fields | answer |
|---|---|---|
| JOIN | a Join | OK and a Status; ERROR and why |
| POLL | | OK and a Status |
| LEAVE | | OK |
| PEEK | a Join | OK and the Status of those that wait to meet him; he does not come |
| SET, GET, ADD, CHECK, COMPARE_SET, DELETE, COUNT | serial of the epoch, ... | OK and a value; ABSENT; OVER; ERROR |

Every request has one answer, at once. A store belongs to an epoch, and only its members reach it; when it is over,
they are told why, whatever they ask, and only what is final may be read.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from tricomm.connect.meeting import handshake
from tricomm.connect.meeting.handshake import Seals
from tricomm.connect.meeting.join import Join, encode_status
from tricomm.connect.meeting.room import Room, join, leave, lose, over_reason, settle, status_of, who_is_missing
from tricomm.connect.meeting.table import FINAL, Table
from tricomm.connect.meeting.wire import (
    MAX_BODY_BYTES,
    MAX_KEY_BYTES,
    SEAL_BYTES,
    FrameReader,
    Reader,
    WireError,
    Writer,
    framed,
)
from tricomm.errors import TransportError

LOG = logging.getLogger("tricomm")

JOIN, POLL, LEAVE, PEEK = 1, 2, 3, 4
SET, GET, ADD, CHECK, COMPARE_SET, DELETE, COUNT = range(10, 17)
OK, ABSENT, OVER, ERROR = 0, 1, 2, 3

STRANGER_SECONDS = 10.0
"""So long a connection may take to show that it knows the secret."""

SILENT_SECONDS = 20.0
"""A process that has not been heard of for so long is lost; it polls every second."""

MAX_STRANGERS = 256
MAX_CONNECTIONS = 1 << 14
MAX_ROOMS = 1024


@dataclass(slots=True)
class Peer:
    """One connection.

    Attributes:
        address: from where, in words.
        nonce: that it was greeted with.
        opened: when it came.
        seals: None until it has shown that it knows the secret.
        room: the name of the meeting that it has joined.
    """

    address: str
    nonce: bytes
    opened: float
    frames: FrameReader = field(default_factory=lambda: FrameReader(handshake.ANSWER_BYTES))
    seals: Seals | None = None
    room: str | None = None


class Host:
    """All meetings at one address.

    Args:
        secret: that all who come must know.
        make_nonce: for tests.
    """

    def __init__(self, secret: bytes, make_nonce: Callable[[], bytes] = handshake.new_nonce) -> None:
        self._secret = secret
        self._make_nonce = make_nonce
        self._peers: dict[int, Peer] = {}
        self._heard: dict[int, float] = {}
        self._strangers: set[int] = set()
        self._rooms: dict[str, Room] = {}
        self._tables: dict[int, Table] = {}
        self._serial = 0
        self._wrong_secrets = ""
        self._wrong_count = 0

    # ---- what the sockets tell

    def opened(self, connection: int, address: str, now: float) -> bytes | None:
        """Somebody has connected: what to say to him, or None to close."""
        if len(self._strangers) >= MAX_STRANGERS or len(self._peers) >= MAX_CONNECTIONS:
            LOG.warning("the meeting is full: the connection from %s is closed", address)
            return None
        nonce = self._make_nonce()
        self._peers[connection] = Peer(address, nonce, now)
        self._heard[connection] = now
        self._strangers.add(connection)
        return handshake.greeting(nonce)

    def received(self, connection: int, data: bytes, now: float) -> tuple[bytes, bool]:
        """Bytes have come: (what to answer, whether the connection goes on)."""
        peer = self._peers[connection]
        self._heard[connection] = now
        try:
            peer.frames.feed(data)
            frame = peer.frames.next()
            if frame is None:
                return b"", True
            if peer.seals is None:
                said = self._admit(connection, peer, frame)
                return said, peer.seals is not None
            body = self._answer(connection, peer, peer.seals.open(frame), now)
            if peer.frames.next() is not None:
                raise WireError("it asks again before it was answered")
            return framed(peer.seals.seal(body)), True
        except WireError as error:
            LOG.warning("the connection from %s is closed: %s", peer.address, error)
        except Exception:
            # One peer, whatever it has found to say, must not end the meeting of all others.
            LOG.exception("the connection from %s is closed", peer.address)
        return b"", False

    def closed(self, connection: int, how: str, now: float) -> None:
        """A connection is gone."""
        peer = self._peers.pop(connection, None)
        self._heard.pop(connection, None)
        self._strangers.discard(connection)
        if peer is None or peer.room is None:
            return
        self._put(peer.room, lose(self._rooms[peer.room], connection, how), now)

    def tick(self, now: float) -> dict[int, str]:
        """Some time has passed: return the connections to close, and how that is told.

        Those are strangers that take too long, and the silent.
        """
        for name in [name for name, room in self._rooms.items() if room.waiting]:
            self._put(name, self._rooms[name], now)
        found = {}
        for connection, peer in self._peers.items():
            if peer.seals is None:
                if now > peer.opened + STRANGER_SECONDS:
                    found[connection] = "did not show the secret"
            elif now > self._heard[connection] + SILENT_SECONDS:
                found[connection] = f"gave no sign of life for {SILENT_SECONDS:.0f} s: its host is gone or it hangs"
        return found

    # ---- who comes

    def _admit(self, connection: int, peer: Peer, frame: bytes) -> bytes:
        accepted = handshake.accept(self._secret, peer.nonce, frame)
        if accepted is None:
            self._wrong_count += 1
            self._wrong_secrets = (
                f"{self._wrong_count} connection(s) had a wrong secret, the last from {peer.address.rsplit(':', 1)[0]}"
            )
            LOG.warning("the meeting refused the wrong secret of %s", peer.address)
            return framed(handshake.REFUSED)
        self._strangers.discard(connection)
        proof, peer.seals = accepted
        peer.frames.limit = MAX_BODY_BYTES + SEAL_BYTES
        return framed(proof)

    def _answer(self, connection: int, peer: Peer, body: bytes, now: float) -> bytes:
        reader = Reader(body)
        operation = reader.code()
        try:
            if operation == JOIN:
                return self._join(connection, peer, reader, now)
            if operation in (POLL, LEAVE):
                reader.end()
                return self._attend(connection, peer, operation, now)
            if operation == PEEK:
                who = Join.read(reader)
                reader.end()
                room = self._rooms.get(who.room, Room())
                return bytes([OK]) + encode_status(who_is_missing(room, who.names))
            return self._store(connection, peer, operation, reader)
        except WireError:
            raise
        except TransportError as error:
            return Writer(ERROR).text(str(error)).done()

    def _join(self, connection: int, peer: Peer, reader: Reader, now: float) -> bytes:
        who = Join.read(reader)
        reader.end()
        if peer.room is not None and peer.room != who.room:
            raise TransportError("a connection stays at one meeting; connect again for another")
        if who.room not in self._rooms and not self._make_room():
            raise TransportError(f"there are {MAX_ROOMS} meetings here already, and the most are that")
        peer.room = who.room
        self._put(who.room, join(self._rooms.get(who.room, Room()), connection, who, now), now)
        return self._attend(connection, peer, POLL, now)

    def _make_room(self) -> bool:
        """Whether there is room for one more meeting, perhaps after those where nobody is have gone."""
        if len(self._rooms) < MAX_ROOMS:
            return True
        for name in [name for name, room in self._rooms.items() if room.is_empty]:
            del self._rooms[name]
        return len(self._rooms) < MAX_ROOMS

    def _attend(self, connection: int, peer: Peer, operation: int, now: float) -> bytes:
        """Somebody asks how it stands, or goes."""
        if peer.room is None:
            raise WireError("asked before it joined")
        if operation == LEAVE:
            self._put(peer.room, leave(self._rooms[peer.room], connection), now)
            return bytes([OK])
        return bytes([OK]) + encode_status(status_of(self._rooms[peer.room], connection, now, self._wrong_secrets))

    def _put(self, name: str, changed: Room, now: float) -> None:
        """Take a new state, and settle what follows from it.

        The store of an epoch that is over keeps what is final, until the epoch after the next one begins.
        """
        before = self._rooms.get(name, Room()).epoch
        room = self._rooms[name] = settle(changed, now, self._heard, self._serial + 1)
        epoch = room.epoch
        if epoch is None:
            return
        if before is None or before.serial != epoch.serial:
            self._serial += 1
            self._tables[epoch.serial] = Table()
            for serial in room.past:
                if before is None or serial != before.serial:
                    self._tables.pop(serial, None)
        table = None if before is None else self._tables.get(before.serial)
        if before is not None and table is not None and (epoch.over or epoch.serial != before.serial):
            table.finish()
        if room.is_empty:
            for serial in (*room.past, epoch.serial):
                self._tables.pop(serial, None)

    # ---- the store of an epoch

    def _store(self, connection: int, peer: Peer, operation: int, reader: Reader) -> bytes:
        serial = reader.integer(1)
        if peer.room is None:
            raise WireError("asked for the store before it joined")
        over = over_reason(self._rooms[peer.room], connection, serial)
        table = self._tables.get(serial)
        if operation == GET:
            key = _key(reader)
            reader.end()
            may_read = over is None or (key.startswith(FINAL) and self._was_member(peer.room, connection, serial))
            if table is not None and may_read:
                value = table.get(key)
                if value is not None or over is None:
                    return bytes([ABSENT]) if value is None else Writer(OK).octets(value).done()
        if over is not None or table is None:
            return Writer(OVER).text(over or "the epoch is over").done()
        return Writer(OK).octets(_apply(table, operation, reader)).done()

    def _was_member(self, name: str, connection: int, serial: int) -> bool:
        """Whether a connection may read what is final: it is at the meeting whose epoch that is or was."""
        room = self._rooms[name]
        is_last = room.epoch is not None and room.epoch.serial == serial
        return connection in self._peers and (is_last or serial in room.past)


def _key(reader: Reader) -> str:
    return reader.text(MAX_KEY_BYTES)


def _apply(table: Table, operation: int, reader: Reader) -> bytes:
    """Do what is asked to a store; what to answer."""
    if operation == CHECK:
        keys = reader.texts()
        reader.end()
        return b"1" if table.has(keys) else b"0"
    if operation == COUNT:
        reader.end()
        return str(len(table)).encode()
    key = _key(reader)
    if operation == SET:
        value = reader.octets()
        reader.end()
        table.set(key, value)
        return b""
    if operation == ADD:
        amount = reader.integer()
        reader.end()
        return str(table.add(key, amount)).encode()
    if operation == COMPARE_SET:
        expected, desired = reader.octets(), reader.octets()
        reader.end()
        return table.compare_set(key, expected, desired)
    if operation == DELETE:
        reader.end()
        return b"1" if table.delete(key) else b"0"
    raise WireError(f"{operation} is no operation of a meeting")
