"""Meetings: ranks compare what they are about to do before they do it.

The ranks of a call count their calls, so its number is the same on all of them, and for every number there is
one outcome on the store: "done", written by the last rank to arrive, or a problem, written by whoever first sees
that the meeting cannot come about. Whichever is written first stands. Nobody can therefore succeed where another
failed, and a call that failed may simply be made again.

On the fast path a rank adds one to a counter and looks at the outcome. What it is about to do it tells in detail
only if somebody is slow.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.store import store_errors, wait_for_key

PATIENCE_SECONDS = 0.1
"""How long a rank waits before it tells the others what it is about to do, and between two looks at what they tell."""

SETTLE_SECONDS = 0.5
"""How long a rank that has seen a disagreement waits for the others' notes, so that the first one is named."""

DONE = "done "


class Turn(NamedTuple):
    """The ``number``-th call by one set of ranks on one channel."""

    name: str
    number: int

    @property
    def outcome_key(self) -> str:
        """Where the outcome stands."""
        return f"meet/{self.name}/{self.number}/outcome"

    @property
    def wish_key(self) -> str:
        """Where a rank notes that it asks for something new."""
        return f"meet/{self.name}/{self.number}/wish"

    def count_key(self, digest: str) -> str:
        """Where the ranks that are about to do the same are counted."""
        return f"meet/{self.name}/{self.number}/{digest}"


