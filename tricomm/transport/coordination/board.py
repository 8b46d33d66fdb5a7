"""Which calls a rank made on connections without tags, compared with its neighbours' by the monitor's thread.

NCCL matches messages by their order alone, so a rank that calls in another order gets the bytes of another call. A call
only notes which one it is; at each look the monitor posts what was noted and reads what the ranks before and after this
one have posted. Whoever posts later sees the other, so a difference is found within two looks, and all ranks hear it.

| key | written by | when | read by | deleted |
|---|---|---|---|---|
| PLACE/calls/RANK | the monitor of RANK | a look after RANK has called | its neighbours | never: one per rank |
| PLACE/misordered | who finds a difference | once (compare_set) | all | never: one per failure |
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tricomm.transport.coordination.order import same_order_rule
from tricomm.transport.coordination.status import StatusStore
from tricomm.transport.coordination.store import post_note, store_errors

LOOKS = 3
"""So often the monitor looks after a call, so that what a later rank finds is known here before the next one."""

RECENT = 64
"""So many calls are posted one by one, those before as digests."""

KEPT = 1024
"""Digests are kept of so many times RECENT calls."""

PRIME = (1 << 61) - 1


class Posted(NamedTuple):
    """What a rank posts.

    Attributes:
        made: calls that it has made.
        recent: (tag, number) of the last ones.
        digest: the last position of which one is kept, and that of all calls before it; empty before the first.
    """

    made: int
    recent: list[list[int]]
    digest: list[int]


class CallBoard:
    """See above.

    Args:
        status: of the ranks.
        place: the communicator.
        participants: its ranks, sorted.
        tell: gives what is told the difference that was found, once, from the monitor's thread; None if it is gone.
    """

    def __init__(
        self,
        status: StatusStore,
        place: str,
        participants: Sequence[int],
        tell: Callable[[], Callable[[str], object] | None],
    ) -> None:
        self._status = status
        self._place = place
        here = participants.index(status.rank)
        around = [participants[here - 1], participants[(here + 1) % len(participants)]]
        self._neighbours = sorted({*around} - {status.rank})
        self._tell = tell
        self._lock = threading.Lock()
        self._count = 0
        self._posted = 0
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
        self._digest = 0
        self._digests: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._is_told = False

    def add(self, tag: int, number: int, name: str) -> None:
        """Note a call that begins: the ``number``-th of the Resharder with a tag."""
        with self._lock:
            self._names[tag] = name
            self._recent.append((tag, number))
            self._count += 1
            self._digest = (self._digest * 1_000_003 + tag * 8_191 + number) % PRIME
            if self._count % RECENT == 0:
                self._digests[self._count] = self._digest
                self._digests.pop(self._count - KEPT * RECENT, None)

    def compare(self) -> None:
        """Post what was noted, and tell a difference from what a neighbour has posted."""
        if self._is_told:
            return
        with self._lock:
            last = self._count - self._count % RECENT
            digest = [last, self._digests[last]] if last else []
            mine = Posted(self._count, [[*one] for one in self._recent], digest)
        if mine.made != self._posted:
            post_note(self._status.store, f"{self._place}/calls/{self._status.rank}", mine)
            self._posted = mine.made
        store, told = self._status.store, f"{self._place}/misordered"
        with store_errors():
            text = bytes(store.get(told)).decode() if store.check([told]) else self._find(mine)
            if text is not None:
                text = bytes(store.compare_set(told, "", text)).decode()
        if text is not None:
            self._is_told, tell = True, self._tell()
            if tell is not None:
                tell(text)

    def _find(self, mine: Posted) -> str | None:
        store = self._status.store
        for other in self._neighbours:
            key = f"{self._place}/calls/{other}"
            if store.check([key]):
                text = self._difference(mine, other, Posted(*json.loads(store.get(key))))
                if text is not None:
                    return text
        return None

    def _difference(self, mine: Posted, other: int, theirs: Posted) -> str | None:
        first, their_first = (one.made - len(one.recent) for one in (mine, theirs))
        for position in range(max(first, their_first), min(mine.made, theirs.made)):
            ours, there = mine.recent[position - first], theirs.recent[position - their_first]
            if ours != there:
                return self._describe(ours, other, there, "in its place")
        if theirs.digest and self._digests.get(theirs.digest[0], theirs.digest[1]) != theirs.digest[1]:
            return self._describe(mine.recent[-1], other, theirs.recent[-1], "after calls in another order")
        return None

    def _describe(self, ours: Sequence[int], other: int, there: Sequence[int], how: str) -> str:
        """The same words on both ranks."""
        calls = {self._status.rank: self._words(*ours), other: self._words(*there)}
        (one, call), (another, its_call) = sorted(calls.items())
        return (
            f"rank {one} made {call}, and rank {another} {how} {its_call}, so that results may be those of another "
            f"call; {same_order_rule(call, its_call)}"
        )

    def _words(self, tag: int, number: int) -> str:
        return f"call {number} of {self._names.get(tag, f'another Resharder (of tag {tag})')}"
