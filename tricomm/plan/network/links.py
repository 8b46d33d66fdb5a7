"""Links: what hops share, and the links of messages' chains as columns of integers.

A link is a NIC in one direction or, within a host, one rank's end of a copy.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import numbers, offsets_of
from tricomm.layout.topology import Topology


class Crossings(NamedTuple):
    """What some hops occupy, a row for each.

    Attributes:
        out, into: numbers of the links by which it leaves and enters.
        out_rates, into_rates: their bytes per second.
    """

    out: np.ndarray
    into: np.ndarray
    out_rates: np.ndarray
    into_rates: np.ndarray

    def seconds(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For how long each hop keeps the link by which it leaves busy, and the one by which it enters."""
        return nbytes / self.out_rates, nbytes / self.into_rates


def crossings(sources: np.ndarray, destinations: np.ndarray, topology: Topology) -> Crossings:
    """The links between pairs of ranks. Numbers are below ``link_count(topology)``."""
    nics = topology.nic_numbers
    count, ranks = len(topology.nic_send_rates), len(nics)
    shared = topology.share_host(sources, destinations)
    intra = topology.intra_bytes_per_second
    out, into = nics[sources], nics[destinations]
    return Crossings(
        np.where(shared, count + sources, out),
        np.where(shared, count + destinations, into) + count + ranks,
        np.where(shared, intra, topology.nic_send_rates[out]),
        np.where(shared, intra, topology.nic_receive_rates[into]),
    )


def link_count(topology: Topology) -> int:
    """How many numbers links have."""
    return 2 * (len(topology.nic_send_rates) + len(topology.nic_numbers))


class ChainLinks(NamedTuple):
    """Every link of some chains of ranks, chain after chain, each from its sender on.

    Attributes:
        chain: which chain it is of, ascending.
        sources, destinations: the ranks at its ends.
        firsts: (chains,), the row of each chain's first link.
    """

    chain: np.ndarray
    sources: np.ndarray
    destinations: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, chains: Sequence[Sequence[int]]) -> "ChainLinks":
        """Of chains of two ranks or more."""
        counts = numbers(map(len, chains), len(chains))
        ranks = numbers(chain.from_iterable(chains), int(counts.sum()))
        is_source, is_destination = np.ones((2, len(ranks)), bool)
        ends = np.cumsum(counts)
        is_source[ends - 1] = False
        is_destination[ends - counts] = False
        links = counts - 1
        return cls(
            np.repeat(np.arange(len(chains)), links), ranks[is_source], ranks[is_destination], offsets_of(links)[:-1]
        )

    @property
    def lasts(self) -> np.ndarray:
        """(chains,), the row of each chain's last link."""
        return np.append(self.firsts[1:], len(self.chain)) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Links of each chain."""
        return np.bincount(self.chain, minlength=len(self.firsts))
