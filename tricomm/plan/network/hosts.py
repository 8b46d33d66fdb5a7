"""Ranks by host or NIC."""

from collections.abc import Callable, Iterable, Sequence

from tricomm.layout.topology import Topology

Hosts = tuple[tuple[int, ...], ...]
"""Some ranks of several hosts, host by host."""


def grouped(ranks: Iterable[int], number_of: Callable[[int], int]) -> Hosts:
    """Group ranks that have the same number, in the order of the first of each group."""
    groups: dict[int, list[int]] = {}
    for rank in ranks:
        groups.setdefault(number_of(rank), []).append(rank)
    return tuple(map(tuple, groups.values()))


def by_host(ranks: Iterable[int], topology: Topology) -> Hosts:
    """Group ranks by host, hosts in the order of their first rank.

    Example:
        >>> by_host([4, 1, 5, 0], Topology(("a", "a", "a", "b", "b", "b")))
        ((4, 5), (1, 0))
    """
    return grouped(ranks, topology.host)


class HostsOf(dict[tuple[int, ...], Hosts]):
    """Looks up ranks by host; many tasks have the same ranks, which are then grouped once.

    Example:
        >>> HostsOf(Topology(("a", "a", "b")))[0, 2, 1]
        ((0, 1), (2,))
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self._topology = topology

    def __missing__(self, ranks: tuple[int, ...]) -> Hosts:
        self[ranks] = hosts = by_host(ranks, self._topology)
        return hosts


def other_hosts(hosts: Sequence[tuple[int, ...]], rank: int, topology: Topology) -> Hosts:
    """Leave out the host that a rank is on.

    Example:
        >>> other_hosts(((4, 5), (1, 0)), 3, Topology(("a", "a", "a", "b", "b", "b")))
        ((1, 0),)
    """
    here = topology.host(rank)
    return tuple([ranks for ranks in hosts if topology.host(ranks[0]) != here])
