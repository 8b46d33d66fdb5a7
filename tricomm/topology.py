"""Topology: which host a rank lives on, and how fast bytes leave and enter it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from tricomm.errors import SpecError

DEFAULT_NIC_BYTES_PER_SECOND = 12.5e9
DEFAULT_INTRA_BYTES_PER_SECOND = 200e9
DEFAULT_LATENCY_SECONDS = 20e-6


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts and the links between them.

    Args:
        hosts: one host name per rank of the process group.
        nic_bytes_per_second: rate of one NIC, in each direction.
        nics_per_host: NICs that the ranks of a host share.
        intra_bytes_per_second: rate between two ranks of one host.
        latency_seconds: from posting a message to its first byte.

    Raises:
        SpecError: no hosts, or a rate that is not positive.
    """

    hosts: tuple[str, ...]
    nic_bytes_per_second: float = DEFAULT_NIC_BYTES_PER_SECOND
    nics_per_host: int = 1
    intra_bytes_per_second: float = DEFAULT_INTRA_BYTES_PER_SECOND
    latency_seconds: float = DEFAULT_LATENCY_SECONDS

    def __post_init__(self) -> None:
        hosts = self.hosts
        if (
            isinstance(hosts, str)
            or not isinstance(hosts, Sequence)
            or not all(isinstance(host, str) for host in hosts)
        ):
            raise SpecError(f'hosts={hosts!r} must be one host name per rank; write ("a", "a", "b", "b")')
        if not hosts:
            raise SpecError("hosts is empty; give one host name per rank")
        object.__setattr__(self, "hosts", tuple(hosts))
        for name, example in (
            ("nic_bytes_per_second", "a rate such as 12.5e9"),
            ("intra_bytes_per_second", "a rate such as 200e9"),
            ("latency_seconds", "a time such as 20e-6"),
        ):
            value = getattr(self, name)
            rule = "at least 0" if name == "latency_seconds" else "above 0"
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < inf or (value == 0 and rule == "above 0"):
                raise SpecError(f"{name}={value!r} must be {rule}, a finite number; give {example}")
            # 10 and 10.0 are the same rate, and must have the same digest on all ranks.
            object.__setattr__(self, name, float(value))
        nics = self.nics_per_host
        if isinstance(nics, bool) or not isinstance(nics, int) or nics < 1:
            raise SpecError(f"nics_per_host={nics!r} must be above 0, an integer; give the NICs of one host")

    @classmethod
    def flat(cls, ranks: int) -> "Topology":
        """Every rank on a host of its own, at nominal rates: what is assumed when no topology is given."""
        return cls(tuple(f"rank{rank}" for rank in range(ranks)))

    @classmethod
    def detect(cls, group: Any = None, **rates: Any) -> "Topology":
        """Ask every rank of a process group for its host name. Every rank of the group must call.

        Args:
            group: a torch.distributed process group; None is the default one.
            rates: the other fields, which are not measured, e.g. ``nic_bytes_per_second=50e9``.
        """
        import socket

        import torch.distributed as dist

        hosts: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        return replace(cls(tuple(str(host) for host in hosts)), **rates)

    def host(self, rank: int) -> str:
        """The host of a rank."""
        return self.hosts[rank]

    def check_covers(self, ranks: Sequence[int]) -> None:
        """Refuse ranks for which no host is named.

        Raises:
            SpecError: a rank beyond the list of hosts.
        """
        highest = max(ranks)
        if highest >= len(self.hosts):
            raise SpecError(
                f"rank {highest} has no host: topology names {len(self.hosts)} hosts; give one host name per rank"
            )

    @property
    def host_bytes_per_second(self) -> float:
        """All NICs of a host together, in one direction."""
        return self.nic_bytes_per_second * self.nics_per_host
