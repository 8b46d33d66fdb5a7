"""Connections of which some pairs go by memory of devices, beside NCCL for all others, in the same rounds."""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from tricomm.packing.runs import NOTHING_IN_PLACE
from tricomm.packing.staging import Direction
from tricomm.transport.accelerator import Accelerator
from tricomm.transport.base import (
    Arenas,
    Asked,
    ConnectionLostError,
    Connections,
    Directions,
    Operation,
    Shared,
)
from tricomm.transport.coordination.background import Question, in_background
from tricomm.transport.device.alive import alive
from tricomm.transport.device.held import BLOCK_NBYTES, Held
from tricomm.transport.device.link import DeviceLink, Posted
from tricomm.transport.device.memory import DeviceMemory, DeviceMemoryError
from tricomm.transport.device.run import DeviceRun, DeviceRuns
from tricomm.transport.memory.rungs import PairTransports
from tricomm.transport.memory.signals import LinkClosedError
from tricomm.transport.nccl import DEPTH

PART_NBYTES = 4096
"""At a multiple of which each part of an allocation begins."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.05


class DeviceConnections:
    """See Linked.

    Args:
        accelerator, memory: of this rank.
        network: for all pairs that have no link; None if there are none.
        links: by rank.
        transports: of the pairs of this rank, for whoever asks.
        held: what is given back when they go.
        is_mixed: whether any rank has a link.
        interrupted: raises if a wait on the host is to end.
    """

    has_tags = False
    depth = DEPTH
    in_place = NOTHING_IN_PLACE

    def __init__(
        self,
        accelerator: Accelerator,
        memory: DeviceMemory,
        network: Connections | None,
        links: Mapping[int, DeviceLink],
        transports: PairTransports,
        held: Held,
        is_mixed: bool,
        interrupted: Callable[[], None],
    ) -> None:
        self.device = held.device
        self.transports = transports
        self.network = network
        self._directions: Directions = frozenset((is_send, rank) for rank in links for is_send in (True, False))
        self._version = object()
        self._accelerator, self._memory = accelerator, memory
        self._held = held
        self._runs, self._links, self._blocks = held.runs, links, held.blocks
        self._interrupted: Any = weakref.WeakMethod(interrupted)  # who holds it holds these connections
        self._groups = 0
        self._is_mixed = is_mixed
        self._unpacked: list[Posted] = []
        """What was waited for, and is read where it is by what is launched before anything of another group is."""
        alive().add(self)
        weakref.finalize(self, give_back_later, held, os.getpid()).atexit = False

    # ---- Connections

    @property
    def is_idle(self) -> bool:
        """Whether the device has done all that was queued."""
        return self._runs.are_over

    def begin(self) -> DeviceRun:
        """See Connections."""
        return self._runs.begin()

    def launch(self, work: Callable[[], object]) -> None:
        """See Transport."""
        self._accelerator.launch(work)

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections."""
        self._tell_read()
        self._run.join(is_aborted)

    @property
    def _run(self) -> DeviceRun:
        assert self._runs.last is not None
        return self._runs.last

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections."""
        self._groups += 1
        self._tell_read()
        works: list[tuple[int, Any]] = []
        others: list[Operation] = []
        at: list[int] = []
        for operation in operations:
            link = self._links.get(operation.peer)
            if link is None:
                at.append(len(works))
                others.append(operation)
                works.append((operation.peer, None))
            else:
                works.append((operation.peer, link.post(operation, self._run, self._groups)))
        if others:
            assert self.network is not None
            for place, work in zip(at, self.network.post(others, tag), strict=True):
                works[place] = work
        return works

    def wait(self, work: Any, limit: timedelta) -> None:
        """See Connections. It orders the current stream; the host goes on."""
        if isinstance(work, DeviceLink):
            work.require()
            return
        if not isinstance(work, Posted):
            assert self.network is not None
            self.network.wait(work, limit)
            return
        if work.operation.is_send or any(one.group != work.group for one in self._unpacked):
            self._tell_read()
        if work.link.wait(work):
            self._unpacked.append(work)

    def _tell_read(self) -> None:
        """What was launched has read all that was waited for: the senders may go on."""
        for one in self._unpacked:
            one.link.read(one.count)
        self._unpacked.clear()

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections. Where some pairs go by memory, which not all know of, nothing goes in one call."""
        if self.network is not None:
            self.network.gather(() if self._is_mixed else groups)

    def connected(self) -> None:
        """See Connections."""
        if self.network is not None:
            self.network.connected()

    def abort(self) -> None:
        """See Connections. First all is told, then streams are let go, before anybody asks the driver: it may answer
        only then.
        """
        links = tuple(self._links.values())
        for link in links:
            link.end()
        for link in links:
            link.flags.let_go()
        in_background("tricomm-let-go", partial(_let_go, links, self._runs))
        if self.network is not None:
            self.network.abort()

    def unread(self) -> list[tuple[int, Any]]:
        """See Linked. Streams wait for that; but nothing is begun with a rank that is known to be gone, unless nothing
        ever went to it or came from it: it may be done, and have nothing to do with this rank.
        """
        return [(link.peer, link) for link in self._links.values() if link.is_used and not link.counts()]

    def nod(self, tag: int) -> None:
        """See Linked: streams wait, and not the host."""

    def near(self) -> None:
        """See Linked."""

    def finish(self, limit: timedelta) -> bool:
        """See Linked: a call is over on this rank."""
        self._tell_read()
        return True

    # ---- arenas

    @property
    def arenas(self) -> Arenas:
        """See Transport."""
        return Arenas(self._directions, self._version, self._held.shares)

    def reserve(self, nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """See Transport. Where one has to grow, the host waits for the other rank to come to the same call, once.

        Raises:
            ConnectionLostError: a rank is gone, its memory cannot be opened, or there is too little.
        """
        wanted = {way: least for way, least in nbytes.items() if self._arena(way).numel() < least}
        if wanted:
            with self._run.posting(tuple({peer for _, peer in wanted})):
                try:
                    self._grow({peer: least for (is_send, peer), least in wanted.items() if is_send})
                except DeviceMemoryError as error:
                    raise ConnectionLostError(None, error) from error
                for (is_send, peer), least in wanted.items():
                    if not is_send:
                        self._links[peer].take(least, self._look)
            self._version = object()
        return {way: self._arena(way) for way in nbytes}

    def share(self, asked: Asked, tag: int) -> Shared:
        """See Linked. The host waits for the other ranks to come to the same call, once."""
        with self._run.posting((*asked.to, *asked.of)):
            return self._held.shares.share(asked, tag, partial(are_idle, self._held), self._look)

    def _look(self) -> None:
        """Raise if the wait on the host is to end."""
        interrupted = self._interrupted()
        if interrupted is not None:
            interrupted()

    def _arena(self, way: Direction) -> torch.Tensor:
        is_send, peer = way
        return self._links[peer].arenas[is_send]

    def _grow(self, wanted: Mapping[int, int]) -> None:
        """Allocate for some peers at once: twice what each had at least, so that all that ever was is little more."""
        parts, total = {}, 0
        for peer, least in wanted.items():
            parts[peer] = total, max(least, 2 * self._arena((True, peer)).numel())
            total += -(-parts[peer][1] // PART_NBYTES) * PART_NBYTES
        if total:
            address = self._memory.allocate(-(-total // BLOCK_NBYTES) * BLOCK_NBYTES)
            self._blocks.append(address)
            handle = self._memory.exported(address)
            for peer, (offset, size) in parts.items():
                try:
                    self._links[peer].give(handle, address, offset, size)
                except LinkClosedError as error:
                    raise ConnectionLostError(peer, error) from error


def give_back_later(held: Held, owner: int | None = None) -> None:
    """Give back what nobody here uses any more, on a thread of its own; not in a fork of the process whose it is.

    To take memory away waits for all that the device has to do, and holds up who launches meanwhile: so that waits
    until nothing is under way there, of any connections.
    """
    if owner is None or os.getpid() == owner:
        in_background("tricomm-give-back", partial(held.give_back, partial(are_idle, held)))


def are_idle(held: Held) -> bool:
    """Whether a device has nothing to do, of any connections."""
    return held.runs.are_over and alive().are_idle_on(held.device)


def _let_go(links: tuple[DeviceLink, ...], runs: DeviceRuns) -> None:
    """Let streams go on until the device has done all that was queued. What a peer's device writes late would hold them
    again; and the driver may answer nobody before they go on.
    """
    question: Question[bool] | None = None
    pause = FIRST_PAUSE_SECONDS
    while True:
        for link in links:
            link.flags.let_go()
        question = question or Question(lambda: runs.are_over)
        answer = question.answer(pause)
        if answer:
            return
        if not question.is_open:
            question = None
            time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
