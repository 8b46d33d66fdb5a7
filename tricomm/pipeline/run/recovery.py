"""After a failure: the ranks of an executor come to one call of it before they connect again.

A rank whose part of a failed call was done already returned from it, and hears of the failure in its next call, one
later than the others. So those that are behind give up their call, and all go on with that of the one furthest on.
"""

import time
from collections.abc import Sequence
from typing import Any

from tricomm.errors import TransportError
from tricomm.transport.coordination.store import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PAUSE_GROWTH,
    post_note,
    store_errors,
)

KEY = "executor/{name}/resumes at/{rank}"


def await_all(store: Any, name: str, rank: int, ranks: Sequence[int], call: int, timeout_seconds: float) -> None:
    """Return when all ranks have come to a call.

    Args:
        store: that the ranks share.
        name: of the executor, never used before on this store.
        rank: this one.
        ranks: all.
        call: the number of the call of the executor in which this rank is.
        timeout_seconds: how long to wait.

    Raises:
        TransportError: a rank is further on, or did not come within the timeout.
    """
    post_note(store, KEY.format(name=name, rank=rank), call)
    deadline = time.monotonic() + timeout_seconds
    for other in ranks:
        pause = FIRST_PAUSE_SECONDS
        while (there := _call_of(store, KEY.format(name=name, rank=other))) < call:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {other} did not call the executor again within the timeout after a step had failed; every "
                    "rank of its meshes calls it as often as the others"
                )
            time.sleep(pause)
            pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)
        if there > call:
            raise TransportError(
                f"rank {other} has gone on to call {there} of the executor, as it heard of the failure one call later, "
                f"and this rank is in call {call}; the next call of all works"
            )


def _call_of(store: Any, key: str) -> int:
    with store_errors():
        return int(store.get(key)) if store.check([key]) else 0
