"""Channel: what the Resharders of the same ranks, device and channel name share, as long as one of them is there."""

import hashlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tricomm.errors import TransportError
from tricomm.transport.accelerator import Accelerator
from tricomm.transport.base import Near
from tricomm.transport.communicator import CONNECTING_TAG, LOG, Communicator
from tricomm.transport.coordination.background import LAST_WAIT_SECONDS, BackgroundThread
from tricomm.transport.coordination.coordinator import Coordinator
from tricomm.transport.coordination.diagnosis import describe_missed
from tricomm.transport.coordination.intent import Intent, ProblemError
from tricomm.transport.coordination.loss import post_closed
from tricomm.transport.coordination.order import channel_in_words
from tricomm.transport.coordination.run import CallId
from tricomm.transport.coordination.status import Heartbeat, StatusStore
from tricomm.transport.device.joining import joined
from tricomm.transport.device.run import DeviceRuns
from tricomm.transport.gloo import MAX_TAG, GlooConnections, GlooDevices
from tricomm.transport.handle import Ended
from tricomm.transport.memory.connections import met
from tricomm.transport.memory.meeting import doorway
from tricomm.transport.nccl import NcclConnections
from tricomm.transport.streams import StreamContext, stream_context_of

LEAST_PART_TO_CONNECT = 0.1
"""Of the timeout, for connecting after a rank that came to the meeting at the last moment."""

Task = tuple["Future[Any]", Callable[[], Any]]


class Worker:
    """Runs what is submitted, one after the other, on a thread that begins with the first and ends with the worker.

    It is a daemon: unlike a pool's thread it does not hold up the end of the process when a run waits for a rank that
    does not come.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread: BackgroundThread | None = None
        self._ended = threading.Semaphore(0)
        """One for each task that has ended; no future is kept, whose error would keep alive all that it has seen."""
        self._submitted = 0
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def submit(self, task: Callable[[], Any]) -> "Future[Any]":
        """Run a task when those before it are done."""
        if self._thread is None:
            self._thread = BackgroundThread("tricomm", partial(_work, self._tasks, self._ended))
            self._thread.start()
        future: Future[Any] = Future()
        self._submitted += 1
        self._tasks.put((future, task))
        return future

    @property
    def is_this_thread(self) -> bool:
        """Whether it is what runs this."""
        return threading.current_thread() is self._thread

    def end(self) -> None:
        """At the end of the process: end what waits for others, which hear of it, and wait a little for that."""
        if self._thread is not None:
            self._thread.is_to_end = True
        self.wait_idle(LAST_WAIT_SECONDS)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until all that was submitted has ended, well or badly, or for some seconds; true if it has."""
        deadline = time.monotonic() + seconds
        while self._submitted and self._ended.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._submitted -= 1
        return not self._submitted


def _work(tasks: "SimpleQueue[Task | None]", ended: threading.Semaphore) -> None:
    while True:
        given = tasks.get()
        if given is None:
            return
        future, task = given
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)
        finally:
            ended.release()
        del given, future, task


def _end_pending(worker: Worker, current: "list[weakref.ref[Communicator]]", rank: int, process: int) -> None:
    """At the end of the process, end what is still running in the background.

    A thread that is inside of the backend when the interpreter goes would end the process by a signal. Before the end
    of the process a channel goes when nothing uses it, perhaps in the last task of its worker. A finalizer lives until
    then, so it must not hold what leads back to the channel. In a forked child nothing runs, whatever was pending.
    """
    if os.getpid() != process or worker.is_this_thread or worker.wait_idle(0):
        return
    communicator = current[0]() if current else None
    if communicator is not None:
        call = communicator.call
        communicator.abort(f"the process of rank {rank} ended while {call} was pending", call, rank)
    worker.end()


