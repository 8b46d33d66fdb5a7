"""One rank at one rendezvous, as a state machine without a store: what it sees and the time in, what it does out.

any     --all have told the same by links-------------------> Meet
any     --a call failed that others began by links----------> Abort
any     --this rank gave its call up------------------------> Abort
TOLD    --in vain, or PATIENCE over-------------------------> Arrive: ARRIVED
ARRIVED --the last to arrive--------------------------------> Decide
ARRIVED --PATIENCE over-------------------------------------> Announce: ANNOUNCED
any     --an outcome stands---------------------------------> Return
ANNOUNCED --notes disagree: all here, or for MISMATCH_SECONDS> Abort (mismatch or refusal)
ANNOUNCED --only ranks known to be dead are missing---------> Abort (death)
ANNOUNCED --a missing rank waits for them in another call---> Abort (another order)
ANNOUNCED --deadline over-----------------------------------> Abort (absence)
any     --none of these-------------------------------------> Look again
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile
from typing import Any, NamedTuple

from tricomm.transport.coordination.order import channel_in_words, same_order_rule
from tricomm.transport.coordination.status import Wait

PATIENCE_SECONDS = 0.1
"""How long a rank waits before it tells the others what it is about to do, and between two looks at what they tell."""

MISMATCH_SECONDS = 0.5
"""How long a rank that has seen a mismatch waits for the others' notes, so that the first one is named."""

DEAD_SECONDS = 2.0
"""How long a rank that died may take to come, should it be alive after all."""


DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
"""Of Resharders, which the calls that stand beside it are told by."""


class CallEpoch(NamedTuple):
    """The ``number``-th call by one set of ranks on one channel."""

    name: str
    number: int


