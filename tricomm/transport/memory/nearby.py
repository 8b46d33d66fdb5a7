"""Ranks whose links stand tell each other by these what they are about to do, in place of the store.

Each tells each. A rank has met the others when all have told the same as it has itself; then every one of them has, or
will have when it looks, unless its link with one ended before that had told it. Who has met fails in the call then, and
says so where the others look: see ``find_failed``.

What each tells each is one message, the same for all: it is encoded once, and what comes is compared with it as bytes.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache

from tricomm.transport.memory.link import Link
from tricomm.transport.memory.protocol import (
    HERE,
    HERE_KIND,
    MAX_MESSAGE_NBYTES,
    Here,
)
from tricomm.transport.memory.signals import FILE_NBYTES, FLAGS, LinkClosedError
from tricomm.transport.memory.transfers import CROWDED_MILLISECONDS, LONGEST_MILLISECONDS

DIGEST_NBYTES = 16


@lru_cache(maxsize=64)
def digest_of(text: str) -> bytes:
    """What is told of what a rank is about to do."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:DIGEST_NBYTES]


class Nearby:
    """See Near.

    Args:
        links: with all other ranks.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = tuple(links)
        self._backlogs = tuple(link.backlog for link in links)
        self._missing: list[Link] = []
        self._here, self._data = Here(0, b""), b""
        self.have_told = self.is_in_vain = False
        self.number = 0
        self.find_failed: Callable[[int], str | None] = lambda _: None

    def tell(self, number: int, digest: str) -> None:
        """See Near."""
        here = number, digest_of(digest)
        self._here, self._data = tuple.__new__(Here, here), HERE.pack(HERE_KIND, *here)
        self._missing = [*self._links]
        self.have_told, self.is_in_vain, self.number = False, False, number
        for link in self._links:
            try:
                link.say(self._data)
            except LinkClosedError:
                self.is_in_vain = True

    def wait(self, seconds: float) -> bool:
        """See Near."""
        deadline = time.monotonic() + seconds
        self._wait(seconds)
        if self.is_in_vain:
            time.sleep(max(0.0, deadline - time.monotonic()))
        return self.have_told

    def meet(self, number: int, digest: str, seconds: float) -> bool:
        """See Near."""
        self.tell(number, digest)
        return self._wait(seconds)

    def _wait(self, seconds: float) -> bool:
        """Wait until all have told the same, or one tells something else; whether they have."""
        here, missing, is_late = self._here, self._missing, False
        deadline = time.monotonic() + seconds
        while missing and not (self.is_in_vain or is_late):
            link = missing[0]
            heres = link.heres
            while heres and heres[0].number < here.number:
                heres.popleft()  # of a rendezvous for which this rank went to the store
            if heres:
                self.is_in_vain = heres[0] != here
                if not self.is_in_vain:
                    heres.popleft()
                    del missing[0]
                continue
            try:
                heard = self._hear(link, self._data, deadline - time.monotonic())
            except LinkClosedError:
                self.is_in_vain = True
                break
            if heard:
                del missing[0]
            is_late = heard is None
        self.have_told = not missing and not self.is_in_vain
        return self.have_told

    def _hear(self, link: Link, data: bytes, seconds: float) -> bool | None:
        """Take what comes by a link until it is a message, or another of its kind: whether it is; None if neither comes
        within some seconds.

        Raises:
            LinkClosedError: the link has ended before.
        """
        deadline, is_over = 0.0, False
        while True:
            try:
                came, ancillary, _, _ = link.receive(MAX_MESSAGE_NBYTES, FILE_NBYTES, FLAGS)
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + seconds
                if now < deadline and not is_over:
                    milliseconds = min(1000 * (deadline - now), LONGEST_MILLISECONDS)
                    is_over = link.wait(self._flushed(milliseconds) if any(self._backlogs) else milliseconds)
                    continue
                if not is_over:
                    return None
                came = b""
            except OSError:
                came = b""
            if came == data:
                return True
            if not came:
                raise LinkClosedError(f"the link to rank {link.peer} is closed")
            link.take(came, ancillary)
            if came[0] == data[0]:
                return False

    def _flushed(self, milliseconds: float) -> float:
        """Send what waits for room; how long to wait for news at most, until some is tried again."""
        for one in self._links:
            with suppress(LinkClosedError):  # whoever waits for that one hears of it
                one.flush()
        return min(milliseconds, CROWDED_MILLISECONDS) if any(self._backlogs) else milliseconds
