"""Transfers over a link: what is offered, what is expected, and how long to wait for it. See ``link``."""

import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from datetime import timedelta

from tricomm.packing import runs as in_runs
from tricomm.transport.base import Operation
from tricomm.transport.memory.arena import SharedSlab
from tricomm.transport.memory.pieces import Common, Slot
from tricomm.transport.memory.protocol import (
    RECEIVING,
    SENDING,
    Action,
    Event,
    Ready,
    Receiving,
    Sending,
)
from tricomm.transport.memory.reading import UnreadableError
from tricomm.transport.memory.signals import LinkClosedError, Signals

CROWDED_MILLISECONDS = 1.0
"""How long to wait between two tries to tell what did not fit into a socket."""

AHEAD_MILLISECONDS = 20.0
"""So long a link waits for others that send the same, if none of them goes on: longer than ranks wait for a core."""

LONGEST_MILLISECONDS = 3_600_000.0
"""Of one look for news: poll takes less than 25 days, and a limit may be longer."""


class End(Signals, ABC):
    """What transfers ask of their link.

    Attributes:
        leaving: what goes piece by piece, as long as not all pieces are packed; and what was offered behind it.
        arriving: what is expected in pieces.
    """

    def __init__(self, peer: int, end: socket.socket, pid: int) -> None:
        super().__init__(peer, end, pid)
        self.leaving: deque[Departure] = deque()
        self.arriving: set[Arrival] = set()

    @property
    def is_busy(self) -> bool:
        """Whether something is under way in pieces, or waits for room in the socket."""
        return bool(self.leaving or self.arriving or self.backlog)

    @property
    @abstractmethod
    def is_ahead(self) -> bool:
        """Whether it waits for links that send the same: they are served first, or it hurries."""

    @abstractmethod
    def hurry(self) -> None:
        """Do not wait for other links any more with what is under way."""

    @abstractmethod
    def look(self, awaiting: "Expected | Arrival | ExpectedNod | None" = None) -> None:
        """Take what messages have come; only until what is awaited is among them, if anything is."""

    @abstractmethod
    def serve(self, one_message: bool = False) -> None:
        """Take what messages have come, or the first one if that is enough, and go on with all pieces.

        Raises:
            LinkClosedError: it is.
        """

    @abstractmethod
    def read(self, ready: Ready, operation: Operation) -> None:
        """Read what was offered, or a piece of it, into the operation's buffer, its runs or its pieces.

        Raises:
            UnreadableError: not all could be read.
        """

    @abstractmethod
    def done(self, ready: Ready) -> None:
        """Tell the peer that what it offered was read. If it has closed, it learns from that."""


def size_of(operation: Operation) -> int:
    """Bytes of an operation."""
    _, _, buffer, runs, *_ = operation
    return buffer.numel() if runs is None else runs.nbytes


class Patience:
    """Until when to wait, and which links may still have something to tell meanwhile."""

    def __init__(self, limit: timedelta, links: tuple[End, ...]) -> None:
        self._deadline = time.monotonic() + limit.total_seconds()
        self._links = links
        self._ended: set[int] = set()

    def await_news(self, link: End, serves: bool = False) -> bool:
        """Wait for news from a link, and go on with other links meanwhile; true if it has ended.

        Args:
            link: the one.
            serves: whether to go on with that one too, if there is news of it.

        Raises:
            LinkClosedError: the deadline is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise LinkClosedError(f"rank {link.peer} gave no sign within the limit")
        milliseconds = min(1000 * left, LONGEST_MILLISECONDS)
        others: dict[int, End] = {}
        ahead: list[End] = []
        for one in self._links:
            if one.backlog:
                milliseconds = CROWDED_MILLISECONDS
                with suppress(LinkClosedError):  # whoever waits for that one hears of it
                    one.flush()
            elif not (one.leaving or one.arriving):
                continue
            if one.leaving and one.is_ahead:
                ahead.append(one)
                milliseconds = min(milliseconds, AHEAD_MILLISECONDS)
            if one is not link and one.peer not in self._ended:
                others[one.peer] = one
        news = link.wait_with(others, milliseconds) if others else {link.peer: link.wait(milliseconds)}
        for one in ahead:
            if not others or not news:
                one.hurry()
        for peer, one in others.items():
            is_over = news.get(peer)
            if is_over:
                self._ended.add(peer)  # whoever waits for that one hears of it
            if is_over is not None or one in ahead:
                with suppress(LinkClosedError):
                    one.serve(one_message=not is_over)
        is_over = news.get(link.peer)
        if serves and (is_over is not None or link in ahead):
            link.serve(one_message=not is_over)
        return is_over is True


class Offer:
    """Bytes that the peer may read. Its link holds it, and it does not hold its link.

    Attributes:
        tag: of its call.
        operation: keeps alive what is read; None where the link has a copy.
        slab: in which they are, if they are in one.
        slot: whose slab it is, if other links offer it too; else it is of the link's arena.
        free: where the slab goes when they are read; None if it is of a slot, or of the link's ring.
        is_read: whether the peer has them.
    """

    __slots__ = ("free", "is_read", "operation", "slab", "slot", "tag")

    def __init__(
        self,
        tag: int,
        operation: Operation | None,
        slab: SharedSlab | None,
        slot: Slot | None = None,
        free: list[SharedSlab] | None = None,
    ) -> None:
        self.tag = tag
        self.operation = operation
        self.slab = slab
        self.slot = slot
        self.free = free
        self.is_read = False

    @property
    def is_free(self) -> bool:
        """Whether whoever offered them may change them."""
        return self.is_read or self.operation is None

    def wait(self, link: End, patience: Patience) -> None:
        """Return when the sender may change them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        if not self.is_free:
            self.wait_read(link, patience)

    def wait_read(self, link: End, patience: Patience) -> None:
        """Return when the peer has them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        state, is_over = Sending.OFFERED, False
        link.serve()
        while state is Sending.OFFERED:
            if self.is_read:
                state, _ = SENDING[state, Event.DONE]
            elif is_over:
                state, _ = SENDING[state, Event.CLOSED]
            else:
                is_over = patience.await_news(link, serves=True)
        if state is Sending.LOST:
            raise LinkClosedError(f"the link to rank {link.peer} is closed")


class Departure:
    """Bytes that go piece by piece. Its link holds it, and it does not hold its link.

    Attributes:
        operation: what is sent.
        tag, nbytes: of it.
        common: if other links send the same, what packs it once for all.
        packed_nbytes: how many the link has offered.
    """

    __slots__ = ("common", "nbytes", "operation", "packed_nbytes", "tag")

    def __init__(self, operation: Operation, tag: int, nbytes: int, common: Common | None = None) -> None:
        self.operation = operation
        self.tag = tag
        self.nbytes = nbytes
        self.common = common
        self.packed_nbytes = 0

    @property
    def is_free(self) -> bool:
        """Whether whoever offered them may change them."""
        return self.packed_nbytes == self.nbytes

    def wait(self, link: End, patience: Patience) -> None:
        """Return when the sender may change them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        if not self.is_free:
            link.serve()
        is_over = False
        while not self.is_free:
            if is_over:
                raise LinkClosedError(f"the link to rank {link.peer} is closed")
            is_over = patience.await_news(link, serves=True)


