"""Topology: which host and NIC a rank uses, and how fast bytes leave and enter it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple, TypedDict, Unpack, get_type_hints

import numpy as np

from tricomm.errors import ArgumentError, SpecError, describe_unknown, shown
from tricomm.kinds import explains_missing

DEFAULT_NIC_BYTES_PER_SECOND = 12.5e9
DEFAULT_INTRA_BYTES_PER_SECOND = 200e9
DEFAULT_LATENCY_SECONDS = 20e-6
DEFAULT_OVERHEAD_SECONDS = 20e-6
MAX_RANKS = 1 << 24
"""Of a flat topology: more is a mistake, and would only fill the memory."""
MAX_NICS_PER_HOST = 1 << 10


class NicRate(NamedTuple):
    """What one NIC carries in each direction at once."""

    send_bytes_per_second: float
    receive_bytes_per_second: float


Rate = float | tuple[float, float]
"""A rate in both directions, or (sending, receiving)."""


class Rates(TypedDict, total=False):
    """What ``Topology.detect`` does not measure."""

    nic_bytes_per_second: float | Mapping[str, Rate]
    nics_per_host: int
    intra_bytes_per_second: float
    latency_seconds: float
    overhead_seconds: float
    memory_bytes_per_second: float | None
    multicast_hop_seconds: float | None


@explains_missing
@dataclass(frozen=True, slots=True, init=False)
class Topology:
    """Say which ranks share a host and a NIC, and how fast bytes leave and enter it.

    Args:
        hosts: one host name per rank of the process group.
        nic_bytes_per_second: rate of one NIC: a number, or {host: number}, or {host: (sending, receiving)} with an
            entry for every host.
        nics_per_host: NICs of a host. Rank i of a host (in the order of ranks) uses NIC i modulo this: 1 is a NIC
            that all share, as many as devices is a NIC for each (rails).
        intra_bytes_per_second: rate between two ranks of one host.
        memory_bytes_per_second: what all copies within one host move together, for ranks that read each other's memory:
            5e9 to 10e9 on most machines. None leaves each its own rate, as links between GPUs do.
        latency_seconds: from posting a message to its first byte.
        overhead_seconds: for which a message keeps the rank that sends it busy (LogP's o).
        multicast_hop_seconds: how much longer a broadcast in one call takes for each rank that it goes to, for ranks
            that have such calls. None leaves it to a Resharder, which knows whether it has NCCL; a plan has none.

    Raises:
        SpecError: no hosts, a rate that is not positive, or a host without a rate; an ArgumentError where an argument
            is of the wrong kind.

    Example:
        >>> topology = Topology(["a", "a", "b", "b"], nic_bytes_per_second={"a": 25e9, "b": (50e9, 12.5e9)})
        >>> topology.host(2), topology.nic(3), topology.nic_rate(1).receive_bytes_per_second
        (1, 1, 12500000000.0)
        >>> print(Topology.flat(8))
        8 ranks on 8 hosts, a NIC of 12.5 GB/s on each; latency 20 us
    """

    hosts: tuple[str, ...]
    nic_bytes_per_second: float | tuple[tuple[str, NicRate], ...]
    nics_per_host: int
    intra_bytes_per_second: float
    latency_seconds: float
    overhead_seconds: float
    memory_bytes_per_second: float | None
    multicast_hop_seconds: float | None
    _host_of: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _nic_of: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _nic_rates: tuple[NicRate, ...] = field(init=False, repr=False, compare=False)
    host_numbers: np.ndarray = field(init=False, repr=False, compare=False)
    """The host of each rank, as ``host`` says."""
    nic_numbers: np.ndarray = field(init=False, repr=False, compare=False)
    """The NIC of each rank, as ``nic`` says."""
    nic_send_rates: np.ndarray = field(init=False, repr=False, compare=False)
    nic_receive_rates: np.ndarray = field(init=False, repr=False, compare=False)
    """Of each NIC, as ``nic_rate`` says."""

    def __init__(
        self,
        hosts: Sequence[str],
        nic_bytes_per_second: float | Mapping[str, Rate] | tuple[tuple[str, Rate], ...] = DEFAULT_NIC_BYTES_PER_SECOND,
        nics_per_host: int = 1,
        intra_bytes_per_second: float = DEFAULT_INTRA_BYTES_PER_SECOND,
        latency_seconds: float = DEFAULT_LATENCY_SECONDS,
        overhead_seconds: float = DEFAULT_OVERHEAD_SECONDS,
        memory_bytes_per_second: float | None = None,
        multicast_hop_seconds: float | None = None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "hosts", _checked_hosts(hosts))
        # 10 and 10.0 are the same rate, and must have the same digest on all ranks.
        set_field(self, "intra_bytes_per_second", _checked_number("intra_bytes_per_second", intra_bytes_per_second))
        set_field(self, "latency_seconds", _checked_number("latency_seconds", latency_seconds))
        set_field(self, "overhead_seconds", _checked_number("overhead_seconds", overhead_seconds))
        optional = {
            "memory_bytes_per_second": memory_bytes_per_second,
            "multicast_hop_seconds": multicast_hop_seconds,
        }
        for name, value in optional.items():
            set_field(self, name, None if value is None else _checked_number(name, value))
        set_field(self, "nics_per_host", _checked_nics(nics_per_host))
        names = tuple(dict.fromkeys(self.hosts))
        rates = _checked_rates(nic_bytes_per_second, names)
        set_field(self, "nic_bytes_per_second", rates if isinstance(rates, float) else tuple(rates.items()))
        self._number_hosts_and_nics(names, rates)

    def _number_hosts_and_nics(self, names: Sequence[str], rates: float | dict[str, NicRate]) -> None:
        set_field = object.__setattr__
        nics = self.nics_per_host
        index = {name: number for number, name in enumerate(names)}
        host_of = tuple(index[name] for name in self.hosts)
        seen = [0] * len(names)
        nic_of: list[int] = []
        for host in host_of:
            nic_of.append(host * nics + seen[host] % nics)
            seen[host] += 1
        set_field(self, "_host_of", host_of)
        set_field(self, "_nic_of", tuple(nic_of))
        per_host = [NicRate(rates, rates) if isinstance(rates, float) else rates[name] for name in names]
        set_field(self, "_nic_rates", tuple(rate for rate in per_host for _ in range(nics)))
        set_field(self, "host_numbers", np.array(host_of, np.int64))
        set_field(self, "nic_numbers", np.array(nic_of, np.int64))
        sends, receives = zip(*self._nic_rates, strict=True)
        set_field(self, "nic_send_rates", np.array(sends))
        set_field(self, "nic_receive_rates", np.array(receives))

    @classmethod
    @explains_missing
    def flat(cls, ranks: int) -> "Topology":
        """Put every rank on a host of its own, at nominal rates: what is assumed when no topology is given.

        Raises:
            SpecError: no ranks; an ArgumentError where that is no integer.

        Example:
            >>> Topology.flat(2).hosts
            ('rank0', 'rank1')
        """
        if not isinstance(ranks, int) or isinstance(ranks, bool):
            raise ArgumentError(f"ranks={shown(ranks)} is not a number of ranks; write an integer above 0")
        if not 0 < ranks <= MAX_RANKS:
            raise SpecError(f"ranks={shown(ranks)} must be from 1 to {MAX_RANKS}; write how many ranks there are")
        return _flat(ranks)

    @classmethod
    def detect(cls, group: Any = None, **rates: Unpack[Rates]) -> "Topology":
        """Ask every rank of a process group for its host name. Every rank of the group must call.

        ::

            topology = Topology.detect(nic_bytes_per_second=50e9)  # by every rank
            mover = tricomm.Resharder(source, destination, topology=topology)

        Args:
            group: a torch.distributed process group; None is the default one.
            rates: the other fields, which are not measured, e.g. ``nic_bytes_per_second=50e9``.

        Raises:
            SpecError: a rate that breaks a rule; an ArgumentError where there is no such field.
        """
        import torch.distributed as dist

        for name in rates:
            if name not in get_type_hints(Rates):
                raise ArgumentError(describe_unknown(name, "Topology.detect", get_type_hints(Rates)))
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ArgumentError(f"group={shown(group)} is not a process group; pass what new_group gave, or None")
        if not dist.is_initialized():
            raise SpecError("there is no process group to ask; call torch.distributed.init_process_group first")
        import socket

        hosts: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        return cls(tuple(str(host) for host in hosts), **rates)

    def __str__(self) -> str:
        hosts = len(set(self._host_of))
        nics = "a NIC" if self.nics_per_host == 1 else f"{self.nics_per_host} NICs"
        rates = {rate for pair in self._nic_rates for rate in pair}
        slow, fast = (f"{rate / 1e9:.4g}" for rate in (min(rates), max(rates)))
        within = f", {self.intra_bytes_per_second / 1e9:.4g} GB/s within a host" if hosts < len(self.hosts) else ""
        if within and self.memory_bytes_per_second is not None:
            within += f" ({self.memory_bytes_per_second / 1e9:.4g} in all)"
        ranks = "1 rank" if len(self.hosts) == 1 else f"{len(self.hosts)} ranks"
        return (
            f"{ranks} on {hosts} host{'s' if hosts > 1 else ''}, {nics} of "
            f"{slow if slow == fast else f'{slow} to {fast}'} GB/s on each{within}; "
            f"latency {self.latency_seconds * 1e6:.4g} us"
        )

    def host(self, rank: int) -> int:
        """Return the number of a rank's host: hosts are counted in the order in which ``hosts`` first names them.

        >>> topology = Topology(["a", "a", "b"])
        >>> [topology.host(rank) for rank in range(3)]
        [0, 0, 1]
        """
        try:
            if rank >= 0:
                return self._host_of[rank]
        except (IndexError, TypeError, ValueError, RuntimeError):
            pass
        raise _unknown("rank", rank, len(self.hosts))

    def nic(self, rank: int) -> int:
        """Return the number of the NIC that a rank uses; NICs are counted host by host.

        >>> topology = Topology(["a", "a", "b", "b"], nics_per_host=2)
        >>> [topology.nic(rank) for rank in range(4)]
        [0, 1, 2, 3]
        """
        try:
            if rank >= 0:
                return self._nic_of[rank]
        except (IndexError, TypeError, ValueError, RuntimeError):
            pass
        raise _unknown("rank", rank, len(self.hosts))

    def nic_rate(self, nic: int) -> NicRate:
        """Return the rates of a NIC.

        >>> topology = Topology(["a", "b"], nic_bytes_per_second={"a": 25e9, "b": (50e9, 12.5e9)})
        >>> topology.nic_rate(topology.nic(1))
        NicRate(send_bytes_per_second=50000000000.0, receive_bytes_per_second=12500000000.0)
        """
        try:
            if nic >= 0:
                return self._nic_rates[nic]
        except (IndexError, TypeError, ValueError, RuntimeError):
            pass
        raise _unknown("nic", nic, len(self._nic_rates))

    def share_host(self, senders: np.ndarray, receivers: np.ndarray) -> np.ndarray:
        """Whether each sender is on the same host as the receiver beside it.

        >>> Topology(["a", "a", "b"]).share_host(np.array([0, 0]), np.array([1, 2])).tolist()  # 0 to 1, 0 to 2
        [True, False]
        """
        shared: np.ndarray = self.host_numbers[senders] == self.host_numbers[receivers]
        return shared

    def rates_between(self, senders: np.ndarray, receivers: np.ndarray) -> np.ndarray:
        """Bytes per second at which each sender could reach the receiver beside it if nothing else travelled.

        >>> topology = Topology(["a", "a", "b"], nic_bytes_per_second=25e9, intra_bytes_per_second=200e9)
        >>> topology.rates_between(np.array([0, 0]), np.array([1, 2])).tolist()  # 0 to 1, 0 to 2
        [200000000000.0, 25000000000.0]
        """
        rates = self.nic_send_rates[self.nic_numbers[senders]]
        within = min(self.intra_bytes_per_second, self.memory_bytes_per_second or inf)
        return np.where(self.share_host(senders, receivers), within, rates)

    def check_covers(self, ranks: Sequence[int]) -> None:
        """Refuse ranks for which no host is named.

        Raises:
            SpecError: a rank beyond the list of hosts.

        Example:
            >>> Topology.flat(2).check_covers([0, 1, 2])
            Traceback (most recent call last):
            tricomm.errors.SpecError: rank 2 has no host: topology names 2 hosts; give one host name per rank
        """
        kinds = {*map(type, ranks)} if isinstance(ranks, Sequence) and not isinstance(ranks, str) else {str}
        if not all(issubclass(kind, int) for kind in kinds):
            raise ArgumentError(f"ranks={shown(ranks)} is not a sequence of ranks; write [0, 1]")
        highest = max(ranks, default=-1)
        if highest >= len(self.hosts):
            raise SpecError(
                f"rank {highest} has no host: topology names {len(self.hosts)} hosts; give one host name per rank"
            )


@lru_cache(maxsize=8)
def _flat(ranks: int) -> Topology:
    return Topology(tuple(f"rank{rank}" for rank in range(ranks)))


def _unknown(name: str, value: object, count: int) -> SpecError:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        return ArgumentError(f"{name}={shown(value)} is not an integer; write one from 0 to {count - 1}")
    return SpecError(f"{name}={shown(value)} is none of this topology, which has {count}; use 0 to {count - 1}")


def _checked_hosts(hosts: object) -> tuple[str, ...]:
    if isinstance(hosts, str) or not isinstance(hosts, Sequence) or not all(isinstance(host, str) for host in hosts):
        raise ArgumentError(f'hosts={shown(hosts)} must be one host name per rank; write ("a", "a", "b", "b")')
    if not hosts:
        raise SpecError("hosts is empty; give one host name per rank")
    return tuple(hosts)


def _checked_nics(nics: object) -> int:
    is_number = isinstance(nics, int) and not isinstance(nics, bool)
    if not is_number or not 0 < nics <= MAX_NICS_PER_HOST:  # type: ignore[operator]
        error = SpecError if is_number else ArgumentError
        raise error(
            f"nics_per_host={shown(nics)} must be above 0, an integer up to {MAX_NICS_PER_HOST}; give the NICs of "
            "one host"
        )
    return int(nics)  # type: ignore[call-overload, no-any-return]


def _checked_number(name: str, value: object) -> float:
    is_time = name.endswith("_seconds")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < inf or (value == 0 and not is_time):  # type: ignore[operator]
        rule, example = ("at least 0", "a time such as 20e-6") if is_time else ("above 0", "a rate such as 12.5e9")
        error = SpecError if is_number else ArgumentError
        raise error(f"{name}={shown(value)} must be {rule}, a finite number; give {example}")
    return float(value)  # type: ignore[arg-type]


def _checked_rates(given: object, names: Sequence[str]) -> float | dict[str, NicRate]:
    """One rate for every NIC, or one pair of rates per host."""
    if isinstance(given, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
        given = dict(given)  # as __init__ leaves it, for dataclasses.replace
    if not isinstance(given, Mapping):
        return _checked_number("nic_bytes_per_second", given)
    missing = [name for name in names if name not in given]
    if missing:
        raise SpecError(
            f"nic_bytes_per_second={dict(given)!r} has no rate for host {missing[0]!r}; give one for every host, "
            "or one number for all"
        )
    rates: dict[str, NicRate] = {}
    for name in names:
        pair = given[name] if isinstance(given[name], tuple) else (given[name], given[name])
        if len(pair) != 2:
            raise SpecError(
                f"nic_bytes_per_second={pair!r} of host {name!r} must be a rate or (sending, receiving); give two rates"
            )
        rates[name] = NicRate(*(_checked_number("nic_bytes_per_second", rate) for rate in pair))
    return rates
