"""Pushes of one feed on the store of an epoch: who is ready, what is decided, how each ended.

| key | written by | when | read by |
|---|---|---|---|
| FEED/held/R | rank R of the destination | the feed begins, and before it is ready | source 0, latest |
| FEED/ready/K | every rank of the destination (a roll call) | it takes the K-th push whenever that comes | source 0 |
| FEED/go/K | source 0: version and base version | the K-th push starts | the destination |
| FEED/started | source 0: K | right after | the destination, latest |
| FEED/attempt/N | source 0 | it has decided what the N-th call of push does | the other ranks of the source |
| FEED/votes/K | every rank of both (a roll call) | its part of the K-th push went well | itself: the last publishes |
| final/FEED/push/K | the last to vote, or the first to fail | once (compare_set) | all, also after the epoch |
| final/FEED/latest | every rank | it has read that a push is published | latest |

A push is published if and only if every rank has voted for it and the last one's word came before anybody's failure and
before the end of the epoch; whichever is written first stands, for everybody. What belongs to a push or an attempt is
deleted when MAX_KEPT others have followed.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from tricomm.connect.feeds.roll import RollCall
from tricomm.connect.meeting.table import FINAL
from tricomm.errors import TransportError
from tricomm.transport.coordination.store import GroupOverError

Found = TypeVar("Found")

NOTHING = -1
"""In place of a version: there is none."""

MAX_KEPT = 4096
"""So many decisions, and pushes, are kept for ranks that are behind."""

PUBLISHED, FAILED = b"published ", b"failed "
GO, SKIP, REFUSE = "go", "skip", "refuse"
FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.02


class Decision(NamedTuple):
    """What a call of push does: GO, SKIP or REFUSE; of which version; why."""

    what: str
    version: int
    why: str = ""


class Offer(NamedTuple):
    """A push that has started.

    Attributes:
        version: that it brings.
        base_version: that the destination holds, on which it builds; None is on nothing.
    """

    version: int
    base_version: int | None


class Ballot:
    """One rank's view of the pushes of a feed.

    Args:
        store: of the epoch.
        feed: its name.
        rank: this one.
        sources, destinations: the ranks of either side.
    """

    def __init__(self, store: Any, feed: str, rank: int, sources: Sequence[int], destinations: Sequence[int]) -> None:
        self._store = store
        self._feed = feed
        self._rank = rank
        self._destinations = tuple(destinations)
        self._ranks = (*sources, *destinations)

    # ---- the destination

    def say_held(self, destination_rank: int, version: int | None, dirty: str) -> None:
        """Say which version this rank holds; None with a reason is a mix of several."""
        self._store.set(f"{self._feed}/held/{destination_rank}", f"{NOTHING if version is None else version} {dirty}")

    def say_ready(self, number: int) -> None:
        """Say that this rank takes the push."""
        self._ready(number).answer(self._rank)

    def offer(self, number: int) -> Offer | None:
        """Return what the push brings, if it has started."""
        if self.started() < number:
            return None
        version, base = map(int, self._store.get(f"{self._feed}/go/{number}").split())
        return Offer(version, None if base == NOTHING else base)

    # ---- the source

    def decide(self, number: int, attempt: int, offer: Offer, wait_seconds: float) -> Decision:
        """As rank 0 of the source: start the push if all of the destination are ready, or are within some seconds."""
        deadline = time.monotonic() + wait_seconds
        ready = self._ready(number)
        missing = "" if self._wait(ready.is_complete, deadline) else ready.describe_missing("are ready")
        problem = self._base_problem(offer) if not missing else ""
        if missing:
            decision = Decision(SKIP, offer.version, missing)
        elif problem:
            decision = Decision(REFUSE, offer.version, problem)
        else:
            base = NOTHING if offer.base_version is None else offer.base_version
            self._store.set(f"{self._feed}/go/{number}", f"{offer.version} {base}")
            self._store.set(f"{self._feed}/started", str(number))
            self._forget(number - MAX_KEPT)
            decision = Decision(GO, offer.version)
        self._store.set(f"{self._feed}/attempt/{attempt}", " ".join(map(str, decision)))
        if attempt > MAX_KEPT:
            self._store.delete_key(f"{self._feed}/attempt/{attempt - MAX_KEPT}")
        return decision

    def decided(self, attempt: int, seconds: float) -> Decision:
        """As another rank of the source: what rank 0 has decided.

        Raises:
            TransportError: nothing, for so long.
        """
        key = f"{self._feed}/attempt/{attempt}"
        if not self._wait(lambda: self._store.check([key]), time.monotonic() + seconds):
            raise TransportError(
                f"rank 0 of the source did not make its call number {attempt} of push() within {seconds:.0f} s; all "
                "ranks of a side push as often as the others"
            )
        what, version, why = self._store.get(key).decode().split(" ", 2)
        return Decision(what, int(version), why)

    def _forget(self, number: int) -> None:
        if number > 0:
            self._ready(number).clear()
            self._votes(number).clear()
            for key in (f"{self._feed}/go/{number}", f"{FINAL}{self._feed}/push/{number}"):
                self._store.delete_key(key)

    def _base_problem(self, offer: Offer) -> str:
        if offer.base_version is None:
            return ""
        for rank, (version, dirty) in enumerate(self.held()):
            if version != offer.base_version:
                holds = dirty or ("nothing" if version is None else f"version {version}")
                return (
                    f"version {offer.version} builds on version {offer.base_version}, and rank {rank} of the "
                    f"destination holds {holds}; push the whole, with base_version=None"
                )
        return ""

    # ---- both

    def started(self) -> int:
        """Return how many pushes have started."""
        return int(self._store.find(f"{self._feed}/started") or 0)

    def held(self) -> list[tuple[int | None, str]]:
        """Return what each rank of the destination says that it holds, and why that is no version."""
        found: list[tuple[int | None, str]] = []
        for rank in range(len(self._destinations)):
            version, _, dirty = (self._store.find(f"{self._feed}/held/{rank}") or b"-1 ").decode().partition(" ")
            found.append((None if int(version) == NOTHING else int(version), dirty))
        return found

    def vote(self, number: int, version: int, failure: str | None, seconds: float) -> str:
        """Say how this rank's part went, and return why the push failed; "" if it is published."""
        key, published = f"{FINAL}{self._feed}/push/{number}", PUBLISHED + str(version).encode()
        votes = self._votes(number)
        try:
            if failure is not None:
                self._store.compare_set(key, b"", FAILED + failure.encode(errors="backslashreplace")[:4000])
            elif votes.answer(self._rank):
                self._store.compare_set(key, b"", published)
            if not self._wait(lambda: self._store.find(key) is not None, time.monotonic() + seconds):
                missing = votes.describe_missing(f"had done their part after {seconds:.0f} s")
                # If all have, whoever was to say so was stopped before it could.
                self._store.compare_set(key, b"", FAILED + missing.encode() if missing else published)
            outcome = self.outcome(number)
        except GroupOverError as over:
            try:
                outcome = self.outcome(number)
            except GroupOverError:
                outcome = None
            if outcome is None:
                return str(over)
        if outcome is None:
            return "its outcome is lost"
        if outcome == "":
            self._say_latest(version)
        return outcome

    def outcome(self, number: int) -> str | None:
        """Return why a push failed; "" if it is published, None while it is under way."""
        found = self._store.find(f"{FINAL}{self._feed}/push/{number}")
        if found is None:
            return None
        return "" if found.startswith(PUBLISHED) else found.removeprefix(FAILED).decode(errors="replace")

    def latest(self) -> int | None:
        """Return the version that was published last in this epoch."""
        found = self._store.find(f"{FINAL}{self._feed}/latest")
        return None if found is None else int(found)

    def _say_latest(self, version: int) -> None:
        """Before this rank votes again: so that the number never goes back."""
        try:
            self._store.set(f"{FINAL}{self._feed}/latest", str(version))
        except GroupOverError:
            return  # the next epoch's ranks say what they hold

    def _ready(self, number: int) -> RollCall:
        return RollCall(self._store, f"{self._feed}/ready/{number}", self._destinations)

    def _votes(self, number: int) -> RollCall:
        return RollCall(self._store, f"{self._feed}/votes/{number}", self._ranks)

    def _wait(self, is_so: Callable[[], bool], deadline: float) -> bool:
        return look_until(lambda: is_so() or None, deadline) is True


def look_until(look: Callable[[], Found | None], deadline: float) -> Found | None:
    """Look again and again until something is there; None if it is not by a time, of time.monotonic()."""
    pause = FIRST_PAUSE_SECONDS
    while (found := look()) is None and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(1.25 * pause, LONGEST_PAUSE_SECONDS)
    return found
