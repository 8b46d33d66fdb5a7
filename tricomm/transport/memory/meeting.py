"""The ranks of one host find each other, and agree on how bytes go between each two of them.

Who may be on one host says so on the store: same kernel, same network namespace (emulated hosts have one each). Of two
such ranks the higher one connects to the local socket of the lower one; both prove that they have read the store by the
other's nonce, and hand over a piece of an arena. Then each tries to read what the other announced, and tells over the
network what it found: so both ends know both verdicts before anything depends on them.
"""

import ctypes
import json
import logging
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tricomm.transport.memory.arena import PAGE_NBYTES, SharedSlab, mapped_slab, new_slab
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.reading import UnreadableError, read_run
from tricomm.transport.memory.rungs import BEST, NO_FILES, PairTransport, Rung, unreadable

LOG = logging.getLogger("tricomm")

NONCE_NBYTES = 16
VERDICT_NBYTES = 512
REPLY_SECONDS = 5.0
"""For which the connecting rank waits for the greeting of one that has heard that it is connected."""

Exchange = Callable[[Mapping[int, str]], dict[int, str]]
"""Gives each of some ranks a text over the network; returns theirs."""

CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Presence:
    """A rank as the others of its host find it on the store.

    Attributes:
        rank: of the group.
        name: of its local socket, as hexadecimal bytes.
        nonce: in hexadecimal; who greets with it has read the store.
        address: where the nonce stands in its memory.
    """

    rank: int
    name: str
    nonce: str
    address: int


def host_key() -> str:
    """What ranks have in common that can reach each other's local sockets: the kernel and the network namespace."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel}/{os.stat('/proc/thread-self/ns/net').st_ino}"


class Doorway:
    """This rank's presence at a meeting: a socket that listens, and a nonce in memory.

    Args:
        store: of this meeting alone.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._host = host_key()
        self._nonce = ctypes.create_string_buffer(secrets.token_bytes(NONCE_NBYTES), NONCE_NBYTES)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind("")  # a name that the kernel draws, of no file
        self.socket.listen(socket.SOMAXCONN)
        self.socket.setblocking(False)
        name = bytes(self.socket.getsockname()).hex()
        self.here = Presence(rank, name, self._nonce.raw.hex(), ctypes.addressof(self._nonce))
        self._number = store.add(f"{self._host}/count", 1)
        store.set(f"{self._host}/{self._number}", json.dumps([rank, name, self.here.nonce, self.here.address]))

    def others(self) -> dict[int, Presence]:
        """The other ranks of this host, once all ranks have come."""
        count = self._store.add(f"{self._host}/count", 0)
        keys = [f"{self._host}/{number}" for number in range(1, count + 1)]
        # One that fails meanwhile takes its own away, and then this rank hears of it over the network.
        found = [Presence(*json.loads(self._store.get(key))) for key in keys if self._store.check([key])]
        return {one.rank: one for one in sorted(found, key=lambda one: one.rank) if one.rank != self.here.rank}

    def close(self) -> None:
        """Everybody has what it needs: nothing stays behind."""
        self.socket.close()
        self._store.delete_key(f"{self._host}/{self._number}")
        if self._number == 1:
            self._store.delete_key(f"{self._host}/count")


def doorway(store: Any, rank: int) -> Doorway | None:
    """This rank's doorway; None where the system has none of what it takes, so that the others do not find it."""
    try:
        return Doorway(store, rank) if sys.platform == "linux" else None
    except OSError as error:
        LOG.info("rank %d takes the network alone: %s", rank, error)
        return None


