"""The notice board of a process group: who waits for whom, and who is to blame.

*Beats*: a rank that has waited for a while says that it is alive and for whom it waits in which lane. (In a pipeline, a
rank may wait in one lane for a rank that waits in another.) *Verdict*: the first rank that knows who is to blame for a
failure writes it down, and everybody else repeats it.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tricomm.transport.store import post_note, store_errors


class Beat(NamedTuple):
    """After ``number`` beats of its monitor a rank waits in these lanes, for whom (for itself: it does not wait)."""

    number: int
    waits: Mapping[str, int]


class Board:
    """One rank's view of the notes of a process group. Every method raises TransportError if the store is lost.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank

    def post_beat(self, beat: Beat) -> None:
        """Say that this rank is alive and for whom it waits."""
        post_note(self.store, f"beat/{self.rank}", beat)

    def beat_of(self, rank: int) -> Beat:
        """The last beat of a rank; number 0 if it never waited."""
        with store_errors():
            if not self.store.check([f"beat/{rank}"]):
                return Beat(0, {})
            return Beat(*json.loads(self.store.get(f"beat/{rank}")))

    def post_verdict(self, lane: str, text: str) -> str:
        """Note a failure unless somebody did before; the verdict that stands."""
        with store_errors():
            return bytes(self.store.compare_set(f"{lane}/verdict", "", text)).decode()

    def verdict(self, lane: str) -> str | None:
        """The failure that was noted for a lane, or None."""
        with store_errors():
            if not self.store.check([f"{lane}/verdict"]):
                return None
            return bytes(self.store.get(f"{lane}/verdict")).decode()
