"""Who is to blame for a wait that timed out: found from what ranks say of themselves, without any process."""

from collections.abc import Mapping

import pytest

from tricomm.transport import monitor
from tricomm.transport.monitor import stalled_rank
from tricomm.transport.status import Heartbeat, StatusStore


class Dict:
    """As much of a store as a status uses."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]


def diagnose(
    monkeypatch: pytest.MonkeyPatch,
    heartbeats: Mapping[int, int],
    waits: Mapping[int, tuple[int, ...]],
    quiet: set[int],
) -> str:
    """What rank 0 finds, who waited for rank 1, if all but quiet ranks post heartbeats (rank: whom it awaits)."""
    store = Dict()

    def everybody_beats(number: int) -> None:
        for rank in {*heartbeats, *waits}:
            if number == 1 or rank not in quiet:
                here = {"communicator": heartbeats[rank]} if rank in heartbeats else {}
                elsewhere = {f"communicator to {peer}": peer for peer in waits.get(rank, ())}
                StatusStore(store, rank).post_heartbeat(Heartbeat(number, {**elsewhere, **here}))

    class Event:
        def wait(self, seconds: float) -> None:
            assert seconds == 1.5
            everybody_beats(2)

    everybody_beats(1)
    monkeypatch.setattr(monitor.threading, "Event", Event)
    return stalled_rank(StatusStore(store, 0), "communicator", 1, 1.0)


@pytest.mark.parametrize(
    ("heartbeats", "waits", "quiet", "found"),
    [
        ({}, {}, set(), "rank 1 gave no sign of life"),
        ({1: 2}, {1: (2,)}, set(), "rank 2 gave no sign of life"),
        ({1: 2, 2: 3}, {1: (2,), 2: (3,), 3: (1,)}, {3}, "rank 3 gave no sign of life"),
        ({}, {1: (0, 2), 2: (1, 3)}, set(), "rank 3 gave no sign of life"),  # each in communicators of its own
        ({1: 2}, {1: (2,), 2: (0, 3), 3: (2, 4), 4: (5,)}, {4}, "rank 4 gave no sign of life"),
        ({}, {1: (0, 2), 2: (1, 0)}, set(), "rank 1 is alive but did not send"),
        ({1: 1}, {1: ()}, set(), "rank 1 is alive but did not send"),
        ({1: 2, 2: 1}, {1: (2,), 2: (1,)}, set(), "ranks [1, 2] wait for each other"),
    ],
)
def test_the_rank_that_says_nothing_is_found_through_all_lanes(
    monkeypatch: pytest.MonkeyPatch,
    heartbeats: dict[int, int],
    waits: dict[int, tuple[int, ...]],
    quiet: set[int],
    found: str,
) -> None:
    assert diagnose(monkeypatch, heartbeats, waits, quiet).startswith(found)
