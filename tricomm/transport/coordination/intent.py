"""What a rank is about to do, as the others compare it, and what is said when they do not come together."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.coordination.attendance import CallEpoch, Note, View, runs_of

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
        counter: the name of the field that counts the calls of one thing, if any does.
        counted: which thing that is.
    """

    participants: tuple[int, ...]
    fields: Mapping[str, str]
    digest: str
    channel: str
    call: str
    counter: str = ""
    counted: str = ""


class Agreed(NamedTuple):
    """What the ranks agreed on: the number of the epoch, and what the last one decided."""

    epoch: int
    decision: str


class Problem(NamedTuple):
    """What ends rendezvous, as it is written on the store.

    Attributes:
        text: in words.
        refused_by: the rank that refused or failed, if one did.
        epochs: that are over by it, that of the rendezvous first.
        absent: ranks that did not come.
        is_mismatch: whether ranks are about to do different things.
        is_given_up: whether a rank gave up its call as it waited: nobody is told who makes another one.
        digest: of what the absent are missed in, or of what was given up.
        counted: what all ranks count anew.
    """

    text: str
    refused_by: int | None
    epochs: Sequence[CallEpoch]
    absent: Sequence[int] = ()
    is_mismatch: bool = False
    is_given_up: bool = False
    digest: str = ""
    counted: str = ""

    def written(self) -> str:
        """As ``of`` reads it."""
        return json.dumps(self._asdict())

    @classmethod
    def of(cls, written: str) -> "Problem":
        """Read what is on the store."""
        return cls(**json.loads(written))


class ProblemError(TransportError):
    """What ended a rendezvous: the cause of the TransportError that says so.

    Args:
        text: in words.
        is_mismatch: ranks are about to do different things.
        counts_anew: all ranks of what this one calls have heard of it, and count its calls from one again.
        refused_by: the rank that refused or failed, if one did.
        absent: ranks that did not come.

    Attributes:
        may_have_met: other ranks may have met all the same, by links, and may wait for this one in the call. Who fails
            by itself tells them; and a rank that is about to do something else has not met anybody.
    """

    def __init__(
        self,
        text: str,
        is_mismatch: bool = False,
        counts_anew: bool = False,
        refused_by: int | None = None,
        absent: Sequence[int] = (),
    ) -> None:
        super().__init__(text)
        self.is_mismatch = is_mismatch
        self.counts_anew = counts_anew
        self.may_have_met = refused_by is None and not is_mismatch
        self.late = absent[0] if absent else None


def describe_refusal(rank: int, reason: str) -> str:
    """Say that a rank did not come because of its own arguments."""
    return f"rank {rank} refused the call: {reason}"


def describe_late(rank: int) -> str:
    """Say to a rank that it is the one of which an error speaks."""
    return f"this is rank {rank}, which came to that call when the others had given it up; call again on all ranks"


def differ_in_count(intent: Intent, view: View) -> bool:
    """Whether ranks disagree about nothing but which call of the same thing it is."""
    said = [note.fields or {} for note in (view.notes or {}).values()]
    others = [{name: value for name, value in one.items() if name != intent.counter} for one in said]
    return bool(intent.counter) and all(one == others[0] for one in others)


def notes_of(store: Any, rank: int) -> list[Note]:
    """What a rank tells on the store of where it is, on each of its channels."""
    key = f"now/{rank}"
    return [Note.of(note) for note in json.loads(store.get(key))] if store.check([key]) else []


class OwnNotes:
    """What this rank tells the others on the store of where it is; see ``notes_of``.

    Args:
        store: of the ranks.
        rank: this one.

    Attributes:
        of_channels: its notes, by channel; the latest is the last.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._key = f"now/{rank}"
        self._lock = threading.Lock()
        self.of_channels: dict[str, Note] = {}

    def announce(self, note: Note) -> None:
        """Tell the others where this rank is on a channel."""
        with self._lock:
            self.of_channels.pop(note.channel, None)
            self.of_channels[note.channel] = note
            while len(self.of_channels) > MAX_NOTES:
                del self.of_channels[next(iter(self.of_channels))]
            self._tell()

    def settle(self, epoch: CallEpoch, intent: Intent) -> None:
        """Whoever has met this rank since it refused a call waits for that no longer; nobody does if this was it."""
        with self._lock:
            note = self.of_channels.get(intent.channel)
            if note is None or not note.is_awaited_refusal:
                return
            told = set() if note.epoch.name == epoch.name else note.ranks.difference(intent.participants)
            self.of_channels[note.channel] = note._replace(participants=runs_of(sorted(told)))
            self._tell()

    def _tell(self) -> None:
        self._store.set(self._key, json.dumps(list(self.of_channels.values())))