class Candidate:
    """One pair of ranks that may be on one host.

    Args:
        other: the other rank.
        end: the connected socket.
    """

    def __init__(self, other: Presence, end: socket.socket) -> None:
        self.other = other
        self.end = end
        self.pid, _, _ = CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        self.slabs: dict[bool, SharedSlab] = {}
        """What this rank has handed over (True), and what the other has."""

    @property
    def has_arena(self) -> bool:
        """Whether files can be handed over."""
        return False in self.slabs

    def greet(self, here: Presence) -> None:
        """Show that this rank has read the store, and hand over a piece of an arena."""
        slab, file = new_slab(1, NONCE_NBYTES)
        try:
            slab.memory[:NONCE_NBYTES] = as_tensor(here.nonce)
            self.slabs[True] = slab
            text = json.dumps([here.rank, self.other.nonce]).encode()
            socket.send_fds(self.end, [text], [file], socket.MSG_NOSIGNAL)
        finally:
            os.close(file)

    def accept(self, here: Presence, greeting: tuple[bytes, Sequence[int]]) -> bool:
        """Look at the other's greeting; false if it is not that of the rank which is on the store."""
        data, files = greeting
        try:
            with suppress(ValueError, OSError, IndexError):
                slab = mapped_slab(1, files[0], PAGE_NBYTES)
                if slab.memory[:NONCE_NBYTES].equal(as_tensor(self.other.nonce)):
                    self.slabs[False] = slab
            return bool(json.loads(data) == [self.other.rank, here.nonce])
        except ValueError:
            return False
        finally:
            for file in files:
                os.close(file)

    def probe(self, refused: str) -> PairTransport:
        """How bytes come from the other rank, by trying.

        Args:
            refused: why its memory could not be read in a call before; "" if it could.
        """
        if not self.has_arena:  # by which few bytes go, wherever memory can be read
            return NO_FILES
        if refused:
            return PairTransport(Rung.ARENA, refused)
        read = ctypes.create_string_buffer(NONCE_NBYTES)
        try:
            if self.pid == 0:
                raise UnreadableError(0, "no pid")
            read_run(self.pid, ctypes.addressof(read), self.other.address, NONCE_NBYTES)
            if read.raw.hex() == self.other.nonce:
                return BEST
            return unreadable(0, "another process has its pid here", self.pid)
        except UnreadableError as error:
            return unreadable(error.number, str(error), self.pid)


def as_tensor(nonce: str) -> torch.Tensor:
    """A nonce as it stands in memory."""
    return torch.frombuffer(bytearray.fromhex(nonce), dtype=torch.uint8)


class Gathering(NamedTuple):
    """Who has come to a meeting.

    Attributes:
        found: the other ranks of this host with which this one is connected.
        problems: why not with the others of those that seem to be on it.
    """

    found: dict[int, Candidate]
    problems: dict[int, str]

    @property
    def ranks(self) -> list[int]:
        """All of them, which know of this rank, too."""
        return sorted((*self.found, *self.problems))


def gather(door: Doorway, exchange: Exchange, interrupted: Callable[[], None]) -> Gathering:
    """Connect the local sockets of the ranks of this host, once all ranks have come to their doors; see ``meet``."""
    here, others = door.here, door.others()
    found: dict[int, Candidate] = {}
    problems: dict[int, str] = {}
    for rank, other in others.items():
        if rank < here.rank:
            try:
                found[rank] = _connected(here, other)
            except OSError as error:
                problems[rank] = f"its local socket cannot be reached: {error}"[:160]
    told = exchange({rank: problems.get(rank, "") for rank in others})
    problems |= {rank: text for rank, text in told.items() if text}
    above = {rank: other for rank, other in others.items() if rank > here.rank and rank not in problems}
    found |= _accepted(door, above)
    for rank, candidate in list(found.items()):
        if rank < here.rank and not _is_answered(candidate, here, interrupted):
            problems[rank] = "it did not answer on its local socket"
            found.pop(rank).end.close()
    problems |= {rank: "it did not come to this rank's local socket" for rank in above if rank not in found}
    for rank in set(problems) & set(found):
        found.pop(rank).end.close()
    return Gathering(found, problems)


