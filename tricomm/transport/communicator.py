"""Communicator: connections between some ranks of a process group, and what becomes of a call when they fail.

Ranks that reshard with each other on one channel share a communicator of their own, so that nothing here meets the
user's messages, and a failure leaves the user's process group usable. It is made from the backends directly: names of
``dist.new_group`` depend on a rank's history, and those with different ones would never find each other.

**Identity.** Every message belongs to (communicator, tag, call, round). A communicator is one generation of
connections: after a failure there are new ones. The *tag* is the identity of a Resharder: the number of the
rendezvous in which all ranks met for it last, of a count that is the same on all of them. Of one tag, calls and
rounds follow each other on every pair of ranks, as they do on the ranks. gloo keeps a queue for each tag, so bytes of
another Resharder are never delivered; on NCCL, whose messages match in order alone, ``confirm`` compares tag and
call, and a board does after the calls. Ranks that call in different orders wait for each other, until the deadline at
the latest, or have each other's bytes on NCCL without ``confirm``; and are told both calls.

**Failure.** Whoever knows a cause posts it, with the call in which it happened, and then closes its connections.
Whoever finds a connection closed reads the cause. If it concerns a call that is over here (others were in the
barrier, or still had to receive), nothing is wrong with the call that found it: ``is_past`` says so; it may be redone.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import torch

from tricomm.errors import TransportError
from tricomm.packing.runs import NOTHING_IN_PLACE
from tricomm.packing.staging import Direction
from tricomm.transport.base import (
    NO_ARENAS,
    Asked,
    ConnectionLostError,
    Connections,
    Linked,
    Near,
    NoConnections,
    Operation,
    Shared,
)
from tricomm.transport.coordination.background import Question, end_if_asked
from tricomm.transport.coordination.board import CallBoard
from tricomm.transport.coordination.coordinator import Coordinator
from tricomm.transport.coordination.loss import describe_loss
from tricomm.transport.coordination.order import describe_another
from tricomm.transport.coordination.run import CallId, Place, Run
from tricomm.transport.coordination.status import AbortReason, Fault
from tricomm.transport.coordination.store import with_lost_store
from tricomm.transport.memory.reading import UnreadableError
from tricomm.transport.memory.rungs import ELSEWHERE, NOT_ASKED, PairTransports, of_all

LOG = logging.getLogger("tricomm")

CONNECTING_TAG = 0
"""The tag of what is sent before any call; Resharders' tags begin at 1."""

PostedWork = tuple[int, Any]
"""The peer of a posted operation, and the backend's work. Several NCCL operations of one group share that."""