def runs_of(ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Write ranks as few (first, last, distance), for a fleet has thousands.

    Example:
        >>> runs_of([0, 1, 2, 3, 8, 16, 24])
        [(0, 3, 1), (8, 24, 8)]
    """
    found: list[tuple[int, int, int]] = []
    for rank in sorted(ranks):
        first, last, distance = found[-1] if found else (rank, rank, 0)
        if found and rank - last == (distance or rank - last):
            found[-1] = (first, rank, rank - last)
        else:
            found.append((rank, rank, 0))
    return found


class Note(NamedTuple):
    """What a rank tells the others who may wait for it.

    Attributes:
        epoch: at which it is.
        participants: who must come there, as ``runs_of`` writes them.
        channel: of the call.
        call: in words.
        digest: of what it is about to do; None if it refused.
        refusal: why it does not come.
        fields: what it is about to do, by name; None if it refused, or as long as nobody has looked.
    """

    epoch: CallEpoch
    participants: Sequence[tuple[int, int, int]]
    channel: str
    call: str
    digest: str | None
    refusal: str = ""
    fields: Mapping[str, str] | None = None

    def awaits(self, rank: int) -> bool:
        """True if a rank must come there."""
        return any(rank in range(first, last + 1, max(step, 1)) for first, last, step in self.participants)

    @property
    def ranks(self) -> set[int]:
        """Who must come there."""
        return {rank for first, last, step in self.participants for rank in range(first, last + 1, max(step, 1))}

    @property
    def is_awaited_refusal(self) -> bool:
        """Whether it says that this rank does not come, to ranks that may wait for it."""
        return self.digest is None and bool(self.participants)

    @classmethod
    def of(cls, value: Sequence[Any]) -> "Note":
        """Read a note from what JSON gives back."""
        epoch, *rest = value
        return cls(CallEpoch(*epoch), *rest)


class Phase(Enum):
    """Whether a rank has told the others what it is about to do: by links, or by its note on the store."""

    TOLD = 0
    ARRIVED = 1
    ANNOUNCED = 2


@dataclass(frozen=True, slots=True)
class Terms:
    """What does not change while a rank is at a rendezvous.

    Attributes:
        epoch: which.
        participants: who must come, sorted.
        arrived: when this rank came.
        deadline: until when it waits.
        dead: ranks known to have died or left, and how that is known; more may come while the rank waits.
    """

    epoch: CallEpoch
    participants: tuple[int, ...]
    arrived: float
    deadline: float
    dead: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class State:
    """Where a rank is: its phase, and since when it sees a mismatch."""

    phase: Phase = Phase.ARRIVED
    mismatch_since: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a rank sees at one moment.

    Attributes:
        now: the time.
        outcome: what stands on the store, or None.
        is_last: whether all others have arrived with the same intent.
        notes: of the participants, by rank; looked at when this rank has announced.
        elsewhere: what absent ranks are in, by rank, where it is known.
        missed: an absent rank that waits for those who are here, and in which call.
        have_told: whether all others have told by links that they are about to do the same; so have this rank and each
            other one to all then, and every one of them sees it sooner or later.
        is_in_vain: whether not all will tell that by links.
        failed: why the call failed that others have begun, as they had met by links.
        given_up: why this rank does not make its call any more; "" if it does.
    """

    now: float
    outcome: str | None = None
    is_last: bool = False
    notes: Mapping[int, Note] | None = None
    elsewhere: Mapping[int, str] | None = None
    missed: tuple[int, str] | None = None
    have_told: bool = False
    is_in_vain: bool = False
    failed: str | None = None
    given_up: str = ""


class Meet(NamedTuple):
    """Go on as is: all others do."""


class Arrive(NamedTuple):
    """Go to the store: somebody has to be met there, or to be told what is wrong."""


class Decide(NamedTuple):
    """Write what is agreed on."""


class Announce(NamedTuple):
    """Tell the others what this rank is about to do."""


class Look(NamedTuple):
    """Look again after some seconds, or as soon as there is an outcome."""

    seconds: float


class Return(NamedTuple):
    """Go away with the outcome."""

    outcome: str


class Abort(NamedTuple):
    """End the rendezvous of these epochs with a problem; whichever outcome is written first stands.

    Attributes:
        text: what is wrong.
        refused_by: the rank that refused, if one did.
        epochs: this one first, then those that clash with it.
        absent: ranks that did not come.
        is_mismatch: whether ranks are about to do different things.
        is_given_up: whether this rank gave its call up.
    """

    text: str
    refused_by: int | None
    epochs: tuple[CallEpoch, ...]
    absent: tuple[int, ...] = ()
    is_mismatch: bool = False
    is_given_up: bool = False


Action = Meet | Arrive | Decide | Announce | Look | Return | Abort


def advance(state: State, view: View, terms: Terms) -> tuple[State, Action]:
    """Return the next state and what to do; see the table above."""
    patient_until = min(terms.arrived + PATIENCE_SECONDS, terms.deadline)
    if view.given_up and view.outcome is None and not view.have_told:
        return state, Abort(view.given_up, None, (terms.epoch,), is_given_up=True)
    if view.have_told or view.failed or state.phase is Phase.TOLD:
        return _by_links(state, view, terms, patient_until)
    if state.phase is Phase.ARRIVED and view.is_last:
        return state, Decide()
    if view.outcome is not None:
        return state, Return(view.outcome)
    if state.phase is Phase.ARRIVED:
        if view.now < patient_until:
            return state, Look(patient_until - view.now)
        return replace(state, phase=Phase.ANNOUNCED), Announce()
    notes = view.notes or {}
    mismatch = find_mismatch(notes, terms.participants)
    if mismatch is not None:
        return _mismatched(state, view, terms, mismatch)
    state = replace(state, mismatch_since=None)
    end = _hopeless(view, terms, tuple(rank for rank in terms.participants if rank not in notes))
    return state, end or Look(min(PATIENCE_SECONDS, terms.deadline - view.now))


def _by_links(state: State, view: View, terms: Terms, patient_until: float) -> tuple[State, Action]:
    if view.have_told:
        return state, Meet()
    if view.failed:
        return state, Abort(view.failed, None, (terms.epoch,))
    if view.is_in_vain or view.now >= patient_until:
        return replace(state, phase=Phase.ARRIVED), Arrive()
    return state, Look(patient_until - view.now)


def _hopeless(view: View, terms: Terms, absent: tuple[int, ...]) -> Abort | None:
    """The absent do not come, as is known or must be assumed; None as long as they may."""
    fates = [terms.dead.get(rank) for rank in absent]
    if fates and None not in fates and view.now >= terms.arrived + DEAD_SECONDS:
        text = f"{fates[0]}; it did not come back. Ranks {list(terms.participants)} must all call"
        return Abort(text, None, (terms.epoch,), absent)
    if view.missed is not None:
        rank, text = view.missed
        return Abort(text, rank, (terms.epoch,))
    if view.now >= terms.deadline:
        text = describe_absence(absent, terms.participants, view.elsewhere or {})
        return Abort(text, None, (terms.epoch,), absent)
    return None


def _mismatched(state: State, view: View, terms: Terms, mismatch: tuple[str, int | None]) -> tuple[State, Action]:
    since = view.now if state.mismatch_since is None else state.mismatch_since
    notes = view.notes or {}
    until = min(since + MISMATCH_SECONDS, terms.deadline)
    if len(notes) < len(terms.participants) and view.now < until:
        return replace(state, mismatch_since=since), Look(min(PATIENCE_SECONDS, until - view.now))
    others = {note.epoch for note in notes.values()} - {terms.epoch}
    text, refused_by = mismatch
    return state, Abort(text, refused_by, (terms.epoch, *sorted(others)), is_mismatch=refused_by is None)


def find_mismatch(notes: Mapping[int, Note], participants: Sequence[int]) -> tuple[str, int | None] | None:
    """Return (what is wrong, the rank that refused if one did); None if all notes agree.

    The first rank that refused, or else the first that says another thing than the lowest rank.
    """
    for rank in participants:
        if rank in notes and notes[rank].digest is None:
            return notes[rank].refusal, rank
    speaking = [rank for rank in participants if rank in notes]
    for rank in speaking[1:]:
        first, other = notes[speaking[0]], notes[rank]
        text = _difference(speaking[0], first, rank, other)
        if text is not None:
            calls = f"rank {speaking[0]} makes {first.call}, rank {rank} {other.call}"
            return f"{text}; {same_order_rule(calls)} ({calls})", None
    return None


def _difference(first: int, one: Note, rank: int, other: Note) -> str | None:
    ours, theirs = one.fields or {}, other.fields or {}
    field = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
    if field is not None:
        said, answer = around_difference(_readable(str(ours.get(field))), _readable(str(theirs.get(field))))
        about = f"rank {rank} disagrees with rank {first} about {field}"
        return f"{about}: rank {first} says {said}, rank {rank} says {answer}"
    if other.epoch != one.epoch:
        return (
            f"rank {rank} makes its call number {other.epoch.number} and rank {first} its call number "
            f"{one.epoch.number} on these ranks"
        )
    return None


def _readable(text: str) -> str:
    """What a field says: of digests their first digits, and what would break the line as Python writes it."""
    text = DIGEST.sub(r"\1", text)
    return text if text and text.isprintable() else repr(text)


def describe_absence(absent: Sequence[int], participants: Sequence[int], elsewhere: Mapping[int, str]) -> str:
    """Say who did not come to a rendezvous, and where it is if that is known."""
    if not absent:
        return f"ranks {list(participants)} all called but did not meet within the timeout; raise the timeout"
    others = f" (nor did {list(absent[1:])})" if absent[1:] else ""
    seen = next((f"; rank {rank} is in {elsewhere[rank]}" for rank in absent if rank in elsewhere), "")
    return (
        f"rank {absent[0]} did not call within the timeout{others}, and ranks {list(participants)} must all "
        f"call{seen}; see whether it died, hangs, calls something else or calls with layouts that leave it out"
    )


def describe_apart(wait: Wait, notes: Sequence[Note], channel: str) -> str:
    """Say what an absent rank is in, with both channels if it waits at a rendezvous of another one.

    Args:
        wait: of that rank, by its heartbeat.
        notes: its own, of all channels.
        channel: where it is missed.

    Example:
        >>> note = Note(CallEpoch("ab12", 1), ((0, 1, 1),), "b", "call 1", "digest")
        >>> describe_apart(Wait("rendezvous/ab12", None, "call 1"), [note], "")
        "call 1 on channel 'b', and is missed on the shared channel; give the same channel= on all ranks"
    """
    there = next((note.channel for note in notes if wait.place == f"rendezvous/{note.epoch.name}"), channel)
    if there == channel:
        return wait.call
    here, other = map(channel_in_words, (channel, there))
    return f"{wait.call} on {other}, and is missed on {here}; give the same channel= on all ranks"


def around_difference(one: str, other: str, limit: int = 200) -> tuple[str, str]:
    """Cut two texts, of which much may be alike, down to where they begin to differ."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = max(0, same - limit // 2) if max(len(one), len(other)) > limit else 0
    end = begin + limit

    def cut(text: str) -> str:
        return f"{'... ' if begin else ''}{text[begin:end]}{' ...' if len(text) > end else ''}"

    return cut(one), cut(other)
