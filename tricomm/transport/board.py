"""The notice board of a process group: who waits for whom, and who is to blame.

*Beats*: a rank that has waited for a while says that it is alive and for whom it waits, in each lane and in all of them
together (in a pipeline, one rank may wait in one lane for a rank that waits in another). *Verdict*: the first rank that
knows who is to blame for a failure writes it down, and everybody else repeats it.
"""

import json
from typing import Any, NamedTuple

from tricomm.transport.store import store_errors


class Beat(NamedTuple):
    """After ``number`` beats of its monitor a rank waits for rank ``peer`` (for itself: it does not wait)."""

    number: int
    peer: int


class Waits(NamedTuple):
    """After ``number`` beats of its monitor a rank waits for these ranks, on any of its lanes."""

    number: int
    peers: tuple[int, ...]


class Board:
    """One rank's view of the notes of a process group. Every method raises TransportError if the store is lost.

    Args:
        store: a torch.distributed store that all ranks of the group share.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self.rank = rank

    def post_beat(self, lane: str, beat: Beat) -> None:
        """Say that this rank is alive and for whom it waits."""
        with store_errors():
            self.store.set(f"{lane}/beat/{self.rank}", json.dumps(beat))

    def beat_of(self, lane: str, rank: int) -> Beat:
        """The last beat of a rank; number 0 if it never waited."""
        with store_errors():
            if not self.store.check([f"{lane}/beat/{rank}"]):
                return Beat(0, rank)
            return Beat(*json.loads(self.store.get(f"{lane}/beat/{rank}")))

    def post_waits(self, waits: Waits) -> None:
        """Say that this rank is alive and for whom it waits, whatever the lane."""
        with store_errors():
            self.store.set(f"waits/{self.rank}", json.dumps(waits))

    def waits_of(self, rank: int) -> Waits:
        """What a rank said last; number 0 if it never waited."""
        with store_errors():
            if not self.store.check([f"waits/{rank}"]):
                return Waits(0, ())
            number, peers = json.loads(self.store.get(f"waits/{rank}"))
            return Waits(number, tuple(peers))

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
