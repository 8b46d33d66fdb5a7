"""Rendezvous: ranks compare what they are about to do before they do it.

The ranks of a call count their calls, so its number, the *epoch*, is the same on all of them, and for every epoch
there is one outcome on the store: "done", written by the last rank to arrive, or a problem, written by whoever first
sees that the rendezvous cannot come about. Whichever is written first stands. Nobody can therefore succeed where
another failed, and a call that failed may simply be made again.

| key | written by | when | read by | deleted by |
|---|---|---|---|---|
| rendezvous/NAME/EPOCH/DIGEST | every rank (add) | it arrives | itself: the last knows | the last, an epoch later |
| rendezvous/NAME/EPOCH/reconnect | a rank without connections | before it arrives | the last | likewise |
| rendezvous/NAME/EPOCH/outcome | the last, or who sees a problem | once (compare_set) | all who came | likewise |
| now/RANK | RANK | PATIENCE after it arrived, or it refused | who waits for it | never: one per rank |

NAME is a hash of the participants and the channel. On the fast path a rank adds one to a counter and looks at the
outcome; what it is about to do it tells in detail only if somebody is slow. What a rank does while it waits, the state
machine in ``attendance`` says; what an outcome means for it, ``Rendezvous._take`` says.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.coordination.attendance import (
    PATIENCE_SECONDS,
    Abort,
    Announce,
    CallEpoch,
    Decide,
    Look,
    Note,
    Phase,
    Return,
    State,
    Terms,
    View,
    advance,
)
from tricomm.transport.coordination.monitor import Monitor, Run, deadline_after
from tricomm.transport.coordination.store import store_errors, wait_for_key

DONE = "done "

MAX_NOTES = 16
"""Notes of so many channels are kept, the latest."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What a rank is about to do.

    Args:
        participants: who must come, sorted, this rank among them.
        fields: what it is, by name, equal on all ranks.
        digest: of the fields.
        channel: calls are counted per participants and channel.
        call: in words, for errors.
    """

    participants: tuple[int, ...]
    fields: Mapping[str, str]
    digest: str
    channel: str
    call: str


class Agreed(NamedTuple):
    """What the ranks agreed on: the number of the epoch, and what the last one decided."""

    epoch: int
    decision: str


class MismatchError(TransportError):
    """Ranks are about to do different things: the cause of the TransportError that says so."""


class Rendezvous:
    """One rank's part in the rendezvous of a process group. Threads may be in it at once, on channels of their own.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
        monitor: speaks for the rank while it waits.
        dead: ranks known to have died, and how; those that come are taken out.
    """

    def __init__(self, store: Any, rank: int, monitor: Monitor, dead: dict[int, str]) -> None:
        self.store = store
        self.rank = rank
        self._monitor = monitor
        self._dead = dead
        self._epochs: dict[str, int] = {}
        self._last_digest: dict[str, str] = {}
        self._was_late: set[str] = set()
        self._notes: dict[str, Note] = {}
        self._lock = threading.Lock()

    def join(
        self,
        intent: Intent,
        timeout_seconds: float,
        needs_reconnect: bool = False,
        decide: Callable[[bool], str] = lambda _: "",
    ) -> Agreed:
        """Return once every participant has come and is about to do the same.

        Args:
            intent: what this rank is about to do.
            timeout_seconds: how long to wait.
            needs_reconnect: whether this rank cannot go on with what was decided before.
            decide: what the ranks must agree on for what follows; the last one to come decides it for all, when
                everybody is past the calls before and nobody has begun this one. It is told whether any rank needs to
                reconnect.

        Raises:
            TransportError: somebody is about to do something else (from a MismatchError), refused, failed, or did not
                come in time.
        """
        deadline = deadline_after(timeout_seconds)
        with store_errors():
            while True:
                epoch = self._next_epoch(intent.participants, intent.channel)
                try:
                    if needs_reconnect:
                        self.store.set(_reconnect_key(epoch), "1")
                    outcome = self._attend(epoch, intent, deadline, timeout_seconds, decide)
                except (TransportError, RuntimeError):
                    raise
                except BaseException as error:
                    self._end(f"rank {self.rank} failed in {intent.call}: {error!r}", self.rank, [epoch])
                    raise
                try:
                    agreed = self._take(outcome, epoch, intent)
                except MismatchError as error:
                    raise TransportError(str(error)) from error
                if agreed is not None:
                    return agreed

    def abort(
        self, participants: Sequence[int], reason: str, channel: str = "", audience: Sequence[int] | None = None
    ) -> None:
        """Tell those who may wait for this rank that it does not come to its next call, and why.

        Nobody waits for one that is not among the participants.

        Args:
            participants, channel: of the call, as far as this rank knows.
            reason: a sentence that names this rank.
            audience: who may wait for it in a call of others; None is nobody but the participants.
        """
        if self.rank not in participants:
            return
        with store_errors():
            epoch = self._next_epoch(participants, channel)
            self._end(reason, self.rank, [epoch])
            # For ranks that expect it in a call of other participants.
            told = tuple(participants if audience is None else audience)
            self._announce(Note(epoch, told, channel, "", None, reason))

    def abort_awaited(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """As ``abort``, if others wait for this rank in a rendezvous by now; else nothing."""
        with store_errors():
            self._abort_if_awaited(_name_of(participants, channel), participants, channel, reason)

    def _take(self, outcome: str, epoch: CallEpoch, intent: Intent) -> Agreed | None:
        """Take an outcome for what it means here: None if the next epoch is meant."""
        if outcome.startswith(DONE):
            self._last_digest[epoch.name] = intent.digest
            self._was_late.discard(epoch.name)
            if self._dead:
                for rank in intent.participants:
                    self._dead.pop(rank, None)
            return Agreed(epoch.number, outcome.removeprefix(DONE))
        problem = json.loads(outcome)
        with self._lock:
            for name, number in problem["epochs"]:
                self._epochs[name] = max(self._epochs.get(name, 0), number)
        if self.rank in problem["absent"]:
            self._catch_up(epoch, intent)
        if problem["refused_by"] != self.rank:
            raise (MismatchError if problem["is_mismatch"] else TransportError)(problem["text"])
        # The others aborted this epoch when this rank refused an earlier call: the next one is meant.
        return None

    def _catch_up(self, epoch: CallEpoch, intent: Intent) -> None:
        """On the first miss, skip the aborted epochs: whoever calls again is found there. On the second one running
        this rank is a call behind, and would be for ever, so it ends a call of the others.
        """
        while self.store.check([_outcome_key(epoch._replace(number=self._epochs[epoch.name] + 1))]):
            self._epochs[epoch.name] += 1
        if epoch.name in self._was_late:
            text = f"rank {self.rank} is one call behind the others, and ends this one to catch up"
            text = f"{text}; call again on all ranks"
            self._abort_if_awaited(epoch.name, intent.participants, intent.channel, text)
        self._was_late.add(epoch.name)

    def _abort_if_awaited(self, name: str, participants: Sequence[int], channel: str, text: str) -> None:
        """Abort the epoch in which others wait for this rank, if they do."""
        # Time for all who have come to say so.
        time.sleep(2 * PATIENCE_SECONDS)
        here = CallEpoch(name, self._epochs.get(name, 0))
        waiting = [note.epoch for note in self._read_notes(here, participants, channel).values()]
        awaited = max((epoch for epoch in waiting if epoch.name == name), default=here)
        if awaited.number > here.number:
            self._epochs[name] = awaited.number
            self._end(text, self.rank, [awaited])

    def _next_epoch(self, participants: Sequence[int], channel: str) -> CallEpoch:
        name = _name_of(participants, channel)
        with self._lock:
            self._epochs[name] = self._epochs.get(name, 0) + 1
            return CallEpoch(name, self._epochs[name])

    def _attend(
        self,
        epoch: CallEpoch,
        intent: Intent,
        deadline: float,
        timeout_seconds: float,
        decide: Callable[[bool], str],
    ) -> str:
        """Be at one rendezvous; returns its outcome."""
        is_last = self.store.add(_count_key(epoch, intent.digest), 1) == len(intent.participants)
        terms = Terms(epoch, intent.participants, time.monotonic(), deadline, dict(self._dead))
        state, view = State(), View(terms.arrived, is_last=is_last)
        run = Run(f"rendezvous/{epoch.name}", lambda: intent.call, timeout_seconds, None)
        before: dict[int, int] = {}
        try:
            while True:
                state, action = advance(state, view, terms)
                match action:
                    case Return():
                        return action.outcome
                    case Decide():
                        return self._decide(epoch, intent, decide)
                    case Abort():
                        return self._end(*action)
                    case Announce():
                        self._monitor.watch(run)
                        self._announce(_note_of(intent, epoch))
                        before = {rank: self._monitor.status.heartbeat_of(rank).number for rank in intent.participants}
                        view = self._view(epoch, intent, before)
                    case Look():
                        if wait_for_key(self.store, _outcome_key(epoch), action.seconds):
                            view = View(time.monotonic(), bytes(self.store.get(_outcome_key(epoch))).decode())
                        elif state.phase is Phase.ARRIVED:
                            view = View(time.monotonic())
                        else:
                            view = self._view(epoch, intent, before)
        finally:
            self._monitor.release(run)

    def _view(self, epoch: CallEpoch, intent: Intent, before: Mapping[int, int]) -> View:
        """Look at what the others say, and where those are that say nothing."""
        notes = self._read_notes(epoch, intent.participants, intent.channel)
        elsewhere = {}
        for rank in intent.participants:
            if rank not in notes:
                beat = self._monitor.status.heartbeat_of(rank)
                if beat.waits and beat.number != before.get(rank):
                    elsewhere[rank] = beat.waits[0].call
        return View(time.monotonic(), None, False, notes, elsewhere)

    def _decide(self, epoch: CallEpoch, intent: Intent, decide: Callable[[bool], str]) -> str:
        """Write what is agreed on, as the last one to arrive, and delete the keys of the epoch before."""
        outcome = self._conclude(epoch, DONE + decide(self.store.check([_reconnect_key(epoch)])))
        digest = self._last_digest.pop(epoch.name, None)
        if digest is not None:
            before = epoch._replace(number=epoch.number - 1)
            for key in (_outcome_key(before), _count_key(before, digest), _reconnect_key(before)):
                self.store.delete_key(key)
        return outcome

    def _conclude(self, epoch: CallEpoch, outcome: str) -> str:
        """Write an outcome unless there is one; the outcome that stands."""
        return bytes(self.store.compare_set(_outcome_key(epoch), "", outcome)).decode()

    def _end(
        self,
        text: str,
        refused_by: int | None,
        epochs: Sequence[CallEpoch],
        absent: Sequence[int] = (),
        is_mismatch: bool = False,
    ) -> str:
        """End the first epoch, and the others that clash with it, with a problem; the first one's outcome."""
        problem = {
            "text": text,
            "refused_by": refused_by,
            "epochs": list(epochs),
            "absent": list(absent),
            "is_mismatch": is_mismatch,
        }
        outcome = self._conclude(epochs[0], json.dumps(problem))
        if not outcome.startswith(DONE):
            for epoch in epochs[1:]:
                self._conclude(epoch, outcome)
        return outcome

    def _announce(self, note: Note) -> None:
        """Tell the others where this rank is, on each of its channels."""
        with self._lock:
            self._notes.pop(note.channel, None)
            self._notes[note.channel] = note
            while len(self._notes) > MAX_NOTES:
                del self._notes[next(iter(self._notes))]
            self.store.set(f"now/{self.rank}", json.dumps(list(self._notes.values())))

    def _read_notes(self, epoch: CallEpoch, participants: Sequence[int], channel: str) -> dict[int, Note]:
        """Read the participants' latest notes that concern this rank and no call that it is past."""
        found: dict[int, Note] = {}
        for rank in participants:
            key = f"now/{rank}"
            if not self.store.check([key]):
                continue
            for note in map(Note.of, json.loads(self.store.get(key))):
                is_ahead = note.epoch.number > self._epochs.get(note.epoch.name, 0) and self.rank in note.participants
                if note.channel == channel and (note.epoch == epoch or is_ahead):
                    found[rank] = note
        return found


def _name_of(participants: Sequence[int], channel: str) -> str:
    """Return what the epochs of some ranks on a channel are called on the store."""
    return hashlib.sha256(repr((list(participants), channel)).encode()).hexdigest()[:16]


def _note_of(intent: Intent, epoch: CallEpoch) -> Note:
    return Note(epoch, intent.participants, intent.channel, intent.call, dict(intent.fields))


def _outcome_key(epoch: CallEpoch) -> str:
    return f"rendezvous/{epoch.name}/{epoch.number}/outcome"


def _reconnect_key(epoch: CallEpoch) -> str:
    return f"rendezvous/{epoch.name}/{epoch.number}/reconnect"


def _count_key(epoch: CallEpoch, digest: str) -> str:
    return f"rendezvous/{epoch.name}/{epoch.number}/{digest}"


def describe_refusal(rank: int, reason: str) -> str:
    """Say that a rank did not come because of its own arguments."""
    return f"rank {rank} refused the call: {reason}"