class Turn:
    """Whose turn a channel is: a frame's that is in a ``with`` block, from when it takes it until it gives it back.

    A frame that an interrupt (KeyboardInterrupt) has ended on the way out, before the first line of what gives the turn
    back, is on no stack any more, and its turn is over all the same.

    Attributes:
        holders: one at most, at 0: the first to ``setdefault`` itself there has the turn, until it clears this.
    """

    def __init__(self) -> None:
        self.holders: dict[int, tuple[int, FrameType]] = {}
        self._taking_over = threading.Lock()

    def take(self, frame: FrameType) -> bool:
        """Take it for a frame of this thread, without waiting; false if another frame has it."""
        mine = (threading.get_ident(), frame)
        while (holder := self.holders.setdefault(0, mine)) is not mine:
            if _is_running(*holder):
                return False
            with self._taking_over:
                # One that has ended and is here still will not give it back, and nobody else may take its place.
                if self.holders.get(0) is holder:
                    self.holders[0] = mine
        return True

    def give_back(self) -> None:
        """End the turn of the frame that has it."""
        self.holders.clear()


def _is_running(thread: int, frame: FrameType) -> bool:
    """Whether a frame is on the stack of a thread."""
    at = sys._current_frames().get(thread)
    while at is not None and at is not frame:
        at = at.f_back
    return at is frame


