"""What the replicas of a tile carry: the shares of it that the busiest of its hosts hears, hands on and hears first."""

from typing import NamedTuple

import numpy as np

from tricomm.plan.product.grid import Rings
from tricomm.plan.product.shared import Arcs, SharedHosts

FEW_HOSTS = 256
"""Up to so many hosts and messages of a tile the loads of trees are summed up; with more they are bounded."""

SAMPLED_TILES = 2


class Loads(NamedTuple):
    """Shares of a tile's elements.

    Attributes:
        hosts: of the longest way.
        free: of cells without holders on the tile's hosts.
        heard: by the host that hears most.
        handed_on: by the host that sends most to others of the tile, in chains or trees.
        first: what enters at one host first.
        directly: what holders on the tile's hosts send if each replica hears from one.
    """

    hosts: int
    free: float
    heard: float
    handed_on: float
    first: float
    directly: float

    @classmethod
    def apart(cls, hosts: int, messages: int, children: int) -> "Loads":
        """Where all of a tile comes from other hosts, in equal messages that enter all round."""
        first = -(-messages // hosts) / messages
        if children == 1:
            return cls(hosts, 1.0, 1.0, 1 - messages // hosts / messages, first, 0.0)
        if hosts > FEW_HOSTS or messages > FEW_HOSTS:
            # Half of the hosts of a tree hand on, twice, and the other half that of the next message.
            return cls(hosts, 1.0, 1.0, 2 * -(-messages // 2) / messages, first, 0.0)
        entries = np.bincount((2 * np.arange(messages) + 1) * hosts // (2 * messages) % hosts, minlength=hosts)
        sent = int(_handed_on(entries, hosts, children).max())
        return cls(hosts, 1.0, 1.0, sent / messages, first, 0.0)

    @classmethod
    def among(cls, shared: SharedHosts, messages: int, children: int) -> "Loads":
        """Where hosts have ranks of both meshes: of a few tiles, in the place of all."""
        tiles = len(shared.rings.ranks)
        sampled = sorted({tiles * index // SAMPLED_TILES for index in range(SAMPLED_TILES)})
        found = [cls._of_tile(shared, tile, messages, children) for tile in sampled]
        return cls._make(map(max, zip(*found, strict=True)))

    @classmethod
    def _of_tile(cls, shared: SharedHosts, tile: int, messages: int, children: int) -> "Loads":
        rings, cutting = shared.rings, shared.cutting
        hosts = int(rings.hosts[tile])
        rows = cutting.needed_in(tile)
        numel = cutting.numel(rows)
        arcs, free = shared.arcs(rows)
        weights, total = numel[arcs.cell], max(int(numel.sum()), 1)
        part = float(numel[free].sum() / total)
        apart = cls.apart(hosts, messages, children)
        heard, sent, first = (np.zeros(hosts) for _ in range(3))
        for span in np.unique(arcs.spans[arcs.spans > 0]).tolist():
            of_span = arcs.spans == span
            begins = np.bincount(arcs.place[of_span], weights[of_span], hosts).astype(np.int64)
            entries = np.roll(begins, 1)
            first += entries
            heard += _ranges(entries, span)
            if children == 1 or hosts > FEW_HOSTS:
                sent += _ranges(begins, span)
            else:
                sent += begins + _handed_on(entries, span, children)
        longest = max(int(arcs.spans.max(initial=0)), hosts if len(free) else 0)
        return cls(
            longest,
            part,
            float(heard.max() / total) + part,
            float(sent.max() / total) + part * apart.handed_on,
            float(first.max() / total) + part * apart.first,
            _directly(rings, arcs, weights) / total,
        )


def _ranges(entries: np.ndarray, span: int) -> np.ndarray:
    """Of a circle, what enters each place and goes on to ``span`` places in all, summed up at each."""
    twice = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([entries, entries]))])
    at = np.arange(len(entries)) + len(entries) + 1
    found: np.ndarray = twice[at] - twice[at - span]
    return found


def _handed_on(entries: np.ndarray, span: int, children: int) -> np.ndarray:
    """Of a circle, what each place hands on, if what enters goes through trees of ``span`` places."""
    givers = np.maximum(np.arange(1, span) - 1, 0) // children
    counts = np.bincount(givers, minlength=span)
    sent = np.convolve(entries, counts)
    found = np.zeros(len(entries), np.int64)
    np.add.at(found, np.arange(len(sent)) % len(entries), sent)
    return found


def _directly(rings: Rings, arcs: Arcs, weights: np.ndarray) -> float:
    """What the busiest host sends if each replica on the hosts of arcs hears from where these begin."""
    if not len(arcs.cell):
        return 0.0
    tile = arcs.tile
    begin, behind = arcs.place + 1, arcs.place + arcs.spans + 1
    hosts = rings.hosts[tile]
    replicas = behind // hosts * rings.replicas + rings.firsts[tile, behind % hosts]
    replicas -= begin // hosts * rings.replicas + rings.firsts[tile, begin % hosts]
    return float(np.bincount(arcs.place, weights * replicas).max())
