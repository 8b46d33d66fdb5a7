"""A cluster emulated on this machine: hosts with NICs of a known rate, and processes as their devices.

    with Cluster.uniform(hosts=4, devices_per_host=2, nic_bits_per_second=400e6) as cluster, cluster.ranks() as ranks:
        print(calibrate(cluster, ranks))
        ranks.run(function, argument)           # function(rank, argument) on every rank

Ranks count through the devices of host 0, then those of host 1, and so on. On the command line:

    python -m bench.cluster run --hosts 4 --devices 4 --nic 400mbit [--rails N] -- COMMAND...
    python -m bench.cluster calibrate --hosts 4 --devices 4 --nic 400mbit [--rails N]
    python -m bench.cluster clean

Needs root and iproute2. Nothing outside of the namespaces that it makes is touched.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, TYPE_CHECKING

from bench.cluster import network
from bench.cluster.network import ClusterError, Host, Nic, Port

if TYPE_CHECKING:
    from tricomm.launch import Ranks

# What four hosts of a machine with two cores send and receive all at once at line rate, with time to spare.
DEFAULT_BITS_PER_SECOND = 400_000_000
# Of rank 0's own namespace, so always free.
MASTER_PORT = 29500
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
OUTPUT_SECONDS = 5.0


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

    def ranks(self, timeout_seconds: float = 300.0) -> "Ranks":
        """Start one process per device, each inside of its host; use as a context manager.

        They meet over the unshaped interfaces, so that the store does not disturb what is measured.
        """
        # Here, so that the command line, which may not need torch, starts at once.
        import torch.distributed as dist

        from tricomm.launch import Ranks

        with network.inside(f"{self.name}-{network.SWITCH}"):
            store = dist.TCPStore(network.SWITCH_ADDRESS, 0, is_master=True, wait_for_workers=False)
        return Ranks(
            self.size, timeout_seconds, wrap=_EnterSeat(self.seats), store=store, store_address=network.SWITCH_ADDRESS
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


def run_command(cluster: Cluster, command: Sequence[str]) -> int:
    """Run a command once per device inside of its host, with the variables that torchrun sets.

    Returns:
        0, or the exit code of the first that failed; the others are then ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    forwarders: list[threading.Thread] = []
    try:
        for seat in cluster.seats:
            # A session of its own: Ctrl-C reaches this process alone, which then ends all.
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **cluster.environment(seat)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=seat.enter,  # noqa: PLW1509 - no thread has been started yet
                )
            )
        for seat, process in zip(cluster.seats, processes, strict=True):
            assert process.stdout is not None
            forwarder = threading.Thread(target=_forward, args=(seat.rank, process.stdout), daemon=True)
            forwarder.start()
            forwarders.append(forwarder)
        code = _wait_for_all(processes)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"the command {command[0]!r} cannot be started: {error}") from error
    finally:
        _end(processes)
    for forwarder in forwarders:
        forwarder.join(OUTPUT_SECONDS)
    return code


def _forward(rank: int, lines: IO[bytes]) -> None:
    for line in lines:
        sys.stdout.buffer.write(b"[rank %d] %s\n" % (rank, line.rstrip(b"\r\n")))
        sys.stdout.buffer.flush()


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                print(f"rank {rank} ended with exit code {code}; ending the others", file=sys.stderr)
                # What a signal ended has a negative code here, and 128 more in a shell.
                return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and then make it."""
    deadline = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()) if number == signal.SIGTERM else None)


def parse_bits_per_second(text: str) -> int:
    """A rate as ``tc`` writes them: 400mbit, 1gbit, 1.5gbit, 64000kbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write a number and kbit, mbit or gbit, such as 400mbit")
    return round(float(found[1]) * {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}[found[2]])


def parse_nic(text: str) -> Nic:
    """``RATE``, or ``SEND/RECEIVE`` where they differ."""
    rates = [parse_bits_per_second(part) for part in text.split("/")]
    if len(rates) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(rates)} rates; a NIC has one, or SEND/RECEIVE")
    try:
        return Nic(rates[0], rates[-1])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_nics(text: str) -> list[Nic]:
    """NICs separated by commas."""
    return [parse_nic(part) for part in text.split(",")]


def parse_hosts(hosts: int, devices: int, nics: Sequence[Nic], rails: int) -> list[Host]:
    """What the options of the command line describe.

    Raises:
        ValueError: they do not fit together.
    """
    if hosts < 1:
        raise ValueError(f"--hosts {hosts} must be above 0")
    if rails < 1:
        raise ValueError(f"--rails {rails} must be above 0")
    if len(nics) not in (1, hosts):
        raise ValueError(f"--nic has {len(nics)} rates for {hosts} hosts; give one for all, or one for each")
    return [Host(devices, (nic,) * rails) for nic in (nics if len(nics) == hosts else [nics[0]] * hosts)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description="A cluster emulated on this machine.")
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run a command once per device, like torchrun")
    calibrate = actions.add_parser("calibrate", help="measure whether the NICs do what they promise")
    for action in (run, calibrate):
        action.add_argument("--hosts", type=int, default=4, help="how many (%(default)s)")
        action.add_argument("--devices", type=int, default=1, help="of each host (%(default)s)")
        action.add_argument(
            "--nic",
            type=parse_nics,
            default=f"{DEFAULT_BITS_PER_SECOND // 10**6}mbit",
            metavar="RATE[,RATE...]",
            help="of each NIC; one for all hosts or one per host; SEND/RECEIVE where they differ (%(default)s)",
        )
        action.add_argument("--rails", type=int, default=1, help="NICs of each host (%(default)s)")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    actions.add_parser("clean", help="remove what a crashed run has left")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.action == "clean":
            print("\n".join(f"removed {name}" for name in network.clean()) or "nothing to remove")
            return 0
        try:
            hosts = parse_hosts(options.hosts, options.devices, options.nic, options.rails)
            cluster = Cluster(hosts)
        except ValueError as error:
            parser.error(str(error))
        with cluster:
            return run_command(cluster, options.command) if options.action == "run" else _print_calibration(cluster)
    except ClusterError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _print_calibration(cluster: Cluster) -> int:
    from bench.cluster.calibrate import calibrate

    with cluster.ranks() as ranks:
        print(calibrate(cluster, ranks))
    return 0
