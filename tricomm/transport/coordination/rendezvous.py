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
| rendezvous/NAME/EPOCH/waiting | every rank (add) | it announces itself | itself: the first two watch | likewise |
| rendezvous/NAME/EPOCH/DIGEST/fields | a rank | it announces itself | watchers, if digests differ | likewise |
| now/RANK | RANK | PATIENCE after it arrived, or it refused | watchers | never: one per rank |

NAME is a hash of the participants and the channel. Ranks that have links with all others tell each by these first; if
all have told the same soon, they have met, and the store knows nothing of it. Else they go there, and listen to links
as well: what one has heard of all, all hear, unless one has died meanwhile; then they are told why the others failed.
At the store a rank adds one to a counter and looks at the outcome; what it is about to do it tells in detail only if
somebody is slow. See ``attendance`` for what a rank does while it waits, and ``_take`` for what an outcome means.

Of thousands of ranks few are ever as quick as PATIENCE, so waiting must be cheap too. A rank that waits writes one
short note, and looks at the outcome at growing distances. The notes of the others are read by watchers alone, the first
two that wait, and by a rank whose time is over before. A note has a digest; fields are written once per digest.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tricomm.errors import TransportError
from tricomm.transport.base import Near
from tricomm.transport.coordination.attendance import (
    PATIENCE_SECONDS,
    Abort,
    Announce,
    CallEpoch,
    Decide,
    Look,
    Meet,
    Note,
    Phase,
    Return,
    State,
    Terms,
    View,
    advance,
    describe_apart,
    runs_of,
)
from tricomm.transport.coordination.intent import (
    Agreed,
    Intent,
    OwnNotes,
    Problem,
    ProblemError,
    describe_late,
    differ_in_count,
    notes_of,
)
from tricomm.transport.coordination.monitor import Monitor
from tricomm.transport.coordination.run import Place, Run, deadline_after
from tricomm.transport.coordination.status import Heartbeat
from tricomm.transport.coordination.store import (
    LONGEST_PAUSE_SECONDS,
    EpochKeys,
    Leavings,
    name_of,
    store_errors,
    wait_for_key,
)

DONE = "done "

FindMissed = Callable[[int, Heartbeat, Sequence[int]], str | None]
GivenUp = Callable[[], str]

WATCHERS = 2
"""Ranks of a rendezvous that read what the others tell; two, so that one may die."""

