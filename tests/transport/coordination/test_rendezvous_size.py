"""What a rendezvous of thousands of ranks asks of the store: few calls a rank and few bytes, also when ranks come late.

The ranks come one after the other, each while the one before looks for the outcome; time passes as they sleep.
"""

import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tricomm.transport.coordination import rendezvous, store
from tricomm.transport.coordination.rendezvous import WATCHERS, Agreed, Intent, Rendezvous


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class CountingStore:
    """A store in memory that counts what each rank asks and carries; who waits for an outcome lets the next rank come.

    Args:
        clock: of all ranks.
        every_seconds: between two arrivals.
    """

    def __init__(self, clock: Clock, every_seconds: float) -> None:
        self.values: dict[str, bytes] = {}
        self.clock, self.every_seconds = clock, every_seconds
        self.arriving: Iterator[tuple[int, Rendezvous, Intent]] = iter(())
        self.rank, self.due = -1, 0.0
        self.calls: dict[int, int] = {}
        self.nbytes: dict[int, int] = {}
        self.agreed: list[Agreed] = []

    def let_come(self) -> None:
        """The next rank makes its call, if it is time and one is left."""
        following = next(self.arriving, None) if self.clock.now >= self.due else None
        if following is not None:
            before = self.rank
            self.rank, one, intent = following
            self.due = self.clock.now + self.every_seconds
            self.agreed.append(one.join(intent, 10_000.0))
            self.rank = before

    def _count(self, *texts: str | bytes) -> None:
        self.calls[self.rank] = self.calls.get(self.rank, 0) + 1
        self.nbytes[self.rank] = self.nbytes.get(self.rank, 0) + sum(map(len, texts))

    def add(self, key: str, amount: int) -> int:
        self._count(key)
        self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._count(key, self.values[key])
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        if keys[0].endswith("/outcome"):
            self.let_come()
        self._count(*keys)
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, _: str, value: str) -> bytes:
        self._count(key, value)
        return self.values.setdefault(key, value.encode())

    def delete_key(self, key: str) -> bool:
        self._count(key)
        return self.values.pop(key, None) is not None


class Speaker:
    """A monitor of which nothing is heard."""

    def __init__(self) -> None:
        self.status = SimpleNamespace(heartbeat_of=lambda rank: SimpleNamespace(number=0, waits=()))

    def watch(self, run: Any) -> None:
        pass

    def release(self, run: Any) -> None:
        pass


def met(ranks: int, every_seconds: float, monkeypatch: pytest.MonkeyPatch, fields: Mapping[str, str]) -> CountingStore:
    """So many ranks, each so long after the one before, come to a rendezvous; the store that counted."""
    clock = Clock()
    for module in (rendezvous, store):
        monkeypatch.setattr(module, "time", clock)
    shared = CountingStore(clock, every_seconds)
    everyone = tuple(range(ranks))
    intent = Intent(everyone, fields, "digest", "", "call 1")
    shared.arriving = iter([(rank, Rendezvous(shared, rank, Speaker(), {}), intent) for rank in everyone])  # type: ignore[arg-type]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50 * ranks + limit)
    try:
        while len(shared.agreed) < ranks:
            shared.let_come()
    finally:
        sys.setrecursionlimit(limit)
    assert shared.agreed == [Agreed(1, "")] * ranks
    return shared


@pytest.mark.parametrize("ranks", [64, 1024, 4096])
def test_ranks_that_come_at_once_ask_little(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = met(ranks, 0.0, monkeypatch, {"hosts": "x" * 100_000})
    assert max(shared.calls.values()) <= 8
    assert max(shared.nbytes.values()) <= 1_000


@pytest.mark.parametrize("ranks", [64, 1024])
def test_ranks_that_come_late_ask_little_and_watchers_in_proportion(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = met(ranks, 2.0, monkeypatch, {"hosts": "x" * 100_000})
    calls, nbytes = (sorted(of_rank.values()) for of_rank in (shared.calls, shared.nbytes))
    # Watchers look at every note now and then; the first that announces itself writes fields.
    assert calls[-1 - WATCHERS] <= 150
    assert nbytes[-1 - WATCHERS] <= 15_000
    assert calls[-1] <= 40 * ranks
    assert nbytes[-1] <= 1_000 * ranks + 150_000
