"""Cells that go to the holder that has least to do, whole or but for what makes NICs level. All are looked at, so ranks
are few.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import offsets_of
from tricomm.layout.topology import Topology
from tricomm.plan.product.grid import times_before
from tricomm.plan.product.pieces import Cutting
from tricomm.plan.product.sharing import LEVELLED, UNITS, WHOLE, Allotment, Sharing

FEW_DELIVERIES = 1 << 11
"""So many cells, each as often as it is sent, are allotted in some milliseconds."""

WORTH_A_CUT = 0.02
"""Of what a NIC sends where all send the same: to move less than that to another NIC is not worth a message."""


class _Deliveries(NamedTuple):
    """Each cell to each replica that lacks it, as columns.

    Attributes:
        row: of all cells.
        copy: which replica.
        receiver: its rank.
        holders: (deliveries, holders), ranks; -1 of those that are not asked as others are on the receiver's host.
        nbytes: as a NIC sends them; 0 within a host.
    """

    row: np.ndarray
    copy: np.ndarray
    receiver: np.ndarray
    holders: np.ndarray
    nbytes: np.ndarray

    @classmethod
    def of(cls, cutting: Cutting, itemsize: int, topology: Topology) -> "_Deliveries":
        """First those within hosts, which have less choice; then the largest for each NIC, the next for each, and so
        on: what is posted last shall not all be for one NIC.
        """
        rows, hosts = cutting.every, topology.host_numbers
        sizes, (sources, tiles) = cutting.numel(rows) * itemsize, cutting.tiles_of(rows)
        every, needing = cutting.source.ranks[sources], cutting.destination.ranks[tiles]
        here = hosts[every][:, None, :] == hosts[needing][:, :, None]
        lacks = ~(every[:, None, :] == needing[:, :, None]).any(2)
        row, copy = np.nonzero(lacks)
        is_beside = here.any(2)[row, copy]
        order = np.lexsort((copy, row, -sizes[row]))
        row, copy, is_beside = row[order], copy[order], is_beside[order]
        before = times_before(topology.nic_numbers[needing[row, copy]] * 2 + is_beside)
        order = np.lexsort((before, ~is_beside))
        row, copy, is_beside = row[order], copy[order], is_beside[order]
        asked = here[row, copy] | ~is_beside[:, None]
        return cls(row, copy, needing[row, copy], np.where(asked, every[row], -1), np.where(is_beside, 0, sizes[row]))


def allotted(cutting: Cutting, itemsize: int, topology: Topology, shares: int) -> Allotment:
    """Give each cell for each replica to one of its tile's holders: to whoever is done first with what it sends.
    Replicas that have holders on their host hear from those.

    A holder is done when its NIC has sent everything that its ranks send, and when it has posted its own messages
    and the longest of them is sent.

    Args:
        cutting: of both sides.
        itemsize: bytes of an element on the wire.
        topology: of all ranks.
        shares: one of BY_ALLOTMENT. If it is LEVELLED, NICs that send more than the mean then give of that to others;
            if it is that of WHOLE, cells between hosts first go to the holders that they have with WHOLE.
    """
    given, copies = _Deliveries.of(cutting, itemsize, topology), cutting.destination.replicas
    books = _Books(given, topology)
    first = np.full(len(given.row), -1)
    if shares == LEVELLED[WHOLE]:
        pieces = cutting.pieces(copies, Sharing(cutting.source.replicas, WHOLE), None)
        first = np.where(given.nbytes > 0, pieces.parts.reshape(-1, copies)[given.row, given.copy], -1)
    for delivery, holder in enumerate(first.tolist()):
        books.give(delivery, holder)
    if shares in LEVELLED.values():
        books.level()
    shape = (*map(len, cutting.lengths), copies)
    number = np.ravel_multi_index((*cutting.every[given.row].T, given.copy), shape)
    sent, place = np.nonzero(books.parts)
    stops = np.rint(np.cumsum(books.parts, 1) * UNITS).astype(np.int64)[sent, place]
    order = np.argsort(number[sent], kind="stable")
    counts = np.bincount(number[sent], minlength=int(np.prod(shape)))
    return Allotment(shape, offsets_of(counts), place[order], stops[order])


class _Books:
    """Who sends what part of each delivery, and what NICs and ranks have to do."""

    def __init__(self, given: _Deliveries, topology: Topology) -> None:
        self.given, self.ranks = given, len(topology.hosts)
        self.nics = topology.nic_numbers[given.holders]
        self.overhead = topology.overhead_seconds
        self.rates = topology.nic_send_rates
        self.parts = np.zeros(given.holders.shape)
        self.sending = np.zeros(len(topology.nic_send_rates))  # seconds
        self.posted = np.zeros(len(topology.hosts), np.int64)
        self.longest = np.zeros(len(topology.hosts))  # seconds of a rank's longest message, which may be posted last

    def give(self, delivery: int, place: int) -> None:
        """One of them to a holder, or with -1 to the one that is done first."""
        places = np.flatnonzero(self.given.holders[delivery] >= 0) if place < 0 else np.array([place])
        holders, nics = self.given.holders[delivery, places], self.nics[delivery, places]
        seconds = self.given.nbytes[delivery] / self.rates[nics]
        sending, longest = self.sending[nics] + seconds, np.maximum(self.longest[holders], seconds)
        posting = (self.posted[holders] + 1) * self.overhead + longest
        best = np.lexsort((places, sending + posting, np.maximum(sending, posting)))[0]
        self.parts[delivery, places[best]] = 1.0
        self.sending[nics[best]] = sending[best]
        self.longest[holders[best]] = longest[best]
        self.posted[holders[best]] += 1

    def level(self) -> None:
        """Let NICs that send longer than the mean give parts of what their ranks send to others, in few messages; those
        may have to give as much to others again.
        """
        nics = np.unique(self.nics[self.given.holders >= 0])
        mean = sum(self.sending[nics].tolist()) / max(len(nics), 1)  # in one order on every machine
        least = WORTH_A_CUT * mean
        for nic in nics[np.argsort(-self.sending[nics], kind="stable")].tolist():
            while self.sending[nic] - mean > least:
                seconds, path = self._relief(nic, mean, least)
                if not path:
                    break
                for giver, taker in reversed(list(pairwise(path))):
                    self._pass_on(giver, taker, seconds)

    def _relief(self, nic: int, mean: float, least: float) -> tuple[float, list[int]]:
        """The shortest way on which NICs may pass on what the first of them sends too much of, in parts of one delivery
        each, and how much of it; an empty one if there is none.
        """
        most, before = {nic: self.sending[nic] - mean}, {nic: -1}
        reached = [nic]
        while reached:
            following: list[int] = []
            for one in reached:
                parts = self._largest_parts(one)
                for to in np.flatnonzero(parts > least).tolist():
                    if to not in most:
                        most[to], before[to] = min(most[one], parts[to]), one
                        following.append(to)
            spare = {to: min(most[to], mean - self.sending[to]) for to in following}
            best = max(following, key=lambda to: spare[to], default=-1)
            if best >= 0 and spare[best] > least:
                path = [best]
                while before[path[-1]] >= 0:
                    path.append(before[path[-1]])
                return spare[best], path[::-1]
            reached = following
        return 0.0, []

    def _parts_of(self, nic: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(delivery, place of the holder, seconds, which holders may send it instead) of each part that a NIC sends."""
        given = self.given
        delivery, place = np.nonzero((self.parts > 0) & (self.nics == nic) & (given.nbytes > 0)[:, None])
        seconds = self.parts[delivery, place] * given.nbytes[delivery] / self.rates[nic]
        return delivery, place, seconds, (given.holders[delivery] >= 0) & (self.nics[delivery] != nic)

    def _largest_parts(self, nic: int) -> np.ndarray:
        """The seconds of the largest part that each NIC may send in the place of one."""
        delivery, _, seconds, others = self._parts_of(nic)
        found = np.zeros(len(self.sending))
        row, to = np.nonzero(others)
        np.maximum.at(found, self.nics[delivery[row], to], seconds[row])
        return found

    def _pass_on(self, nic: int, to_nic: int, moved: float) -> None:
        """Let another NIC send so many seconds of a part, from the rank that posts most to the one that posts least,
        which shall post it last.
        """
        given = self.given
        delivery, place, seconds, others = self._parts_of(nic)
        row, to = np.nonzero(others & (self.nics[delivery] == to_nic) & (seconds >= moved)[:, None])
        giver, taker = given.holders[delivery[row], place[row]], given.holders[delivery[row], to]
        distance = (given.receiver[delivery[row]] - taker) % self.ranks
        best = np.lexsort((row, -distance, self.posted[taker], -self.posted[giver]))[0]
        row, to = row[best], to[best]
        at, of, part = delivery[row], place[row], moved / (given.nbytes[delivery[row]] / self.rates[nic])
        self.posted[taker[best]] += self.parts[at, to] == 0
        self.parts[at, to] += part
        left = self.parts[at, of] - part
        is_gone = left * UNITS < 1
        self.parts[at, of] = 0.0 if is_gone else left
        self.posted[giver[best]] -= is_gone
        self.sending[[nic, to_nic]] += (-moved, moved)