class Channel:
    """One rank's end: the communicator of the moment, a thread for background runs, staging, and whose turn it is.

    Args:
        coordinator: of the process group.
        participants: the ranks, sorted.
        device: where tensors live; decides the backend.
        name: channels of equal ranks with different names know nothing of each other.
        devices: gloo's, of the group.
        accelerator: of the device; None if that is host memory.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        participants: tuple[int, ...],
        device: torch.device,
        name: str,
        devices: GlooDevices,
        accelerator: Accelerator | None,
    ) -> None:
        self.coordinator = coordinator
        self.participants = participants
        self.device = device
        self.name = name
        self.communicator: Communicator | None = None
        """The one of the moment."""
        self._has_memory = self._has_network = False
        """Whether the ranks of the communicator looked for each other's memory, and whether all have a network."""
        self._refused: dict[int, str] = {}
        """Ranks whose memory could not be read in a call, and why."""
        self._current: list[weakref.ref[Communicator]] = []
        """The same for the end of the process, which must not keep alive what keeps this channel alive."""
        self.told = (-1, 0)
        """The tag of what this rank was last told at a rendezvous that it failed, and how many calls it had begun."""
        self.last_started: Future[Ended] | None = None
        self.stream_context: StreamContext = stream_context_of(accelerator, device)
        self.worker = Worker()
        weakref.finalize(self, _end_pending, self.worker, self._current, coordinator.rank, os.getpid())
        self._devices = devices
        self._accelerator = accelerator
        self.staged = torch.empty(0, dtype=torch.uint8, device=device)
        """What ``staging`` gave last."""
        self.turn = Turn()
        """Of the thread that is in a call; taken without waiting, see ``describe_two_threads``."""
        key = repr((participants, device.type, name))
        self._place = f"communicator/{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _take(self, communicator: Communicator | None) -> None:
        """Use another one, or none, in place of that of the moment."""
        if self.communicator is not None:
            self.communicator.is_usable = False
        self.communicator = communicator
        self._current[:] = [] if communicator is None else [weakref.ref(communicator)]

    def staging(self, nbytes: int) -> torch.Tensor:
        """Staging of the channel, grown where it is too small; one run at a time uses it, on its current stream."""
        if self._accelerator is not None:
            self._accelerator.keep(self.staged, self._accelerator.current_stream(self.device))
        if self.staged.numel() < nbytes:
            self.staged = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.staged

    def describe_two_threads(self) -> str:
        """Say that the turn is another thread's."""
        return (
            f"two threads of rank {self.coordinator.rank} call at once between ranks {list(self.participants)} on "
            f"{channel_in_words(self.name)}, so ranks cannot know which call comes first; give each thread a "
            "channel=... of its own"
        )

    @property
    def is_connected(self) -> bool:
        """Whether calls may begin as it is."""
        return self.communicator is not None and self.communicator.is_usable

    def connect(
        self,
        intent: Intent,
        timeout_seconds: float,
        uses_memory: bool = False,
        by_links: bool = False,
        near: Near | None = None,
        given_up: Callable[[], str] = str,
    ) -> int:
        """Compare with the other ranks what is going to be done, and connect to them; returns the tag for it.

        Any rank may have lost its communicator, by a failure or because nothing there used it any more. So all take a
        new one if any rank asks for it; otherwise all have the same. One that is to use memory takes the place of one
        that cannot.

        Args:
            intent: what is going to be done.
            timeout_seconds: how long to wait.
            uses_memory: whether the memory of other ranks is to be used.
            by_links: whether no other thread uses the links of the ranks, so that they may meet by these.
            near: the links, if this rank has come to meet by them already.
            given_up: see Rendezvous.join.

        Raises:
            TransportError: a rank does something else, refused, or did not come within the timeout.
        """
        began, communicator, coordinator = time.monotonic(), self.communicator, self.coordinator
        has_memory = uses_memory or (communicator is not None and self._has_memory)
        has_network = not uses_memory or (communicator is not None and self._has_network)
        is_lacking = has_memory > self._has_memory or has_network > self._has_network

        def decide(must_reconnect: bool) -> str:
            if must_reconnect or communicator is None:
                return f"{coordinator.store.add(f'{self._place}/generations', 1)} {int(has_memory)} {int(has_network)}"
            return f"{communicator.generation} {int(self._has_memory)} {int(self._has_network)}"

        seen: dict[int, int] = {}
        told: list[str] = []

        def find_missed(other: int, heartbeat: Heartbeat, present: Sequence[int]) -> str | None:
            if communicator is None or communicator.abort_reason is not None:
                return None
            place, begun, rank = communicator.place, communicator.begun, coordinator.rank
            text = describe_missed(rank, intent.call, begun, place, other, heartbeat, present)
            # What one heartbeat says may be over; two say that it lasts.
            if text is None or seen.setdefault(other, heartbeat.number) == heartbeat.number:
                return None
            told.append(text)
            return text

        must_reconnect = not self.is_connected or is_lacking
        if near is None or not near.number:
            near = self.near() if by_links and uses_memory and not must_reconnect else None
        try:
            how = must_reconnect, decide, find_missed, near, given_up
            agreed = coordinator.rendezvous.join(intent, timeout_seconds, *how)
        except BaseException as error:
            self.fail_to_meet(near, intent.call, error, told)
            raise
        generation, with_memory, with_network = map(int, agreed.decision.split())
        if communicator is None or communicator.generation != generation:
            # Forget the old one first: should connecting fail, the next rendezvous must know that this rank has none.
            communicator = None
            self._take(None)
            has = bool(with_memory), bool(with_network)
            self._take(self._connected(generation, intent.call, _left(began, timeout_seconds), has))
            self._has_memory = bool(with_memory)
        return tag_of(agreed.epoch)

    def fail_to_meet(self, near: Near | None, call: str, error: BaseException, missed: Sequence[str] = ()) -> None:
        """Tell those who may have met by links, and have begun the call, that this rank failed at the rendezvous; or
        those who are ``missed`` there and wait in a call, why: what ends both has one tag, and nobody hears it twice.
        """
        communicator = self.communicator
        if communicator is None:
            return
        tag = tag_of(self.coordinator.rendezvous.number_of(self.participants, self.name))
        self.told = tag, communicator.begun
        if missed:
            communicator.abort(missed[0], CallId(tag, 0, call))
        elif near is not None:
            _tell_those_who_met(communicator, near.number, call, error)

    def near(self) -> Near | None:
        """What the ranks meet by, if all have links."""
        communicator = self.communicator
        near = None if communicator is None else communicator.near()
        if communicator is not None and near is not None:
            near.find_failed = partial(_failed, self.coordinator.status, communicator.place)
        return near

    def _connected(self, generation: int, call: str, timeout_seconds: float, has: tuple[bool, bool]) -> Communicator:
        """A communicator whose connections stand on all ranks; ``has`` memory, network."""
        found = Communicator(self.coordinator, self.participants, self._place, generation, self.device, self._refused)
        self._current[:] = [weakref.ref(found)]
        run = found.begin(CONNECTING_TAG, 0, call, timeout_seconds, connecting=self.participants)
        try:
            with self._telling(found, call):
                self._has_network = True
                if len(self.participants) > 1:
                    self._has_network = self._connect(found, timeout_seconds, *has)
        finally:
            found.end(run)
        weakref.finalize(found, post_closed, self.coordinator.status, found.place, os.getpid())
        return found

    @contextmanager
    def _telling(self, found: Communicator, call: str) -> Iterator[None]:
        """Whatever stops this rank while it connects reaches the others."""
        try:
            yield
        except TransportError as error:
            raise found.abort(str(error)) from error
        except RuntimeError as error:
            raise found.abort(self._describe_failure(found, call, error)) from error
        except BaseException as error:
            found.abort(f"rank {self.coordinator.rank} failed while it connected for {call}: {error!r}")
            raise

    def _connect(self, found: Communicator, timeout_seconds: float, has_memory: bool, has_network: bool) -> bool:
        """Connect it; returns whether all its ranks have a network, and not memory alone."""
        rank, store = self.coordinator.rank, self.coordinator.store
        index = {rank: index for index, rank in enumerate(self.participants)}
        store.set(f"{found.place}/hello/{rank}", "1")
        door = doorway(dist.PrefixStore(f"{found.place}/memory", store), rank) if has_memory else None
        accelerator, interrupted = self._accelerator, found.interrupted
        if accelerator is None:
            of_gloo = dist.PrefixStore(f"{found.place}/gloo", store)
            gloo: Any = GlooConnections(of_gloo, rank, index, self._devices, timeout_seconds, interrupted)
            others, refused = [other for other in self.participants if other != rank], found.refused
            link = None if door is None else partial(met, gloo, door, others, found.exchange, interrupted, refused)
            found.connect(gloo, link)
            return True

        def by_nccl(runs: DeviceRuns) -> NcclConnections:
            of_nccl = dist.PrefixStore(f"{found.place}/nccl", store)
            return NcclConnections(accelerator, of_nccl, rank, index, self.device, timeout_seconds, runs)

        if not has_memory:
            found.connect(by_nccl(DeviceRuns(accelerator, self.device)))
            return True
        of_device, ranks = dist.PrefixStore(f"{found.place}/device", store), (rank, self.participants)
        linked = joined(accelerator, self.device, of_device, ranks, door, has_network, by_nccl, interrupted)
        found.connect(linked.network or linked, lambda: linked)
        return linked.network is not None

    def _describe_failure(self, found: Communicator, call: str, error: RuntimeError) -> str:
        if found.abort_reason is not None:
            return found.abort_reason.text
        store = self.coordinator.store
        absent = [rank for rank in self.participants if not store.check([f"{found.place}/hello/{rank}"])]
        who = f"rank {absent[0]} did not connect" if absent else f"ranks {list(self.participants)} could not connect"
        names = "GLOO_SOCKET_IFNAME" if self._accelerator is None else "NCCL_SOCKET_IFNAME"
        LOG.info("rank %d while it connects for %s: %s", self.coordinator.rank, call, error)
        return f"{who} in {call}; see whether a rank died, and on several hosts whether {names} names the right network"


def _left(began: float, timeout_seconds: float) -> float:
    """What the meeting has left of the timeout, for connecting."""
    return max(began + timeout_seconds - time.monotonic(), LEAST_PART_TO_CONNECT * timeout_seconds)


def tag_of(epoch: int) -> int:
    """The tag of what is done from the epoch of a number on."""
    return 1 + epoch % (MAX_TAG - 1)


def _failed(status: StatusStore, place: str, epoch: int) -> str | None:
    """See Near: why what was done from an epoch on has failed, for ranks that are still there."""
    reason = status.abort_of(place)
    return reason.text if reason is not None and reason.tag == tag_of(epoch) else None


def _tell_those_who_met(communicator: Communicator, epoch: int, call: str, error: BaseException) -> None:
    """A rank that failed at a rendezvous tells those who may have met there by links, and have begun the call."""
    problem = error.__cause__
    if not epoch or (isinstance(problem, ProblemError) and not problem.may_have_met):
        return
    rank, late = communicator.coordinator.rank, problem.late if isinstance(problem, ProblemError) else None
    text = str(error) if isinstance(error, TransportError) else f"rank {rank} failed in {call}: {error!r}"
    communicator.abort(text, CallId(tag_of(epoch), 0, call), late, "late")
