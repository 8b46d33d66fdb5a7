"""The status of the ranks of a process group, on its store: who waits for whom, and why a communicator was aborted.

*Heartbeat*: a rank that has waited for a while says that it is alive and for whom it waits in which communicator. (In
a pipeline, a rank may wait in one communicator for a rank that waits in another.) *Abort reason*: the first rank that
knows the cause of a failure writes it down, and everybody else repeats it.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tricomm.transport.store import post_note, store_errors


class Heartbeat(NamedTuple):
    """The ``number``-th heartbeat of a rank: in which communicators it waits, and for whom (itself: for nobody)."""

    number: int
    waits: Mapping[str, int]


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
        """Say that this rank is alive and for whom it waits."""
        post_note(self.store, f"heartbeat/{self.rank}", heartbeat)

    def heartbeat_of(self, rank: int) -> Heartbeat:
        """The last heartbeat of a rank; number 0 if it never waited."""
        with store_errors():
            if not self.store.check([f"heartbeat/{rank}"]):
                return Heartbeat(0, {})
            return Heartbeat(*json.loads(self.store.get(f"heartbeat/{rank}")))

    def post_abort_reason(self, communicator: str, text: str) -> str:
        """Post why a communicator is aborted, unless somebody did before; returns the reason that stands."""
        with store_errors():
            return bytes(self.store.compare_set(f"{communicator}/abort", "", text)).decode()

    def abort_reason(self, communicator: str) -> str | None:
        """Why a communicator was aborted, or None."""
        with store_errors():
            if not self.store.check([f"{communicator}/abort"]):
                return None
            return bytes(self.store.get(f"{communicator}/abort")).decode()
