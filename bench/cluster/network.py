"""Emulated hosts out of network namespaces: the ``ip`` and ``tc`` commands that make them, and how to enter one.

One namespace per NIC. gloo does not bind the sockets that it connects, so in a namespace with several NICs the
kernel's routes would choose one of them, whatever the device; with one NIC there is nothing to choose. Devices that
share a NIC share its namespace and reach each other over its loopback. Every namespace has two interfaces, plugged
into two bridges in a namespace of their own, so that the machine's own network is never touched:

    nic0    the shaped NIC, on the bridge "data"
    back0   unshaped, on the bridge "back": to the other NICs of the same host, and to the rendezvous store

The data NIC is shaped on both of its ends, since a queue only shapes what leaves it: on ``nic0`` what the host
sends, on the bridge's port what it receives.
"""

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.cluster.shaping import MTU_BYTES, kernel_settings, shaping_lines

NETNS_DIRECTORY = Path("/run/netns")
PREFIX = "tricomm"
NIC = "nic0"
BACKPLANE = "back0"
SWITCH = "switch"

CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000
MAX_HOSTS = 250
MAX_NICS = 250
LEAST_BITS_PER_SECOND = 1_000_000


class ClusterError(RuntimeError):
    """The emulated cluster cannot be made, or does not behave as it should."""


@dataclass(frozen=True, slots=True)
class Nic:
    """The rate of one NIC in each direction, in bits per second on the wire, headers included."""

    send_bits_per_second: int
    receive_bits_per_second: int

    def __post_init__(self) -> None:
        for name in ("send_bits_per_second", "receive_bits_per_second"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < LEAST_BITS_PER_SECOND:
                raise ValueError(
                    f"{name}={value!r} must be an integer of at least {LEAST_BITS_PER_SECOND}; "
                    "give bits per second, such as 400_000_000"
                )

    @classmethod
    def symmetric(cls, bits_per_second: float) -> "Nic":
        """The same rate in both directions."""
        return cls(round(bits_per_second), round(bits_per_second))


@dataclass(frozen=True, slots=True)
class Host:
    """A host: device d sends and receives through NIC ``d % len(nics)``.

    With ``has_links`` the rate of a NIC is that of a link of its own to each NIC of the other hosts.
    """

    devices: int
    nics: tuple[Nic, ...]
    has_links: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.devices, bool) or not isinstance(self.devices, int) or self.devices < 1:
            raise ValueError(f"devices={self.devices!r} must be an integer above 0; give the devices of one host")
        if not 1 <= len(self.nics) <= min(self.devices, MAX_NICS):
            raise ValueError(
                f"a host with {self.devices} devices has {len(self.nics)} NICs; every NIC needs a device that uses "
                f"it, so give 1 to {min(self.devices, MAX_NICS)} NICs"
            )


@dataclass(frozen=True, slots=True)
class Port:
    """One NIC of one host: its namespace, its place on both bridges, its addresses."""

    namespace: str
    host: int
    index: int
    nic: Nic
    has_links: bool = False

    @property
    def data_port(self) -> str:
        """The other end of the NIC, in the switch."""
        return f"d{self.host}n{self.index}"

    @property
    def back_port(self) -> str:
        """The other end of the unshaped interface, in the switch."""
        return f"b{self.host}n{self.index}"

    @property
    def data_address(self) -> str:
        """On the shaped NIC."""
        return f"10.77.{self.index}.{self.host + 1}"

    @property
    def back_address(self) -> str:
        """On the unshaped interface."""
        return f"10.78.{self.index}.{self.host + 1}"


SWITCH_ADDRESS = "10.78.254.254"


def new_name() -> str:
    """The common beginning of the namespaces of one cluster; it tells which process owns them."""
    return f"{PREFIX}-{os.getpid()}-{_start_ticks(os.getpid())}-{secrets.token_hex(2)}"


