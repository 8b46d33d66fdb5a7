"""What a rank says when it comes to a meeting, and what it is told there; both as bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from tricomm.connect.meeting.wire import Reader, WireError, Writer
from tricomm.kinds import checks_fields

MAX_SIDES = 64
MAX_SIDE_RANKS = 1 << 20
MAX_NAME_BYTES = 200
MAX_FACTS = 32
MAX_MISSING = 64
"""So many of those that are missing are named."""

MAX_GROUP_RANKS = 1 << 20

OWN = "of one side"
"""Name of the meeting of the ranks of one Publisher or Subscriber."""

RENEWED = "called renew()"

Place = tuple[str, int]
"""A side, and a rank of it."""


@dataclass(frozen=True, slots=True)
class Join:
    """Who comes, and whom he wants to meet.

    Attributes:
        sides: name and size of each, in the order in which their ranks follow each other; 0 is whatever they say.
        side, rank: who comes.
        host, pid: where he is.
        machine: tells hosts apart that have the same name.
        gpu: of the tensors, by its identity; "" is none.
        facts: what must be equal everywhere, such as ("torch", "2.13.0").
        name: tells meetings of the same sides apart.
    """

    sides: tuple[tuple[str, int], ...]
    side: str
    rank: int
    host: str = ""
    pid: int = 0
    machine: str = ""
    gpu: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    name: str = ""

    @property
    def place(self) -> Place:
        """Return where he belongs."""
        return self.side, self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sides, in order."""
        return tuple(name for name, _ in self.sides)

    @property
    def room(self) -> str:
        """Return the name of the meeting, equal for all that want to meet each other in whatever order they say so."""
        return repr((sorted(self.names), self.name))

    @property
    def way_back(self) -> str:
        """Return what others that were there before him must have done to meet him, as words after "has"."""
        if self.name != OWN:
            return RENEWED
        return "made a new Publisher or Subscriber, as all ranks of a side must when one of them has started again"

    def __str__(self) -> str:
        return f"rank {self.rank} of side {self.side!r} (host {self.host}, process {self.pid})"

    def encoded(self) -> bytes:
        """Return it as bytes."""
        writer = Writer().integer(len(self.sides))
        for name, size in self.sides:
            writer.text(name, MAX_NAME_BYTES).integer(size)
        writer.text(self.side, MAX_NAME_BYTES).integer(self.rank).integer(self.pid)
        for text in (self.host, self.machine, self.gpu, self.name):
            writer.text(text, MAX_NAME_BYTES)
        writer.integer(len(self.facts))
        for what, value in self.facts:
            writer.text(what, MAX_NAME_BYTES).text(value, MAX_NAME_BYTES)
        return writer.done()

    @classmethod
    def read(cls, reader: Reader) -> "Join":
        """Take one from bytes.

        Raises:
            WireError: they are none.
        """
        count = reader.count(12, MAX_SIDES)
        sides = tuple((reader.text(MAX_NAME_BYTES), reader.integer(0, MAX_SIDE_RANKS)) for _ in range(count))
        side, rank = reader.text(MAX_NAME_BYTES), reader.integer(0, MAX_SIDE_RANKS)
        pid = reader.integer(0)
        host, machine, gpu, name = (reader.text(MAX_NAME_BYTES) for _ in range(4))
        count = reader.count(8, MAX_FACTS)
        facts = tuple((reader.text(MAX_NAME_BYTES), reader.text(MAX_NAME_BYTES)) for _ in range(count))
        sizes = dict(sides)
        if not sides or len(sizes) != len(sides) or sum(sizes.values()) > MAX_GROUP_RANKS:
            raise WireError(f"sides {list(sizes)} are none, twice the same, or too large; the peer is broken")
        if rank >= sizes.get(side, 0):
            raise WireError(f"rank {rank} of side {side!r} is none of {sizes}; the peer is broken")
        return cls(sides, side, rank, host, pid, machine, gpu, facts, name)


