"""Bytes that processes of separate jobs exchange with the meeting: fields of checked sizes in frames of checked sizes.

A field is an integer or a number of 8 bytes, a code of 1, or bytes behind their length of 4; all little-endian. Nothing
is taken from the length that a peer announces before it is compared with a limit and with what is really there.

    frame    length (4) | seal (16) | body          length counts seal and body
    body     operation or answer (1) | fields
"""

import struct
from collections.abc import Iterable, Sequence

from tricomm.errors import TransportError

LENGTH = struct.Struct("<I")
INTEGER = struct.Struct("<q")
REAL = struct.Struct("<d")
SEAL_BYTES = 16

MAX_VALUE_BYTES = 1 << 20
"""Of one value on the store."""

MAX_BODY_BYTES = MAX_VALUE_BYTES + (1 << 16)
"""Of one body: a value and what stands around it."""

MAX_TEXT_BYTES = 4096
MAX_KEY_BYTES = 1024
MAX_ITEMS = 1 << 16
"""Of one list."""


class WireError(TransportError):
    """Bytes from a peer do not say what they must; the connection ends."""


class Writer:
    """Puts fields one behind the other."""

    def __init__(self, code: int | None = None) -> None:
        self._parts: list[bytes] = [] if code is None else [bytes([code])]

    def integer(self, value: int) -> "Writer":
        """Append an integer of 64 bits."""
        self._parts.append(INTEGER.pack(value))
        return self

    def code(self, value: int) -> "Writer":
        """Append one byte."""
        self._parts.append(bytes([value]))
        return self

    def real(self, value: float) -> "Writer":
        """Append a number of double precision, bit for bit."""
        self._parts.append(REAL.pack(value))
        return self

    def octets(self, value: bytes) -> "Writer":
        """Append bytes behind their length."""
        self._parts += [LENGTH.pack(len(value)), value]
        return self

    def text(self, value: str, limit: int = MAX_TEXT_BYTES) -> "Writer":
        """Append a text for people, cut down to a limit in bytes; names are looked at before."""
        return self.octets(value.encode(errors="backslashreplace")[:limit])

    def texts(self, values: Sequence[str]) -> "Writer":
        """Append several texts behind their count."""
        self.integer(len(values))
        for value in values:
            self.text(value)
        return self

    def integers(self, values: Iterable[int]) -> "Writer":
        """Append several integers behind their count."""
        given = list(values)
        self._parts += [INTEGER.pack(len(given)), struct.pack(f"<{len(given)}q", *given)]
        return self

    def done(self) -> bytes:
        """Return all of it."""
        return b"".join(self._parts)


class Reader:
    """Takes fields one after the other.

    Raises:
        WireError: from every method, where the bytes end early or break a limit.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    def _take(self, count: int) -> memoryview:
        if count > len(self._data) - self._at:
            raise WireError(
                f"{count} bytes are announced and {len(self._data) - self._at} are there; the peer is broken"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def code(self) -> int:
        """Take one byte."""
        return self._take(1)[0]

    def integer(self, lowest: int = -(1 << 63), highest: int = (1 << 63) - 1) -> int:
        """Take an integer within bounds."""
        (value,) = INTEGER.unpack(self._take(8))
        if not lowest <= value <= highest:
            raise WireError(f"{value} does not lie in {lowest} to {highest}; the peer is broken")
        return int(value)

    def real(self) -> float:
        """Take a number of double precision."""
        (value,) = REAL.unpack(self._take(REAL.size))
        return float(value)

    def octets(self, limit: int = MAX_VALUE_BYTES) -> bytes:
        """Take bytes behind their length."""
        (count,) = LENGTH.unpack(self._take(4))
        if count > limit:
            raise WireError(f"{count} bytes are announced, and the most is {limit}; the peer is broken")
        return bytes(self._take(count))

    def text(self, limit: int = MAX_TEXT_BYTES) -> str:
        """Take a text; a character that a limit has cut in two is dropped."""
        return self.octets(limit).decode(errors="ignore")

    def count(self, smallest: int, limit: int = MAX_ITEMS) -> int:
        """Take how many items follow, each of so many bytes or more."""
        found = self.integer(0, limit)
        if found * smallest > len(self._data) - self._at:
            raise WireError(f"{found} items are announced, and {len(self._data) - self._at} bytes are there")
        return found

    def texts(self) -> tuple[str, ...]:
        """Take several texts behind their count."""
        return tuple(self.text() for _ in range(self.count(4)))

    def integers(self, limit: int = MAX_ITEMS) -> tuple[int, ...]:
        """Take several integers behind their count."""
        found = self.count(8, limit)
        return struct.unpack(f"<{found}q", self._take(8 * found))

    def end(self) -> None:
        """Require that nothing is left."""
        if self._at != len(self._data):
            raise WireError(f"{len(self._data) - self._at} bytes are left over; the peer is broken")


def framed(sealed: bytes) -> bytes:
    """Put a seal and body into a frame."""
    return LENGTH.pack(len(sealed)) + sealed


class FrameReader:
    """Cuts a stream of bytes into what its frames hold. It never keeps more than one frame and one piece of the stream.

    Args:
        limit: the longest frame that is taken; see ``limit`` below.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """May be changed between frames: before a peer has shown the secret, frames are short."""
        self._kept = bytearray()

    def feed(self, data: bytes) -> None:
        """Add a piece of the stream."""
        self._kept += data

    def next(self) -> bytes | None:
        """Return what the next frame holds; None if it is not all there yet.

        Raises:
            WireError: a frame longer than the limit is announced.
        """
        if len(self._kept) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._kept)
        if length > self.limit:
            raise WireError(f"a frame of {length} bytes is announced, and the most is {self.limit}; the peer is broken")
        end = LENGTH.size + length
        if len(self._kept) < end:
            return None
        found = bytes(self._kept[LENGTH.size : end])
        del self._kept[:end]
        return found
