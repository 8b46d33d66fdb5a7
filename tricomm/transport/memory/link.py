"""Link: one pair of ranks of one host. A local socket carries signals, memory the bytes; see ``protocol``.

Few bytes go by way of the arena even where the peer could read them from the tensor: the sender goes on at once, and is
not woken once more to hear that they were read. It hears of that in its next call, which does not begin before.
"""

import ctypes
import os
import socket
import time
from collections import deque
from datetime import timedelta

import torch

from tricomm.packing.runs import Runs, one_run, runs_in
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.memory.arena import Arena, SharedSlab, mapped_slab
from tricomm.transport.memory.protocol import (
    RECEIVING,
    SENDING,
    Action,
    Done,
    Event,
    Here,
    Message,
    Nod,
    Ready,
    Receiving,
    Sending,
    Slab,
)
from tricomm.transport.memory.reading import UnreadableError, read_run, read_runs
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.signals import LinkClosedError, Signals

CROWDED_MILLISECONDS = 1.0
"""How long to wait between two tries to tell what did not fit into a socket."""

LONGEST_MILLISECONDS = 3_600_000.0
"""Of one look for news: poll takes less than 25 days, and a limit may be longer."""

EAGER_NBYTES = 1 << 16
"""At most so many bytes are copied for a sender that does not wait: up to here a copy takes less than to be woken."""

MAX_HERES = 16
"""A peer is not known to be at more rendezvous at once; it is ahead by one at most."""

MAX_TABLES = 64
"""Whose runs a link remembers."""

OFFERS_BEFORE_LOOKING = 4
"""How many may be under way before a sender that does not wait looks which were read: to look costs it two calls of the
system, and few slabs stay in the caches."""

EAGER_OFFERS = 16
"""How many transfers of a link may be under way when another sender does not wait: memory stays bounded."""