RANKS_AT_ONCE = 64
"""With more ranks, watchers look as many times more seldom, and all ranks ask for the outcome more seldom."""


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
        self._refused: dict[str, int] = {}
        """The last one of each name that this rank has ended without being there."""
        self._leavings = Leavings(store)
        self._was_late: set[str] = set()
        self._notes = OwnNotes(store, rank)
        self._lock = threading.Lock()

    def join(
        self,
        intent: Intent,
        timeout_seconds: float,
        needs_reconnect: bool = False,
        decide: Callable[[bool], str] = lambda _: "",
        find_missed: FindMissed = lambda *_: None,
        near: Near | None = None,
        given_up: GivenUp = str,
    ) -> Agreed:
        """Return once every participant has come and is about to do the same.

        Args:
            intent: what this rank is about to do.
            timeout_seconds: how long to wait.
            needs_reconnect: whether this rank cannot go on with what was decided before.
            decide: what the ranks must agree on for what follows; the last one to come decides it for all, when
                everybody is past the calls before and nobody has begun this one. It is told whether any rank needs to
                reconnect.
            find_missed: says in words that an absent rank, whose heartbeat it is given, waits for some that are present
                in a call that they have not begun; None if it does not.
            near: links with all others, if there are.
            given_up: says, as soon as it is so, why this rank does not make its call any more; "" as long as it does.

        Raises:
            TransportError: somebody is about to do something else, refused, failed, or did not come in time; from a
                ProblemError.
        """
        deadline = deadline_after(timeout_seconds)
        with store_errors():
            while True:
                epoch = self._next_epoch(intent.participants, intent.channel)
                try:
                    if needs_reconnect:
                        self.store.set(EpochKeys(*epoch).reconnect, "1")
                    # Not a copy: somebody may die, or leave, while this rank waits for it.
                    terms = Terms(epoch, intent.participants, time.monotonic(), deadline, self._dead)
                    outcome = self._attend(terms, intent, timeout_seconds, decide, find_missed, near, given_up)
                except BaseException as error:
                    if not isinstance(error, RuntimeError):  # as TransportErrors are, too
                        text = f"rank {self.rank} failed in {intent.call}: {error!r}"
                        self._end(Problem(text, self.rank, [epoch]))
                    raise
                try:
                    agreed = self._take(outcome, epoch, intent)
                except ProblemError as error:
                    raise TransportError(str(error)) from error
                if agreed is not None:
                    return agreed

    def join_by_links(self, intent: Intent, near: Near) -> int:
        """As ``join``, if all others come by links, soon, and nothing is to be settled; the number of the epoch.

        Else 0, and ``join`` goes on from what ``near`` has told. Who fails here may have been met at ``near.number``.
        """
        near.number = 0
        name, note = name_of(intent.participants, intent.channel), self._notes.of_channels.get(intent.channel)
        is_settled = not (self._dead or name in self._was_late or name in self._leavings.own)
        number = self._epochs.get(name, 0) + 1
        is_settled = is_settled and not (note is not None and note.is_awaited_refusal)
        if not (is_settled and near.meet(number, intent.digest, PATIENCE_SECONDS)):
            return 0
        self._pass(name, number)
        return number

    def number_of(self, participants: Sequence[int], channel: str) -> int:
        """The number of the last epoch of some ranks that this one is at, or past."""
        return self._epochs.get(name_of(tuple(participants), channel), 0)

    def pass_by(self, participants: Sequence[int], channel: str, number: int) -> None:
        """This rank was told elsewhere what became of an epoch, which its next call must not hear there once more."""
        self._pass(name_of(tuple(participants), channel), number)

    def _pass(self, name: str, number: int) -> None:
        with self._lock:
            self._epochs[name] = max(number, self._epochs.get(name, 0))

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
            self._refused[epoch.name] = epoch.number
            self._end(Problem(reason, self.rank, [epoch]))
            # For ranks that expect it in a call of other participants.
            told = tuple(participants if audience is None else audience)
            self._notes.announce(Note(epoch, runs_of(told), channel, "", None, reason))

    def abort_awaited(self, participants: Sequence[int], reason: str, channel: str = "") -> None:
        """As ``abort``, if others wait for this rank in a rendezvous by now; else nothing."""
        with store_errors():
            self._abort_if_awaited(name_of(tuple(participants), channel), participants, channel, reason)

    def _take(self, outcome: str, epoch: CallEpoch, intent: Intent) -> Agreed | None:
        """Take an outcome for what it means here: None if the next epoch is meant."""
        if outcome.startswith(DONE):
            self._was_late.discard(epoch.name)
            self._notes.settle(epoch, intent)
            if self._dead:
                for rank in intent.participants:
                    self._dead.pop(rank, None)
            return Agreed(epoch.number, outcome.removeprefix(DONE))
        problem = Problem.of(outcome)
        for name, number in problem.epochs:
            self._pass(name, number)
        text, counts_anew = problem.text, problem.counted == intent.counted != ""
        if (self.rank in problem.absent or problem.is_given_up) and problem.digest != intent.digest:
            return None  # the others have given up another call, which this rank has left out
        if self.rank in problem.absent:
            caught_up = self._catch_up(epoch, intent)
            counts_anew = caught_up is not None
            text = caught_up or f"{text}; {describe_late(self.rank)}"
        if problem.refused_by != self.rank or self._refused.get(epoch.name, 0) > epoch.number:
            raise ProblemError(text, problem.is_mismatch, counts_anew, problem.refused_by, problem.absent)
        # The others aborted this epoch when this rank refused an earlier call: the next one is meant.
        return None

    def note_late(self, participants: Sequence[int], channel: str) -> None:
        """This rank was told, in a call, that the others had given it up there."""
        self._was_late.add(name_of(tuple(participants), channel))

    def _catch_up(self, epoch: CallEpoch, intent: Intent) -> str | None:
        """On the first miss, skip the aborted epochs: whoever calls again is found there. On the second one running
        this rank is a call behind, and would be for ever, so it ends a call of the others, and says how.
        """
        while self.store.check([EpochKeys(epoch.name, self._epochs[epoch.name] + 1).outcome]):
            self._epochs[epoch.name] += 1
        is_behind = epoch.name in self._was_late
        self._was_late.add(epoch.name)
        text = f"rank {self.rank} is one call behind the others, and ends this one to catch up"
        text = f"{text}; call again on all ranks"
        ends = is_behind and self._abort_if_awaited(
            epoch.name, intent.participants, intent.channel, text, intent.counted
        )
        return text if ends else None

    def _abort_if_awaited(
        self, name: str, participants: Sequence[int], channel: str, text: str, counted: str = ""
    ) -> bool:
        """Abort the epoch in which others wait for this rank, if they do."""
        # Time for all who have come to say so.
        time.sleep(2 * PATIENCE_SECONDS)
        here = CallEpoch(name, self._epochs.get(name, 0))
        waiting = [note.epoch for note in self._read_notes(here, participants, channel).values()]
        awaited = max((epoch for epoch in waiting if epoch.name == name), default=here)
        if awaited.number <= here.number:
            return False
        self._epochs[name] = awaited.number
        self._end(Problem(text, self.rank, [awaited], counted=counted))
        return True

    def _next_epoch(self, participants: Sequence[int], channel: str) -> CallEpoch:
        name = name_of(tuple(participants), channel)
        with self._lock:
            self._epochs[name] = self._epochs.get(name, 0) + 1
            return CallEpoch(name, self._epochs[name])

    def _attend(
        self,
        terms: Terms,
        intent: Intent,
        timeout_seconds: float,
        decide: Callable[[bool], str],
        find_missed: FindMissed,
        near: Near | None,
        given_up: GivenUp,
    ) -> str:
        """Be at one rendezvous; returns its outcome."""
        epoch, keys = terms.epoch, EpochKeys(*terms.epoch, intent.digest)
        if near is not None and near.number != epoch.number:
            near.tell(epoch.number, intent.digest)
        state, view = State(Phase.TOLD), View(terms.arrived, is_in_vain=near is None or near.is_in_vain)
        while state.phase is Phase.TOLD:
            state, action = advance(state, view, terms)
            match action:
                case Meet():
                    self._leavings.met(keys, was_at_store=False)
                    return DONE + decide(False)
                case Look() if near is not None:
                    near.wait(action.seconds)
                    view = _heard(View(time.monotonic()), near)
        return self._attend_at_store(keys, terms, intent, timeout_seconds, decide, find_missed, near, given_up)

    def _attend_at_store(
        self,
        keys: EpochKeys,
        terms: Terms,
        intent: Intent,
        timeout_seconds: float,
        decide: Callable[[bool], str],
        find_missed: FindMissed,
        near: Near | None,
        given_up: GivenUp,
    ) -> str:
        is_last = self.store.add(keys.counter, 1) == len(intent.participants)
        state, view, epoch = State(), View(terms.arrived, is_last=is_last), terms.epoch
        run = Run(0, 0, intent.call, Place.of(f"rendezvous/{epoch.name}", timeout_seconds))
        crowd = max(len(intent.participants) / RANKS_AT_ONCE, 1.0)
        watches, before = False, dict[int, int]()
        try:
            while True:
                state, action = advance(state, _heard(view, near, epoch.number, given_up()), terms)
                match action:
                    case Meet():
                        self._leavings.met(keys, was_at_store=True)
                        return DONE + decide(False)
                    case Return():
                        self._leavings.ended(keys, action.outcome.startswith(DONE))
                        return action.outcome
                    case Decide():
                        outcome = self._conclude(epoch, DONE + decide(self.store.check([keys.reconnect])))
                        self._leavings.decided(keys)
                        return outcome
                    case Abort():
                        counted = intent.counted if action.is_mismatch and differ_in_count(intent, view) else ""
                        self._leavings.ended(keys, is_agreed=False)
                        return self._end(Problem(*action, digest=intent.digest, counted=counted))
                    case Announce():
                        self._monitor.watch(run)
                        keys.tell(self.store, intent.fields)
                        told = runs_of(intent.participants), intent.channel, intent.call, intent.digest
                        self._notes.announce(Note(epoch, *told))
                        watches = self.store.add(keys.waiting, 1) <= WATCHERS
                        if watches:
                            status = self._monitor.status
                            before = {rank: status.heartbeat_of(rank).number for rank in intent.participants}
                        view = self._view(epoch, intent, before, find_missed) if watches else View(time.monotonic())
                    case Look():
                        is_patient, left = state.phase is Phase.ARRIVED, terms.deadline - time.monotonic()
                        longer = min(action.seconds * crowd, left) if watches else left
                        seconds = action.seconds if is_patient else longer
                        found = self._await_outcome(keys, seconds, LONGEST_PAUSE_SECONDS * crowd, near, given_up)
                        view = View(time.monotonic(), found)
                        if found is None and not is_patient:
                            view = self._view(epoch, intent, before, find_missed)
        finally:
            self._monitor.release(run)

    def _await_outcome(
        self, keys: EpochKeys, seconds: float, longest_pause: float, near: Near | None, given_up: GivenUp
    ) -> str | None:
        """The outcome, if it comes within some seconds; ends early if ranks have met by links, or this one gave up."""
        wait = time.sleep if near is None else near.wait
        if not wait_for_key(self.store, keys.outcome, seconds, longest_pause, lambda pause: wait(pause) or given_up()):
            return None
        return bytes(self.store.get(keys.outcome)).decode()

    def _view(self, epoch: CallEpoch, intent: Intent, before: Mapping[int, int], find_missed: FindMissed) -> View:
        """Look at what the others say, and where those are that say nothing."""
        notes = self._read_notes(epoch, intent.participants, intent.channel)
        notes = {rank: note._replace(fields=self._fields_of(note, intent)) for rank, note in notes.items()}
        elsewhere, missed = {}, None
        for rank in before:
            if rank not in notes:
                heartbeat = self._monitor.status.heartbeat_of(rank)
                if heartbeat.waits and heartbeat.number != before.get(rank):
                    elsewhere[rank] = describe_apart(heartbeat.waits[0], notes_of(self.store, rank), intent.channel)
                    text = find_missed(rank, heartbeat, list(notes))
                    missed = missed or (None if text is None else (rank, text))
        return View(time.monotonic(), None, False, notes, elsewhere, missed)

    def _conclude(self, epoch: CallEpoch, outcome: str) -> str:
        """Write an outcome unless there is one; the outcome that stands."""
        return bytes(self.store.compare_set(EpochKeys(*epoch).outcome, "", outcome)).decode()

    def _end(self, problem: Problem) -> str:
        """End the first epoch, and the others that clash with it, with a problem; the first one's outcome."""
        outcome = self._conclude(problem.epochs[0], problem.written())
        if not outcome.startswith(DONE):
            for epoch in problem.epochs[1:]:
                self._conclude(epoch, outcome)
        return outcome

    def _fields_of(self, note: Note, intent: Intent) -> Mapping[str, str] | None:
        """What the rank that wrote a note is about to do; None if it refused."""
        if note.digest in (None, intent.digest):
            return None if note.digest is None else intent.fields
        fields = EpochKeys(*note.epoch, note.digest or "").told(self.store)
        return {"digest": str(note.digest)} if fields is None else fields  # it is past that call by now

    def _read_notes(self, epoch: CallEpoch, participants: Sequence[int], channel: str) -> dict[int, Note]:
        """Read the participants' latest notes that concern this rank and no call that it is past."""
        found: dict[int, Note] = {}
        for rank in participants:
            for note in notes_of(self.store, rank):
                is_ahead = note.epoch.number > self._epochs.get(note.epoch.name, 0) and note.awaits(self.rank)
                if note.channel == channel and (note.epoch == epoch or is_ahead):
                    found[rank] = note
        return found


def _heard(view: View, near: Near | None, number: int = 0, given_up: str = "") -> View:
    """What a rank sees, with what it has heard by links, and at the store of who went on from an epoch by links."""
    if near is None:
        return replace(view, given_up=given_up) if given_up else view
    failed, told = near.find_failed(number) if number else None, (near.have_told, near.is_in_vain)
    return replace(view, have_told=told[0], is_in_vain=told[1], failed=failed, given_up=given_up)
