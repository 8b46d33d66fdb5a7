"""The monitor: a thread that speaks for a rank whose main thread is blocked in a wait.

While a reshard runs longer than a beat, the monitor posts that this rank is alive and whom it waits for, and
looks whether somebody has noted a failure. So when a wait times out, the rank that waited can follow the chain
of who waits for whom to the one that shows no sign of life.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

from tricomm.errors import TransportError
from tricomm.transport.board import Beat, Board, Waits

MAX_HOPS = 64


class Watched(Protocol):
    """What the monitor sees of a lane."""

    name: str
    call: int
    waiting_for: int | None
    is_slow: bool

    def close_connections(self) -> None:
        """Wake the rank from its wait."""
        ...


def beat_seconds(timeout_seconds: float) -> float:
    """The time between two beats: a tenth of the timeout, at most a second."""
    return min(1.0, timeout_seconds / 10)


class Monitor:
    """Watches the lanes of one process on one thread, which runs only from the first slow wait on.

    Args:
        board: where beats are posted and verdicts are read.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self._lanes: dict[str, Watched] = {}
        self._seen: dict[str, int] = {}
        self._beats = 0
        self._seconds = 1.0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, lane: Watched, seconds: float) -> None:
        """A run on the lane has begun."""
        self._lanes[lane.name] = lane
        self._seconds = min(self._seconds, seconds)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tricomm-monitor", daemon=True)
            self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def release(self, lane: Watched) -> None:
        """The run on the lane is over."""
        self._lanes.pop(lane.name, None)

    def _run(self) -> None:
        idle = threading.Event()
        while True:
            self._wake.wait()
            idle.wait(self._seconds)
            if not self._look():
                self._wake.clear()
                self._seen.clear()
                # A run may have begun between the two lines above.
                if self._lanes:
                    self._wake.set()

    def _look(self) -> bool:
        """Beat for the lanes that are slow; whether any is in a run. Keeps no lane alive between two looks."""
        lanes = list(self._lanes.values())
        slow = [lane for lane in lanes if self._seen.get(lane.name) == lane.call]
        if slow:
            self._tell_waits(slow)
        for lane in slow:
            self._beat(lane)
        self._seen.update((lane.name, lane.call) for lane in lanes)
        return bool(lanes)

    def _tell_waits(self, slow: list[Watched]) -> None:
        """Say for whom this rank waits in all of its slow lanes."""
        peers = {lane.waiting_for for lane in slow}
        self._beats += 1
        try:
            self.board.post_waits(Waits(self._beats, tuple(sorted(peer for peer in peers if peer is not None))))
        except TransportError:
            return  # as below

    def _beat(self, lane: Watched) -> None:
        """The lane is in the same run as a beat ago."""
        lane.is_slow = True
        waiting_for = lane.waiting_for
        self._beats += 1
        try:
            self.board.post_beat(
                lane.name,
                Beat(self._beats, self.board.rank if waiting_for is None else waiting_for),
            )
            failed = self.board.verdict(lane.name) is not None
        except TransportError:
            return  # the store is lost: the wait itself will end in an error that says so
        if failed:
            lane.close_connections()


def stalled_rank(board: Board, lane: str, peer: int, seconds: float) -> str:
    """Who is to blame for a wait that timed out: from ``peer`` on, follow the ranks that are alive and wait.

    Args:
        board: the notes.
        lane: the lane's name.
        peer: whom this rank waited for.
        seconds: the time between two beats.
    """
    before: dict[int, int] = {}
    rank = peer
    for _ in range(MAX_HOPS):
        if rank in before:
            break
        beat = board.beat_of(lane, rank)
        before[rank] = beat.number
        rank = beat.peer
    said_before = {rank: waits.number for rank, waits in _reached(board, peer)}
    threading.Event().wait(1.5 * seconds)
    verdict = board.verdict(lane)
    if verdict is not None:
        return verdict
    rank = peer
    followed: list[int] = []
    while rank not in followed:
        beat = board.beat_of(lane, rank)
        is_here = beat.number != before.get(rank, 0)
        silent = None if is_here else _silent_rank(board, rank, said_before)
        if silent is not None:
            return (
                f"rank {silent} gave no sign of life within the timeout: it hangs, is stopped, or never made this "
                f"call; see that rank's log (rank {board.rank} waited for rank {peer})"
            )
        followed.append(rank)
        if beat.peer == rank or not is_here:
            return (
                f"rank {rank} is alive but did not send or receive within the timeout; it is busy elsewhere or the "
                f"timeout is too short (rank {board.rank} waited for rank {peer})"
            )
        rank = beat.peer
    return (
        f"ranks {followed} wait for each other until the timeout; raise the timeout if the network is slow, "
        "and report both specs if it is not"
    )


def _reached(board: Board, first: int) -> Iterator[tuple[int, Waits]]:
    """What a rank says, then those for whom it waits, and those for whom they wait, on any lane."""
    seen, ahead = {board.rank}, [first]
    while ahead:
        rank = ahead.pop(0)
        if rank not in seen:
            seen.add(rank)
            waits = board.waits_of(rank)
            yield rank, waits
            ahead.extend(waits.peers)


def _silent_rank(board: Board, first: int, said_before: Mapping[int, int]) -> int | None:
    """The nearest rank, from one that is not in this lane on, that has said nothing new; None if all are alive."""
    return next((rank for rank, waits in _reached(board, first) if waits.number == said_before.get(rank, 0)), None)
