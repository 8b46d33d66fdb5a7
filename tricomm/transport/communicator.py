"""torch.distributed underneath: gloo for tensors in host memory, NCCL for CUDA tensors.

Ranks that reshard with each other on one channel share a *communicator* of their own, so that nothing here meets the
user's messages, and a failure leaves the user's process group usable. It is made from the backends directly.
``dist.new_group`` would not do: with ``use_local_synchronization`` its name depends on how many groups a rank
happens to have, and ranks with different histories would never find each other.

A communicator lives as long as a Resharder holds it; then its connections and threads go.

gloo runs a pair of ranks half duplex, so a communicator has two backends there, one per direction. Each direction has
a gloo device, with the thread that does the sending and receiving, and all communicators of a process share the two:
such a thread looks for work 100 times a second even when there is none.
"""

import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist

from tricomm.errors import ArgumentError, SpecError, TransportError
from tricomm.transport import nccl
from tricomm.transport.base import Operation, Work
from tricomm.transport.monitor import Monitor, heartbeat_seconds, stalled_rank
from tricomm.transport.rendezvous import Rendezvous
from tricomm.transport.status import StatusStore
from tricomm.transport.streams import stream_context_of

GLOO_DEPTH = (4, 2)
NCCL_DEPTH = (0, 2)
CLOSING_TAG = 1
"""Tag of the receive that closes a gloo connection; data has tag 0."""


class PostedWork:
    """One posted operation. Several NCCL operations of one group share the work underneath."""

    __slots__ = ("_communicator", "_work", "peer")

    def __init__(self, communicator: "Communicator", peer: int, work: Any) -> None:
        self._communicator = communicator
        self._work = work
        self.peer = peer

    def wait(self) -> None:
        """See Work.

        Raises:
            TransportError: the peer, or a rank that it waits for, died, stopped or never called.
        """
        work, self._work = self._work, None
        if work is None:
            return
        communicator = self._communicator
        if communicator.is_cuda:
            work.wait()  # orders the stream; the host goes on
            return
        communicator.waiting_for = self.peer
        try:
            work.wait(communicator.limit())
        except RuntimeError as error:
            raise communicator.diagnose(self.peer, error) from error
        finally:
            communicator.waiting_for = None


