"""Links: find what hops share, and list the links of messages' chains, as columns of integers.

A link is a NIC in one direction or, within a host, one rank's end of a copy. Where the copies within a host share its
memory, they leave by that: whoever reads is busy, and whose bytes are read is not.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import numbers, offsets_of
from tricomm.layout.topology import Topology


class Crossings(NamedTuple):
    """The links that some hops occupy, each field (hops,).

    Attributes:
        out, into: numbers of the links by which each leaves and enters.
        out_rates, into_rates: their bytes per second.
    """

    out: np.ndarray
    into: np.ndarray
    out_rates: np.ndarray
    into_rates: np.ndarray

    def seconds(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For how long each hop keeps the link by which it leaves busy, and that by which it enters, (hops,) each."""
        return nbytes / self.out_rates, nbytes / self.into_rates


def crossings(sources: np.ndarray, destinations: np.ndarray, topology: Topology) -> Crossings:
    """Find the links between pairs of ranks. Numbers are below ``link_count(topology)``.

    Example:
        One hop within a host, one to another:

        >>> found = crossings(np.array([0, 0]), np.array([1, 2]), Topology(("a", "a", "b"), 1e9))
        >>> found.out.tolist(), found.into.tolist(), found.out_rates.tolist()
        ([2, 0], [8, 6], [200000000000.0, 1000000000.0])
    """
    nics = topology.nic_numbers
    count, ranks = len(topology.nic_send_rates), len(nics)
    shared = topology.share_host(sources, destinations)
    intra, memory = topology.intra_bytes_per_second, topology.memory_bytes_per_second
    out, into = nics[sources], nics[destinations]
    left = sources if memory is None else topology.host_numbers[sources]
    return Crossings(
        np.where(shared, count + left, out),
        np.where(shared, count + destinations, into) + count + ranks,
        np.where(shared, memory or intra, topology.nic_send_rates[out]),
        np.where(shared, intra, topology.nic_receive_rates[into]),
    )


def link_count(topology: Topology) -> int:
    """Count the links of a topology: NICs and ranks, in two directions."""
    return 2 * (len(topology.nic_send_rates) + len(topology.nic_numbers))


class ChainLinks(NamedTuple):
    """Every link of some chains of ranks, chain after chain, each from its sender on.

    Attributes:
        chain: (links,), which chain each is of, ascending.
        sources, destinations: (links,), the ranks at its ends.
        firsts: (chains,), the row of each chain's first link.

    Example:
        >>> links = ChainLinks.of([(0, 2, 3), (1, 3)])
        >>> links.chain.tolist(), links.sources.tolist(), links.destinations.tolist(), links.firsts.tolist()
        ([0, 0, 1], [0, 2, 1], [2, 3, 3], [0, 2])
    """

    chain: np.ndarray
    sources: np.ndarray
    destinations: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, chains: Sequence[Sequence[int]], parents: Sequence[Sequence[int] | None] | None = None) -> "ChainLinks":
        """List the links of chains of two ranks or more.

        Args:
            chains: the ranks of each.
            parents: for each, the place of the rank from which each receiver hears; None is the one before it.
        """
        counts = numbers(map(len, chains), len(chains))
        ranks = numbers(chain.from_iterable(chains), int(counts.sum()))
        is_source, is_destination = np.ones((2, len(ranks)), bool)
        ends = np.cumsum(counts)
        is_source[ends - 1] = False
        is_destination[ends - counts] = False
        links = counts - 1
        of_link, firsts = np.repeat(np.arange(len(chains)), links), offsets_of(links)[:-1]
        sources = ranks[is_source]
        for row, places in enumerate(parents or ()):
            if places is not None:
                sources[firsts[row] : firsts[row] + links[row]] = [chains[row][place] for place in places]
        return cls(of_link, sources, ranks[is_destination], firsts)

    @property
    def lasts(self) -> np.ndarray:
        """The row of each chain's last link, (chains,)."""
        return np.append(self.firsts[1:], len(self.chain)) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Count the links of each chain, (chains,)."""
        return np.bincount(self.chain, minlength=len(self.firsts))
