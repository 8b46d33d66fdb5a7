"""torch's Store on a meeting: the store of one epoch, which its members reach and nobody else."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from tricomm.connect.meeting import host
from tricomm.connect.meeting.client import Client
from tricomm.connect.meeting.wire import Writer
from tricomm.errors import TransportError
from tricomm.transport.coordination.store import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, PAUSE_GROWTH

DEFAULT_TIMEOUT = timedelta(seconds=300)


class EpochStore(dist.Store):
    """See torch's Store. Keep it referred to for as long as anything uses it: torch does not.

    Args:
        client: at the meeting.
        serial: of the epoch.

    Every method raises a GroupOverError, with the reason, when the epoch is over, and a TransportError where there is
    no room.
    """

    def __init__(self, client: Client, serial: int) -> None:
        super().__init__()
        self._client = client
        self._serial = serial
        self._timeout = DEFAULT_TIMEOUT

    def set(self, key: str, value: str | bytes) -> None:
        """See torch's Store."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._client.ask_store(host.SET, self._serial, lambda writer: writer.octets(key.encode()).octets(data))

    def find(self, key: str) -> bytes | None:
        """Return the value of a key, or None; does not wait. What is final can be read when the epoch is over."""
        return self._client.ask_store(host.GET, self._serial, lambda writer: writer.octets(key.encode()))

    def get(self, key: str) -> bytes:
        """See torch's Store; waits for the key."""
        found = self.find(key)
        if found is None:
            self.wait([key])
            found = self.find(key)
        if found is None:
            raise TransportError(f"the key {key!r} was deleted while it was read")
        return found

    def add(self, key: str, value: int) -> int:
        """See torch's Store."""
        return int(self._done(host.ADD, lambda writer: writer.octets(key.encode()).integer(value)))

    def check(self, keys: Sequence[str]) -> bool:
        """See torch's Store."""
        names = list(keys)
        return self._done(host.CHECK, lambda writer: writer.texts(names)) == b"1"

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """See torch's Store."""
        given = [one.encode() if isinstance(one, str) else bytes(one) for one in (expected, desired)]
        name = key.encode()
        return self._done(host.COMPARE_SET, lambda writer: writer.octets(name).octets(given[0]).octets(given[1]))

    def delete_key(self, key: str) -> bool:
        """See torch's Store."""
        return self._done(host.DELETE, lambda writer: writer.octets(key.encode())) == b"1"

    def num_keys(self) -> int:
        """See torch's Store."""
        return int(self._done(host.COUNT, lambda writer: writer))

    # What torch's own code in C++ calls.
    deleteKey = delete_key  # noqa: N815
    getNumKeys = num_keys  # noqa: N815

    def set_timeout(self, timeout: timedelta) -> None:
        """See torch's Store."""
        self._timeout = timeout

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """See torch's Store.

        Raises:
            TransportError: a key is not there within the timeout.
        """
        limit = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + limit.total_seconds()
        pause = FIRST_PAUSE_SECONDS
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise TransportError(f"the keys {list(keys)} are not on the store after {limit.total_seconds()} s")
            time.sleep(pause)
            pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)

    def _done(self, operation: int, fields: Callable[[Writer], object]) -> bytes:
        found = self._client.ask_store(operation, self._serial, fields)
        assert found is not None
        return found