class Communicator:
    """Connections between some ranks of a process group, and the diagnosis of their failures.

    Args:
        context: of the process group.
        participants: the ranks, sorted.
        device: where tensors live; decides the backend.
        channel: communicators of equal ranks on different channels know nothing of each other.
        generation: how many communicators these ranks had before on this channel.
        timeout_seconds: for connecting.
    """

    def __init__(
        self,
        context: "GroupContext",
        participants: tuple[int, ...],
        device: torch.device,
        channel: str,
        generation: int,
        timeout_seconds: float,
    ) -> None:
        self.context = context
        self.generation = generation
        self.name = f"{communicator_name(participants, device, channel)}/{generation}"
        self.index = {rank: index for index, rank in enumerate(participants)}
        self.device = device
        self.abort_reason: str | None = None
        self.last_started: Future[tuple[torch.Tensor | None, Any]] | None = None
        self.stream_context = stream_context_of(device)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tricomm")
        self.call = 0
        self.waiting_for: int | None = None
        self.is_slow = False
        self.is_cuda = device.type == "cuda"
        self._timeout_seconds = 0.0
        self._deadline = 0.0
        self._heartbeat_seconds = 1.0
        self._limit = timedelta(0)
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)
        self._token = torch.zeros(2, dtype=torch.uint8, device=device)
        self._backends = self._connect(timeout_seconds)
        if not self.is_cuda:
            self._await_all(timeout_seconds)

    # ---- Transport

    @property
    def depth(self) -> tuple[int, int]:
        """See Transport."""
        return NCCL_DEPTH if self.is_cuda else GLOO_DEPTH

    def post(self, operations: Iterable[Operation]) -> list[Work]:
        """See Transport."""
        if self.is_cuda:
            return self._post_group(list(operations))
        here = self.context.rank
        works: list[Work] = []
        # Packing happens as the iterable is read, outside of what counts as the peer's failure.
        for is_send, peer, buffer in operations:
            # One backend for messages up in rank and one for those down.
            backend = self._backends[is_send == (peer > here)]
            try:
                work = (backend.send if is_send else backend.recv)([buffer], self.index[peer], 0)
            except RuntimeError as error:
                raise self.diagnose(peer, error) from error
            works.append(PostedWork(self, peer, work))
        return works

    def staging(self, nbytes: int) -> torch.Tensor:
        """Staging of the communicator, grown where it is too small; one run at a time uses it."""
        if self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._staging

    def _post_group(self, operations: list[Operation]) -> list[Work]:
        """NCCL: the operations of a round run as one group; the plan keeps it under 256."""
        if not operations:
            return []
        try:
            work = nccl.post_group(self._backends[0], self.device, self.index, operations)
        except RuntimeError as error:
            peers = sorted({operation.peer for operation in operations})
            raise self.abort(
                f"rank {self.context.rank} could not queue its messages to and from ranks {peers}: {error}"
            ) from error
        return [PostedWork(self, operation.peer, work) for operation in operations]

    def _connect(self, timeout_seconds: float) -> list[Any]:
        rank, size = self.index[self.context.rank], len(self.index)
        if size == 1:
            return []
        timeout = timedelta(seconds=timeout_seconds)
        self.context.store.set(f"{self.name}/hello/{self.context.rank}", "1")
        try:
            if self.is_cuda:
                store = dist.PrefixStore(f"{self.name}/nccl", self.context.store)
                backends = [nccl.connect(store, rank, size, self.device, timeout)]
                weakref.finalize(self, _shut_down, backends).atexit = False
                return backends
            return [
                dist.ProcessGroupGloo(
                    dist.PrefixStore(f"{self.name}/{way}", self.context.store),
                    rank,
                    size,
                    _gloo_options(devices, timeout),
                )
                for way, devices in zip(("down", "up"), self.context.gloo_devices, strict=True)
            ]
        except RuntimeError as error:
            absent = [other for other in self.index if not self.context.store.check([f"{self.name}/hello/{other}"])]
            who = f"rank {absent[0]} did not connect" if absent else "the ranks could not connect"
            names = "NCCL_SOCKET_IFNAME" if self.is_cuda else "GLOO_SOCKET_IFNAME"
            raise TransportError(
                f"{who} within the timeout; see whether it died, and on several hosts whether {names} names "
                f"the right network ({error})"
            ) from error

    def _await_all(self, timeout_seconds: float) -> None:
        """Go on only when every rank has all its connections.

        Otherwise one that is quick could do its part, close and be gone before a slower one has looked at the
        connection to it, which would fail there. To connect with NCCL is such a rendezvous.
        """
        with self.running(timeout_seconds, "while it connected"):
            self.confirm()

    def confirm(self) -> None:
        """Return when every rank of the communicator has come here: a dissemination barrier of one-byte messages.

        In step k a rank tells the one 2^k places on and hears the one 2^k places back, so after log2(n) steps it
        has heard of all. A rank that failed has closed its connections, which ends everybody's wait.
        """
        ranks = list(self.index)
        here = self.index[self.context.rank]
        reach = 1
        while reach < len(ranks):
            token = self._token
            to, back = ranks[(here + reach) % len(ranks)], ranks[(here - reach) % len(ranks)]
            for work in self.post([Operation(False, back, token[1:]), Operation(True, to, token[:1])]):
                work.wait()
            reach *= 2

    # ---- waiting and diagnosis

    @contextmanager
    def running(self, timeout_seconds: float, moment: str) -> Iterator[None]:
        """A run: everything that it waits for must come within the timeout. Whatever stops this rank in it (a full
        memory, an interrupt) reaches the others, with the moment in words.
        """
        self.call += 1
        self.is_slow = False
        self._deadline = time.monotonic() + timeout_seconds
        if timeout_seconds != self._timeout_seconds:
            self._timeout_seconds = timeout_seconds
            self._heartbeat_seconds = heartbeat_seconds(timeout_seconds)
            self._limit = self._time_to_wait()
        self.context.monitor.watch(self, self._heartbeat_seconds)
        try:
            yield
        except TransportError:
            raise
        except BaseException as error:
            self.abort(f"rank {self.context.rank} failed {moment}: {error!r}")
            raise
        finally:
            self.context.monitor.release(self)  # it need not look any more

    def limit(self) -> timedelta:
        """How long a wait may take that begins now."""
        return self._time_to_wait() if self.is_slow else self._limit

    def _time_to_wait(self) -> timedelta:
        """What is left of the timeout, less what a diagnosis takes: two and a half heartbeats, and
        one more because a wait that begins within the first heartbeat is given the whole time.
        """
        remaining = self._deadline - time.monotonic() - 3.5 * self._heartbeat_seconds
        return timedelta(milliseconds=max(1, int(remaining * 1000)))

    def diagnose(self, peer: int, error: RuntimeError) -> TransportError:
        """Find out which rank is at fault, tell everybody, and abort the communicator."""
        timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        try:
            text = self.context.status.abort_reason(self.name)
            if text is None and timed_out:
                text = stalled_rank(self.context.status, self.name, peer, self._heartbeat_seconds)
            if text is None:
                text = (
                    f"rank {peer} died, left in the middle of a reshard or closed its Resharder: its connection to "
                    f"rank {self.context.rank} closed; see that rank's log ({error})"
                )
        except TransportError as lost:
            text = f"rank {peer} failed ({error}), and {lost}"
        return self.abort(text)

    def abort(self, text: str) -> TransportError:
        """Post a reason, unless one stands, and close the connections; returns the error to raise."""
        try:
            text = self.context.status.post_abort_reason(self.name, text)
        except TransportError as lost:
            text = f"{text}; {lost}"
        self.abort_reason = text
        self.close_connections()
        return TransportError(text)

    def close_connections(self) -> None:
        """Wake whoever waits for this rank, and this rank if it waits, by closing every connection.

        gloo has no call for it, but a receive that times out closes its pair on both sides.
        """
        if self.is_cuda:
            for backend in self._backends:
                backend.abort()
            return
        nothing = torch.empty(1, dtype=torch.uint8)
        for backend in self._backends:
            for rank, index in self.index.items():
                if rank == self.context.rank:
                    continue
                try:
                    backend.recv([nothing], index, CLOSING_TAG).wait(timedelta(milliseconds=1))
                except RuntimeError:
                    continue  # closed, which is what was wanted


