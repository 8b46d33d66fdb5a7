"""The monitor: a thread that speaks for a rank whose main thread is blocked in a wait.

While a reshard runs longer than a beat, the monitor posts that this rank is alive and whom it waits for, and
looks whether somebody has noted a failure. So when a wait times out, the rank that waited can follow the chain
of who waits for whom to the one that shows no sign of life.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

from tricomm.errors import TransportError
from tricomm.transport.board import Beat, Board

MAX_RANKS = 64
"""So many are asked for their beats at most; each answer takes two calls of the store."""


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
            self._beat(slow)
        self._seen.update((lane.name, lane.call) for lane in lanes)
        return bool(lanes)

    def _beat(self, slow: list[Watched]) -> None:
        """These lanes are in the same run as a beat ago."""
        waits = {}
        for lane in slow:
            lane.is_slow = True
            waiting_for = lane.waiting_for
            waits[lane.name] = self.board.rank if waiting_for is None else waiting_for
        self._beats += 1
        try:
            self.board.post_beat(Beat(self._beats, waits))
            failed = [lane for lane in slow if self.board.verdict(lane.name) is not None]
        except TransportError:
            return  # the store is lost: the wait itself will end in an error that says so
        for lane in failed:
            lane.close_connections()


def stalled_rank(board: Board, lane: str, peer: int, seconds: float) -> str:
    """Who is to blame for a wait that timed out: from ``peer`` on, follow the ranks that are alive and wait.

    Args:
        board: the notes.
        lane: the lane's name.
        peer: whom this rank waited for.
        seconds: the time between two beats.
    """
    before = {rank: beat.number for rank, beat in _reached(board, peer)}
    threading.Event().wait(1.5 * seconds)
    verdict = board.verdict(lane)
    if verdict is not None:
        return verdict
    rank = peer
    followed: list[int] = []
    while rank not in followed:
        beat = board.beat_of(rank)
        is_here = lane in beat.waits and beat.number != before.get(rank, 0)
        silent = None if is_here else _silent_rank(board, rank, before)
        if silent is not None:
            return (
                f"rank {silent} gave no sign of life within the timeout: it hangs, is stopped, or never made this "
                f"call; see that rank's log (rank {board.rank} waited for rank {peer})"
            )
        followed.append(rank)
        if not is_here or beat.waits[lane] == rank:
            return (
                f"rank {rank} is alive but did not send or receive within the timeout; it is busy elsewhere or the "
                f"timeout is too short (rank {board.rank} waited for rank {peer})"
            )
        rank = beat.waits[lane]
    return (
        f"ranks {followed} wait for each other until the timeout; raise the timeout if the network is slow, "
        "and report both specs if it is not"
    )


def _reached(board: Board, first: int) -> Iterator[tuple[int, Beat]]:
    """The beats of a rank, then of those for whom it waits in any lane, and so on, but not of this rank."""
    seen, ahead = {board.rank}, [first]
    while ahead and len(seen) <= MAX_RANKS:
        rank = ahead.pop(0)
        if rank not in seen:
            seen.add(rank)
            beat = board.beat_of(rank)
            yield rank, beat
            ahead.extend(sorted(beat.waits.values()))


def _silent_rank(board: Board, first: int, before: Mapping[int, int]) -> int | None:
    """The nearest rank, from one that is not in this lane on, that has not beaten since; None if all are alive."""
    return next((rank for rank, beat in _reached(board, first) if beat.number == before.get(rank, 0)), None)
