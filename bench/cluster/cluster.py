"""A cluster emulated on this machine: hosts with NICs of a known rate, and processes as their devices.

    with Cluster.uniform(hosts=4, devices_per_host=2, nic_bits_per_second=400e6) as cluster, cluster.ranks() as ranks:
        print(calibrate(cluster, ranks))
        ranks.run(function, argument)           # function(rank, argument) on every rank

Ranks count through the devices of host 0, then those of host 1, and so on. Needs root and iproute2. Nothing outside of
the namespaces that it makes is touched.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from bench.cluster import network
from bench.cluster.network import ClusterError, Host, Nic, Port

if TYPE_CHECKING:
    from tricomm.launch import Ranks

# Of rank 0's own namespace, so always free.
MASTER_PORT = 29500


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the process of one rank runs.

    Attributes:
        rank: of the process.
        local_rank: its device on its host.
        host: the number of the host.
        port: the NIC that it uses.
    """

    rank: int
    local_rank: int
    host: int
    port: Port

    @property
    def host_name(self) -> str:
        """What ``socket.gethostname()`` says there."""
        return f"host{self.host}"

    def enter(self) -> None:
        """Move the calling process there; to be called before it has threads or sockets."""
        network.enter(self.port.namespace)
        network.name_host(self.host_name)


@dataclass(frozen=True, slots=True)
class _EnterSeat:
    """Called in each new process of :class:`Ranks`."""

    seats: tuple[Seat, ...]

    def __call__(self, rank: int) -> None:
        self.seats[rank].enter()
        os.environ["GLOO_SOCKET_IFNAME"] = network.NIC


class Cluster:
    """Emulated hosts; they exist inside of the ``with`` block.

    Args:
        hosts: one :class:`Host` each; they may differ.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = tuple(hosts)
        self.name = network.new_name()
        self.ports = network.ports_of(self.name, self.hosts)
        self.seats = tuple(_seats(self.hosts, self.ports))

    @classmethod
    def uniform(
        cls,
        hosts: int,
        devices_per_host: int,
        nic_bits_per_second: float,
        nics_per_host: int = 1,
        has_links: bool = False,
    ) -> "Cluster":
        """Equal hosts with equal NICs; see :class:`Host`."""
        nics = (Nic.symmetric(nic_bits_per_second),) * nics_per_host
        return cls([Host(devices_per_host, nics, has_links)] * hosts)

    def __enter__(self) -> "Cluster":
        reason = network.missing()
        if reason is not None:
            raise ClusterError(reason)
        network.clean()
        with ExitStack() as stack:
            stack.enter_context(_signals_unwind())
            stack.callback(self._remove)
            network.create(self.name, self.ports)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _remove(self) -> None:
        with _signals_wait():
            network.remove(network.namespaces(self.name))

    @property
    def size(self) -> int:
        """How many devices, and so ranks, there are."""
        return len(self.seats)

    @property
    def host_names(self) -> tuple[str, ...]:
        """The host of each rank, as ``Topology(hosts=...)`` takes it."""
        return tuple(seat.host_name for seat in self.seats)

    def rank_of(self, port: Port) -> int:
        """The first rank that uses a NIC."""
        return next(seat.rank for seat in self.seats if seat.port == port)

    def environment(self, seat: Seat) -> dict[str, str]:
        """The variables that torchrun sets, and the one that leads gloo to the NIC."""
        devices = self.hosts[seat.host].devices
        return {
            "RANK": str(seat.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(seat.local_rank),
            "LOCAL_WORLD_SIZE": str(devices),
            "GROUP_RANK": str(seat.host),
            # The unshaped interface: the store does not disturb what is measured.
            "MASTER_ADDR": self.seats[0].port.back_address,
            "MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": network.NIC,
        }

    def ranks(self, timeout_seconds: float = 300.0, preload: Sequence[str] = ("bench.cluster.flows",)) -> "Ranks":
        """Start one process per device, each inside of its host; use as a context manager.

        They are forked from one that has imported the modules of ``preload``: by itself, each would import torch.

        They meet over the unshaped interfaces, so that the store does not disturb what is measured.
        """
        # Here, so that the command line, which may not need torch, starts at once.
        import torch.distributed as dist

        from tricomm.launch import Ranks

        with network.inside(f"{self.name}-{network.SWITCH}"):
            store = dist.TCPStore(network.SWITCH_ADDRESS, 0, is_master=True, wait_for_workers=False)
        return Ranks(
            self.size,
            timeout_seconds,
            wrap=_EnterSeat(self.seats),
            store=store,
            store_address=network.SWITCH_ADDRESS,
            preload=preload,
        )


def _seats(hosts: Sequence[Host], ports: Sequence[Port]) -> Iterator[Seat]:
    rank = 0
    for number, host in enumerate(hosts):
        own = [port for port in ports if port.host == number]
        for device in range(host.devices):
            yield Seat(rank, device, number, own[device % len(own)])
            rank += 1


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """A signal that would end the process at once raises SystemExit instead, so that ``with`` blocks clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, unwind) for number in SIGNALS[1:]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that come during the block take effect after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
