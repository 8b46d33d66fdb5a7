"""The keys and values of one epoch, bounded in number and bytes."""

from collections.abc import Sequence

from tricomm.connect.meeting.wire import MAX_KEY_BYTES, MAX_VALUE_BYTES
from tricomm.errors import TransportError

FINAL = "final/"
"""Keys that begin so are written once and may still be read when their epoch is over."""

MAX_KEYS = 1 << 19
MAX_TABLE_BYTES = 128 << 20
KEY_OVERHEAD_BYTES = 200
MAX_DIGITS = 20


class Table:
    """What torch's Store asks for, in the memory of the meeting; never more than MAX_TABLE_BYTES."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._nbytes = 0

    def set(self, key: str, value: bytes) -> None:
        """Write a value.

        Raises:
            TransportError: no room.
        """
        if len(key) > MAX_KEY_BYTES or len(value) > MAX_VALUE_BYTES:
            raise TransportError(
                f"a value of {len(value)} bytes under a key of {len(key)}: the most are {MAX_VALUE_BYTES} and "
                f"{MAX_KEY_BYTES}; write it in pieces"
            )
        before = self._values.get(key)
        growth = len(value) - len(before) if before is not None else len(value) + len(key) + KEY_OVERHEAD_BYTES
        if self._nbytes + growth > MAX_TABLE_BYTES or (before is None and len(self._values) >= MAX_KEYS):
            raise TransportError(
                f"the store of the epoch is full: {len(self._values)} keys, {self._nbytes} bytes; the most are "
                f"{MAX_KEYS} and {MAX_TABLE_BYTES}"
            )
        self._values[key] = value
        self._nbytes += growth

    def get(self, key: str) -> bytes | None:
        """Return a value, or None."""
        return self._values.get(key)

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a number that begins at 0; returns it.

        Raises:
            TransportError: what stands there is no number, or grows beyond 64 bits.
        """
        before = self._values.get(key, b"0")
        is_number = len(before) <= MAX_DIGITS and before.removeprefix(b"-").isdigit()
        total = int(before) + amount if is_number else 0
        if not is_number or not -(1 << 63) <= total < 1 << 63:
            raise TransportError(
                f"{amount} cannot be added to {before[:MAX_DIGITS]!r} under {key!r}; add to integers of 64 bits only"
            )
        self.set(key, str(total).encode())
        return total

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Write a value if the expected one stands there, or none and none is expected; returns what stands then."""
        before = self._values.get(key)
        if before == expected or (before is None and not expected):
            self.set(key, desired)
            return desired
        return expected if before is None else before

    def delete(self, key: str) -> bool:
        """Whether the key was there."""
        before = self._values.pop(key, None)
        if before is None:
            return False
        self._nbytes -= len(before) + len(key) + KEY_OVERHEAD_BYTES
        return True

    def __len__(self) -> int:
        return len(self._values)

    def finish(self) -> None:
        """Keep what is final, as the epoch is over."""
        self._values = {key: value for key, value in self._values.items() if key.startswith(FINAL)}
        self._nbytes = sum(len(key) + len(value) + KEY_OVERHEAD_BYTES for key, value in self._values.items())
