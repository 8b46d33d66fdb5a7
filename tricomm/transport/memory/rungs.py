"""How a pair of ranks moves bytes, why not better, and what to do about it."""

import errno
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tricomm.layout.mesh import format_ranks


class Rung(Enum):
    """From the best way down."""

    READ = "process_vm_readv"
    ARENA = "arena"
    TENSORS = "CUDA IPC, straight from the tensors"
    DEVICE = "CUDA IPC"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class PairTransport:
    """How bytes go from one rank to another.

    Attributes:
        rung: the way: read from the sender's memory, by way of an arena that both share (of the host, or of the
            sender's device), or over the network.
        reason: why not a better one; "" for the best.
        remedy: what would help; "" if nothing does.
    """

    rung: Rung
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.rung.value, self.reason, self.remedy) if part)


PairTransports = Mapping[tuple[int, int], PairTransport]
"""By (sender, receiver)."""


class TransportsOfRank(dict[tuple[int, int], PairTransport]):
    """How bytes go between one rank and each other, by (sender, receiver); prints as a line for each way.

    Args:
        rank: the one.
        found: of all pairs that it is in.

    Example:
        >>> far = PairTransport(Rung.NETWORK, "the ranks are on different hosts")
        >>> print(TransportsOfRank(0, {(0, 1): BEST, (1, 0): BEST, (0, 2): far, (2, 0): far, (3, 0): BEST}))
        rank 0 to and from 1: process_vm_readv
        rank 0 to and from 2: network; the ranks are on different hosts
        rank 0 from 3: process_vm_readv
    """

    def __init__(self, rank: int, found: PairTransports) -> None:
        super().__init__(found)
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return TransportsOfRank, (self.rank, dict(self))

    def __repr__(self) -> str:
        peers: dict[tuple[str, PairTransport], list[int]] = {}
        for other in sorted({rank for pair in self for rank in pair if rank != self.rank}):
            to, back = self.get((self.rank, other)), self.get((other, self.rank))
            ways = [("to and from", to)] if to == back else [("to", to), ("from", back)]
            for direction, found in ways:
                if found is not None:
                    peers.setdefault((direction, found), []).append(other)
        lines = [f"rank {self.rank} {how} {format_ranks(ranks)}: {found}" for (how, found), ranks in peers.items()]
        return "\n".join(lines) or f"rank {self.rank} has met nobody yet"


BEST = PairTransport(Rung.READ)
NOT_ASKED = PairTransport(
    Rung.NETWORK, "this Resharder uses the network alone", 'pass transport="auto" to read the memory of one host'
)
ELSEWHERE = PairTransport(
    Rung.NETWORK,
    "the ranks are on different hosts or in different network namespaces, or one is not on Linux",
    "let containers of one host share the network namespace (docker run --network=host)",
)
NO_FILES = PairTransport(Rung.NETWORK, "no file could be handed over")


def unreadable(number: int, text: str, peer_pid: int) -> PairTransport:
    """The arena, and why the peer's memory cannot be read.

    Args:
        number: of the system's error; 0 if what was read was not what stands there.
        text: in the system's words.
        peer_pid: 0 where this process does not see the peer's.
    """
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if peer_pid == 0 or number == errno.ESRCH:
        return PairTransport(
            Rung.ARENA,
            "the ranks are in different pid namespaces",
            "let containers share them (docker run --pid=host, or --pid=container:NAME)",
        )
    if number == errno.EPERM and scope.exists() and scope.read_text().strip() != "0":
        return PairTransport(
            Rung.ARENA,
            f"ptrace_scope is {scope.read_text().strip()}",
            "set kernel.yama.ptrace_scope to 0, or give the ranks CAP_SYS_PTRACE",
        )
    if number == errno.EPERM:
        return PairTransport(
            Rung.ARENA,
            "this process may not read the memory of the other",
            "run both as one user with equal capabilities, and let seccomp allow process_vm_readv",
        )
    return PairTransport(Rung.ARENA, f"the memory of the other process cannot be read: {text}")


def of_all(
    found: PairTransports, rank: int, participants: Sequence[int], otherwise: PairTransport
) -> dict[tuple[int, int], PairTransport]:
    """What is known of both directions between a rank and each other, of which those not found are alike."""
    pairs = [pair for other in participants if other != rank for pair in ((rank, other), (other, rank))]
    return {pair: found.get(pair, otherwise) for pair in pairs}


def describe_lacking(pairs: Collection[tuple[int, int]], transports: PairTransports) -> str | None:
    """What is wrong with the first of some pairs that goes over the network; None if none does."""
    for sender, receiver in sorted(pairs):
        found = transports[sender, receiver]
        if found.rung is Rung.NETWORK:
            text = f'transport="memory", but rank {sender} cannot reach rank {receiver} by memory: {found.reason}'
            return f'{text}; {found.remedy or "use the network"}, or pass transport="auto"'
    return None