class Expected:
    """Bytes that the peer is to offer. Its link holds it, and it does not hold its link."""

    __slots__ = ("operation", "ready")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.ready: Ready | None = None

    def take(self, ready: Ready) -> bool:
        """This is what is offered; returns whether it is all."""
        self.ready = ready
        return True

    def wait(self, link: End, patience: Patience) -> None:
        """Return when they are here, and count.

        Raises:
            LinkClosedError: the link has ended before.
            UnreadableError: they cannot be read though the link stands.
        """
        state, action, is_over, problem = Receiving.WAITING, Action.LOOK, False, None
        while action not in (Action.TELL_DONE, Action.FAIL):
            if action is Action.LOOK:
                if self.ready is None:
                    link.look(self)
                    if link.is_busy:
                        link.serve()  # it may come behind others
                if self.ready is None and not is_over:
                    is_over = patience.await_news(link)
                    continue
                event = Event.CLOSED if self.ready is None else Event.READY
            elif action is Action.READ:
                event, problem = self._read(link)
            else:
                event = Event.CLOSED if link.is_closed() else Event.STANDS
            state, action = RECEIVING[state, event]
        if state is Receiving.UNREADABLE:
            assert problem is not None
            raise problem
        if state is Receiving.LOST:
            raise LinkClosedError(f"the link to rank {link.peer} is closed")
        assert self.ready is not None
        link.done(self.ready)

    def _read(self, link: End) -> tuple[Event, UnreadableError | None]:
        assert self.ready is not None
        try:
            link.read(self.ready, self.operation)
        except UnreadableError as error:
            return Event.NOT_ALL_READ, error
        return Event.ALL_COPIED if self.ready.slab else Event.ALL_READ, None


class Arrival:
    """Bytes that the peer is to offer piece by piece. Its link holds it, and it does not hold its link.

    Attributes:
        operation: what is received.
        pieces: offered and not unpacked yet.
        unpacked_nbytes: how many are; or more, if all are.
        problem: why that cannot go on.
    """

    __slots__ = ("_nbytes", "operation", "pieces", "problem", "unpacked_nbytes")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self._nbytes = size_of(operation)
        self.pieces: deque[Ready] = deque()
        self.unpacked_nbytes = 0
        self.problem: UnreadableError | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here."""
        return self.unpacked_nbytes >= self._nbytes

    def take(self, ready: Ready) -> bool:
        """This is what is offered next; returns whether it is the last."""
        self.pieces.append(ready)
        return ready.nbytes != self._nbytes or ready.address + in_runs.PIECE_NBYTES >= self._nbytes

    def wait(self, link: End, patience: Patience) -> None:
        """Return when they are here. What is in slabs counts, see ``protocol``.

        Raises:
            LinkClosedError: the link has ended before.
            UnreadableError: they are not what was expected.
        """
        is_over = False
        link.serve()
        while self.problem is None and not self.is_whole:
            if is_over:
                raise LinkClosedError(f"the link to rank {link.peer} is closed")
            is_over = patience.await_news(link, serves=True)
        if self.problem is not None:
            raise self.problem


class ExpectedNod:
    """That the peer has all that it needs in a call."""

    has_come = False

    def wait(self, link: End, patience: Patience) -> None:
        """Return when it is told.

        Raises:
            LinkClosedError: the link has ended before.
        """
        is_over = False
        while not self.has_come:
            link.look(self)
            if self.has_come:
                return
            if is_over:
                raise LinkClosedError(f"the link to rank {link.peer} is closed")
            is_over = patience.await_news(link)