class Communicator:
    """One generation of connections, and the calls on it, one at a time.

    Args:
        coordinator: of the process group.
        participants: the ranks, sorted.
        place: its name on the store, the same on all ranks.
        generation: how many these ranks had before on this channel.
        device: where tensors live.
        refused: ranks of this host whose memory could not be read, and why; added to.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        participants: tuple[int, ...],
        place: str,
        generation: int,
        device: torch.device,
        refused: dict[int, str] | None = None,
    ) -> None:
        self.coordinator, self.participants = coordinator, participants
        self.place, self.generation, self.device = f"{place}/{generation}", generation, device
        self.abort_reason: AbortReason | None = None
        """Why it can no longer be used. Written once, under the lock."""
        self.is_usable = True
        """Whether calls may begin: nobody has aborted it, as far as is known here, nor taken another in its place."""
        self._monitor, self._watched = coordinator.monitor, coordinator.monitor.watched
        self.run: Run | None = None
        self.begun = 0  # calls
        self.unread_of: tuple[int, int, str, int] | None = None
        """Tag, number, name and position of the call of which others may still read what it gave them by memory."""
        self.call = CallId(CONNECTING_TAG, 0, "")
        """The one that runs, or ran last."""
        self._set_timeout(0.0, ())
        self._has_failed_late, self._completed = False, dict[int, int]()
        self._unfinished: deque[Run] = deque()
        """Runs of which the device has still to do what they queued when their calls returned, in their order."""
        self._board: CallBoard | None = None
        """Where messages have no tags, what calls were made."""
        self._last_runs: dict[int, Run] = {}
        """There, the last one of each tag, whose Resharder hears of a difference."""
        self.connections: Connections = NoConnections()
        self._network: Connections = self.connections
        self._by_memory: Linked | None = None
        self.near: Callable[[], Near | None] = lambda: None
        self.refused = {} if refused is None else refused
        self.depth, self.launch = self.connections.depth, self.connections.launch
        self.in_place, self.arenas = NOTHING_IN_PLACE, NO_ARENAS
        self._lock = threading.Lock()
        self._token = torch.zeros(2, dtype=torch.uint8, device=device)

    def connect(self, connections: Connections, link: Callable[[], Linked] | None = None) -> None:
        """Use the connections, in a run, once every rank has all its own: a quick one could else be gone before.

        Args:
            connections: over the network.
            link: gives those that mix memory and network, once all are connected; None if nobody asks for that.
        """
        self._network = self.connections = connections
        self.depth, self.launch = connections.depth, connections.launch
        if connections.has_tags:
            self.confirm()  # else to connect is to meet already
        else:
            tell = weakref.WeakMethod(self._misordered)
            self._board = CallBoard(self.coordinator.status, self.place, self.participants, tell)
        if link is not None:
            self._by_memory = link()
            self.near = self._by_memory.near
        connections.connected()

    def transports(self, uses_memory: bool) -> PairTransports:
        """How bytes go between this rank and each other, in calls that use memory or do not."""
        found = self._by_memory.transports if self._by_memory is not None and uses_memory else {}
        return of_all(found, self.coordinator.rank, self.participants, ELSEWHERE if uses_memory else NOT_ASKED)

    # ---- Transport

    def post(self, operations: Iterable[Operation]) -> list[PostedWork]:
        """See Transport."""
        try:
            return self.connections.post(operations, self.call.tag)
        except ConnectionLostError as error:
            raise self.lost(error.peer, error) from error

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Raise what became of the call when the connections are lost."""
        try:
            yield
        except ConnectionLostError as error:
            raise self.lost(error.peer, error) from error

    def wait(self, posted: PostedWork) -> None:
        """Return when the buffer of a posted operation may be read (receive) or reused (send).

        Raises:
            TransportError: the peer, or a rank that it waits for, died, stopped or never called.
        """
        run = self.run
        assert run is not None
        run.waiting_for, work = posted
        try:
            (self._by_memory or self.connections).wait(work, self._limit)
        except RuntimeError as error:
            raise self.failed(posted[0], error) from error
        run.waiting_for = None

    def reserve(self, nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """See Transport."""
        assert self._by_memory is not None
        with self._losing():
            found = self._by_memory.reserve(nbytes)
        self.arenas = self._by_memory.arenas
        return found

    def share(self, asked: Asked) -> Shared:
        """See Transport."""
        assert self._by_memory is not None
        with self._losing():
            return self._by_memory.share(asked, self.call.tag)

    def catch_up(self) -> None:
        """Before anything is posted by memory, wait until others have read what this rank gave in a call before."""
        run, given, by_memory = self.run, self.unread_of, self._by_memory
        if run is None or given is None or by_memory is None or self.connections is not by_memory:
            return
        self.unread_of, unread = None, by_memory.unread()
        run.behind = Run(*given[:3], self._place, None, given[3]) if unread else None
        for work in unread:
            self.wait(work)
        run.behind = None

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections."""
        with self._losing():
            self.connections.gather(groups)

    def exchange(self, operations: Iterable[Operation]) -> None:
        """Post operations and wait for all of them."""
        for work in self.post(operations):
            self.wait(work)

    def confirm(self) -> None:
        """Return when every rank of the communicator has come here.

        Each tells each by its link, or else in step k the one 2^k places on, by a byte, and hears the one 2^k places
        back. Who failed has closed its connections, which ends all waits. Without tags, bytes are tag and call.
        """
        if self.connections is self._by_memory and self._nod():
            return
        ranks, here = self.participants, self.participants.index(self.coordinator.rank)
        ours, theirs = self._token[:1], self._token[1:]
        if not self.connections.has_tags:
            identity = torch.tensor([self.call.tag, self.call.number], device=self.device)
            ours, theirs = identity.view(torch.uint8), torch.empty_like(identity).view(torch.uint8)
        reach = 1
        while reach < len(ranks):
            to, back = ranks[(here + reach) % len(ranks)], ranks[(here - reach) % len(ranks)]
            self.exchange((Operation(False, back, theirs), Operation(True, to, ours)))
            if not self.connections.has_tags:
                self._join()
                self._compare(back, theirs)
            reach *= 2

    def _nod(self) -> bool:
        """As ``confirm``, by links; false if there are not enough."""
        run = self.run
        assert run is not None
        try:
            nods = self._by_memory and self._by_memory.nod(run.tag)
            for run.waiting_for, nod in nods or ():
                nod.wait(self._limit)
        except RuntimeError as error:
            raise self.lost(error.peer if isinstance(error, ConnectionLostError) else run.waiting_for, error) from error
        run.waiting_for = None
        return nods is not None

    def _join(self) -> None:
        """Return when the device has done all that this call has queued: nothing has been received before.

        Raises:
            TransportError: the call was aborted meanwhile.
        """
        self.connections.join(lambda: self.abort_reason is not None)
        self.interrupted()

    def _compare(self, other: int, received: torch.Tensor) -> None:
        """Without tags: whether another rank confirms the same call."""
        tag, number = received.view(torch.int64).tolist()
        if (tag, number) != (self.call.tag, self.call.number):
            rank, is_of_same = self.coordinator.rank, tag == self.call.tag
            raise self.abort(describe_another(rank, str(self.call), other, number, is_of_same, tag))

    # ---- calls

    def begin(
        self,
        tag: int,
        number: int,
        name: str,
        timeout_seconds: float,
        uses_memory: bool = False,
        connecting: tuple[int, ...] = (),
    ) -> Run:
        """Begin a call: all that it waits for must come within the timeout. ``end`` it in any case.

        Args:
            tag, number, name: see CallId.
            timeout_seconds: of the call.
            uses_memory: whether it may use the memory of other ranks.
            connecting: the ranks that connect in it, if it is for that.
        """
        if timeout_seconds != self._timeout_seconds:
            self._set_timeout(timeout_seconds, connecting)
        by_memory = self._by_memory
        if by_memory is not None and uses_memory:
            self.connections, self.in_place, self.arenas = by_memory, by_memory.in_place, by_memory.arenas
        elif by_memory is not None:
            self.connections, self.in_place, self.arenas = self._network, NOTHING_IN_PLACE, NO_ARENAS
        self.begun += 1
        self.call = self.run = run = object.__new__(Run)  # and what Run(...) does: few functions are entered here
        run.tag, run.number, run.name, run.owner, run.position = tag, number, name, self, self.begun
        run.place, run.began = self._place, monotonic()
        run.deadline = run.began + self._place.waiting_seconds
        if (begin := self.connections.begin) is not None:
            run.pending = begin()
        if self._board is not None:
            self._board.add(tag, number, name)
            self._last_runs[tag], run.board = run, self._board
        watched = self._watched  # as Monitor.watch, which does the rest if there is any
        run.computed_before = watched.computing.seconds_before
        watched.runs.add(run)
        if watched.is_idle or watched.computing.what or run.place.heartbeat_seconds < watched.seconds:
            self._monitor.watch(run)
        return run

    def _set_timeout(self, timeout_seconds: float, connecting: tuple[int, ...]) -> None:
        """Bind once what calls with the same timeout have in common."""
        self._timeout_seconds = 0.0 if connecting else timeout_seconds
        self._place = Place.of(self.place, timeout_seconds, connecting)
        self._limit = self._place.limit_after(timeout_seconds)

    def end(self, run: Run, is_complete: bool = False) -> None:
        """End a call, badly or well: it is over here, and what it queued on a device is watched until it is done."""
        if is_complete:
            if self._by_memory is not None and self.connections is self._by_memory:
                is_unread = self._by_memory.finish(self._limit)
                self.unread_of = (run.tag, run.number, run.name, run.position) if is_unread else None
            self._completed[self.call.tag] = self.call.number
        self.run = None
        if run.pending is None:
            self._watched.runs.discard(run)
            run.owner = None  # see Monitor.release
            return
        run.pending.close()
        for before in tuple(self._unfinished):
            if not before.is_done():  # asked without the lock: an abort may be what the answer waits for
                break
            with self._lock, suppress(ValueError):  # which has dropped it meanwhile
                self._unfinished.remove(before)
            self._monitor.release(before)
        with self._lock:
            if self.abort_reason is None:
                self._unfinished.append(run)
                return
        self._monitor.release(run)

    def is_past(self, told: int = -1) -> bool:
        """Whether it was aborted in a call that is over here, or in one of a ``told`` tag, and all may come again."""
        reason = self.abort_reason
        if (
            reason is None
            or reason.lost is not None
            or self._has_failed_late
            or (reason.tag, reason.call) == (self.call.tag, self.call.number)
        ):
            return False
        return reason.tag == told or self._completed.get(reason.tag, 0) >= reason.call > 0

    # ---- failure

    def abort(
        self, text: str, call: CallId | None = None, rank: int | None = None, fault: Fault = "left"
    ) -> TransportError:
        """Post a reason, unless one stands, and close the connections; returns the error to raise.

        Args:
            text: the reason.
            call: in which call; None is the one that runs, or ran last.
            rank, fault: who is at fault, and what it did: see AbortReason.
        """
        call = self.call if call is None else call
        with self._lock:
            if self.abort_reason is None:
                mine = AbortReason(text, call.tag, call.number, rank, fault)
                try:
                    reason = self.coordinator.status.post_abort(self.place, mine)
                except TransportError as error:
                    reason = mine._replace(text=with_lost_store(text, error))
                if reason.dead is not None:
                    self.coordinator.dead[reason.dead] = reason.text
                self.abort_reason, self.is_usable = reason, False
                self._fail_unfinished(reason.text)
                (self._by_memory or self.connections).abort()
            return TransportError(self.abort_reason.text)

    def lost(self, peer: int | None, error: RuntimeError) -> TransportError:
        """Find out why an operation failed, tell everybody, and abort; returns the error to raise.

        Args:
            peer: whose connection failed; None if no single one did.
            error: what the backend says. It goes to the log.
        """
        LOG.info("rank %d in %s: %s", self.coordinator.rank, self.call, error)
        if self.abort_reason is not None:
            return TransportError(self.abort_reason.text)
        status, place = self.coordinator.status, (self.place, self.participants)
        text, lost, fault = describe_loss(status, place, str(self.call), peer, error)
        return self.abort(text, None, lost, fault)

    def failed(self, peer: int, error: RuntimeError) -> TransportError:
        """As ``lost``; but if a rank's memory cannot be read though it is there, tell everybody, and do without."""
        if not isinstance(error, UnreadableError) or error.is_of_dead:
            return self.lost(peer, error)
        self.refused[peer] = f"its memory could not be read in {self.call}: {error}"
        rank = self.coordinator.rank
        return self.abort(f"rank {rank} could not read the memory of rank {peer} in {self.call}: {error}; call again")

    def interrupted(self) -> None:
        """Raise if somebody has aborted it, or the process ends."""
        end_if_asked()
        if self.abort_reason is not None:
            raise TransportError(self.abort_reason.text)

    def _fail_unfinished(self, text: str) -> None:
        """Calls have returned that the device does not carry out any more; called with the lock held."""
        runs = tuple(self._unfinished)
        done = Question(lambda: [run for run in runs if run.is_done()]).answer() or ()
        for run in runs:
            if run not in done:
                run.failure = text
                self._has_failed_late = True
            self._monitor.release(run)
        self._unfinished.clear()

    def _misordered(self, text: str) -> None:
        """Calls were made in another order, and may have returned with each other's bytes: the next ones say so."""
        self.abort(text)
        for run in list(self._last_runs.values()):
            run.failure = run.failure or text

    def end_run(self, run: Run, text: str, late: int | None) -> None:
        """See RunOwner."""
        if self.run is run or run in self._unfinished:
            self.abort(text, run, late, "late")
