"""The ranks of one host find each other and try each other's device memory, before there is any network between them.

All of it goes over the store and local sockets, as NCCL may not be needed at all, and refuses two ranks on one device.
Each rank opens what the others have exported, reads a nonce there that they wrote by their device, and looks whether a
word came that their device set. Only what both ranks of a pair could do is used, in both directions.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tricomm.transport.accelerator import Accelerator, await_event
from tricomm.transport.device.flags import FIRST_NBYTE, Flag, Flags
from tricomm.transport.device.held import BLOCK_NBYTES, Held
from tricomm.transport.device.link import DeviceLink
from tricomm.transport.device.memory import DeviceMemory, DeviceMemoryError
from tricomm.transport.device.run import DeviceRuns
from tricomm.transport.device.shares import Shares
from tricomm.transport.memory.arena import PAGE_NBYTES
from tricomm.transport.memory.meeting import (
    NONCE_NBYTES,
    Candidate,
    Doorway,
    Gathering,
    as_tensor,
    gather,
    read_verdict,
    written_verdict,
)
from tricomm.transport.memory.protocol import Region
from tricomm.transport.memory.rungs import NO_FILES, PairTransport, Rung
from tricomm.transport.memory.signals import Signals

LOG = logging.getLogger("tricomm")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 100e-6, 0.02
PROBED = 0x5EED
SMALL_NBYTES = PAGE_NBYTES
"""Of each arena before a Resharder needs more: for the few bytes that tell of a call."""

assert NONCE_NBYTES <= FIRST_NBYTE


class Notices:
    """What ranks tell each other over the store, before they are connected.

    Args:
        store: of this meeting alone.
        rank: this rank.
        ranks: all.
        interrupted: raises if the waiting is to end.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int], interrupted: Callable[[], None]) -> None:
        self._store, self._rank, self._ranks, self._interrupted = store, rank, ranks, interrupted
        self._number = 0
        self._counted: list[str] = []

    def _await(self, is_there: Callable[[], bool]) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not is_there():
            self._interrupted()
            time.sleep(pause)
            pause = min(1.25 * pause, LONGEST_PAUSE_SECONDS)

    def meet(self) -> None:
        """Return when all ranks have come here."""
        self._number += 1
        name, count = f"met/{self._number}", len(self._ranks)
        self._counted.append(name)
        self._store.add(name, 1)
        self._await(lambda: self._store.add(name, 0) >= count)

    def exchange(self, texts: Mapping[int, str]) -> dict[int, str]:
        """Give each of some ranks a text, and return theirs; they do the same."""
        self._number += 1
        for rank, text in texts.items():
            self._store.set(f"{self._number}/{self._rank}/{rank}", text or " ")
        found = {}
        for rank in texts:
            key = f"{self._number}/{rank}/{self._rank}"
            self._await(partial(self._store.check, [key]))
            found[rank] = bytes(self._store.get(key)).decode().strip()
            self._store.delete_key(key)
        return found

    def any_of_all(self, mine: bool) -> bool:
        """Whether any of all ranks says so."""
        self._number += 1
        name = f"any/{self._number}"
        self._counted.append(name)
        if mine:
            self._store.add(name, 1)
        self.meet()
        return bool(self._store.add(name, 0) > 0)

    def close(self) -> None:
        """The last rank to call it deletes what was counted, which nobody reads any more."""
        if self._store.add("left", 1) == len(self._ranks):
            for name in (*self._counted, "left"):
                self._store.delete_key(name)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank shows another one of its device.

    Attributes:
        identity: of the device.
        problem: why it has nothing to show; "" if it has.
        region: of its arena, which begins with its nonce.
    """

    identity: str
    problem: str
    region: Region | None

    def written(self) -> str:
        """As text."""
        region = self.region
        return json.dumps([self.identity, self.problem, None if region is None else [region.handle.hex(), *region[1:]]])

    @classmethod
    def read(cls, text: str) -> "Offer":
        """What ``written`` gave."""
        identity, problem, region = json.loads(text)
        return cls(identity, problem, None if region is None else Region(bytes.fromhex(region[0]), *region[1:]))


def describe_refusal(text: str, peer_pid: int) -> tuple[str, str]:
    """(reason, remedy) of what a driver or a device refuses.

    Args:
        text: in its words.
        peer_pid: 0 where this process does not see the peer's.
    """
    if peer_pid == 0:
        return "the ranks are in different pid namespaces", (
            "let containers share them (docker run --pid=host, or --pid=container:NAME)"
        )
    if "hidden" in text:
        return text, "let every rank see all GPUs of its host (CUDA_VISIBLE_DEVICES), and choose one by device="
    if "NVLink" in text:
        return text, "NCCL is faster there"
    return f"its device memory cannot be opened: {text}", "look at MIG, at the container's rights, at the driver"


class Meeting:
    """One rank's part.

    Args:
        accelerator, memory, device: of this rank.
        door: of this rank.
    """

    def __init__(
        self, accelerator: Accelerator, memory: DeviceMemory, device: torch.device, door: Doorway | None
    ) -> None:
        self._accelerator, self._memory, self._device, self._door = accelerator, memory, device, door
        self._links: dict[int, DeviceLink] = {}
        self._blocks: list[int] = []
        self._shares = Shares(memory, self._links)

    def held(self, runs: DeviceRuns) -> Held:
        """What is to be given back in the end."""
        return Held(self._memory, self._device, runs, tuple(self._links.values()), self._blocks, self._shares)

    def links(
        self, notices: Notices, interrupted: Callable[[], None]
    ) -> tuple[dict[int, DeviceLink], dict[tuple[int, int], PairTransport]]:
        """The links by rank, and what was agreed on for each pair that may be on this host.

        Args:
            notices: over the store.
            interrupted: raises if the connecting is to end.
        """
        notices.meet()
        if self._door is None:
            return {}, {}
        gathering = gather(self._door, notices.exchange, interrupted)
        offers = self._offers(gathering, interrupted)
        theirs = notices.exchange({rank: offer.written() for rank, offer in offers.items()})
        found: dict[int, PairTransport] = {}
        for rank in gathering.ranks:
            if rank in gathering.problems:
                found[rank] = PairTransport(Rung.NETWORK, gathering.problems[rank])
            else:
                found[rank] = self._verdict(gathering.found[rank], offers[rank], Offer.read(theirs[rank]), interrupted)
        heard = notices.exchange({rank: written_verdict(one) for rank, one in found.items()})
        transports: dict[tuple[int, int], PairTransport] = {}
        for rank, text in heard.items():
            transports |= self._agreed(rank, found[rank], read_verdict(text), gathering)
        for way in sorted({*found.values()}, key=str):
            ranks = [rank for rank in found if found[rank] == way]
            LOG.info("rank %d receives from ranks %s by %s", self._door.here.rank, ranks, way)
        return self._links, transports

    def _agreed(
        self, rank: int, mine: PairTransport, theirs: PairTransport, gathering: Gathering
    ) -> dict[tuple[int, int], PairTransport]:
        """What a pair uses in both directions: the worse of what the two found."""
        assert self._door is not None
        used = mine if mine.rung is Rung.NETWORK else theirs
        if used.rung is Rung.NETWORK:
            link = self._links.pop(rank, None)
            if link is not None:
                link.unmap()
                link.flags.close()
            if rank in gathering.found:
                gathering.found[rank].end.close()
        here = self._door.here.rank
        return {(rank, here): used, (here, rank): used}

    def _offers(self, gathering: Gathering, interrupted: Callable[[], None]) -> dict[int, Offer]:
        """What this rank shows the others: a nonce in memory of its device, and a word that its device sets."""
        assert self._door is not None
        try:
            identity = self._memory.identity()
            ranks = list(gathering.found)
            if not ranks:
                return {rank: Offer(identity, "", None) for rank in gathering.ranks}
            address = self._memory.allocate(BLOCK_NBYTES)
            self._blocks.append(address)
            handle = self._memory.exported(address)
            with self._accelerator.on_stream(self._accelerator.new_stream(self._device)):
                for at, rank in enumerate(ranks):
                    self._prepare(gathering.found[rank], address, at * SMALL_NBYTES)
                self._join(interrupted)
            regions = {rank: Region(handle, at * SMALL_NBYTES, SMALL_NBYTES) for at, rank in enumerate(ranks)}
            return {rank: Offer(identity, "", regions.get(rank)) for rank in gathering.ranks}
        except DeviceMemoryError as error:
            return {rank: Offer("", str(error), None) for rank in gathering.ranks}

    def _prepare(self, candidate: Candidate, address: int, offset: int) -> None:
        """Make the link of a candidate, and let the device write what the other is to find."""
        assert self._door is not None
        here, other = self._door.here.rank, candidate.other.rank
        if not candidate.has_arena:
            return
        page = candidate.slabs[here < other]  # that of the lower rank, which both have
        flags = Flags(self._memory, page, here < other)
        link = DeviceLink(
            self._accelerator, self._memory, self._device, Signals(other, candidate.end, candidate.pid), flags
        )
        link.arenas[True] = self._memory.tensor(address + offset, SMALL_NBYTES)
        self._links[other] = link
        nonce = as_tensor(self._door.here.nonce)
        self._accelerator.launch(partial(link.arenas[True][:NONCE_NBYTES].copy_, nonce))
        flags.write(self._accelerator.current_stream(self._device), Flag.PROBED, PROBED)

    def _join(self, interrupted: Callable[[], None]) -> None:
        """Return when the device has done what the current stream has to do."""

        def is_given_up() -> bool:
            interrupted()
            return False

        await_event(self._accelerator.current_stream(self._device).record_event(), is_given_up)

    def _verdict(
        self, candidate: Candidate, ours: Offer, theirs: Offer, interrupted: Callable[[], None]
    ) -> PairTransport:
        """What this rank finds of another."""
        link = self._links.get(candidate.other.rank)
        if not candidate.has_arena:
            return NO_FILES
        try:
            problem = ours.problem or theirs.problem or self._memory.refusal(theirs.identity)
            if not problem and link is not None and theirs.region is not None:
                link.open(theirs.region)
                problem = self._read(link, candidate.other.nonce, interrupted)
        except DeviceMemoryError as error:
            problem = str(error)
        if not problem:
            return PairTransport(Rung.DEVICE)
        return PairTransport(Rung.NETWORK, *describe_refusal(problem, candidate.pid))

    def _read(self, link: DeviceLink, nonce: str, interrupted: Callable[[], None]) -> str:
        """What is wrong with what the other has shown; "" if nothing is."""
        if link.flags.theirs(Flag.PROBED) != PROBED:
            return "what its device writes to a shared page does not come here"
        with self._accelerator.on_stream(self._accelerator.new_stream(self._device)):
            read = torch.zeros(NONCE_NBYTES, dtype=torch.uint8, device="cpu")
            self._accelerator.launch(partial(read.copy_, link.arenas[False][:NONCE_NBYTES]))
            self._join(interrupted)
        return "" if read.equal(as_tensor(nonce)) else "what was opened is not what the other has exported"
