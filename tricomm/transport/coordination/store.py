"""Small things about a torch.distributed key-value store."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tricomm.errors import TransportError

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


def wait_for_key(store: Any, key: str, seconds: float, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> bool:
    """Whether the key appears within some seconds.

    Asked for again and again, at growing distances: a store's own wait logs a warning for every wait that ends
    early, and may take a second to end it.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE_SECONDS
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(min(pause, max(deadline - time.monotonic(), FIRST_PAUSE_SECONDS)))
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