class Link(Signals):
    """One end of the link of this rank with another. One thread uses it at a time, but for ``close``.

    Args:
        peer: the other rank.
        end: a connected local socket that keeps the bounds of messages; the link's from now on.
        pid: of the peer's process as this one sees it; 0 if it does not.
        outgoing, incoming: how bytes go there and come from there.
    """

    def __init__(self, peer: int, end: socket.socket, pid: int, outgoing: Rung, incoming: Rung) -> None:
        super().__init__(peer, end, pid)
        self.pid = pid
        self.outgoing = outgoing
        self.incoming = incoming
        self._early: dict[int, deque[Ready]] = {}
        """Offers that came before anybody expected them, by tag."""
        self._expected: dict[int, deque[Expected]] = {}
        """What is expected and was not offered yet, by tag; in the order in which it was posted."""
        self._early_nods: set[int] = set()
        self._nods: dict[int, ExpectedNod] = {}
        """The same of nods. No call of a tag begins before the one before it is over, so there is one of each tag."""
        self.heres: deque[Here] = deque(maxlen=MAX_HERES)
        """To which rendezvous the peer has come, as far as is known without a look, until this rank comes there."""
        self._offers: dict[int, Offer] = {}
        self._count = 0
        self._arena = Arena()
        self._slabs: dict[int, SharedSlab] = {}
        self._tables: dict[int, Runs] = {}
        """Runs of offers that were read last, by the address of their table in the peer's memory."""

    def rung(self, is_send: bool) -> Rung:
        """How bytes go in one direction."""
        return self.outgoing if is_send else self.incoming

    def offer(self, operation: Operation, tag: int) -> "Offer":
        """Tell the peer that bytes may be read: those of the operation's buffer, or of its runs.

        Raises:
            ConnectionLostError: the link is closed.
        """
        self._count += 1
        _, _, buffer, runs, *_ = operation
        nbytes = buffer.numel() if runs is None else runs.nbytes
        if len(self._offers) >= OFFERS_BEFORE_LOOKING:
            self.look()  # what was read meanwhile is not under way any more
        is_eager = nbytes <= EAGER_NBYTES and len(self._offers) < EAGER_OFFERS
        slab = None
        if is_eager or self.outgoing is Rung.ARENA:
            slab = self._filled(operation, nbytes)
            ready = Ready(self._count, tag, nbytes, 0, 0, slab.number)
        elif runs is None:
            ready = Ready(self._count, tag, nbytes, buffer.data_ptr())
        else:
            ready = Ready(self._count, tag, nbytes, runs.table.data_ptr(), len(runs.ends))
        found = self._offers[self._count] = Offer(None if is_eager else operation, slab)
        self._tell_of(ready)
        return found

    def _filled(self, operation: Operation, nbytes: int) -> SharedSlab:
        """A slab of the arena with the bytes of an operation, of which the peer knows."""
        _, _, buffer, runs, *_ = operation
        slab, file = self._arena.take(nbytes)
        if file is not None:
            self._tell_of(Slab(slab.number, slab.memory.numel()), file)
        if runs is None:
            ctypes.memmove(slab.address, buffer.data_ptr(), nbytes)
        else:
            read_runs(os.getpid(), one_run(slab.address, nbytes), runs)
        return slab

    def unread(self) -> list["Offer"]:
        """What was offered, as far as is known without a look, and is not read yet."""
        return [*self._offers.values()]

    def _tell_of(self, message: Message, file: int | None = None) -> None:
        try:
            self.tell(message, file)
        except LinkClosedError as error:
            raise ConnectionLostError(self.peer, error) from error

    def expect(self, operation: Operation, tag: int) -> "Expected":
        """Something to wait for: the bytes that the peer offers next under a tag.

        Offers and what is expected match in the order in which they are posted, in whatever order they are waited for.
        """
        found = Expected(operation)
        early = self._early.get(tag)
        if early:
            found.ready = early.popleft()
            if not early:
                del self._early[tag]  # a one-shot call has a tag of its own
        else:
            self._expected.setdefault(tag, deque()).append(found)
        return found

    def nod(self, tag: int) -> "ExpectedNod":
        """Tell the peer that this rank has all that it needs in a call; something to wait for: that it tells the same.

        Raises:
            ConnectionLostError: the link is closed.
        """
        self._tell_of(Nod(tag))
        found = ExpectedNod()
        if tag in self._early_nods:
            self._early_nods.remove(tag)
            found.has_come = True
        else:
            self._nods[tag] = found
        return found

    def read(self, ready: Ready, operation: Operation) -> None:
        """Read what was offered into the operation's buffer, or its runs.

        Raises:
            UnreadableError: not all could be read.
        """
        _, _, buffer, runs, *_ = operation
        expected = buffer.numel() if runs is None else runs.nbytes
        if ready.nbytes != expected:
            text = f"{ready.nbytes} bytes came where {expected} were expected; the ranks do not follow the same plan"
            raise UnreadableError(0, text)
        if ready.slab:
            address = self._slabs[ready.slab].address
            if runs is None:
                ctypes.memmove(buffer.data_ptr(), address, ready.nbytes)
            else:
                read_runs(os.getpid(), runs, one_run(address, ready.nbytes))
        elif not ready.runs and runs is None:
            read_run(self.pid, buffer.data_ptr(), ready.address, ready.nbytes)
        else:
            here = one_run(buffer.data_ptr(), ready.nbytes) if runs is None else runs
            read_runs(self.pid, here, self._their_runs(ready))

    def _their_runs(self, ready: Ready) -> Runs:
        """The runs of an offer. Their table is read from the peer each time; only what it says is known by it."""
        if not ready.runs:
            return one_run(ready.address, ready.nbytes)
        table = torch.empty(ready.runs, 2, dtype=torch.int64, device="cpu")
        read_run(self.pid, table.data_ptr(), ready.address, table.nbytes)
        found = self._tables.get(ready.address)
        if found is None or not torch.equal(found.table, table):
            found = runs_in(table)
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[ready.address] = found
        if found.nbytes != ready.nbytes:
            raise UnreadableError(0, f"the runs of {ready.nbytes} offered bytes have {found.nbytes}")
        return found

    def done(self, ready: Ready) -> None:
        """Tell the peer that what it offered was read. If it has closed, it learns from that."""
        try:
            self.tell(Done(ready.number))
        except LinkClosedError:
            return

    def look(self, awaiting: "Expected | ExpectedNod | None" = None) -> None:
        """Take what messages have come; only until what is awaited is among them, if anything is."""
        for message, files in self.come():
            match message:
                case Ready():
                    expected = self._expected.get(message.tag)
                    if expected:
                        found = expected.popleft()
                        if not expected:
                            del self._expected[message.tag]
                        found.ready = message
                        if found is awaiting:
                            return
                    else:
                        self._early.setdefault(message.tag, deque()).append(message)
                case Done():
                    offer = self._offers.pop(message.number)
                    offer.is_read = True
                    if offer.slab is not None:
                        self._arena.give_back(offer.slab)
                case Here():
                    self.heres.append(message)
                case Nod():
                    if self._take_nod(message) is awaiting is not None:
                        return
                case Slab():
                    self._slabs[message.slab] = mapped_slab(message.slab, files[0], message.nbytes)

    def _take_nod(self, message: Nod) -> "ExpectedNod | None":
        """Who awaited it, if anybody did."""
        nod = self._nods.pop(message.tag, None)
        if nod is None:
            self._early_nods.add(message.tag)
        else:
            nod.has_come = True
        return nod


