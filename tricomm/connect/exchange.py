"""What each side tells the others of its tensors, once in an epoch, over the store of the epoch.

| key | written by | when | read by |
|---|---|---|---|
| specs/N/SIDE/piece/I | rank 0 of SIDE | it exchanges for the N-th time | ranks that do not know the digest |
| specs/N/SIDE | rank 0 of SIDE: digest and length | all pieces are there | everybody |
| specs/N/agreed | every rank (add) | it has all, and its side says what it says | everybody |
| specs/N/problem | the first rank that has one | at once (compare_set) | everybody |

Layouts that are known from an epoch before, by their digest, are not sent again.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from tricomm.connect.meeting.wire import Reader, Writer
from tricomm.connect.specs import MAX_SPECS_BYTES, Specs, decode_specs, encode_specs
from tricomm.errors import TransportError

PIECE_BYTES = 512 << 10
DIGEST_BYTES = 32
FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.05

Known = dict[bytes, dict[str, Any]]
"""Layouts by digest."""


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

    def run(self, specs: Specs, known: Known) -> dict[str, Specs]:
        """Return what each side says, on its own ranks; what is new is put into ``known``.

        Raises:
            TransportError: a side does not come until the deadline, or its ranks contradict each other.
        """
        data = encode_specs(specs)
        ours = hashlib.sha256(data).digest()
        if self._side_rank == 0:
            self._tell(data, ours)
        found: dict[str, Specs] = {}
        for side in self._sizes:
            digest, length = self._heard(side)
            if side == self._side:
                known.setdefault(ours, dict(specs))
                if digest != ours:
                    raise self._problem(
                        f"rank {self._side_rank} of side {side!r} says other layouts than its rank 0 "
                        f"({len(specs)} tensors in {len(data)} bytes, and {length} bytes there); all ranks of a side "
                        "say the same"
                    )
            elif digest not in known:
                known[digest] = self._fetch(side, digest, length)
            found[side] = known[digest]
        self._store.add(f"{self._prefix}/agreed", 1)
        total = str(sum(self._sizes.values())).encode()
        self._wait(lambda: self._store.find(f"{self._prefix}/agreed") == total, "all ranks agree")
        return found

    def _tell(self, data: bytes, digest: bytes) -> None:
        for index, at in enumerate(range(0, len(data), PIECE_BYTES)):
            self._store.set(f"{self._prefix}/{self._side}/piece/{index}", data[at : at + PIECE_BYTES])
        self._store.set(f"{self._prefix}/{self._side}", Writer().octets(digest).integer(len(data)).done())

    def _heard(self, side: str) -> tuple[bytes, int]:
        key = f"{self._prefix}/{side}"
        self._wait(lambda: self._store.check([key]), f"rank 0 of side {side!r} tells its layouts")
        reader = Reader(self._store.get(key))
        digest, length = reader.octets(DIGEST_BYTES), reader.integer(0, MAX_SPECS_BYTES)
        reader.end()
        return digest, length

    def _fetch(self, side: str, digest: bytes, length: int) -> dict[str, Any]:
        pieces = [self._store.get(f"{self._prefix}/{side}/piece/{index}") for index in range(-(-length // PIECE_BYTES))]
        data = b"".join(pieces)
        if hashlib.sha256(data).digest() != digest:
            raise self._problem(f"what side {side!r} tells of its layouts is not what its digest says")
        return decode_specs(data)

    def _problem(self, text: str) -> TransportError:
        stands = bytes(self._store.compare_set(f"{self._prefix}/problem", "", text))
        return TransportError(stands.decode(errors="replace"))

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not is_there():
            problem = self._store.find(f"{self._prefix}/problem")
            if problem is not None:
                raise TransportError(problem.decode(errors="replace"))
            if time.monotonic() > self._deadline:
                raise self._problem(
                    f"rank {self._side_rank} of side {self._side!r} waited in exchange() until {what}, and gave up at "
                    "its timeout; every rank of every side exchanges as often as the others"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
