"""For how long bytes keep NICs and links busy: every "bytes / rate" of the planner stands here."""

from collections.abc import Iterable

import numpy as np

from tricomm.layout.topology import Topology
from tricomm.plan.network.links import Crossings, link_count


class NicSeconds:
    """The seconds for which NICs send, or receive, what was added so far.

    Args:
        topology: NICs and their rates.
        receiving: count at the rate at which NICs receive; otherwise at that at which they send.

    Example:
        >>> sending = NicSeconds(Topology(("a", "a", "b"), nic_bytes_per_second=1e6, nics_per_host=2))
        >>> sending.add(0, nbytes=500)
        >>> sending.add_evenly([0, 1], nbytes=3000)
        >>> sending.seconds
        {0: 0.002, 1: 0.0015}
        >>> sending.busiest
        0.002
    """

    def __init__(self, topology: Topology, receiving: bool = False) -> None:
        self.seconds: dict[int, float] = {}
        self._topology, self._receiving = topology, receiving

    def of(self, nic: int) -> float:
        """Seconds of one NIC."""
        return self.seconds.get(nic, 0.0)

    def after(self, nic: int, nbytes: float) -> float:
        """Seconds of one NIC if it carried so many bytes more."""
        return self.seconds.get(nic, 0.0) + nbytes / self._topology.nic_rate(nic)[self._receiving]

    def add(self, nic: int, nbytes: float) -> None:
        """Add bytes that a NIC carries."""
        self.seconds[nic] = self.after(nic, nbytes)

    def add_evenly(self, ranks: Iterable[int], nbytes: float) -> None:
        """Add bytes that the NICs of some ranks carry together, each an equal part."""
        nics = dict.fromkeys(map(self._topology.nic, ranks))
        for nic in nics:
            self.add(nic, nbytes / len(nics))

    @property
    def busiest(self) -> float:
        """Seconds of the busiest NIC."""
        return max(self.seconds.values(), default=0.0)

    def copy(self) -> "NicSeconds":
        """The same seconds, to go on from."""
        other = NicSeconds(self._topology, self._receiving)
        other.seconds = dict(self.seconds)
        return other


def host_rates(topology: Topology, ranks: Iterable[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes per second that the NICs of some ranks send and receive together, per host.

    Example:
        >>> host_rates(Topology(("a", "a", "b"), nic_bytes_per_second=1e6, nics_per_host=2), range(3))
        ({0: 2000000.0, 1: 1000000.0}, {0: 2000000.0, 1: 1000000.0})
    """
    sending: dict[int, float] = {}
    receiving: dict[int, float] = {}
    host_of = {topology.nic(rank): topology.host(rank) for rank in ranks}
    for nic in sorted(host_of):
        host, rate = host_of[nic], topology.nic_rate(nic)
        sending[host] = sending.get(host, 0.0) + rate.send_bytes_per_second
        receiving[host] = receiving.get(host, 0.0) + rate.receive_bytes_per_second
    return sending, receiving


def link_seconds(crossed: Crossings, nbytes: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Sum the seconds for which hops keep links busy, in the order of rows, so that all machines round alike.

    Args:
        crossed: the links of each hop.
        nbytes: (hops,), what each carries.
        topology: of all ranks.

    Returns:
        (NICs + ranks,) seconds of the links that hops leave by: NICs, and after them, for copies within a host, ranks;
        and as many of the links that they enter by.
    """
    count = link_count(topology)
    out_seconds, into_seconds = crossed.seconds(nbytes)
    busy = np.bincount(crossed.out, out_seconds, count)
    busy += np.bincount(crossed.into, into_seconds, count)
    return busy[: count // 2], busy[count // 2 :]
