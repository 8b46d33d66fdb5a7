"""The status of the ranks of a process group, on its store: what each waits in, and why something was aborted.

| key | written by | when | read by | deleted |
|---|---|---|---|---|
| status/RANK | the monitor of RANK | every heartbeat while RANK waits | whoever diagnoses | never: one per rank |
| PLACE/abort | the first rank that knows a cause | at the failure | everybody in PLACE | never: one per failure |
| PLACE/closed/RANK | RANK | when it gives its connections back, or ends | who finds them closed | never |

A *place* is a communicator or a rendezvous. In a pipeline a rank may wait in one place for a rank that waits in
another.
"""

import json
from typing import Any, Literal, NamedTuple

from tricomm.transport.coordination.store import post_note, store_errors


class Wait(NamedTuple):
    """What a rank waits in.

    Attributes:
        place: a communicator or rendezvous.
        peer: the rank that it waits for; None if it waits for nobody or for nobody in particular.
        call: in words.
        others: ranks that it waits for at the same time, in one group of messages.
        position: in a communicator, how many calls this rank had begun there with this one. Ranks that make the same
            calls in the same order are in the same call at the same position.
    """

    place: str
    peer: int | None
    call: str
    others: tuple[int, ...] = ()
    position: int = 0

    @property
    def peers(self) -> tuple[int, ...]:
        """All ranks that it waits for."""
        return () if self.peer is None else (self.peer, *self.others)


class Heartbeat(NamedTuple):
    """The ``number``-th heartbeat of a rank, and what it waits in."""

    number: int
    waits: tuple[Wait, ...]

    def wait_in(self, place: str) -> Wait | None:
        """Return the rank's wait in a place, if it is there."""
        return next((wait for wait in self.waits if wait.place == place), None)


Fault = Literal["left", "died", "late"]


class AbortReason(NamedTuple):
    """Why a communicator was aborted.

    Attributes:
        text: in words.
        tag, call: in which call: the ``call``-th of the Resharder with that tag.
        rank: which is at fault; None if none is, or it is not known.
        fault: what that rank did: it left for good, it died, or it did not come in time and still may.
    """

    text: str
    tag: int
    call: int
    rank: int | None = None
    fault: Fault = "left"

    @property
    def lost(self) -> int | None:
        """The rank that does not come again, because it died or closed its Resharder; None if all may."""
        return None if self.fault == "late" else self.rank

    @property
    def dead(self) -> int | None:
        """The rank that died."""
        return self.rank if self.fault == "died" else None

    @property
    def late(self) -> int | None:
        """The rank that did not come in time."""
        return self.rank if self.fault == "late" else None


class StatusStore:
    """One rank's view of the status of all. Every method raises TransportError if the store is lost.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank

    def post_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Say that this rank is alive and what it waits in."""
        post_note(self.store, f"status/{self.rank}", heartbeat)

    def heartbeat_of(self, rank: int) -> Heartbeat:
        """Return the last heartbeat of a rank; number 0 if it never waited."""
        with store_errors():
            key = f"status/{rank}"
            if not self.store.check([key]):
                return Heartbeat(0, ())
            number, waits = json.loads(self.store.get(key))
            return Heartbeat(number, tuple(Wait(*wait) for wait in waits))

    def post_abort(self, place: str, reason: AbortReason) -> AbortReason:
        """Post why a place is aborted, unless somebody did before; returns the reason that stands."""
        with store_errors():
            return AbortReason(*json.loads(self.store.compare_set(f"{place}/abort", "", json.dumps(reason))))

    def abort_of(self, place: str) -> AbortReason | None:
        """Return why a place was aborted, or None."""
        with store_errors():
            key = f"{place}/abort"
            return AbortReason(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def post_closed(self, place: str, is_end: bool = False) -> None:
        """Say that this rank gives its connections back on purpose, or because its process ends."""
        post_note(self.store, f"{place}/closed/{self.rank}", is_end)

    def closed_by(self, place: str, rank: int) -> bool | None:
        """Return None if a rank has not given its connections back, else whether its process ended."""
        with store_errors():
            key = f"{place}/closed/{rank}"
            return bool(json.loads(self.store.get(key))) if self.store.check([key]) else None
