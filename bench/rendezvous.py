"""What a rendezvous of thousands of ranks asks of the store, counted on one in memory.

    python -m bench.rendezvous

The ranks come one after the other, each while the one before looks for the outcome; time passes as they sleep. Nothing
is timed: calls and bytes are the same on any machine.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tricomm.transport.coordination import rendezvous, store
from tricomm.transport.coordination.intent import Agreed, Intent
from tricomm.transport.coordination.rendezvous import WATCHERS, Rendezvous

SIZES = (64, 1024, 4096)
FIELDS = {"hosts": "x" * 100_000}
"""What ranks tell of themselves if their calls differ: the first that announces itself writes it."""


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """What it is now."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
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
        """As torch's."""
        self._count(key)
        self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        """As torch's."""
        self._count(key, value)
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """As torch's."""
        self._count(key, self.values[key])
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        """As torch's; who looks for an outcome lets the next rank come."""
        if keys[0].endswith("/outcome"):
            self.let_come()
        self._count(*keys)
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, _: str, value: str) -> bytes:
        """As torch's."""
        self._count(key, value)
        return self.values.setdefault(key, value.encode())

    def delete_key(self, key: str) -> bool:
        """As torch's."""
        self._count(key)
        return self.values.pop(key, None) is not None


class Speaker:
    """A monitor of which nothing is heard."""

    def __init__(self) -> None:
        self.status = SimpleNamespace(heartbeat_of=lambda rank: SimpleNamespace(number=0, waits=()))

    def watch(self, run: Any) -> None:
        """Nothing to do."""

    def release(self, run: Any) -> None:
        """Nothing to do."""


def met(ranks: int, every_seconds: float, fields: Mapping[str, str] = FIELDS) -> CountingStore:
    """So many ranks, each so long after the one before, come to a rendezvous; the store that counted.

    Raises:
        ValueError: they do not agree.
    """
    clock = Clock()
    shared = CountingStore(clock, every_seconds)
    everyone = tuple(range(ranks))
    intent = Intent(everyone, fields, "digest", "", "call 1")
    shared.arriving = iter([(rank, Rendezvous(shared, rank, Speaker(), {}), intent) for rank in everyone])  # type: ignore[arg-type]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50 * ranks + limit)
    try:
        with patch.object(rendezvous, "time", clock), patch.object(store, "time", clock):
            while len(shared.agreed) < ranks:
                shared.let_come()
    finally:
        sys.setrecursionlimit(limit)
    if shared.agreed != [Agreed(1, "")] * ranks:
        raise ValueError(f"{ranks} ranks of one call have not agreed on it")
    return shared


@dataclass(frozen=True, slots=True)
class Row:
    """One rendezvous.

    Attributes:
        ranks: that meet.
        every_seconds: between two arrivals.
        calls, nbytes: of the store, by the rank that asks most but for the watchers.
        watcher_calls, watcher_nbytes: by the watcher that asks most.
    """

    ranks: int
    every_seconds: float
    calls: int
    nbytes: int
    watcher_calls: int
    watcher_nbytes: int

    @classmethod
    def of(cls, ranks: int, every_seconds: float) -> "Row":
        """Count one."""
        shared = met(ranks, every_seconds)
        calls, nbytes = (sorted(of_rank.values()) for of_rank in (shared.calls, shared.nbytes))
        return cls(ranks, every_seconds, calls[-1 - WATCHERS], nbytes[-1 - WATCHERS], calls[-1], nbytes[-1])

    def __str__(self) -> str:
        when = f"{self.every_seconds:g} s apart" if self.every_seconds else "at once"
        return (
            f"| {self.ranks:,} | {when} | {self.calls:,} | {self.nbytes:,} | {self.watcher_calls:,} "
            f"| {self.watcher_nbytes:,} |"
        )


def main() -> None:
    """Print a table in Markdown."""
    print(
        "| ranks | come | calls of a rank | its bytes | calls of a watcher | its bytes |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for ranks, every_seconds in (*((size, 0.0) for size in SIZES), *((size, 2.0) for size in SIZES[:2])):
        print(Row.of(ranks, every_seconds))


if __name__ == "__main__":
    main()
