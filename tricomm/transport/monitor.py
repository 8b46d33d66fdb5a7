"""The monitor: a thread that speaks for a rank whose main thread is blocked in a wait.

While a reshard runs longer than a heartbeat, the monitor posts that this rank is alive and whom it waits for, and
looks whether somebody has posted an abort reason. So when a wait times out, the rank that waited can follow the chain
of who waits for whom to the one that shows no sign of life.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

from tricomm.errors import TransportError
from tricomm.transport.status import Heartbeat, StatusStore

MAX_RANKS = 64
"""Query at most this many ranks for heartbeats; each answer takes two calls of the store."""


class Watched(Protocol):
    """What the monitor sees of a communicator."""

    name: str
    call: int
    waiting_for: int | None
    is_slow: bool

    def close_connections(self) -> None:
        """Wake the rank from its wait."""
        ...


def heartbeat_seconds(timeout_seconds: float) -> float:
    """The time between two heartbeats: a tenth of the timeout, at most a second."""
    return min(1.0, timeout_seconds / 10)


class Monitor:
    """Watches the communicators of one process on one thread, which runs only from the first slow wait on.

    Args:
        status: where heartbeats are posted and abort reasons are read.
    """

    def __init__(self, status: StatusStore) -> None:
        self.status = status
        self._communicators: dict[str, Watched] = {}
        self._seen: dict[str, int] = {}
        self._heartbeats = 0
        self._seconds = 1.0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, communicator: Watched, seconds: float) -> None:
        """A run on the communicator has begun."""
        self._communicators[communicator.name] = communicator
        self._seconds = min(self._seconds, seconds)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tricomm-monitor", daemon=True)
            self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def release(self, communicator: Watched) -> None:
        """The run on the communicator is over."""
        self._communicators.pop(communicator.name, None)

    def _run(self) -> None:
        idle = threading.Event()
        while True:
            self._wake.wait()
            idle.wait(self._seconds)
            if not self._look():
                self._wake.clear()
                self._seen.clear()
                # A run may have begun between the two lines above.
                if self._communicators:
                    self._wake.set()

    def _look(self) -> bool:
        """Post a heartbeat for the slow communicators; whether any is in a run. Keeps none alive between two looks."""
        communicators = list(self._communicators.values())
        slow = [one for one in communicators if self._seen.get(one.name) == one.call]
        if slow:
            self._post_heartbeat(slow)
        self._seen.update((one.name, one.call) for one in communicators)
        return bool(communicators)

    def _post_heartbeat(self, slow: list[Watched]) -> None:
        """These communicators are in the same run as a heartbeat ago."""
        waits = {}
        for communicator in slow:
            communicator.is_slow = True
            waiting_for = communicator.waiting_for
            waits[communicator.name] = self.status.rank if waiting_for is None else waiting_for
        self._heartbeats += 1
        try:
            self.status.post_heartbeat(Heartbeat(self._heartbeats, waits))
            failed = [one for one in slow if self.status.abort_reason(one.name) is not None]
        except TransportError:
            return  # the store is lost: the wait itself will end in an error that says so
        for communicator in failed:
            communicator.close_connections()


def stalled_rank(status: StatusStore, communicator: str, peer: int, seconds: float) -> str:
    """Diagnose a wait that timed out: from ``peer`` on, follow the ranks that are alive and wait.

    Args:
        status: the notes.
        communicator: the communicator's name.
        peer: whom this rank waited for.
        seconds: the time between two heartbeats.
    """
    before = {rank: heartbeat.number for rank, heartbeat in _waited_for(status, peer)}
    threading.Event().wait(1.5 * seconds)
    abort_reason = status.abort_reason(communicator)
    if abort_reason is not None:
        return abort_reason
    rank = peer
    followed: list[int] = []
    while rank not in followed:
        heartbeat = status.heartbeat_of(rank)
        is_here = communicator in heartbeat.waits and heartbeat.number != before.get(rank, 0)
        silent = None if is_here else _silent_rank(status, rank, before)
        if silent is not None:
            return (
                f"rank {silent} gave no sign of life within the timeout: it hangs, is stopped, or never made this "
                f"call; see that rank's log (rank {status.rank} waited for rank {peer})"
            )
        followed.append(rank)
        if not is_here or heartbeat.waits[communicator] == rank:
            return (
                f"rank {rank} is alive but did not send or receive within the timeout; it is busy elsewhere or the "
                f"timeout is too short (rank {status.rank} waited for rank {peer})"
            )
        rank = heartbeat.waits[communicator]
    return (
        f"ranks {followed} wait for each other until the timeout; raise the timeout if the network is slow, "
        "and report both specs if it is not"
    )


def _waited_for(status: StatusStore, first: int) -> Iterator[tuple[int, Heartbeat]]:
    """The heartbeats of a rank, then of those for whom it waits anywhere, and so on, but not of this rank."""
    seen, ahead = {status.rank}, [first]
    while ahead and len(seen) <= MAX_RANKS:
        rank = ahead.pop(0)
        if rank not in seen:
            seen.add(rank)
            heartbeat = status.heartbeat_of(rank)
            yield rank, heartbeat
            ahead.extend(sorted(heartbeat.waits.values()))


def _silent_rank(status: StatusStore, first: int, before: Mapping[int, int]) -> int | None:
    """The nearest rank, from ``first`` on, without a heartbeat since; None if all are alive."""
    return next(
        (rank for rank, heartbeat in _waited_for(status, first) if heartbeat.number == before.get(rank, 0)), None
    )