@checks_fields
@dataclass(frozen=True, slots=True)
class Missing:
    """What a rank is told while it waits.

    Attributes:
        seconds: for which it has waited at the meeting.
        places: who is missing, the first MAX_MISSING; rank -1 is a side of which nobody has said its size.
        busy: those of them that are there, in an epoch that goes on or is over, and have not called ``renew``.
        note: what else has happened that may be why.

    Example:
        >>> print(Missing(12.5, (("server", 0), ("server", 2))))
        waiting for ranks 0, 2 of side 'server' since 12.5 s
    """

    seconds: float
    places: tuple[Place, ...]
    busy: tuple[Place, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return describe_missing(self)


@dataclass(frozen=True, slots=True)
class Paired:
    """What a rank is told when all are there.

    Attributes:
        serial: of the epoch, never the same twice at one meeting.
        number: of the epoch among these sides, from 1.
        sides: names and sizes in order.
        hosts: of each rank of the group.
        left: ranks of the group that have ended well since, and how that is said.
    """

    serial: int
    number: int
    sides: tuple[tuple[str, int], ...]
    hosts: tuple[str, ...]
    left: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """What a rank is told that cannot join, or whose epoch is over.

    Attributes:
        text: why.
        is_over: whether the rank was in an epoch that is over, and may pair anew.
    """

    text: str
    is_over: bool = False


Status = Missing | Paired | Refused
CODES: dict[type, int] = {Missing: 1, Paired: 2, Refused: 3}


def encode_status(status: Status) -> bytes:
    """Return what a rank is told as bytes."""
    writer = Writer(CODES[type(status)])
    match status:
        case Missing():
            writer.integer(int(1e6 * status.seconds))
            for places in (status.places, status.busy):
                _write_sizes(writer, places)
            writer.text(status.note)
        case Paired():
            writer.integer(status.serial).integer(status.number)
            _write_sizes(writer, status.sides)
            writer.texts(status.hosts)
            _write_sizes(writer, tuple((text, rank) for rank, text in status.left.items()))
        case Refused():
            writer.text(status.text).integer(status.is_over)
    return writer.done()


def decode_status(data: bytes) -> Status:
    """Read what a rank is told.

    Raises:
        WireError: the bytes say nothing of the kind.
    """
    reader = Reader(data)
    code = reader.code()
    found: Status
    if code == CODES[Missing]:
        found = Missing(reader.integer(0) / 1e6, _read_sizes(reader, -1), _read_sizes(reader, -1), reader.text())
    elif code == CODES[Paired]:
        serial, number = reader.integer(1), reader.integer(1)
        sides, hosts = _read_sizes(reader, 1), reader.texts()
        found = Paired(serial, number, sides, hosts, {rank: text for text, rank in _read_sizes(reader, 0)})
        if sum(size for _, size in sides) != len(hosts):
            raise WireError(f"{len(hosts)} hosts are named for sides {sides}; the meeting is broken")
    elif code == CODES[Refused]:
        found = Refused(reader.text(), bool(reader.integer(0, 1)))
    else:
        raise WireError(f"{code} is no answer of a meeting")
    reader.end()
    return found


def _write_sizes(writer: Writer, pairs: tuple[tuple[str, int], ...]) -> None:
    writer.integer(len(pairs))
    for name, number in pairs:
        writer.text(name).integer(number)


def _read_sizes(reader: Reader, lowest: int) -> tuple[tuple[str, int], ...]:
    return tuple((reader.text(), reader.integer(lowest, MAX_GROUP_RANKS)) for _ in range(reader.count(12)))


def describe_missing(missing: Missing, way_back: str = RENEWED) -> str:
    """Say who is missing, and what those that are busy have not done.

    >>> print(describe_missing(Missing(12.5, (("server", 0),), (("server", 0),)), "come back"))
    waiting for rank 0 of side 'server' since 12.5 s; rank 0 of side 'server' is there and has not come back
    """
    told = [_describe_side(side, ranks) for side, ranks in _by_side(missing.places).items()]
    whom = f"for {' and '.join(told)}" if told else "to hear whether those that are in these places are alive,"
    text = f"waiting {whom} since {missing.seconds:.1f} s"
    if missing.busy:
        told = [_describe_side(side, ranks) for side, ranks in _by_side(missing.busy).items()]
        are, have = ("is", "has") if len(missing.busy) == 1 else ("are", "have")
        text += f"; {' and '.join(told)} {are} there and {have} not {way_back}"
    return f"{text}; {missing.note}" if missing.note else text


def _by_side(places: tuple[Place, ...]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for side, rank in places:
        found.setdefault(side, []).append(rank)
    return found


def _describe_side(side: str, ranks: list[int]) -> str:
    if ranks == [-1]:
        return f"all of side {side!r}"
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))} of side {side!r}"