def meet(
    door: Doorway, exchange: Exchange, interrupted: Callable[[], None], refused: Mapping[int, str]
) -> tuple[dict[int, Link], dict[tuple[int, int], PairTransport]]:
    """Connect with the other ranks of this host, once all ranks have come to their doors.

    Args:
        door: of this rank.
        exchange: over the network.
        interrupted: raises if the connecting is to end.
        refused: ranks whose memory could not be read in a call before, and why.

    Returns:
        The links by rank, and what was agreed on for each pair that may be on this host.
    """
    here = door.here
    found, problems = gathering = gather(door, exchange, interrupted)
    mine = {
        rank: found[rank].probe(refused.get(rank, "")) if rank in found else PairTransport(Rung.NETWORK, problems[rank])
        for rank in gathering.ranks
    }
    theirs = {
        rank: read_verdict(text)
        for rank, text in exchange({rank: written_verdict(one) for rank, one in mine.items()}).items()
    }
    transports = {(rank, here.rank): one for rank, one in mine.items()}
    transports |= {(here.rank, rank): one for rank, one in theirs.items()}
    links = {}
    for rank, candidate in found.items():
        ways = theirs[rank].rung, mine[rank].rung
        if ways == (Rung.NETWORK, Rung.NETWORK):
            candidate.end.close()
        else:
            links[rank] = Link(rank, candidate.end, candidate.pid, *ways)
    for way in sorted({*mine.values()}, key=str):
        LOG.info("rank %d receives from ranks %s by %s", here.rank, [rank for rank in mine if mine[rank] == way], way)
    return links, transports


def _connected(here: Presence, other: Presence) -> Candidate:
    """Connect to another rank's socket and greet it; that needs nothing of it but that it listens."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(REPLY_SECONDS)
    try:
        end.connect(bytes.fromhex(other.name))
        candidate = Candidate(other, end)
        candidate.greet(here)
    except BaseException:
        end.close()
        raise
    return candidate


def _accepted(door: Doorway, above: Mapping[int, Presence]) -> dict[int, Candidate]:
    """Those who have connected to this rank, as they said over the network, and greeted."""
    found: dict[int, Candidate] = {}
    while len(found) < len(above):
        try:
            end, _ = door.socket.accept()
        except BlockingIOError:
            break  # all who could are there
        candidate = _recognised(door.here, above, end)
        if candidate is None or candidate.other.rank in found or not _is_greeted(candidate, door.here):
            end.close()  # somebody else who has found the name, or one that can no longer be greeted
            continue
        found[candidate.other.rank] = candidate
    return found


def _is_greeted(candidate: Candidate, here: Presence) -> bool:
    """Greet who has connected; false if that fails, which costs this pair its link and nobody the call."""
    try:
        candidate.greet(here)
    except OSError as error:
        LOG.info("rank %d takes the network to rank %d: %s", here.rank, candidate.other.rank, error)
        return False
    return True


def _recognised(here: Presence, above: Mapping[int, Presence], end: socket.socket) -> Candidate | None:
    end.setblocking(False)
    try:
        data, files, _, _ = socket.recv_fds(end, VERDICT_NBYTES, 1)
    except OSError:
        return None
    try:
        rank = json.loads(data)[0]
        candidate = Candidate(above[rank], end)
    except (ValueError, LookupError, TypeError):
        for file in files:
            os.close(file)
        return None
    return candidate if candidate.accept(here, (data, files)) else None


def _is_answered(candidate: Candidate, here: Presence, interrupted: Callable[[], None]) -> bool:
    """Whether the lower rank greets too."""
    candidate.end.settimeout(0.1)
    for _ in range(int(REPLY_SECONDS / 0.1)):
        interrupted()
        try:
            data, files, _, _ = socket.recv_fds(candidate.end, VERDICT_NBYTES, 1)
        except TimeoutError:
            continue
        except OSError:
            return False
        return candidate.accept(here, (data, files))
    return False


def written_verdict(one: PairTransport) -> str:
    """A verdict as text that fits into a message."""
    return json.dumps([one.rung.value, one.reason[:160], one.remedy[:160]])


def read_verdict(text: str) -> PairTransport:
    """The verdict that a text is."""
    rung, reason, remedy = json.loads(text)
    return PairTransport(Rung(rung), reason, remedy)
