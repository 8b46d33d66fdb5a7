"""The protocol between two ranks of one host, as tables: what one end of a transfer has seen, and what it does next.

The sender offers bytes with READY and leaves them alone until DONE. The receiver reads them, and they count only if the
link still stands *afterwards*. An end that fails, times out, is cancelled or dies closes the link *before* its user
gets control back and may change the bytes. So whoever read bytes that were changed meanwhile finds the link closed.

    sender    OFFERED --DONE--> FREE                receiver   WAITING --READY--> READING --all read--> CHECKING
              OFFERED --closed--> LOST                         CHECKING --stands--> HAS (and tells DONE)
                                                               WAITING, CHECKING --closed--> LOST
    READING --not all could be read--> DOUBTING --stands--> UNREADABLE, --closed--> LOST

A sender that copies the bytes to a slab of its arena is FREE when it has told READY: the slab is the link's, and stays
as it is until DONE, whatever becomes of the sender. What was read there counts without a look at the link.

    READING --all read, from a slab--> HAS

A nod says that a rank has all that it needs in a call, and so has read all that was offered to it there. Where a call
ends with nods, a receiver of few bytes in a slab leaves DONE to that, which its peer waits for anyway.

Messages of a link keep their order, and what was sent before the link closed is still seen: a DONE counts even then, as
nothing is read after it.
"""

import struct
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple


class Sending(Enum):
    """Where a transfer is at its sender."""

    OFFERED = "offered"
    FREE = "free"
    LOST = "lost"

    __hash__ = object.__hash__  # Enum's own is no function of C, and tables ask for it at each step


class Receiving(Enum):
    """Where a transfer is at its receiver."""

    WAITING = "waiting"
    READING = "reading"
    CHECKING = "checking"
    DOUBTING = "doubting"
    HAS = "has"
    LOST = "lost"
    UNREADABLE = "unreadable"

    __hash__ = object.__hash__


class Event(Enum):
    """What an end of a transfer may see."""

    READY = "ready"
    DONE = "done"
    ALL_READ = "all read"
    ALL_COPIED = "all read, from a slab"
    NOT_ALL_READ = "not all could be read"
    STANDS = "stands"
    CLOSED = "closed"

    __hash__ = object.__hash__


class Action(Enum):
    """What an end of a transfer does next."""

    LOOK = "look for a message, or whether the link closed"
    READ = "read what READY names"
    CHECK = "look whether the link still stands"
    TELL_DONE = "tell DONE, and give the bytes to the user"
    RETURN = "give the bytes back to the user"
    FAIL = "close the link, then raise"


SENDING: Mapping[tuple[Sending, Event], tuple[Sending, Action]] = {
    (Sending.OFFERED, Event.DONE): (Sending.FREE, Action.RETURN),
    (Sending.OFFERED, Event.CLOSED): (Sending.LOST, Action.FAIL),
}
"""After READY was told; it begins in OFFERED, to LOOK."""

RECEIVING: Mapping[tuple[Receiving, Event], tuple[Receiving, Action]] = {
    (Receiving.WAITING, Event.READY): (Receiving.READING, Action.READ),
    (Receiving.WAITING, Event.CLOSED): (Receiving.LOST, Action.FAIL),
    (Receiving.READING, Event.ALL_READ): (Receiving.CHECKING, Action.CHECK),
    (Receiving.READING, Event.ALL_COPIED): (Receiving.HAS, Action.TELL_DONE),
    (Receiving.READING, Event.NOT_ALL_READ): (Receiving.DOUBTING, Action.CHECK),
    (Receiving.CHECKING, Event.STANDS): (Receiving.HAS, Action.TELL_DONE),
    (Receiving.CHECKING, Event.CLOSED): (Receiving.LOST, Action.FAIL),
    (Receiving.DOUBTING, Event.STANDS): (Receiving.UNREADABLE, Action.FAIL),
    (Receiving.DOUBTING, Event.CLOSED): (Receiving.LOST, Action.FAIL),
}
"""It begins in WAITING, to LOOK."""


