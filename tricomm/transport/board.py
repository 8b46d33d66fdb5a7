"""The notice board: what ranks tell each other outside the data path, through the group's key-value store.

Three kinds of notes. *Meetings*: ranks meet before a call (does everybody make the same one?) and, if asked,
after it. *Beats*: a rank that has waited for a while says so, and for whom. *Verdict*: the first rank that knows
who is to blame writes it down, and everybody else repeats it. On the fast path a meeting costs two operations
on the store; everything else is written only once something is slow.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tricomm.errors import TransportError

FAST_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 20e-6
POLL_SECONDS = 0.02
SETTLE_SECONDS = 0.5
"""How long a rank that has seen a disagreement waits for the others' records, so that all name the same rank."""


class Beat(NamedTuple):
    """After ``number`` beats of its monitor a rank waits for rank ``peer`` (for itself: it does not wait)."""

    number: int
    peer: int


class Board:
    """One rank's view of the notes of a process group.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank
        self._times_met: dict[str, int] = {}
        self._turns: dict[str, int] = {}

    # ---- meetings

    def meet(
        self,
        digest: str,
        participants: Sequence[int],
        record: Callable[[], Mapping[str, str]],
        timeout_seconds: float,
        verdict: Callable[[], str | None] = lambda: None,
        kind: str = "call",
    ) -> None:
        """Return once every participant has come to the same meeting.

        Args:
            digest: of the record; ranks with equal digests meet.
            participants: who must come, sorted, this rank among them.
            record: what this rank is about to do, field by field; asked for only if somebody is slow.
            timeout_seconds: how long to wait.
            verdict: tells of a failure that somebody has noted, so that nobody waits for the dead.
            kind: meetings of one kind and the same ranks follow each other.

        Raises:
            TransportError: somebody came with another record, refused, failed, or did not come in time.
        """
        # A little early, so that the error is there within the timeout.
        deadline = time.monotonic() + timeout_seconds - min(0.25, 0.1 * timeout_seconds)
        meeting = _Meeting(digest, self._times_met.get(digest, 0), tuple(participants), self._turn(participants, kind))
        self._times_met[digest] = meeting.occurrence + 1
        with _store_errors():
            if self.store.add(meeting.key, 1) == len(participants):
                self.store.set(meeting.done_key, "1")
                if meeting.occurrence:
                    # Everybody is past the previous meeting: its keys may go.
                    before = meeting._replace(occurrence=meeting.occurrence - 1)
                    self.store.delete_key(before.key)
                    self.store.delete_key(before.done_key)
                return
            if self._wait(meeting.done_key, min(FAST_SECONDS, timeout_seconds)):
                return
            note = {"digest": digest, "occurrence": meeting.occurrence, "fields": dict(record())}
            self._announce(note, meeting.turn)
            problem = self._meet_slowly(meeting, deadline, verdict)
            if problem is None:
                return
            # Take the place back, so that the same call may be tried again.
            self.store.add(meeting.key, -1)
            self._times_met[digest] = meeting.occurrence
        raise TransportError(problem)

    def refuse(self, participants: Sequence[int], reason: str) -> None:
        """Tell those who may wait for this rank that it does not come, and why."""
        with _store_errors():
            self._announce({"refused": reason}, self._turn(participants, "call"))

    def _turn(self, participants: Sequence[int], kind: str) -> "_Turn":
        """The next turn of these ranks: ranks that make the same calls count the same turns."""
        name = f"{kind} {list(participants)}"
        self._turns[name] = self._turns.get(name, 0) + 1
        return _Turn(name, self._turns[name])

    def _meet_slowly(self, meeting: "_Meeting", deadline: float, verdict: Callable[[], str | None]) -> str | None:
        """Wait for the meeting while looking at what the others say; the problem, or None if all came."""
        settled: float | None = None
        while True:
            if self._wait(meeting.done_key, FAST_SECONDS):
                return None
            failure = verdict()
            if failure is not None:
                return failure
            records = self._records(meeting)
            now = time.monotonic()
            dissent = _dissent(records, meeting.participants)
            if dissent is not None:
                settled = settled or now + SETTLE_SECONDS
                if len(records) == len(meeting.participants) or now > min(settled, deadline):
                    return dissent
            elif now > deadline:
                return _absence([rank for rank in meeting.participants if rank not in records], meeting)

    def _announce(self, note: dict[str, Any], turn: "_Turn") -> None:
        self.store.set(f"now/{self.rank}", json.dumps({**note, "turn": turn}).encode())

    def _records(self, meeting: "_Meeting") -> dict[int, dict[str, Any]]:
        """The latest notes of the participants that concern this rank and no earlier call.

        A note is of an earlier call if this rank has had as many turns with the ranks that the note names.
        """
        records: dict[int, dict[str, Any]] = {}
        for rank in meeting.participants:
            if not self.store.check([f"now/{rank}"]):
                continue
            note = json.loads(self.store.get(f"now/{rank}"))
            turn = _Turn(*note["turn"])
            concerns_me = self.rank in json.loads(turn.name.split(" ", 1)[1])
            if turn == meeting.turn or (concerns_me and turn.number > self._turns.get(turn.name, 0)):
                records[rank] = note
        return records

    # ---- beats and verdicts

    def post_beat(self, lane: str, beat: Beat) -> None:
        """Say that this rank is alive and waits."""
        with _store_errors():
            self.store.set(f"{lane}/beat/{self.rank}", json.dumps(beat).encode())

    def beat_of(self, lane: str, rank: int) -> Beat:
        """The last beat of a rank; number 0 if it never waited."""
        with _store_errors():
            if not self.store.check([f"{lane}/beat/{rank}"]):
                return Beat(0, rank)
            return Beat(*json.loads(self.store.get(f"{lane}/beat/{rank}")))

    def post_verdict(self, lane: str, text: str) -> str:
        """Note a failure unless somebody did before; the verdict that stands."""
        with _store_errors():
            return bytes(self.store.compare_set(f"{lane}/verdict", "", text)).decode()

    def verdict(self, lane: str) -> str | None:
        """The failure that was noted for a lane, or None."""
        with _store_errors():
            if not self.store.check([f"{lane}/verdict"]):
                return None
            return bytes(self.store.get(f"{lane}/verdict")).decode()

    def _wait(self, key: str, seconds: float) -> bool:
        """Whether the key appears within some seconds.

        Asked for again and again, at growing distances: a store's own wait logs a warning for every wait that
        ends early, and may take a second to end it.
        """
        deadline = time.monotonic() + seconds
        pause = FIRST_PAUSE_SECONDS
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return True


class _Turn(NamedTuple):
    """The ``number``-th call of one kind by one set of ranks."""

    name: str
    number: int


class _Meeting(NamedTuple):
    digest: str
    occurrence: int
    participants: tuple[int, ...]
    turn: _Turn

    @property
    def key(self) -> str:
        """Where arrivals are counted."""
        return f"meet/{self.digest}/{self.occurrence}"

    @property
    def done_key(self) -> str:
        """Set by the last one to arrive."""
        return f"{self.key}/done"


def _dissent(records: Mapping[int, Mapping[str, Any]], participants: Sequence[int]) -> str | None:
    """The first rank that refused or says another thing than the lowest rank, in words; None if all agree."""
    for rank in participants:
        if rank in records and "refused" in records[rank]:
            return f"rank {rank} refused the call: {records[rank]['refused']}"
    speaking = [rank for rank in participants if rank in records]
    for rank in speaking[1:]:
        reference, note = records[speaking[0]], records[rank]
        ours, theirs = reference["fields"], note["fields"]
        field = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if field is not None:
            return (
                f"rank {rank} disagrees with rank {speaking[0]} about {field}: rank {speaking[0]} says "
                f"{_short(ours.get(field))}, rank {rank} says {_short(theirs.get(field))}; "
                "every rank must make the same call"
            )
        if note["occurrence"] != reference["occurrence"]:
            return (
                f"rank {rank} makes this call for the {note['occurrence'] + 1}. time and rank {speaking[0]} for the "
                f"{reference['occurrence'] + 1}. time; every rank must make the same calls in the same order"
            )
    return None


def _absence(missing: Sequence[int], meeting: _Meeting) -> str:
    others = f" (nor did {list(missing[1:])})" if missing[1:] else ""
    return (
        f"rank {missing[0]} did not call within the timeout{others}, and ranks {list(meeting.participants)} must all "
        "call; see whether it died, hangs or calls something else"
    )


def _short(value: object, limit: int = 300) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


@contextmanager
def _store_errors() -> Iterator[None]:
    """A store that cannot be reached is a TransportError."""
    try:
        yield
    except TransportError:
        raise
    except RuntimeError as error:
        raise TransportError(
            f"the process group's store cannot be reached ({error}); the process that hosts it, usually rank 0 "
            "or its launcher, has died"
        ) from error
