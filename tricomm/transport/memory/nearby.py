"""Ranks whose links stand tell each other by these what they are about to do, in place of the store.

Each tells each. A rank has met the others when all have told the same as it has itself; then every one of them has, or
will have when it looks, unless its link with one ended before that had told it. Who has met fails in the call then, and
says so where the others look: see ``find_failed``.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from tricomm.transport.memory.link import Link
from tricomm.transport.memory.protocol import Here
from tricomm.transport.memory.signals import LinkClosedError

DIGEST_NBYTES = 16


@lru_cache(maxsize=64)
def digest_of(text: str) -> bytes:
    """What is told of what a rank is about to do."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_NBYTES]


class Nearby:
    """See Near.

    Args:
        links: with all other ranks.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links
        self._missing: list[Link] = []
        self._here = Here(0, b"")
        self.have_told = self.is_in_vain = False
        self.number = 0
        self.find_failed: Callable[[int], str | None] = lambda _: None

    def tell(self, number: int, digest: str) -> None:
        """See Near."""
        self._here = here = Here(number, digest_of(digest))
        self._missing = [*self._links]
        self.have_told, self.is_in_vain, self.number = False, False, number
        for link in self._links:
            try:
                link.tell(here)
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
        self._wait(seconds)
        return self.have_told

    def _wait(self, seconds: float) -> None:
        """Wait until all have told the same, or one tells something else."""
        deadline = time.monotonic() + seconds
        while self._missing and not self.is_in_vain:
            link = self._missing[0]
            if self._has_told(link):
                self._missing.pop(0)
                continue
            left = deadline - time.monotonic()
            if self.is_in_vain or left <= 0:
                break
            if link.wait(1000 * left) and not link.heres:
                link.look()  # what was told before the end
                self.is_in_vain = not link.heres
        self.have_told = not self._missing and not self.is_in_vain

    def _has_told(self, link: Link) -> bool:
        """Whether the peer of a link has told the same."""
        heres = link.heres
        if not heres:
            link.look()
        while heres and heres[0].number < self._here.number:
            heres.popleft()  # of a rendezvous for which this rank went to the store
        if not heres:
            return False
        self.is_in_vain = heres[0] != self._here
        if not self.is_in_vain:
            heres.popleft()
        return not self.is_in_vain
