"""What each side tells the others of its tensors, once in an epoch, over the store of the epoch.

| key | written by | when | read by |
|---|---|---|---|
| specs/N/SIDE/K/piece/I | rank 0 of SIDE: its K-th document | its N-th exchange | ranks that do not know the digest |
| specs/N/SIDE | rank 0 of SIDE: what the documents are, digests and lengths | all pieces are there | everybody |
| specs/N/agreed | every rank (add) | it has all, and its side says what it says | everybody |
| specs/N/problem | the first rank that has one | at once (compare_set) | everybody |

The first document of a side is its layouts; each other one is how the tensors of a side are made of those of another,
one of which it is itself. What is known from an epoch before, by its digest, is not sent again.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tricomm.connect.meeting.join import MAX_NAME_BYTES, MAX_SIDES
from tricomm.connect.meeting.wire import Reader, WireError, Writer
from tricomm.connect.told.agreed import DifferenceError, Pair, Told, agree
from tricomm.connect.told.maps import MAX_MAP_BYTES, Map, decode_map, encode_map
from tricomm.connect.told.specs import MAX_SPECS_BYTES, Specs, decode_specs, encode_specs
from tricomm.errors import TransportError

PIECE_BYTES = 512 << 10
DIGEST_BYTES = 32
FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.05

FAILED, DIFFERENT = b"f", b"d"
"""Before a problem: whether to try again would help, or not."""

LAYOUTS: Pair = ("", "")
"""In place of a pair of sides: the document is layouts."""


class Document(NamedTuple):
    """What a side tells, without the bytes.

    Attributes:
        about: which sides its rules are between, source first; LAYOUTS if it is none.
        digest: of its bytes.
        length: of them.
    """

    about: Pair
    digest: bytes
    length: int

    @classmethod
    def of(cls, about: Pair, data: bytes) -> "Document":
        """That of some bytes."""
        return cls(about, hashlib.sha256(data).digest(), len(data))

    @property
    def is_layouts(self) -> bool:
        """Whether it is layouts, and not rules."""
        return self.about == LAYOUTS


Known = dict[tuple[bool, bytes], Any]
"""Layouts and rules by whether they are layouts, and their digests."""


class Exchange:
    """One rank's part in the ``number``-th exchange of an epoch.

    Args:
        store: of the epoch.
        number: from 1, the same on all ranks.
        side, side_rank: this rank.
        sizes: of all sides.
        deadline: for all.
    """

    def __init__(
        self, store: Any, number: int, side: str, side_rank: int, sizes: Mapping[str, int], deadline: float
    ) -> None:
        self._store = store
        self._prefix = f"specs/{number}"
        self._side = side
        self._side_rank = side_rank
        self._sizes = sizes
        self._deadline = deadline

    def run(self, specs: Specs, rules: Mapping[Pair, Map], known: Known) -> Told:
        """Return what each side says, on its own ranks; what is new is put into ``known``.

        Raises:
            TransportError: a side does not come until the deadline, or its ranks contradict each other; a
                DifferenceError if sides do.
            SpecError: more than can be told.
        """
        given: dict[Pair, tuple[Any, bytes]] = {LAYOUTS: (dict(specs), encode_specs(specs))}
        given |= {pair: (rules[pair], encode_map(rules[pair])) for pair in sorted(rules)}
        ours = tuple(Document.of(about, data) for about, (_, data) in given.items())
        known.update(
            {(one.is_layouts, one.digest): value for one, (value, _) in zip(ours, given.values(), strict=True)}
        )
        if self._side_rank == 0:
            self._tell(ours, [data for _, data in given.values()])
        layouts: dict[str, Any] = {}
        told: dict[str, dict[Pair, Map]] = {}
        for side in self._sizes:
            documents = self._heard(side)
            if side == self._side and documents != ours:
                theirs = self._value(side, 0, documents[0], known)
                raise self._problem(_contradiction(self._side, self._side_rank, (specs, theirs), ours, documents))
            values = [self._value(side, number, document, known) for number, document in enumerate(documents)]
            layouts[side] = values[0]
            told[side] = {one.about: value for one, value in zip(documents[1:], values[1:], strict=True)}
        try:
            agreed = agree(told, layouts)
        except DifferenceError as error:
            raise self._problem(str(error), DIFFERENT) from None
        self._store.add(f"{self._prefix}/agreed", 1)
        total = str(sum(self._sizes.values())).encode()
        self._wait(lambda: self._store.find(f"{self._prefix}/agreed") == total, "all ranks agree")
        return Told(layouts, agreed)

    def _tell(self, documents: tuple[Document, ...], contents: list[bytes]) -> None:
        for number, data in enumerate(contents):
            for index, at in enumerate(range(0, len(data), PIECE_BYTES)):
                self._store.set(self._piece(self._side, number, index), data[at : at + PIECE_BYTES])
        self._store.set(f"{self._prefix}/{self._side}", encode_documents(documents))

    def _piece(self, side: str, number: int, index: int) -> str:
        return f"{self._prefix}/{side}/{number}/piece/{index}"

    def _heard(self, side: str) -> tuple[Document, ...]:
        key = f"{self._prefix}/{side}"
        self._wait(lambda: self._store.check([key]), f"rank 0 of side {side!r} tells its layouts")
        found = decode_documents(self._store.get(key))
        for document in found[1:]:
            one, other = document.about
            if one == other or side not in document.about or not {one, other} <= self._sizes.keys():
                raise WireError(f"side {side!r} tells rules between {one!r} and {other!r}; the peer is broken")
        return found

    def _value(self, side: str, number: int, document: Document, known: Known) -> Any:
        key = (document.is_layouts, document.digest)
        if key not in known:
            known[key] = self._fetch(side, number, document)
        return known[key]

    def _fetch(self, side: str, number: int, document: Document) -> Any:
        count = -(-document.length // PIECE_BYTES)
        data = b"".join([self._store.get(self._piece(side, number, index)) for index in range(count)])
        if Document.of(document.about, data) != document:
            raise self._problem(f"what side {side!r} tells of its tensors is not what its digest says")
        return decode_specs(data) if document.is_layouts else decode_map(data)

    def _problem(self, text: str, kind: bytes = FAILED) -> TransportError:
        said = kind + text.encode(errors="backslashreplace")
        return _error_of(self._store.compare_set(f"{self._prefix}/problem", b"", said))

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not is_there():
            problem = self._store.find(f"{self._prefix}/problem")
            if problem is not None:
                raise _error_of(problem)
            if time.monotonic() > self._deadline:
                raise self._problem(
                    f"rank {self._side_rank} of side {self._side!r} waited in exchange() until {what}, and gave up at "
                    "its timeout; every rank of every side exchanges as often as the others"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)


def _error_of(problem: bytes) -> TransportError:
    """The error of what stands under the key of the problem."""
    kind = DifferenceError if problem.startswith(DIFFERENT) else TransportError
    return kind(problem[1:].decode(errors="replace"))


def encode_documents(documents: tuple[Document, ...]) -> bytes:
    """Return what the documents of a side are as bytes."""
    writer = Writer().integer(len(documents))
    for about, digest, length in documents:
        writer.text(about[0], MAX_NAME_BYTES).text(about[1], MAX_NAME_BYTES).octets(digest).integer(length)
    return writer.done()


def decode_documents(data: bytes) -> tuple[Document, ...]:
    """Read what the documents of a side are: layouts first, then rules, each pair of sides once.

    Raises:
        WireError: the bytes say something else, or of more than can be told.
    """
    reader = Reader(data)
    found = []
    for number in range(reader.count(20, 2 * MAX_SIDES)):
        about = (reader.text(MAX_NAME_BYTES), reader.text(MAX_NAME_BYTES))
        digest = reader.octets(DIGEST_BYTES)
        found.append(Document(about, digest, reader.integer(0, MAX_MAP_BYTES if number else MAX_SPECS_BYTES)))
    reader.end()
    pairs = [one.about for one in found]
    if pairs[:1] != [LAYOUTS] or len(set(pairs)) != len(pairs):
        raise WireError("a side tells its layouts first, once, and rules once for each pair; the peer is broken")
    return tuple(found)


def _contradiction(
    side: str, side_rank: int, layouts: tuple[Specs, Specs], ours: tuple[Document, ...], theirs: tuple[Document, ...]
) -> str:
    """Say in what a rank differs from rank 0 of its side; ``layouts`` are its own, and those."""
    if ours[0] != theirs[0]:
        about = f"rank {side_rank} of side {side!r} says other layouts than its rank 0"
        return f"{about}: {_difference(side_rank, *layouts)}; all ranks of a side say the same"
    pairs = sorted({one.about for one in {*ours} ^ {*theirs}})
    between = "; ".join(f"from {source!r} to {destination!r}" for source, destination in pairs)
    told = f"rank {side_rank} of side {side!r} tells other rules {between} than its rank 0"
    return f"{told}; all ranks of a side tell the same"


def _difference(side_rank: int, ours: Specs, theirs: Specs) -> str:
    """Name the first tensor of which two ranks say different things."""
    for name in sorted({**ours, **theirs}):
        if name not in ours or name not in theirs:
            return f"only rank {side_rank if name in ours else 0} has {name!r}"
        if ours[name] != theirs[name]:
            return f"{name!r} is {ours[name]} for rank {side_rank}, and {theirs[name]} for rank 0"
    return f"{len(ours)} tensors, and {len(theirs)} there"