class GroupContext:
    """What one process keeps for one process group: its rendezvous, its status, its monitor, its communicators.

    There is a communicator for each set of ranks that reshard with each other, times their channels.
    """

    def __init__(self, group: Any) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.store = dist.PrefixStore("tricomm", group.get_group_store())
        self.status = StatusStore(self.store, self.rank)
        self.rendezvous = Rendezvous(self.store, self.rank)
        self.monitor = Monitor(self.status)
        self._communicators: weakref.WeakValueDictionary[tuple[tuple[int, ...], str, str], Communicator] = (
            weakref.WeakValueDictionary()
        )

    @cached_property
    def gloo_devices(self) -> tuple[list[Any], list[Any]]:
        """The gloo devices of messages down and up in rank, for all communicators."""
        return _new_gloo_devices(), _new_gloo_devices()

    def connect(
        self,
        digest: str,
        participants: tuple[int, ...],
        fields: Callable[[], Mapping[str, str]],
        device: torch.device,
        channel: str,
        timeout_seconds: float,
    ) -> Communicator:
        """Compare with the other ranks what is going to be done, and connect to them; see Rendezvous.join.

        Any rank may have lost its communicator, by a failure or because nothing there used it any more. So all take a
        new one if any rank asks for it; otherwise all have the same.
        """
        key = (participants, device.type, channel)
        communicator = self._communicators.get(key)
        name = communicator_name(participants, device, channel)

        def decide(is_asked_for: bool) -> str:
            return str(
                self.store.add(f"{name}/generations", 1)
                if is_asked_for or communicator is None
                else communicator.generation
            )

        asks = communicator is None or communicator.abort_reason is not None
        generation = int(self.rendezvous.join(digest, participants, fields, timeout_seconds, asks, decide, channel))
        if communicator is None or communicator.generation != generation:
            # Forget the old one first: should connecting fail, the next rendezvous must know that this rank has none.
            self._communicators.pop(key, None)
            communicator = Communicator(self, participants, device, channel, generation, timeout_seconds)
            self._communicators[key] = communicator
        return communicator


def communicator_name(participants: tuple[int, ...], device: torch.device, channel: str) -> str:
    """What the communicators of some ranks are called on the store, the same on all of them."""
    return f"communicator/{hashlib.sha256(repr((participants, device.type, channel)).encode()).hexdigest()[:16]}"


def _new_gloo_devices() -> list[Any]:
    """A gloo device per network interface that GLOO_SOCKET_IFNAME names, as torch makes them for a group of its own."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names]


def _gloo_options(devices: list[Any], timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = devices
    options._timeout = timeout
    options._threads = 1  # they run collectives, of which there are none here
    return options


def _shut_down(backends: list[Any]) -> None:
    for backend in backends:
        backend.shutdown()


@lru_cache(maxsize=16)
def context_of(group: Any) -> GroupContext:
    """The context of a process group."""
    return GroupContext(group)


def resolve_group(group: Any) -> Any:
    """The process group, the default one for None.

    Raises:
        SpecError: there is none, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        remedy = "call torch.distributed.init_process_group first, or run all ranks here with tricomm.LocalTransport"
        raise SpecError(f"there is no process group; {remedy}")
    if group is None:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise SpecError("this process is not in the given group; only its ranks may call")
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(f"group={group!r} is not a process group; pass what new_group gave, or None")
    return group


def default_device(group: Any) -> torch.device:
    """Where tensors are expected when nobody says: the current CUDA device if the group has NCCL, else host memory."""
    # The configuration, as get_backend says "undefined" of a group that was made without naming one.
    if "cuda:nccl" in dist.get_backend_config(group).split(",") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_of(device: torch.device | str | None, group: Any) -> torch.device:
    """The device that somebody asks for, with its index ("cuda" is the current one), or the default one for None."""
    found = default_device(group) if device is None else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found
