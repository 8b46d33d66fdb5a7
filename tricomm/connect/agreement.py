"""What the ranks of one side do next, decided by their rank 0, so that all do it in the same call."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tricomm.connect.meeting.join import OWN
from tricomm.connect.world import World, connect
from tricomm.errors import TransportError
from tricomm.options import Options
from tricomm.transport.coordination.store import GroupOverError

MAX_KEPT = 4096
"""So many decisions are kept for ranks that are behind."""

FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.02


class Agreement:
    """Decisions of the ranks of one side.

    Args:
        world: of that side alone.
        timeout_seconds: how long a rank waits for rank 0 to decide.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world = world
        self._seconds = timeout_seconds
        self._number = 0

    def decide(self, make: Callable[[], str]) -> str:
        """Return what rank 0 makes of it, on all ranks.

        Raises:
            TransportError: rank 0 has not decided in time, or a rank of the side died.
        """
        try:
            return self._decided(make)
        except GroupOverError as over:
            raise GroupOverError(
                f"{over}; all ranks of side {self.world.side!r} close their Publisher or Subscriber and make a new one"
            ) from over

    def _decided(self, make: Callable[[], str]) -> str:
        self._number += 1
        key, store = f"decision/{self._number}", self.world.get_group_store()
        if self.world.rank() == 0:
            text = make()
            store.set(key, text)
            if self._number > MAX_KEPT:
                store.delete_key(f"decision/{self._number - MAX_KEPT}")
            return text
        deadline, pause = time.monotonic() + self._seconds, FIRST_PAUSE_SECONDS
        while (found := store.find(key)) is None:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank 0 of side {self.world.side!r} did not make its call number {self._number} within "
                    f"{self._seconds:.0f} s; all ranks of a side make the same calls"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        return found.decode()


class Gathered(NamedTuple):
    """The ranks of one side, which have met each other.

    Attributes:
        connect: ``connect``, as this rank, but for who else takes part and for how long to wait.
        agreement: of them.
        options: of moves.
    """

    connect: "partial[World]"
    agreement: Agreement
    options: Options


def gathered(
    address: str,
    side: str,
    side_rank: int,
    side_size: int,
    secret: str | bytes,
    host: str | None,
    chosen: Options,
) -> Gathered:
    """Wait for all ranks of this side.

    Raises:
        TransportError: one did not come in time.
    """
    of_rank = partial(connect, address, side=side, side_rank=side_rank, secret=secret, host=host, device=chosen.device)
    own = of_rank(side_sizes={side: side_size}, name=OWN, timeout_seconds=chosen.seconds)
    return Gathered(of_rank, Agreement(own, chosen.seconds), replace(chosen, device=None))
