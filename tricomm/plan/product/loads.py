"""What the NICs of a tile's replicas carry, as multiples of what each would if all were level."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tricomm.plan.product.rings import FROM_SENDER
from tricomm.plan.product.shared import Arcs, SharedHosts
from tricomm.plan.product.sharing import Sharing

FEW_HOSTS = 256
"""Up to so many hosts and messages of a tile the loads of trees are summed up; with more they are bounded."""

FEW_PIECES = 1 << 11
"""The same where hosts have ranks of both meshes: of a tile, with more of which all is taken for level."""

SAMPLED_TILES = 2


class Loads(NamedTuple):
    """Loads of the busiest NIC; 1 is a tile's elements divided by the NICs by which its replicas on a host hear.

    Attributes:
        hosts: of the longest way.
        free: share of the tile in cells without holders on its hosts, as often as holders send it.
        heard: of what comes in.
        handed_on: of what is sent to others of the tile, in chains or trees.
        first: of what enters a host as the first one.
        sent: of what holders of cells that are on the tile's hosts send.
    """

    hosts: int
    free: float
    heard: float
    handed_on: float
    first: float
    sent: float

    @classmethod
    def apart(cls, hosts: int, rails: int, messages: int, children: int) -> "Loads":
        """Where all of a tile comes from other hosts, in equal messages that enter all round.

        Args:
            hosts: that have replicas of the tile.
            rails: NICs of a host by which they hear; every message keeps to one.
            messages: how many.
            children: of the trees that they follow; 1 is a chain; FROM_SENDER none.
        """
        of_rail = -(-messages // rails)
        heard = of_rail * rails / messages
        first = -(-of_rail // hosts) * rails / messages
        if children == FROM_SENDER:
            return cls(1, float(hosts), heard, 0.0, heard, 0.0)
        if children == 1:
            return cls(hosts, 1.0, heard, heard * (1 - of_rail // hosts / of_rail), first, 0.0)
        if hosts > FEW_HOSTS or of_rail > FEW_HOSTS:
            # Half of the hosts of a tree hand on, twice, and the other half that of the next message.
            return cls(hosts, 1.0, heard, 2 * -(-of_rail // 2) * rails / messages, first, 0.0)
        entries = np.arange(hosts)[(2 * np.arange(of_rail) + 1) * hosts // (2 * of_rail) % hosts]
        sent = np.zeros(hosts, np.int64)
        np.add.at(sent, (entries[:, None] + np.arange(hosts)) % hosts, _given_on(hosts, children)[None, :])
        return cls(hosts, 1.0, heard, float(sent.max()) * rails / messages, first, 0.0)

    @classmethod
    def among(
        cls, shared: SharedHosts, rails: int, messages: int, sharing: Sharing, kinds: Sequence[int]
    ) -> "list[Loads]":
        """Where hosts have ranks of both meshes, for some numbers of children: of a few tiles, in the place of all."""
        apart = [cls.apart(shared.rings.most_hosts, rails, messages, children) for children in kinds]
        found = [cls._of_tile(shared, tile, rails, sharing, kinds, apart) for tile in _sampled(shared)]
        return [cls._make(map(max, zip(*of_kind, strict=True))) for of_kind in zip(*found, strict=True)]

    @classmethod
    def _of_tile(
        cls,
        shared: SharedHosts,
        tile: int,
        rails: int,
        sharing: Sharing,
        kinds: Sequence[int],
        apart: "Sequence[Loads]",
    ) -> "list[Loads]":
        hosts = int(shared.rings.hosts[tile])
        rows, numel, arcs, free = shared.of_tile(tile)
        if len(arcs.cell) * (1 if sharing.shares <= 0 else sharing.parts) > FEW_PIECES:
            whole, around = numel[arcs.cell][arcs.spans > 0].sum(), (numel[arcs.cell] * arcs.spans).sum()
            heard = float(around) / hosts / rails
            from_sender = heard, 0.0, heard, heard * rails
            chained = heard, heard, whole / hosts / rails, whole / hosts
            carried = [from_sender if children == FROM_SENDER else chained for children in kinds]
        else:
            pieces = Onward.of(shared, rows, arcs.take(np.flatnonzero(arcs.spans > 0)), sharing)
            carried = [pieces.loads(hosts, rails, children) for children in kinds]
        total = max(int(numel.sum()), 1)
        part = float(numel[free].sum() / total)
        depth = max(int(arcs.spans.max(initial=0)), shared.rings.most_hosts if len(free) else 0)
        return [
            cls(
                1 if children == FROM_SENDER else depth,
                part * alone.free,
                heard * rails / total + part * alone.heard,
                handed_on * rails / total + part * alone.handed_on,
                first * rails / total + part * alone.first,
                sent / total,
            )
            for children, alone, (heard, handed_on, first, sent) in zip(kinds, apart, carried, strict=True)
        ]


class Onward(NamedTuple):
    """Pieces of a tile that go on from holders on its hosts, as columns.

    Attributes:
        weight: elements.
        place: the host before the stretch that each goes round.
        sender: a host from which it comes.
        at: which of the tile's hosts that is; -1 if none.
        span, offset, turn: see Visits.
    """

    weight: np.ndarray
    place: np.ndarray
    sender: np.ndarray
    at: np.ndarray
    span: np.ndarray
    offset: np.ndarray
    turn: np.ndarray

    @classmethod
    def of(cls, shared: SharedHosts, rows: np.ndarray, arcs: Arcs, sharing: Sharing) -> "Onward":
        """Those of some arcs; cells are taken for one run of elements of their tile."""
        arc, part, count = shared.parts(arcs, sharing)
        chosen = arcs.take(arc)
        cells = rows[chosen.cell]
        numel = shared.cutting.numel(cells)
        turns = shared.turns(cells, part, sharing)
        sender = shared.hosts[shared.senders(chosen, part, sharing)]
        offsets = shared.offsets(chosen, cells, part, count)
        at = shared.rings.find(chosen.tile, sender)
        return cls(numel / count, chosen.place, sender, at, chosen.spans, offsets, turns)

    def loads(self, hosts: int, rails: int, children: int) -> tuple[float, float, float, float]:
        """(heard, handed on, heard first, sent first) by the busiest NIC of so many hosts with so many NICs each, in
        elements; what is sent first, by the busiest host.
        """
        if not len(self.weight):
            return 0.0, 0.0, 0.0, 0.0
        alone = children == FROM_SENDER
        rail = self.turn % rails
        begin = (self.place + 1) % hosts
        heard = np.zeros((rails, 2 * hosts + 1))
        np.add.at(heard, (rail, begin), self.weight)
        np.add.at(heard, (rail, begin + self.span), -self.weight)
        heard = np.cumsum(heard, 1)[:, :-1]
        heard = heard[:, :hosts] + heard[:, hosts:]
        first = np.zeros((rails, hosts))
        np.add.at(first, (rail, (begin + self.offset) % hosts), self.weight)
        starting = np.bincount(self.sender, self.weight * self.span if alone else self.weight)
        if alone:
            return float(heard.max()), 0.0, float(heard.max()), float(starting.max())
        sent = np.zeros((rails, hosts))
        if children == 1 or self.span.sum() > FEW_PIECES:
            sent += heard
            np.add.at(sent, (rail, (begin + (self.offset - 1) % self.span) % hosts), -self.weight)
        else:
            for span in np.unique(self.span).tolist():
                of_span = np.flatnonzero(self.span == span)
                far = (self.offset[of_span, None] + np.arange(span)) % span
                at = (begin[of_span, None] + far) % hosts
                given = self.weight[of_span, None] * _given_on(span, children)
                np.add.at(sent, (rail[of_span, None].repeat(span, 1), at), given)
        # A host that has holders hands on what it hears from others, too.
        own = np.bincount(self.at + 1, self.weight, hosts + 1)[1:]
        handed_on = (sent + own / rails).max()
        return float(heard.max()), float(handed_on), float(first.max()), float(starting.max())


def _given_on(hosts: int, children: int) -> np.ndarray:
    """To how many others each host of a tree gives a message, by its place in the tree."""
    return np.bincount((np.arange(1, hosts) - 1) // children, minlength=hosts)


def _sampled(shared: SharedHosts) -> list[int]:
    """A few tiles, in the place of all."""
    tiles = len(shared.rings.ranks)
    return sorted({tiles * index // SAMPLED_TILES for index in range(SAMPLED_TILES)})


def sent_directly(shared: SharedHosts | None) -> float:
    """What the busiest host sends of a tile whose cells have holders on its hosts, if each replica hears from one; as a
    multiple of the tile.
    """
    if shared is None:
        return 0.0
    return max(_directly(shared, *shared.of_tile(tile)[1:3]) for tile in _sampled(shared))


def _directly(shared: SharedHosts, numel: np.ndarray, arcs: Arcs) -> float:
    rings, holders, weights = shared.rings, shared.holders, numel[arcs.cell]
    replicas = rings.before(arcs.tile, arcs.place + arcs.spans + 1) - rings.before(arcs.tile, arcs.place + 1)
    sent = np.bincount(arcs.source, weights * replicas)
    sources = np.flatnonzero(sent)
    if not len(sources):
        return 0.0
    hosts = shared.hosts[holders.ranks[sources]]
    each = (sent[sources] / holders.replicas).repeat(holders.replicas)
    return float(np.bincount(hosts.reshape(-1), each).max()) / max(int(numel.sum()), 1)
