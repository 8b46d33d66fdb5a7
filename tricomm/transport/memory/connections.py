"""Connections of which some pairs go by memory, beside a network for all others."""

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch

from tricomm.packing import runs as in_runs
from tricomm.packing.runs import InPlace
from tricomm.packing.staging import Direction
from tricomm.transport.base import NO_ARENAS, Asked, Connections, Operation, Prepares, Shared
from tricomm.transport.memory.link import PIECES_UNDER_WAY, Link
from tricomm.transport.memory.meeting import VERDICT_NBYTES, Doorway, meet
from tricomm.transport.memory.nearby import Nearby
from tricomm.transport.memory.pieces import Common, Pool
from tricomm.transport.memory.prepared import PreparedNod, prepared
from tricomm.transport.memory.rungs import PairTransports, Rung
from tricomm.transport.memory.signals import LinkClosedError
from tricomm.transport.memory.transfers import Patience, size_of

Exchange = Callable[[Iterable[Operation]], None]
"""Posts operations and waits for all of them."""

MOST_NODS = 15
"""So many others each rank tells by itself that it has come so far; with more, ranks pass it on."""


class HostConnections:
    """See Linked.

    Args:
        network: for all pairs that have no link.
        links: by rank.
        transports: of the pairs of this rank, for whoever asks.
        are_all_linked: whether every rank has a link with each other one; the same on all of them.
    """

    has_tags = True
    begin = None
    arenas = NO_ARENAS
    launch: Any = staticmethod(operator.call)

    def __init__(
        self, network: Connections, links: Mapping[int, Link], transports: PairTransports, are_all_linked: bool = False
    ) -> None:
        self.network = network
        self.transports = transports
        self.depth = network.depth
        self._links = tuple(links.values())
        self._offers = tuple(link.offers for link in self._links)
        self._nods = tuple((link.peer, PreparedNod(link, self._links).start) for link in self._links)
        self._backlogs = tuple(link.backlog for link in self._links)
        leaving = tuple(link.leaving for link in self._links)
        for link in self._links:
            link.leaving_beside = leaving
        self._are_all_linked = are_all_linked
        self._pool = Pool(PIECES_UNDER_WAY * len(links))
        ways = {(is_send, rank): links[rank].rung(is_send) for rank in links for is_send in (True, False)}
        self._ways = {way: links[way[1]] for way, rung in ways.items() if rung is not Rung.NETWORK}
        readable = frozenset(way for way, rung in ways.items() if rung is Rung.READ)
        self.in_place = InPlace(readable, frozenset(self._ways))

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections. Works are waited for, each by itself."""

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections."""
        works: list[tuple[int, Any]] = []
        leaving: dict[int, Link] = {}
        for alike in _together(operations):
            links = [self._ways.get((one.is_send, one.peer)) for one in alike]
            common = None
            if len(alike) > 1 and len(alike) > links.count(None) + 1:
                common = Common(alike[0], self._pool, len(alike) - links.count(None))
            for operation, link in zip(alike, links, strict=True):
                if link is None:
                    works += self.network.post((operation,), tag)
                elif operation.is_send:
                    works.append((operation.peer, (link, link.offer(operation, tag, common, True).wait)))
                    if link.leaving:
                        leaving[link.peer] = link
                else:
                    works.append((operation.peer, (link, link.expect(operation, tag).wait)))
        for link in leaving.values():
            link.set_off()
        return works

    def wait(self, work: Any, limit: timedelta) -> None:
        """See Connections."""
        if isinstance(work, tuple):
            link, wait = work
            wait(link, Patience(limit, self._links))
        else:
            self.network.wait(work, limit)

    def reserve(self, nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """See Linked."""
        return {}

    def share(self, asked: Asked, tag: int) -> Shared:
        """See Linked."""
        raise NotImplementedError

    def prepare(self, operation: Operation, is_confirmed: bool) -> Callable[[int], Any] | None:
        """See Prepares."""
        link = self._ways.get((operation.is_send, operation.peer))
        if link is not None:
            return prepared(operation, link, self._links, is_confirmed and self._are_all_linked)
        return self.network.prepare(operation, is_confirmed) if isinstance(self.network, Prepares) else None

    def unread(self) -> list[tuple[int, Any]]:
        """See Linked."""
        works: list[tuple[int, Any]] = []
        if any(self._offers):
            for link in self._links:
                if link.offers and not link.has_read():
                    works += ((link.peer, (link, offer.wait_read)) for offer in link.unread())
        return works

    def nod(self, tag: int) -> list[tuple[int, Any]] | None:
        """See Linked."""
        if not self._are_all_linked:
            return None
        return [(peer, start(tag)) for peer, start in self._nods]

    def near(self) -> Nearby | None:
        """See Linked."""
        return Nearby(self._links) if self._are_all_linked else None

    def finish(self, limit: timedelta) -> bool:
        """See Linked."""
        if not any(self._backlogs):
            return any(self._offers)
        for link in self._links:
            while link.is_crowded:
                try:
                    if not link.flush():
                        Patience(limit, (link,)).await_news(link)
                except LinkClosedError:
                    break  # the peer learns more from that
        return any(self._offers)

    def connected(self) -> None:
        """See Connections."""
        self.network.connected()

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections. Who goes by memory is known to each pair alone, so nothing goes in one call."""
        self.network.gather(())

    def abort(self) -> None:
        """See Connections. The links first: whoever reads this rank's memory must not count what it reads now."""
        for link in self._links:
            link.close()
        self.network.abort()


def _together(operations: Iterable[Operation]) -> Iterator[list[Operation]]:
    """Operations one by one, but those together that follow each other and send the same, if it is several pieces."""
    together: list[Operation] = []
    for one in operations:
        if together and (one.peer == together[-1].peer or not _same(one, together[0])):
            yield together
            together = []
        together.append(one)
        if not one.is_send or size_of(one) <= in_runs.PIECE_NBYTES:
            yield together
            together = []
    if together:
        yield together


def _same(one: Operation, other: Operation) -> bool:
    """Whether two send the same bytes."""
    if not one.is_send or one.runs is not other.runs or size_of(one) != size_of(other):
        return False
    return one.runs is not None or one.buffer.data_ptr() == other.buffer.data_ptr()


def met(
    network: Connections,
    door: Doorway,
    others: Collection[int],
    exchange: Exchange,
    interrupted: Callable[[], None],
    refused: Mapping[int, str],
) -> HostConnections:
    """Connect to the ranks of this host, once all ranks are connected by the network.

    Args:
        network: see HostConnections.
        door: of this rank.
        others: all ranks but this one.
        exchange: sends and receives over the network, and is watched.
        interrupted, refused: see ``meet``.
    """

    def tell(texts: Mapping[int, str]) -> dict[int, str]:
        theirs = {rank: torch.zeros(VERDICT_NBYTES, dtype=torch.uint8, device="cpu") for rank in texts}
        ours = {rank: _padded(text) for rank, text in texts.items()}
        exchange(
            [
                *(Operation(False, rank, buffer) for rank, buffer in theirs.items()),
                *(Operation(True, rank, buffer) for rank, buffer in ours.items()),
            ]
        )
        return {rank: bytes(buffer.tolist()).rstrip(b"\0").decode() for rank, buffer in theirs.items()}

    try:
        links, transports = meet(door, tell, interrupted, refused)
        is_linked = len(others) <= MOST_NODS and _agreed(links.keys() == {*others}, others, exchange)
        return HostConnections(network, links, transports, is_linked)
    finally:
        door.close()


def _agreed(is_so: bool, others: Collection[int], exchange: Exchange) -> bool:
    """Whether all say so."""
    ours = torch.tensor([is_so], dtype=torch.uint8, device="cpu")
    theirs = torch.zeros(len(others), dtype=torch.uint8, device="cpu")
    receives = [Operation(False, rank, theirs[index : index + 1]) for index, rank in enumerate(others)]
    exchange([*receives, *(Operation(True, rank, ours) for rank in others)])
    return is_so and bool(theirs.all())


def _padded(text: str) -> torch.Tensor:
    data = text.encode(errors="backslashreplace")[:VERDICT_NBYTES]
    return torch.frombuffer(bytearray(data.ljust(VERDICT_NBYTES, b"\0")), dtype=torch.uint8)
