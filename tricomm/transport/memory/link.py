"""Link: one pair of ranks of one host. A local socket carries signals, memory the bytes; see ``protocol``.

Few bytes go by way of the arena even where the peer could read them from the tensor: the sender goes on at once, and is
not woken once more to hear that they were read. It hears of that in its next call, which does not begin before. Many
bytes go the same way, piece by piece: both ends copy at once, what one has packed is still in the caches when the other
unpacks it, and the system, which takes longer to find each page than to copy it, has no part in it.
"""

import ctypes
import os
import socket
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from itertools import count

import torch

from tricomm.packing import runs as in_runs
from tricomm.packing.runs import Pieces, Runs, one_run, runs_in
from tricomm.transport.base import ConnectionLostError, Operation
from tricomm.transport.memory.arena import Arena, Ring, SharedSlab, mapped_slab
from tricomm.transport.memory.pieces import Common, Slot, pack_piece
from tricomm.transport.memory.protocol import (
    DONE,
    DONE_KIND,
    MAX_MESSAGE_NBYTES,
    NOD,
    NOD_KIND,
    Done,
    Here,
    Nod,
    Ready,
    Slab,
    decode,
)
from tricomm.transport.memory.reading import UnreadableError, read_run, read_runs
from tricomm.transport.memory.rungs import Rung
from tricomm.transport.memory.signals import FILE_NBYTES, FLAGS, NO_FILES, Ancillary, LinkClosedError, files_in
from tricomm.transport.memory.transfers import Arrival, Departure, End, Expected, ExpectedNod, Offer, size_of

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

PIECES_UNDER_WAY = 2
"""Of a rank in one direction, and of links to several that get the same: while one is unpacked, the next is packed.
Where several links have something to pack, each has one piece under way: more would only be in the caches' way."""