class Ready(NamedTuple):
    """The bytes of a transfer may be read.

    Attributes:
        number: of the transfer, among all that this end of the link offered.
        tag: of the Resharder.
        nbytes: in all.
        address: where they are in the sender's memory; where the table of their runs is, if they are several; or where
            they are in a slab of the sender's arena.
        runs: rows of that table, each (address, bytes) in 16 bytes; 0 for none.
        slab: number of the arena's slab; 0 for none.
    """

    number: int
    tag: int
    nbytes: int
    address: int
    runs: int = 0
    slab: int = 0


class Done(NamedTuple):
    """The bytes of a transfer were read, and are not read any more."""

    number: int


class Slab(NamedTuple):
    """A new slab of the sender's arena; its file comes with the message."""

    slab: int
    nbytes: int


class Region(NamedTuple):
    """A new part of the sender's arena on a device, in which transfers from the next one on are.

    Attributes:
        handle: what the peer opens the allocation by.
        offset: at which byte of it the part begins.
        nbytes: of the part.
    """

    handle: bytes
    offset: int
    nbytes: int


class Sources(NamedTuple):
    """Where tensors of the sender stay; a file with that comes with the message, unless there is a problem.

    Attributes:
        number: of all that it tells so.
        tag: of the Resharder.
        problem: why nobody can read them; "" if one can.
    """

    number: int
    tag: int
    problem: str


class Opened(NamedTuple):
    """They can be read from now on, or not, for a problem."""

    number: int
    problem: str


class Closed(NamedTuple):
    """They are not read any more, and nothing of them is open."""

    number: int


class Nod(NamedTuple):
    """A rank has all that it needs in a call of the Resharder with a tag."""

    tag: int


class Here(NamedTuple):
    """A rank has come to the rendezvous of a number, about to do what a digest is of, in 16 bytes."""

    number: int
    digest: bytes


Message = Ready | Done | Slab | Region | Sources | Opened | Closed | Nod | Here

READY_KIND, DONE_KIND, NOD_KIND, HERE_KIND = 1, 2, 8, 9
_FORMATS: Mapping[int, tuple[type[Any], struct.Struct]] = {
    kind: (message, struct.Struct(f"=B{fields}"))
    for kind, message, fields in (
        (READY_KIND, Ready, "QQQQII"),
        (DONE_KIND, Done, "Q"),
        (3, Slab, "IQ"),
        (4, Region, "64sQQ"),
        (5, Sources, "QQ"),
        (6, Opened, "Q"),
        (7, Closed, "Q"),
        (NOD_KIND, Nod, "Q"),
        (HERE_KIND, Here, "Q16s"),
    )
}
"""By the kind of a message, its first byte."""

WITH_TEXT = (5, 6)
"""Kinds that end with a text."""

READY, DONE, NOD, HERE = (_FORMATS[kind][1] for kind in (READY_KIND, DONE_KIND, NOD_KIND, HERE_KIND))
"""Formats of what calls of few bytes tell, their kinds included."""

_KINDS = {message: (kind, format.pack) for kind, (message, format) in _FORMATS.items()}
MAX_MESSAGE_NBYTES = 256


def encode(message: Message) -> bytes:
    """A message as bytes; its kind is the first."""
    kind, pack = _KINDS[type(message)]
    if kind in WITH_TEXT:
        *rest, text = message
        return (pack(kind, *rest) + str(text).encode(errors="backslashreplace"))[:MAX_MESSAGE_NBYTES]
    return pack(kind, *message)


def decode(data: bytes) -> Message:
    """The message that bytes are.

    Raises:
        ValueError: they are none.
    """
    kind = data[0] if data else 0
    if kind not in _FORMATS:
        raise ValueError(f"a message of unknown kind {kind}")
    cls, format = _FORMATS[kind]
    try:
        message: Message
        if kind in WITH_TEXT:
            message = cls(*format.unpack_from(data)[1:], data[format.size :].decode(errors="replace"))
        else:
            message = tuple.__new__(cls, format.unpack(data)[1:])
    except struct.error as error:
        raise ValueError(f"a message of kind {kind} and {len(data)} bytes: {error}") from None
    return message
