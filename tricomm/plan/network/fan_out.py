"""Fan-out: how often a strategy sends a task over a NIC, and who forwards it."""

from collections.abc import Sequence
from enum import Enum

from tricomm.plan.network.hosts import Hosts


class FanOut(Enum):
    """How often a strategy puts a task on its sender's NIC; the rest is forwarded by receivers.

    Example:
        Two receivers on host b and two on host c, none of them on the sender's:

        >>> [(fan_out.name, fan_out.sends(((2, 3), (4, 5)))) for fan_out in FanOut]
        [('EVERY_RANK', 4), ('EVERY_HOST', 2), ('ONCE', 1)]
    """

    EVERY_RANK = "once for every receiver on another host"
    EVERY_HOST = "once for every other host"
    ONCE = "once; each host but the last forwards it"

    @property
    def hosts_forward(self) -> bool:
        """True if receiving hosts send a task on to each other."""
        return self is FanOut.ONCE

    def sends(self, others: Sequence[tuple[int, ...]]) -> int:
        """Count how often the sender's NIC sends a task to its receivers on other hosts."""
        return min(self.crossings(others), 1) if self.hosts_forward else self.crossings(others)

    def least_sends(self, hosts: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]) -> int:
        """Count how often the sender's NIC surely sends a task, to receivers on ``hosts``, of which ``others`` are not
        its own: a chain that enters its own host may leave by the NIC of a receiver there.
        """
        return 0 if self.hosts_forward and len(others) < len(hosts) else self.sends(others)

    def crossings(self, others: Sequence[tuple[int, ...]]) -> int:
        """Count how often a task enters a NIC in all, whoever sends it."""
        return sum(map(len, others)) if self is FanOut.EVERY_RANK else len(others)

    def forwarding(self, others: Hosts) -> Hosts:
        """List the hosts that send a task on, which visits ``others`` in this order."""
        return others[:-1] if self.hosts_forward else ()

    def chain_links(self, hosts: Sequence[tuple[int, ...]]) -> int:
        """Count the links of a task's longest chain: to one receiver, to all of a host, or to all."""
        if self is FanOut.EVERY_RANK:
            return 1
        return max(map(len, hosts)) if self is FanOut.EVERY_HOST else sum(map(len, hosts))
