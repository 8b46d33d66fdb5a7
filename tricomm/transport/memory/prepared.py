"""Operations of few bytes that are made ready once and started again and again, each by one function.

A call that comes after something else finds its code in no cache, and then each function that it enters costs more than
to copy some KiB. What is here does what ``link`` and ``transfers`` do for bytes that go by way of a slab, as long as
the link is quiet: nothing waits for room in its socket or goes in pieces, a slab is free, and the message that comes is
the one that is awaited. Anything else goes their way, in the middle of an operation too: both leave the link the same.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from ctypes import memmove
from datetime import timedelta
from itertools import chain
from typing import Any

from tricomm.packing import runs as in_runs
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.memory import link as links
from tricomm.transport.memory.link import OFFERS_BEFORE_LOOKING, Link
from tricomm.transport.memory.pieces import pack_piece
from tricomm.transport.memory.protocol import (
    DONE,
    DONE_KIND,
    MAX_MESSAGE_NBYTES,
    NOD,
    NOD_KIND,
    READY,
    READY_KIND,
    Ready,
)
from tricomm.transport.memory.signals import FILE_NBYTES, FLAGS, LinkClosedError
from tricomm.transport.memory.transfers import (
    LONGEST_MILLISECONDS,
    Departure,
    Expected,
    ExpectedNod,
    Offer,
    Patience,
    size_of,
)

NOW = timedelta(0)

SHORT_PAUSES = 4
"""So often something else may come before what is awaited: then the ordinary way looks at the limit."""


def prepared(
    operation: Operation, link: Link, every: Sequence[Link], ends_with_nods: bool = False
) -> Callable[[int], Any] | None:
    """What starts an operation, as Prepares has it; None if it may go in pieces, as others have to know of each other.

    Args:
        operation: of the peer of the link.
        link: by which it goes.
        every: the links of this rank, which may have something to do while it waits.
        ends_with_nods: whether the ranks nod at the end of each call.
    """
    if size_of(operation) > in_runs.PIECE_NBYTES:
        return None
    if operation.is_send:
        return PreparedSend(operation, link, tuple(every)).start
    return PreparedReceive(operation, link, tuple(every), ends_with_nods).start


class PreparedSend:
    """A send, again and again. The work of one whose bytes are not free yet."""

    def __init__(self, operation: Operation, link: Link, every: tuple[Link, ...]) -> None:
        self._operation, self._link, self._every = operation, link, every
        self._nbytes = size_of(operation)
        self._address = 0 if operation.runs is not None else operation.buffer.data_ptr()
        self._free, self._numbers = link.free_slabs(self._nbytes), link.numbers
        self._offers, self._leaving, self._backlog = link.offers, link.leaving, link.backlog
        self._offer = Offer(0, None, None, free=self._free)
        # Bytes that are too many to be copied for a sender that does not wait never go the short way.
        self._offer.is_read = self._nbytes <= links.EAGER_NBYTES
        self._work: Offer | Departure = self._offer

    def start(self, tag: int) -> "PreparedSend | None":
        """Offer the bytes; None if they are free.

        Raises:
            ConnectionLostError: the link is closed.
        """
        offer, offers, free = self._offer, self._offers, self._free
        if (
            not (offer.is_read and free)
            or self._leaving
            or self._backlog
            or len(offers) >= OFFERS_BEFORE_LOOKING  # then some are perhaps read
        ):
            self._work = work = self._link.offer(self._operation, tag)
            return None if work.is_free else self
        slab = free.pop()
        if self._address:
            memmove(slab.address, self._address, self._nbytes)
        else:
            pack_piece(self._operation, 0, self._nbytes, slab)
        number = next(self._numbers)
        offer.tag, offer.slab, offer.is_read = tag, slab, False
        offers[number] = offer
        try:
            self._link.say(READY.pack(READY_KIND, number, tag, self._nbytes, 0, 0, slab.number))
        except LinkClosedError as error:
            raise ConnectionLostError(self._link.peer, error) from error
        return None

    def wait(self, limit: timedelta) -> None:
        """Return when the sender may change them.

        Raises:
            LinkClosedError: the link has ended before, or the limit is over.
        """
        self._work.wait(self._link, Patience(limit, self._every))


class PreparedReceive:
    """A receive, again and again, and the work of each. Where calls end with nods these say that few bytes are read."""

    def __init__(self, operation: Operation, link: Link, every: tuple[Link, ...], ends_with_nods: bool = False) -> None:
        self._link, self._every, self._tag = link, every, 0
        self._nbytes = size_of(operation)
        self._address = 0 if operation.runs is not None else operation.buffer.data_ptr()
        self._early, self._expected, self._slabs = link.early, link.expected, link.slabs
        self._receive, self._poll = link.receive, link.poll
        self._found, self._tells = Expected(operation), not (ends_with_nods and self._nbytes <= links.EAGER_NBYTES)
        self._under_way = under_way(every)

    def start(self, tag: int) -> "PreparedReceive":
        """Say that the bytes are expected, which matches offers as ``Link.expect`` does."""
        found, self._tag = self._found, tag
        found.ready = None
        early = self._early.get(tag)
        if early:
            found.ready = early.popleft()
            if not early:
                del self._early[tag]
        elif tag in self._expected:
            self._expected[tag].append(found)
        else:
            self._expected[tag] = deque((found,))
        return self

    def wait(self, limit: timedelta) -> None:
        """Return when the bytes are here, and count.

        Raises:
            LinkClosedError: the link has ended before, or the limit is over.
            UnreadableError: they cannot be read though the link stands.
        """
        found = self._found
        ready = found.ready
        if ready is None and not any(self._under_way):
            data, ancillary = b"", list[Any]()
            try:
                try:
                    data, ancillary, _, _ = self._receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
                except BlockingIOError:
                    if not self._poll(min(1000 * limit.total_seconds(), LONGEST_MILLISECONDS)):
                        limit = NOW
                    data, ancillary, _, _ = self._receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except OSError:
                pass  # nothing but the end of the link, or of the limit
            if len(data) == READY.size and data[0] == READY_KIND and not ancillary:
                ready = tuple.__new__(Ready, READY.unpack(data)[1:])
            expected = self._expected[self._tag]
            if ready is not None and ready.tag == self._tag and expected[0] is found:
                found.ready = ready
                expected.popleft()
                if not expected:
                    del self._expected[self._tag]
            elif data:
                self._link.take(data, ancillary)
                ready = found.ready
        if ready is None or not (ready.slab and self._address) or ready.address or ready.nbytes != self._nbytes:
            found.wait(self._link, Patience(limit, self._every))
            return
        memmove(self._address, self._slabs[ready.slab].address, self._nbytes)
        if self._tells:
            with suppress(LinkClosedError):  # the peer has closed, and learns from that
                self._link.say(DONE.pack(DONE_KIND, ready.number))


class PreparedNod:
    """A nod to the peer of a link and the one that it gives, again and again, and what is waited for each time."""

    def __init__(self, link: Link, every: tuple[Link, ...]) -> None:
        self._link, self._every = link, every
        self._found, self._tag = ExpectedNod(), 0
        self._nods, self._offers = link.nods, link.offers
        self._receive, self._poll = link.receive, link.poll
        self._under_way = under_way(every)

    def start(self, tag: int) -> "PreparedNod":
        """Tell the peer that this rank has all that it needs in a call, as ``Link.nod`` does.

        Raises:
            ConnectionLostError: the link is closed.
        """
        self._tag, self._found = tag, self._link.nod(tag)
        return self

    def wait(self, limit: timedelta) -> None:
        """Return when the peer has told the same.

        Raises:
            LinkClosedError: the link has ended before, or the limit is over.
        """
        found, receive = self._found, self._receive
        pauses = 0 if any(self._under_way) else SHORT_PAUSES
        while not found.has_come:
            try:
                data, ancillary, _, _ = receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except BlockingIOError:
                if not pauses:
                    break
                pauses -= 1
                if not self._poll(min(1000 * limit.total_seconds(), LONGEST_MILLISECONDS)):
                    limit, pauses = NOW, 0
                continue
            except OSError:
                break
            if data and data[0] == NOD_KIND and NOD.unpack(data)[1] == self._tag:
                del self._nods[self._tag]
                if self._offers:
                    self._link.end_all(self._tag)
                return
            if not data:
                break
            self._link.take(data, ancillary)
        if not found.has_come:
            found.wait(self._link, Patience(limit, self._every))


def under_way(links: Sequence[Link]) -> tuple[Collection[Any], ...]:
    """What is empty as long as no link has anything under way in pieces, or waiting for room; see ``End.is_busy``."""
    return tuple(chain.from_iterable((one.leaving, one.arriving, one.backlog) for one in links))
