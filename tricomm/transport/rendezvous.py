"""Rendezvous: ranks compare what they are about to do before they do it.

The ranks of a call count their calls, so its number, the *epoch*, is the same on all of them, and for every epoch there
is one outcome on the store: "done", written by the last rank to arrive, or a problem, written by whoever first sees
that the rendezvous cannot come about. Whichever is written first stands. Nobody can therefore succeed where another
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

MISMATCH_SECONDS = 0.5
"""How long a rank that has seen a disagreement waits for the others' notes, so that the first one is named."""

DONE = "done "


class CallEpoch(NamedTuple):
    """The ``number``-th call by one set of ranks on one channel."""

    name: str
    number: int

    @property
    def outcome_key(self) -> str:
        """Where the outcome stands."""
        return f"rendezvous/{self.name}/{self.number}/outcome"

    @property
    def reconnect_key(self) -> str:
        """Where a rank requests to reconnect."""
        return f"rendezvous/{self.name}/{self.number}/reconnect"

    def count_key(self, digest: str) -> str:
        """Where the ranks that are about to do the same are counted."""
        return f"rendezvous/{self.name}/{self.number}/{digest}"


class Rendezvous:
    """One rank's part in the rendezvous of a process group.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank
        self._epochs: dict[str, int] = {}
        self._last_digest: dict[str, str] = {}
        self._was_late: set[str] = set()

    def join(
        self,
        digest: str,
        participants: Sequence[int],
        fields: Callable[[], Mapping[str, str]],
        timeout_seconds: float,
        needs_reconnect: bool = False,
        decide: Callable[[bool], str] = lambda _: "",
        channel: str = "",
    ) -> str:
        """Return once every participant has come and is about to do the same.

        Args:
            digest: of the fields.
            participants: who must come, sorted, this rank among them.
            channel: calls are counted per participants and channel.
            fields: what this rank is about to do, by name; asked for only if somebody is slow.
            timeout_seconds: how long to wait.
            needs_reconnect: whether this rank cannot go on with what was decided before.
            decide: what the ranks must agree on for what follows; the last one to come decides it for all, when
                everybody is past the calls before and nobody has begun this one. It is told whether any rank needs to
                reconnect.

        Returns:
            What was decided.

        Raises:
            TransportError: somebody is about to do something else, refused, failed, or did not come in time.
        """
        # A little early, so that the error is there within the timeout.
        deadline = time.monotonic() + timeout_seconds - min(0.25, 0.1 * timeout_seconds)
        with store_errors():
            while True:
                epoch = self._next_epoch(participants, channel)
                if needs_reconnect:
                    self.store.set(epoch.reconnect_key, "1")
                outcome = self._run_epoch(epoch, digest, participants, fields, deadline, decide)
                if outcome.startswith(DONE):
                    self._last_digest[epoch.name] = digest
                    self._was_late.discard(epoch.name)
                    return outcome.removeprefix(DONE)
                problem = json.loads(outcome)
                for name, number in problem["epochs"]:
                    self._epochs[name] = max(self._epochs.get(name, 0), number)
                if self.rank in problem["absent"]:
                    self._catch_up(epoch, participants)
                if problem["refused_by"] != self.rank:
                    raise TransportError(problem["text"])
                # The others aborted this epoch when this rank refused an earlier call: the next one is meant.

    def _catch_up(self, epoch: CallEpoch, participants: Sequence[int]) -> None:
        """On the first miss, skip the aborted epochs: whoever calls again is found there. On the second one running
        this rank is a call behind, and would be for ever, so it ends a call of the others.
        """
        while self.store.check([epoch._replace(number=self._epochs[epoch.name] + 1).outcome_key]):
            self._epochs[epoch.name] += 1
        if epoch.name in self._was_late:
            text = f"rank {self.rank} is one call behind the others, and ends this one to catch up"
            self._abort_if_awaited(epoch.name, participants, f"{text}; call again on all ranks")
        self._was_late.add(epoch.name)

    def abort_awaited(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """As ``abort``, if others wait for this rank in a rendezvous by now; else nothing."""
        with store_errors():
            self._abort_if_awaited(_name_of(participants, channel), participants, describe_refusal(self.rank, reason))

    def _abort_if_awaited(self, name: str, participants: Sequence[int], text: str) -> None:
        """Abort the epoch in which others wait for this rank, if they do."""
        # Time for all who have come to say so.
        time.sleep(2 * PATIENCE_SECONDS)
        here = CallEpoch(name, self._epochs.get(name, 0))
        waiting = [CallEpoch(*note["epoch"]) for note in self._notes(here, participants).values()]
        awaited = max((epoch for epoch in waiting if epoch.name == name), default=here)
        if awaited.number > here.number:
            self._epochs[name] = awaited.number
            self._abort(text, self.rank, [awaited])

    def abort(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """Tell those who may wait for this rank that it does not come, and why; nobody waits for one that is not among
        the participants.
        """
        if self.rank not in participants:
            return
        with store_errors():
            epoch = self._next_epoch(participants, channel)
            self._abort(describe_refusal(self.rank, reason), self.rank, [epoch])
            # For ranks that expect it in a call of other participants.
            self._announce(epoch, participants, {"refused": reason})

    def _next_epoch(self, participants: Sequence[int], channel: str) -> CallEpoch:
        name = _name_of(participants, channel)
        self._epochs[name] = self._epochs.get(name, 0) + 1
        return CallEpoch(name, self._epochs[name])

    def _run_epoch(
        self,
        epoch: CallEpoch,
        digest: str,
        participants: Sequence[int],
        fields: Callable[[], Mapping[str, str]],
        deadline: float,
        decide: Callable[[bool], str],
    ) -> str:
        """The outcome of one epoch."""
        if self.store.add(epoch.count_key(digest), 1) == len(participants):
            outcome = self._conclude(epoch, DONE + decide(self.store.check([epoch.reconnect_key])))
            self._forget_previous(epoch)
            return outcome
        if wait_for_key(self.store, epoch.outcome_key, min(PATIENCE_SECONDS, deadline - time.monotonic())):
            return self._outcome(epoch)
        self._announce(epoch, participants, {"fields": dict(fields())})
        seen_until: float | None = None
        while not wait_for_key(self.store, epoch.outcome_key, PATIENCE_SECONDS):
            notes = self._notes(epoch, participants)
            mismatch = find_mismatch(notes, participants)
            now = time.monotonic()
            if mismatch is not None:
                seen_until = seen_until or now + MISMATCH_SECONDS
                if len(notes) == len(participants) or now > min(seen_until, deadline):
                    others = {CallEpoch(*note["epoch"]) for note in notes.values()} - {epoch}
                    return self._abort(*mismatch, [epoch, *sorted(others)])
            elif now > deadline:
                absent = [rank for rank in participants if rank not in notes]
                return self._abort(describe_absence(absent, participants), None, [epoch], absent)
        return self._outcome(epoch)

    def _outcome(self, epoch: CallEpoch) -> str:
        return bytes(self.store.get(epoch.outcome_key)).decode()

    def _conclude(self, epoch: CallEpoch, outcome: str) -> str:
        """Write an outcome unless there is one; the outcome that stands."""
        return bytes(self.store.compare_set(epoch.outcome_key, "", outcome)).decode()

    def _abort(self, text: str, refused_by: int | None, epochs: Sequence[CallEpoch], absent: Sequence[int] = ()) -> str:
        """End the first epoch, and the others that clash with it, with a problem; the first one's outcome."""
        problem = {"text": text, "refused_by": refused_by, "epochs": epochs, "absent": list(absent)}
        outcome = self._conclude(epochs[0], json.dumps(problem))
        if not outcome.startswith(DONE):
            for epoch in epochs[1:]:
                self._conclude(epoch, outcome)
        return outcome

    def _announce(self, epoch: CallEpoch, participants: Sequence[int], content: Mapping[str, Any]) -> None:
        note = {"epoch": epoch, "participants": list(participants), **content}
        self.store.set(f"now/{self.rank}", json.dumps(note))

    def _notes(self, epoch: CallEpoch, participants: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The latest notes of the participants that concern this rank and no call that it is past."""
        notes: dict[int, dict[str, Any]] = {}
        for rank in participants:
            if not self.store.check([f"now/{rank}"]):
                continue
            note = json.loads(self.store.get(f"now/{rank}"))
            other = CallEpoch(*note["epoch"])
            is_ahead = other.number > self._epochs.get(other.name, 0) and self.rank in note["participants"]
            if other == epoch or is_ahead:
                notes[rank] = note
        return notes

    def _forget_previous(self, epoch: CallEpoch) -> None:
        """Delete the keys of the epoch before, which all ranks are past; the last one to arrive does it."""
        digest = self._last_digest.pop(epoch.name, None)
        if digest is not None:
            before = epoch._replace(number=epoch.number - 1)
            for key in (before.outcome_key, before.count_key(digest), before.reconnect_key):
                self.store.delete_key(key)


def find_mismatch(notes: Mapping[int, Mapping[str, Any]], participants: Sequence[int]) -> tuple[str, int | None] | None:
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
        if notes[rank]["epoch"] != notes[first]["epoch"]:
            return (
                f"rank {rank} makes its call number {notes[rank]['epoch'][1]} and rank {first} its call number "
                f"{notes[first]['epoch'][1]} on these ranks; every rank must make the same calls in the same order",
                None,
            )
    return None


def _name_of(participants: Sequence[int], channel: str) -> str:
    """What the epochs of some ranks on a channel are called on the store."""
    return hashlib.sha256(repr((list(participants), channel)).encode()).hexdigest()[:16]


def describe_refusal(rank: int, reason: str) -> str:
    """That a rank did not come because of its own arguments, in words."""
    return f"rank {rank} refused the call: {reason}"


def describe_absence(absent: Sequence[int], participants: Sequence[int]) -> str:
    """Who did not come to a rendezvous, in words."""
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
