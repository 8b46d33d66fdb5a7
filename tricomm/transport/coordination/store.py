"""Small things about a torch.distributed key-value store."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.coordination.background import end_if_asked

FIRST_PAUSE_SECONDS = 100e-6
LONGEST_PAUSE_SECONDS = 0.02
PAUSE_GROWTH = 1.25
"""Small, because what is waited for may come just after a pause has begun."""


STORE_LOST = "the process group's store cannot be reached"


class GroupOverError(TransportError):
    """The group of these ranks is over, and no call in it succeeds any more: one of separate jobs, that lost a rank."""


@contextmanager
def store_errors() -> Iterator[None]:
    """A store that cannot be reached is a TransportError."""
    try:
        yield
    except TransportError:
        raise
    except RuntimeError as error:
        raise TransportError(
            f"{STORE_LOST} ({error}); the process that hosts it, usually rank 0 or its launcher, has died"
        ) from error


def describe_lost_store(lost: TransportError, rank: int, call: str, peer: int | None) -> str:
    """Say that a call failed as the store is gone, and blame no rank whose connection closed: survivors close theirs.

    Args:
        lost: says that the store cannot be reached.
        rank, call: who found that, and where.
        peer: whose connection closed; None if no single one did.
    """
    found = "could not queue its messages"
    if peer is not None:
        found = f"lost its connection to rank {peer}, which may have closed it for that"
    return f"{lost} (rank {rank} {found}, in {call})"


def with_lost_store(text: str, lost: TransportError) -> str:
    """Say after something else that the store cannot be reached, unless it says that by itself."""
    return text if STORE_LOST in text else f"{text}; {lost}"


def wait_for_key(
    store: Any,
    key: str,
    seconds: float,
    longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
    pause_for: Callable[[float], object] | None = None,
) -> bool:
    """Whether the key appears within some seconds, or until ``pause_for``, by which to sleep, returns what is true.

    Asked for again and again, at growing distances: a store's own wait logs a warning for every wait that ends
    early, and may take a second to end it.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE_SECONDS
    while not store.check([key]):
        end_if_asked()
        if time.monotonic() > deadline:
            return False
        if (pause_for or time.sleep)(min(pause, max(deadline - time.monotonic(), FIRST_PAUSE_SECONDS))):
            return False
        pause = min(PAUSE_GROWTH * pause, longest_pause_seconds)
    return True


def post_note(store: Any, key: str, note: object) -> None:
    """Leave a value, of what JSON can hold, for other ranks."""
    with store_errors():
        store.set(key, json.dumps(note))


def awaited_note(store: Any, key: str, seconds: float, absent: str) -> Any:
    """The value that a rank leaves under a key.

    Raises:
        TransportError: ``absent``, if it is not there within some seconds.
    """
    with store_errors():
        if not wait_for_key(store, key, seconds):
            raise TransportError(absent)
        return json.loads(store.get(key))


class EpochKeys(NamedTuple):
    """What a rendezvous has on the store; see ``rendezvous``.

    Attributes:
        name, number: of the epoch.
        digest: of what a rank is about to do there; "" where it does not matter.
    """

    name: str
    number: int
    digest: str = ""

    @property
    def place(self) -> str:
        """Under which all of them are."""
        return f"rendezvous/{self.name}/{self.number}"

    @property
    def outcome(self) -> str:
        """Of the outcome."""
        return f"{self.place}/outcome"

    @property
    def reconnect(self) -> str:
        """Whether a rank has no connections."""
        return f"{self.place}/reconnect"

    @property
    def waiting(self) -> str:
        """How many have announced themselves."""
        return f"{self.place}/waiting"

    @property
    def counter(self) -> str:
        """How many have come to do this."""
        return f"{self.place}/{self.digest}"

    @property
    def fields(self) -> str:
        """What that is."""
        return f"{self.counter}/fields"

    def tell(self, store: Any, fields: Mapping[str, str]) -> None:
        """Write what a rank is about to do, unless somebody has."""
        if not store.check([self.fields]):
            store.set(self.fields, json.dumps(dict(fields)))

    def told(self, store: Any) -> Mapping[str, str] | None:
        """What that is; None if it is not there, or not any more."""
        return json.loads(store.get(self.fields)) if store.check([self.fields]) else None

    def delete(self, store: Any) -> None:
        """Nobody looks there any more. To ask for a key takes a fraction of what it takes to delete one."""
        seldom = [(self.waiting, (self.waiting, self.fields)), (self.reconnect, (self.reconnect,))]
        there = [key for asked, keys in seldom if store.check([asked]) for key in keys]
        for key in (self.outcome, self.counter, *there):
            store.delete_key(key)


@lru_cache(maxsize=64)
def name_of(participants: tuple[int, ...], channel: str) -> str:
    """Return what the epochs of some ranks on a channel are called on the store."""
    return hashlib.sha256(repr((list(participants), channel)).encode()).hexdigest()[:16]


class Leavings:
    """What the rendezvous of a rank have left on the store. It is deleted when all have come to a later one.

    Args:
        store: of the ranks.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._shared: dict[str, list[EpochKeys]] = {}
        """By name, what all who were there know of; the last to come there for a later one deletes it."""
        self.own: dict[str, EpochKeys] = {}
        """Of a rendezvous at which this rank was at the store while others met by links: it deletes that itself."""

    def decided(self, keys: EpochKeys) -> None:
        """This rank was the last to come to the store, and has written what was agreed on."""
        for before in self._shared.pop(keys.name, ()):
            before.delete(self._store)
        self._delete_own(keys.name)
        self._shared[keys.name] = [keys]

    def ended(self, keys: EpochKeys, is_agreed: bool) -> None:
        """An outcome stands on the store: another rank has written what was agreed on, or something was wrong."""
        if is_agreed:
            self._shared[keys.name] = [keys]
            self._delete_own(keys.name)
        else:
            self._shared.setdefault(keys.name, []).append(keys)

    def met(self, keys: EpochKeys, was_at_store: bool) -> None:
        """The ranks have met by links."""
        self._delete_own(keys.name)
        if was_at_store:
            self.own[keys.name] = keys

    def _delete_own(self, name: str) -> None:
        own = self.own.pop(name, None)
        if own is not None:
            own.delete(self._store)