class Link(End):
    """One end of the link of this rank with another. One thread uses it at a time, but for ``close``.

    Args:
        peer: the other rank.
        end: a connected local socket that keeps the bounds of messages; the link's from now on.
        pid: of the peer's process as this one sees it; 0 if it does not.
        outgoing, incoming: how bytes go there and come from there.
    """

    def __init__(self, peer: int, end: socket.socket, pid: int, outgoing: Rung, incoming: Rung) -> None:
        super().__init__(peer, end, pid)
        self.pid, self.outgoing, self.incoming = pid, outgoing, incoming
        self.early: dict[int, deque[Ready]] = {}
        """Offers that came before anybody expected them, by tag."""
        self.expected: dict[int, deque[Expected | Arrival]] = {}
        """What is expected and was not offered in whole yet, by tag; in the order in which it was posted."""
        self.early_nods: set[int] = set()
        self.nods: dict[int, ExpectedNod] = {}
        """The same of nods. No call of a tag begins before the one before it is over, so there is one of each tag."""
        self.heres: deque[Here] = deque(maxlen=MAX_HERES)
        """To which rendezvous the peer has come, as far as is known without a look, until this rank comes there."""
        self.offers: dict[int, Offer] = {}
        """What was offered and, as far as is known without a look, is not read yet."""
        self.numbers = count(1)
        self._arena = Arena()
        self.free_slabs = self._arena.free
        self._ring = Ring(self._arena)
        self.leaving_beside: Collection[Collection[Departure]] = (self.leaving,)
        """Of all links of this rank."""
        self._slots: dict[Slot, SharedSlab] = {}
        """Those that this link has offered, by the numbers that it gave them."""
        self._common_under_way = 0
        """How many of them are not read yet."""
        self.slabs: dict[int, SharedSlab] = {}
        """Of the peer."""
        self._tables: dict[int, Runs] = {}
        """Runs of offers that were read last, by the address of their table in the peer's memory."""

    def rung(self, is_send: bool) -> Rung:
        """How bytes go in one direction."""
        return self.outgoing if is_send else self.incoming

    def offer(
        self, operation: Operation, tag: int, common: Common | None = None, others_follow: bool = False
    ) -> "Offer | Departure":
        """Tell the peer that bytes may be read: those of the operation's buffer, or of its runs or pieces.

        Args:
            operation: whose bytes they are.
            tag: of its call.
            common: of what other links send too, in pieces: the peer is told with ``set_off``, when all have it.
            others_follow: perhaps on other links: of what goes in pieces all but the first wait for ``set_off``.

        Raises:
            ConnectionLostError: the link is closed.
        """
        nbytes = size_of(operation)
        try:
            if nbytes <= in_runs.PIECE_NBYTES and not self.leaving:
                return self._offered(operation, tag, nbytes)
            departure = Departure(operation, tag, nbytes, common)
            self.leaving.append(departure)
            if common is None:
                self._pack(others_follow)
            return departure
        except LinkClosedError as error:
            raise ConnectionLostError(self.peer, error) from error

    def set_off(self) -> None:
        """Begin with what leaves.

        Raises:
            ConnectionLostError: the link is closed.
        """
        try:
            self._pack()
        except LinkClosedError as error:
            raise ConnectionLostError(self.peer, error) from error

    def _offered(self, operation: Operation, tag: int, nbytes: int) -> Offer:
        _, _, buffer, runs, *_ = operation
        if len(self.offers) >= OFFERS_BEFORE_LOOKING:
            self.look()  # what was read meanwhile is not under way any more
        assert not isinstance(runs, Pieces)
        number = next(self.numbers)
        is_eager = nbytes <= EAGER_NBYTES and len(self.offers) < EAGER_OFFERS
        slab = free = None
        if is_eager or self.outgoing is Rung.ARENA:
            free = self.free_slabs(nbytes)
            slab = free.pop() if free else self._told(*self._arena.take(nbytes))
            pack_piece(operation, 0, nbytes, slab)
            ready = Ready(number, tag, nbytes, 0, 0, slab.number)
        elif runs is None:
            ready = Ready(number, tag, nbytes, buffer.data_ptr())
        else:
            ready = Ready(number, tag, nbytes, runs.table.data_ptr(), len(runs.ends))
        found = self.offers[number] = Offer(tag, None if is_eager else operation, slab, free=free)
        self.tell(ready)
        return found

    def _told(self, slab: SharedSlab, file: int | None) -> SharedSlab:
        """A slab of whose file, if it has one, the peer is told."""
        if file is not None:
            self.tell(Slab(slab.number, slab.memory.numel()), file)
        return slab

    def _pack(self, others_follow: bool = False) -> None:
        """Pack and offer as many pieces as there is room for."""
        is_alone = not others_follow and sum(map(bool, self.leaving_beside)) <= 1
        most = PIECES_UNDER_WAY if is_alone else 1
        while self.leaving:
            one = self.leaving[0]
            nbytes = min(in_runs.PIECE_NBYTES, one.nbytes - one.packed_nbytes)
            offer = self._packed_for_several(one, nbytes) if one.common else self._packed_alone(one, nbytes, most)
            if offer is None:
                return
            number = next(self.numbers)
            self.offers[number] = offer
            assert offer.slab is not None
            self.tell(Ready(number, one.tag, one.nbytes, one.packed_nbytes, 0, offer.slab.number))
            one.packed_nbytes += nbytes
            if one.is_free:
                self.leaving.popleft()

    def _packed_alone(self, one: Departure, nbytes: int, most: int) -> Offer | None:
        """The next piece in a slab of the ring; None as long as there is no room."""
        taken = self._ring.take(in_runs.PIECE_NBYTES, most)
        if taken is None:
            return None
        slab = self._told(*taken)
        pack_piece(one.operation, one.packed_nbytes, nbytes, slab)
        return Offer(one.tag, None, slab)

    def _packed_for_several(self, one: Departure, nbytes: int) -> Offer | None:
        """The same in a slab that other links offer too."""
        if self._common_under_way == PIECES_UNDER_WAY:
            return None
        assert one.common is not None
        slot = one.common.packed(one.packed_nbytes, nbytes)
        if slot is None:
            return None
        slab = self._slots.get(slot)
        if slab is None:
            slab = self._slots[slot] = slot.slab._replace(number=self._arena.number())
            self._told(slab, os.dup(slot.file))
        slot.readers += 1
        self._common_under_way += 1
        return Offer(one.tag, None, slab, slot)

    def _unpack(self) -> None:
        """Unpack the pieces that have come."""
        for one in [*self.arriving]:
            while one.pieces:
                ready = one.pieces.popleft()
                try:
                    self.read(ready, one.operation)
                except UnreadableError as error:
                    one.problem = error
                    self.arriving.discard(one)
                    break
                one.unpacked_nbytes += in_runs.PIECE_NBYTES
                self.done(ready)
            if one.is_whole:
                self.arriving.discard(one)

    def serve(self, one_message: bool = False) -> None:
        """See End."""
        self.look(one_message=one_message)
        if self.arriving:
            self._unpack()
        if self.leaving:
            self._pack()

    @property
    def is_ahead(self) -> bool:
        """See End."""
        return bool(self.leaving) and self._common_under_way < PIECES_UNDER_WAY and self.leaving[0].common is not None

    def hurry(self) -> None:
        """See End."""
        if self.leaving and self.leaving[0].common is not None:
            self.leaving[0].common.waits = False

    def unread(self) -> list["Offer"]:
        """What was offered, as far as is known without a look, and is not read yet."""
        return [*self.offers.values()]

    def expect(self, operation: Operation, tag: int) -> "Expected | Arrival":
        """Something to wait for: the bytes that the peer offers next under a tag.

        Offers and what is expected match in the order in which they are posted, in whatever order they are waited for.
        """
        found: Expected | Arrival = Expected(operation)
        if size_of(operation) > in_runs.PIECE_NBYTES:
            found = Arrival(operation)
            self.arriving.add(found)
        early = self.early.get(tag)
        is_met = False
        while early and not is_met:
            is_met = found.take(early.popleft())
            if not early:
                del self.early[tag]  # a one-shot call has a tag of its own
        if not is_met:
            self.expected.setdefault(tag, deque()).append(found)
        return found

    def nod(self, tag: int) -> "ExpectedNod":
        """Tell the peer that this rank has all that it needs in a call; something to wait for: that it tells the same.

        Raises:
            ConnectionLostError: the link is closed.
        """
        try:
            self.say(NOD.pack(NOD_KIND, tag))
        except LinkClosedError as error:
            raise ConnectionLostError(self.peer, error) from error
        found = ExpectedNod()
        found.has_come = tag in self.early_nods
        self.early_nods.discard(tag)
        if not found.has_come:
            self.nods[tag] = found
        return found

    def read(self, ready: Ready, operation: Operation) -> None:
        """See End."""
        _, _, buffer, runs, *_ = operation
        expected = size_of(operation)
        if ready.nbytes != expected:
            text = f"{ready.nbytes} bytes came where {expected} were expected; the ranks do not follow the same plan"
            raise UnreadableError(0, text)
        if ready.slab:
            slab, place = self.slabs[ready.slab], ready.address
            if runs is None:
                nbytes = min(ready.nbytes - place, in_runs.PIECE_NBYTES)
                ctypes.memmove(buffer.data_ptr() + place, slab.address, nbytes)
            elif isinstance(runs, Pieces):
                runs.copy(place // in_runs.PIECE_NBYTES, slab.memory)
            else:
                read_runs(os.getpid(), runs, one_run(slab.address, ready.nbytes))
        elif isinstance(runs, Pieces):
            raise UnreadableError(0, f"{ready.nbytes} bytes came whole where pieces were expected")
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
        """See End."""
        with suppress(LinkClosedError):
            self.tell(Done(ready.number))

    def look(self, awaiting: "Expected | Arrival | ExpectedNod | None" = None, one_message: bool = False) -> None:
        """See End."""
        receive = self.receive
        while True:
            try:
                data, ancillary, _, _ = receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except OSError:
                return  # nothing is there; or reset: ``is_closed`` says so
            if not data or (self.take(data, ancillary) is awaiting is not None) or one_message:
                return

    def take(self, data: bytes, ancillary: Ancillary = ()) -> object:
        """Take a message that has come; whoever expected it, if anybody did."""
        files = files_in(ancillary) if ancillary else NO_FILES
        try:
            match message := decode(data):
                case Ready():
                    return self._met(message)
                case Done():
                    self._end(message.number)
                case Here():
                    self.heres.append(message)
                case Nod():
                    return self._take_nod(message)
                case Slab():
                    self.slabs[message.slab] = mapped_slab(message.slab, files[0], message.nbytes)
        finally:
            for file in files:
                os.close(file)
        return None

    def _end(self, number: int) -> None:
        offer = self.offers.pop(number, None)
        if offer is None:
            return  # a nod has said it
        offer.is_read = True
        if offer.slot is not None:
            offer.slot.readers -= 1
            self._common_under_way -= 1
        elif offer.slab is not None:
            (self._ring.give_back if offer.free is None else offer.free.append)(offer.slab)

    def end_all(self, tag: int) -> None:
        """The peer has nodded: it has read all that was offered to it in that call."""
        for number in [number for number, offer in self.offers.items() if offer.tag == tag]:
            self._end(number)

    def has_read(self) -> bool:
        """Take what has come; whether the peer has read all that was offered, as far as it has told."""
        offers, receive = self.offers, self.receive
        while offers:
            try:
                data, ancillary, _, _ = receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except OSError:
                break
            if not data:
                break
            if data[0] == DONE_KIND:
                offer = offers.get(number := DONE.unpack(data)[1])
                if offer is not None and offer.free is not None and offer.slab is not None:
                    del offers[number]
                    offer.is_read = True
                    offer.free.append(offer.slab)
                    continue
            self.take(data, ancillary)
        return not offers

    def _take_nod(self, message: Nod) -> "ExpectedNod | None":
        """Who awaited it, if anybody did."""
        self.end_all(message.tag)
        nod = self.nods.pop(message.tag, None)
        if nod is None:
            self.early_nods.add(message.tag)
        else:
            nod.has_come = True
        return nod

    def _met(self, ready: Ready) -> "Expected | Arrival | None":
        """What expects an offer, which is told; None if nothing does yet."""
        expected = self.expected.get(ready.tag)
        if not expected:
            self.early.setdefault(ready.tag, deque()).append(ready)
            return None
        found = expected[0]
        if found.take(ready):
            expected.popleft()
            if not expected:
                del self.expected[ready.tag]
        return found