class Meetings:
    """One rank's part in the meetings of a process group.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank
        self._turns: dict[str, int] = {}
        self._last_digest: dict[str, str] = {}
        self._was_late: set[str] = set()

    def meet(
        self,
        digest: str,
        participants: Sequence[int],
        fields: Callable[[], Mapping[str, str]],
        timeout_seconds: float,
        asks: bool = False,
        settle: Callable[[bool], str] = lambda _: "",
        channel: str = "",
    ) -> str:
        """Return once every participant has come and is about to do the same.

        Args:
            digest: of the fields.
            participants: who must come, sorted, this rank among them.
            channel: calls are counted per participants and channel.
            fields: what this rank is about to do, by name; asked for only if somebody is slow.
            timeout_seconds: how long to wait.
            asks: whether this rank cannot go on with what was settled before.
            settle: what the ranks must agree on for what follows; the last one to come decides it for all, when
                everybody is past the calls before and nobody has begun this one. It is told whether any rank asks.

        Returns:
            What was settled.

        Raises:
            TransportError: somebody is about to do something else, refused, failed, or did not come in time.
        """
        # A little early, so that the error is there within the timeout.
        deadline = time.monotonic() + timeout_seconds - min(0.25, 0.1 * timeout_seconds)
        with store_errors():
            while True:
                turn = self._next_turn(participants, channel)
                if asks:
                    self.store.set(turn.wish_key, "1")
                outcome = self._attend(turn, digest, participants, fields, deadline, settle)
                if outcome.startswith(DONE):
                    self._last_digest[turn.name] = digest
                    self._was_late.discard(turn.name)
                    return outcome.removeprefix(DONE)
                problem = json.loads(outcome)
                for name, number in problem["turns"]:
                    self._turns[name] = max(self._turns.get(name, 0), number)
                if self.rank in problem["absent"]:
                    self._catch_up(turn, participants)
                if problem["refused_by"] != self.rank:
                    raise TransportError(problem["text"])
                # The others called this turn off when this rank refused an earlier call: the next one is meant.

    def _catch_up(self, turn: Turn, participants: Sequence[int]) -> None:
        """This rank came too late for a turn. The first time it goes on behind the turns that were called off: whoever
        calls again will be met there. If it is late twice running, it is a call behind, and would be for ever.
        """
        while self.store.check([turn._replace(number=self._turns[turn.name] + 1).outcome_key]):
            self._turns[turn.name] += 1
        if turn.name in self._was_late:
            text = f"rank {self.rank} is one call behind the others, and ends this one to catch up"
            self._end_awaited(turn.name, participants, f"{text}; call again on all ranks")
        self._was_late.add(turn.name)

    def release(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """As ``refuse``, if others wait for this rank in a meeting by now; else nothing."""
        with store_errors():
            self._end_awaited(_name_of(participants, channel), participants, describe_refusal(self.rank, reason))

    def _end_awaited(self, name: str, participants: Sequence[int], text: str) -> None:
        """Call off the turn in which others wait for this rank, if they do."""
        # Time for all who have come to say so.
        time.sleep(2 * PATIENCE_SECONDS)
        here = Turn(name, self._turns.get(name, 0))
        waiting = [Turn(*note["turn"]) for note in self._notes(here, participants).values()]
        awaited = max((turn for turn in waiting if turn.name == name), default=here)
        if awaited.number > here.number:
            self._turns[name] = awaited.number
            self._call_off(text, self.rank, [awaited])

    def refuse(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """Tell those who may wait for this rank that it does not come, and why; nobody waits for one that is not among
        the participants.
        """
        if self.rank not in participants:
            return
        with store_errors():
            turn = self._next_turn(participants, channel)
            self._call_off(describe_refusal(self.rank, reason), self.rank, [turn])
            # For ranks that expect it in a call of other participants.
            self._announce(turn, participants, {"refused": reason})

    def _next_turn(self, participants: Sequence[int], channel: str) -> Turn:
        name = _name_of(participants, channel)
        self._turns[name] = self._turns.get(name, 0) + 1
        return Turn(name, self._turns[name])

    def _attend(
        self,
        turn: Turn,
        digest: str,
        participants: Sequence[int],
        fields: Callable[[], Mapping[str, str]],
        deadline: float,
        settle: Callable[[bool], str],
    ) -> str:
        """The outcome of one turn."""
        if self.store.add(turn.count_key(digest), 1) == len(participants):
            outcome = self._conclude(turn, DONE + settle(self.store.check([turn.wish_key])))
            self._forget_previous(turn)
            return outcome
        if wait_for_key(self.store, turn.outcome_key, min(PATIENCE_SECONDS, deadline - time.monotonic())):
            return self._outcome(turn)
        self._announce(turn, participants, {"fields": dict(fields())})
        settled: float | None = None
        while not wait_for_key(self.store, turn.outcome_key, PATIENCE_SECONDS):
            notes = self._notes(turn, participants)
            dissent = find_dissent(notes, participants)
            now = time.monotonic()
            if dissent is not None:
                settled = settled or now + SETTLE_SECONDS
                if len(notes) == len(participants) or now > min(settled, deadline):
                    others = {Turn(*note["turn"]) for note in notes.values()} - {turn}
                    return self._call_off(*dissent, [turn, *sorted(others)])
            elif now > deadline:
                absent = [rank for rank in participants if rank not in notes]
                return self._call_off(describe_absence(absent, participants), None, [turn], absent)
        return self._outcome(turn)

    def _outcome(self, turn: Turn) -> str:
        return bytes(self.store.get(turn.outcome_key)).decode()

    def _conclude(self, turn: Turn, outcome: str) -> str:
        """Write an outcome unless there is one; the outcome that stands."""
        return bytes(self.store.compare_set(turn.outcome_key, "", outcome)).decode()

    def _call_off(self, text: str, refused_by: int | None, turns: Sequence[Turn], absent: Sequence[int] = ()) -> str:
        """End the first turn, and the others that clash with it, with a problem; the first one's outcome."""
        problem = {"text": text, "refused_by": refused_by, "turns": turns, "absent": list(absent)}
        outcome = self._conclude(turns[0], json.dumps(problem))
        if not outcome.startswith(DONE):
            for turn in turns[1:]:
                self._conclude(turn, outcome)
        return outcome

    def _announce(self, turn: Turn, participants: Sequence[int], content: Mapping[str, Any]) -> None:
        note = {"turn": turn, "participants": list(participants), **content}
        self.store.set(f"now/{self.rank}", json.dumps(note))

    def _notes(self, turn: Turn, participants: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The latest notes of the participants that concern this rank and no call that it is past."""
        notes: dict[int, dict[str, Any]] = {}
        for rank in participants:
            if not self.store.check([f"now/{rank}"]):
                continue
            note = json.loads(self.store.get(f"now/{rank}"))
            other = Turn(*note["turn"])
            is_ahead = other.number > self._turns.get(other.name, 0) and self.rank in note["participants"]
            if other == turn or is_ahead:
                notes[rank] = note
        return notes

    def _forget_previous(self, turn: Turn) -> None:
        """All ranks are past the previous turn, so its keys may go; the last one to arrive does it."""
        digest = self._last_digest.pop(turn.name, None)
        if digest is not None:
            before = turn._replace(number=turn.number - 1)
            for key in (before.outcome_key, before.count_key(digest), before.wish_key):
                self.store.delete_key(key)


def find_dissent(notes: Mapping[int, Mapping[str, Any]], participants: Sequence[int]) -> tuple[str, int | None] | None:
    """(what is wrong, the rank that refused if one did); None if all notes agree.

    The first rank that refused, or else the first that says another thing than the lowest rank.
    """
    for rank in participants:
        if rank in notes and "refused" in notes[rank]:
            return describe_refusal(rank, notes[rank]["refused"]), rank
    speaking = [rank for rank in participants if rank in notes]
    for rank in speaking[1:]:
        first = speaking[0]
        ours, theirs = notes[first]["fields"], notes[rank]["fields"]
        field = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if field is not None:
            one, other = _around_difference(str(ours.get(field)), str(theirs.get(field)))
            return (
                f"rank {rank} disagrees with rank {first} about {field}: rank {first} says {one}, rank {rank} says "
                f"{other}; every rank must make the same call",
                None,
            )
        if notes[rank]["turn"] != notes[first]["turn"]:
            return (
                f"rank {rank} makes its call number {notes[rank]['turn'][1]} and rank {first} its call number "
                f"{notes[first]['turn'][1]} on these ranks; every rank must make the same calls in the same order",
                None,
            )
    return None


def _name_of(participants: Sequence[int], channel: str) -> str:
    """What the turns of some ranks on a channel are called on the store."""
    return hashlib.sha256(repr((list(participants), channel)).encode()).hexdigest()[:16]


def describe_refusal(rank: int, reason: str) -> str:
    """That a rank did not come because of its own arguments, in words."""
    return f"rank {rank} refused the call: {reason}"


def describe_absence(absent: Sequence[int], participants: Sequence[int]) -> str:
    """Who did not come to a meeting, in words."""
    if not absent:
        return f"ranks {list(participants)} all called but did not meet within the timeout; raise the timeout"
    others = f" (nor did {list(absent[1:])})" if absent[1:] else ""
    return (
        f"rank {absent[0]} did not call within the timeout{others}, and ranks {list(participants)} must all "
        "call; see whether it died, hangs, calls something else or calls with layouts that leave it out"
    )


def _around_difference(one: str, other: str, limit: int = 200) -> tuple[str, str]:
    """Two texts, of which much may be alike, cut down to where they begin to differ."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = max(0, same - limit // 2) if max(len(one), len(other)) > limit else 0
    end = begin + limit

    def cut(text: str) -> str:
        return f"{'... ' if begin else ''}{text[begin:end]}{' ...' if len(text) > end else ''}"

    return cut(one), cut(other)