class Patience:
    """Until when to wait, and which links may still have something to tell meanwhile."""

    def __init__(self, limit: timedelta, links: tuple[Link, ...]) -> None:
        self._deadline = time.monotonic() + limit.total_seconds()
        self._links = links

    def await_news(self, link: Link) -> bool:
        """Wait for news from a link; true if it has ended.

        Raises:
            LinkClosedError: the deadline is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise LinkClosedError(f"rank {link.peer} gave no sign within the limit")
        crowded = [one for one in self._links if one.is_crowded]
        for one in crowded:
            try:
                one.flush()
            except LinkClosedError:
                continue  # whoever waits for that one hears of it
        return link.wait(CROWDED_MILLISECONDS if crowded else min(1000 * left, LONGEST_MILLISECONDS))


class Offer:
    """Bytes that the peer may read. Its link holds it, and it does not hold its link.

    Attributes:
        operation: keeps alive what is read; None where the link has a copy.
        slab: of the link's arena in which they are, if they are there.
        is_read: whether the peer has them.
    """

    __slots__ = ("is_read", "operation", "slab")

    def __init__(self, operation: Operation | None, slab: SharedSlab | None) -> None:
        self.operation = operation
        self.slab = slab
        self.is_read = False

    @property
    def is_free(self) -> bool:
        """Whether whoever offered them may change them."""
        return self.is_read or self.operation is None

    def wait(self, link: Link, patience: Patience) -> None:
        """Return when the sender may change them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        if not self.is_free:
            self.wait_read(link, patience)

    def wait_read(self, link: Link, patience: Patience) -> None:
        """Return when the peer has them.

        Raises:
            LinkClosedError: the link has ended before.
        """
        state, is_over = Sending.OFFERED, False
        while state is Sending.OFFERED:
            link.look()
            if self.is_read:
                state, _ = SENDING[state, Event.DONE]
            elif is_over:
                state, _ = SENDING[state, Event.CLOSED]
            else:
                is_over = patience.await_news(link)
        if state is Sending.LOST:
            raise LinkClosedError(f"the link to rank {link.peer} is closed")


class Expected:
    """Bytes that the peer is to offer. Its link holds it, and it does not hold its link."""

    __slots__ = ("_operation", "ready")

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self.ready: Ready | None = None

    def wait(self, link: Link, patience: Patience) -> None:
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

    def _read(self, link: Link) -> tuple[Event, UnreadableError | None]:
        assert self.ready is not None
        try:
            link.read(self.ready, self._operation)
        except UnreadableError as error:
            return Event.NOT_ALL_READ, error
        return Event.ALL_COPIED if self.ready.slab else Event.ALL_READ, None


class ExpectedNod:
    """That the peer has all that it needs in a call."""

    __slots__ = ("has_come",)

    def __init__(self) -> None:
        self.has_come = False

    def wait(self, link: Link, patience: Patience) -> None:
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