def ports_of(name: str, hosts: Sequence[Host]) -> list[Port]:
    """Every NIC of every host."""
    if not 1 <= len(hosts) <= MAX_HOSTS:
        raise ValueError(f"{len(hosts)} hosts; a cluster has 1 to {MAX_HOSTS}")
    return [
        Port(f"{name}-host{host}-nic{index}", host, index, nic, described.has_links)
        for host, described in enumerate(hosts)
        for index, nic in enumerate(described.nics)
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """Lines for one call of ``ip`` or ``tc`` inside a namespace ("" is the machine's own)."""

    program: str
    namespace: str
    lines: tuple[str, ...]

    def run(self) -> None:
        """Do them, up to the first that fails.

        Raises:
            ClusterError: with what the program said.
        """
        inside = ["-n", self.namespace] if self.namespace else []
        _call([self.program, *inside, "-batch", "-"], "\n".join(self.lines) + "\n")


def namespace_commands(name: str, ports: Sequence[Port]) -> Batch:
    """Make the namespaces."""
    names = [f"{name}-{SWITCH}", *(port.namespace for port in ports)]
    return Batch("ip", "", tuple(f"netns add {one}" for one in names))


def switch_commands(name: str, ports: Sequence[Port]) -> Batch:
    """Make the two bridges, and plug every namespace into both."""
    lines = ["link set lo up"]
    for bridge in ("data", "back"):
        # Snooping and spanning tree would send and expect packets of their own.
        lines.append(f"link add name {bridge} mtu {MTU_BYTES} type bridge stp_state 0 mcast_snooping 0")
        lines.append(f"link set {bridge} up")
    lines.append(f"address add {SWITCH_ADDRESS}/16 dev back")
    for port in ports:
        for bridge, ours, theirs in (("data", port.data_port, NIC), ("back", port.back_port, BACKPLANE)):
            peer = f"peer name {theirs} mtu {MTU_BYTES} netns {port.namespace}"
            lines.append(f"link add name {ours} mtu {MTU_BYTES} type veth {peer}")
            lines.append(f"link set {ours} master {bridge} up")
    return Batch("ip", f"{name}-{SWITCH}", tuple(lines))


def port_commands(port: Port, ports: Sequence[Port]) -> Batch:
    """Addresses and routes in the namespace of one NIC."""
    lines = [
        "link set lo up",
        f"address add {port.data_address}/16 dev {NIC}",
        f"address add {port.back_address}/16 dev {BACKPLANE}",
        f"link set {NIC} up",
        f"link set {BACKPLANE} up",
    ]
    # Inside of a host nothing passes the NICs: their addresses are reached over the backplane.
    lines += [
        f"route add {sibling.data_address}/32 dev {BACKPLANE} src {port.data_address}"
        for sibling in ports
        if sibling.host == port.host and sibling != port
    ]
    return Batch("ip", port.namespace, tuple(lines))


def shaping_commands(name: str, port: Port, ports: Sequence[Port]) -> tuple[Batch, Batch]:
    """Limit what a NIC sends and what it receives."""
    others = [other.data_address for other in ports if other.host != port.host] if port.has_links else []
    nic = port.nic
    return (
        Batch("tc", port.namespace, shaping_lines(NIC, nic.send_bits_per_second, others, "dst")),
        Batch("tc", f"{name}-{SWITCH}", shaping_lines(port.data_port, nic.receive_bits_per_second, others, "src")),
    )


def apply_settings(port: Port) -> None:
    """Write the kernel's settings; one that this kernel does not have needs no writing."""
    with inside(port.namespace):
        for name, value in kernel_settings().items():
            path = Path("/proc/sys", name)
            if path.exists():
                path.write_text(value)


def create(name: str, ports: Sequence[Port]) -> None:
    """Make everything; on failure the caller removes what there is.

    Raises:
        ClusterError: a command failed.
    """
    namespace_commands(name, ports).run()
    for port in ports:
        apply_settings(port)
    switch_commands(name, ports).run()
    for port in ports:
        port_commands(port, ports).run()
        for batch in shaping_commands(name, port, ports):
            batch.run()


def remove(names: Iterable[str]) -> None:
    """End the processes inside of some namespaces, and take the namespaces away.

    Raises:
        ClusterError: one is still there.
    """
    names = [name for name in names if (NETNS_DIRECTORY / name).exists()]
    for pid in processes_in(names):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for name in names:
        try:
            Batch("ip", "", (f"netns delete {name}",)).run()
        except ClusterError:
            # Another process that starts now may clean up as well.
            if (NETNS_DIRECTORY / name).exists():
                raise


def clean() -> list[str]:
    """Remove what clusters whose process is gone have left; the names of it."""
    stale = [name for name in namespaces(PREFIX) if not owner_lives(name)]
    remove(stale)
    return stale


def namespaces(name: str) -> list[str]:
    """The existing namespaces whose name begins like this."""
    if not NETNS_DIRECTORY.is_dir():
        return []
    return sorted(path.name for path in NETNS_DIRECTORY.iterdir() if path.name.startswith(f"{name}-"))


def owner_lives(namespace: str) -> bool:
    """Whether the process that made a namespace still runs; True for a name that is none of ours."""
    found = re.match(rf"{PREFIX}-(\d+)-(\d+)-", namespace)
    return found is None or _start_ticks(int(found[1])) == int(found[2])


def _start_ticks(pid: int) -> int | None:
    """When a process started: with its number it names a process for good, since numbers are used again."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command, in parentheses, may hold anything; what follows begins with the third field.
    return int(status.rpartition(")")[2].split()[19])


def processes_in(names: Iterable[str]) -> list[int]:
    """The processes whose network is one of these namespaces."""
    inodes = set()
    for name in names:
        with suppress(FileNotFoundError):
            inodes.add((NETNS_DIRECTORY / name).stat().st_ino)
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and (process / "ns" / "net").stat().st_ino in inodes:
                found.append(int(process.name))
    return found


def enter(namespace: str) -> None:
    """Move the calling thread, and the threads it starts later, into a namespace; open sockets stay where they are."""
    with (NETNS_DIRECTORY / namespace).open() as file:
        _system_call("setns", file.fileno(), CLONE_NEWNET)


def name_host(name: str) -> None:
    """Give the calling process a host name of its own."""
    _system_call("unshare", CLONE_NEWUTS)
    socket.sethostname(name)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Run a block with the calling thread in a namespace."""
    with Path("/proc/thread-self/ns/net").open() as before:
        enter(namespace)
        try:
            yield
        finally:
            _system_call("setns", before.fileno(), CLONE_NEWNET)


def _system_call(name: str, *arguments: int) -> None:
    # Python has os.setns and os.unshare from 3.12 on only.
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def missing() -> str | None:
    """What an emulated cluster needs and is plainly not here, with the remedy; None where nothing is."""
    if sys.platform != "linux":
        return f"emulated hosts are Linux network namespaces, and this is {sys.platform}; run on Linux"
    if os.geteuid() != 0:
        return f"making network namespaces needs root, and this is user {os.geteuid()}; run as root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the program {program!r} is missing; install it: apt-get install iproute2"
    return None


def why_not() -> str | None:
    """The reason why this machine cannot emulate a cluster; None where it can, which is found out by a trial."""
    reason = missing()
    if reason is not None:
        return reason
    name = new_name()
    try:
        create(name, ports_of(name, [Host(1, (Nic.symmetric(LEAST_BITS_PER_SECOND),))]))
    except (ClusterError, OSError) as error:
        return f"the kernel refuses: {error}"
    finally:
        remove(namespaces(name))
    return None


def _call(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        # "Command failed -:3" counts the lines of the batch from 1.
        failed = re.search(r"Command failed -:(\d+)", done.stderr)
        line = text.splitlines()[int(failed[1]) - 1] if failed else text.strip()
        raise ClusterError(f"`{' '.join(command[:-2])} {line}` failed: {done.stderr.strip()}")
