"""The monitor: a thread that speaks for a rank that waits, and keeps the deadlines of what it waits in.

While a run takes longer than a heartbeat, the monitor posts that this rank is alive and what it waits in, and looks
whether somebody has aborted it, or whether ranks wait for each other in different calls. In the last heartbeats before
the deadline it watches those of the ranks that are waited for; at the deadline it diagnoses, and ends the run with what
it found. So a wait lasts until its timeout, and its error is there at once.

On a device a call returns when all is queued, and its run is watched until the device has done it. A run's time begins
when the device comes to it: what it does before is nobody's fault, however long it takes.

A pipeline computes while what it has posted waits in the background. For that time nobody else is at fault: deadlines
move on by it, and heartbeats say that the rank computes.
"""

import os
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.coordination.background import LAST_WAIT_SECONDS, process_ends
from tricomm.transport.coordination.board import LOOKS, CallBoard
from tricomm.transport.coordination.diagnosis import (
    SILENT_HEARTBEATS,
    Diagnosis,
    Observations,
    describe_lost,
    describe_silent_device,
    diagnose,
    diagnose_connecting,
    find_ends,
    find_other_order,
)
from tricomm.transport.coordination.run import MAX_HEARTBEAT_SECONDS, DeviceQuestions, Run, heartbeat_seconds
from tricomm.transport.coordination.status import Heartbeat, StatusStore, Wait
from tricomm.transport.coordination.store import GroupOverError

WATCHED_HEARTBEATS = 4.0
"""So many heartbeats before the deadline the monitor begins to watch those of other ranks."""

LOST_HEARTBEATS = 2.0
"""So many heartbeats the monitor looks who is silent after a backend has said that it lost some connection."""


class Computing(NamedTuple):
    """What a rank computes while its runs wait in the background.

    Attributes:
        what: in words; "" if it computes nothing.
        since: from when on.
        seconds_before: for which it had computed before.
        heartbeat_seconds: between two heartbeats.
    """

    what: str = ""
    since: float = 0.0
    seconds_before: float = 0.0
    heartbeat_seconds: float = MAX_HEARTBEAT_SECONDS

    def seconds(self, now: float) -> float:
        """Return for how long it has computed in all."""
        return self.seconds_before + (now - self.since if self.what else 0.0)

    def deadline_of(self, run: Run, now: float) -> float:
        """Return when a run must end: as much later as this rank computed meanwhile."""
        return run.deadline + self.seconds(now) - run.computed_before


class Watched:
    """What a monitor and its thread share; it keeps neither alive."""

    def __init__(self) -> None:
        self.runs: set[Run] = set()
        self.seconds = MAX_HEARTBEAT_SECONDS
        self.busy = threading.Event()
        self.hurry = threading.Event()
        self.is_idle = True
        """Whether the thread waits for ``busy``, or is about to; asking the event itself takes longer."""
        self.computing = Computing()  # written by the thread that computes alone
        self.is_ended = False
        self.thread: threading.Thread | None = None

    def wake(self) -> None:
        """Let the thread look."""
        self.is_idle = False
        self.busy.set()

    def end(self, process: int) -> None:
        """End the thread, unless this is a fork of its process, and wait for it if the process ends."""
        if os.getpid() != process:
            return
        self.is_ended = True
        self.busy.set()
        self.hurry.set()
        if process_ends() and self.thread not in (None, threading.current_thread()):
            self.thread.join(LAST_WAIT_SECONDS)


class Monitor:
    """Watches the runs of one process in one process group, on one thread, which ends with it.

    Args:
        status: where heartbeats are posted and reasons are read.

    Attributes:
        watched: what it watches.
    """

    def __init__(self, status: StatusStore) -> None:
        self.status = status
        self.watched = Watched()
        self._starting = threading.Lock()
        weakref.finalize(self, self.watched.end, os.getpid())

    def watch(self, run: Run) -> None:
        """Begin to watch a run. Communicator.begin does the usual part of it by itself."""
        shared = self.watched
        computing = shared.computing
        run.computed_before = computing.seconds(run.began) if computing.what else computing.seconds_before
        shared.runs.add(run)
        seconds = run.place.heartbeat_seconds
        if seconds < shared.seconds:
            shared.seconds = seconds
            shared.hurry.set()
        if shared.is_idle:
            self._wake()

    def release(self, run: Run) -> None:
        """End to watch a run."""
        self.watched.runs.discard(run)
        run.owner = None  # it may be kept, and what it would abort must not

    @contextmanager
    def computing(self, what: str, timeout_seconds: float) -> Iterator[None]:
        """Surround what this rank computes while it has posted what waits in the background.

        Args:
            what: in words.
            timeout_seconds: of those runs.
        """
        shared, began = self.watched, time.monotonic()
        shared.computing = Computing(what, began, shared.computing.seconds_before, heartbeat_seconds(timeout_seconds))
        if shared.is_idle:
            self._wake()
        try:
            yield
        finally:
            shared.computing = Computing(seconds_before=shared.computing.seconds(time.monotonic()))

    def _wake(self) -> None:
        """Begin to look, on a thread that the first run starts."""
        shared = self.watched
        with self._starting:
            if shared.thread is None:
                arguments = (shared, self.status)
                shared.thread = threading.Thread(target=_watch, args=arguments, name="tricomm-monitor", daemon=True)
                shared.thread.start()
        shared.wake()


def _watch(shared: Watched, status: StatusStore) -> None:
    """The monitor's thread."""
    watcher = Watcher(status)
    while True:
        shared.busy.wait()
        shared.hurry.wait(_seconds_to_next_look(shared))
        if shared.is_ended:
            return
        shared.hurry.clear()
        runs = list(shared.runs)
        for run in watcher.look(runs, time.monotonic(), shared.computing):
            shared.runs.discard(run)
            run.owner = None
        if runs or not watcher.boards:
            shared.seconds = min([MAX_HEARTBEAT_SECONDS, *(run.place.heartbeat_seconds for run in runs)])
        if not runs and not watcher.boards and not shared.computing.what:
            shared.is_idle = True
            shared.busy.clear()
            # A run may have begun between the lines above, or the end have come.
            if shared.runs or shared.computing.what or shared.is_ended:
                shared.wake()
        del runs


def _seconds_to_next_look(shared: Watched) -> float:
    """Return the time to the next heartbeat or deadline; the caller meanwhile keeps no run of a group that is gone."""
    now = time.monotonic()
    shared.seconds = min(shared.seconds, shared.computing.heartbeat_seconds)
    deadlines = [run.deadline - now for run in list(shared.runs) if run.deadline > now]
    return max(min([shared.seconds, *deadlines]), 0.001)


class Watcher:
    """What the monitor does at each look.

    Args:
        status: of the ranks.
    """

    def __init__(self, status: StatusStore) -> None:
        self.status = status
        self._observations = Observations(status)
        self._heartbeats = 0
        self.boards: dict[CallBoard, int] = {}
        """At which it still has to look, and how often."""
        self._devices = DeviceQuestions()
        self._suspicions: dict[str, str] = {}
        """What looked like calls in another order at the last look, by place."""

    def look(self, runs: Sequence[Run], now: float, computing: Computing = Computing()) -> list[Run]:  # noqa: B008
        """Post a heartbeat for the runs that are slow, end those that were aborted, and those whose time is over.

        Returns:
            The runs that a device has done.
        """
        boards = {board: left - 1 for board, left in self.boards.items() if left > 1}
        self.boards = boards | {run.board: LOOKS for run in runs if run.board is not None}
        done = self._devices.done([run for run in runs if run.pending is not None], now)
        runs = [run for run in runs if run not in done]
        slow = [run for run in runs if now - run.began >= 0.9 * run.place.heartbeat_seconds]
        is_slow = bool(computing.what) and now - computing.since >= 0.9 * computing.heartbeat_seconds
        if not slow:
            self._observations.clear()
            self._suspicions.clear()
        try:
            for board in self.boards:
                board.compare()
            if slow or is_slow:
                self._heartbeats += 1
                waits = tuple(run.wait() for run in slow if run.awaited is not None)
                if slow and not waits:  # the device does something else
                    waits = (Wait("", None, f"the computation that was queued before {slow[0]}"),)
                if computing.what:  # that, and none of the ranks that it will need, keeps it
                    waits = (Wait("", None, computing.what), *(wait._replace(peer=None, others=()) for wait in waits))
                self.status.post_heartbeat(Heartbeat(self._heartbeats, waits))
            for run in slow:
                self._attend(run, now, computing.deadline_of(run, now))
        except TransportError as lost:
            for run in runs:
                if isinstance(lost, GroupOverError):
                    run.end(str(lost))
                elif now >= computing.deadline_of(run, now):
                    run.end(f"{run} took longer than its timeout, and {lost}")
        return done

    def _attend(self, run: Run, now: float, deadline: float) -> None:
        if run.owner is None:
            return
        reason = self.status.abort_of(run.place.name)
        if reason is not None:
            run.end(reason.text)
            return
        if run.lost is None and now < deadline - WATCHED_HEARTBEATS * run.place.heartbeat_seconds:
            self._compare(run)
            return
        first = run.candidates or run.place.participants
        if run.pending is not None and self._devices.are_unanswered and now >= deadline:
            run.end(describe_silent_device(self.status.rank, str(run)))
            return
        if not first and run.lost is None:
            return  # busy with its own part; if it waits at the next look, its time is over then
        heartbeats = self._observations.look(first, now)
        silent = self._observations.silent(heartbeats, now, SILENT_HEARTBEATS * run.place.heartbeat_seconds)
        if run.lost is not None and now >= run.lost[0] + LOST_HEARTBEATS * run.place.heartbeat_seconds:
            ends = find_ends(self.status.rank, run.wait(), heartbeats, silent)
            suspects = [rank for rank in ends if rank in silent] or ends or list(first)
            run.end(describe_lost(self.status.rank, str(run), suspects, str(run.lost[1])))
        elif run.lost is None and now >= deadline:
            run.end(*self._diagnose(run, heartbeats, silent))

    def _compare(self, run: Run) -> None:
        """End a run in a circle of ranks that are in different calls at the same position, if seen at two looks."""
        wait, before = run.wait(), self._suspicions.pop(run.place.name, None)
        text = find_other_order(self.status.rank, wait, self.status.heartbeat_of)
        if text is None:
            return
        if text == before:
            run.end(text)
        else:
            self._suspicions[run.place.name] = text

    def _diagnose(self, run: Run, heartbeats: dict[int, Heartbeat], silent: Collection[int]) -> Diagnosis:
        wait = run.wait()
        if wait.peer is None:
            return diagnose_connecting(self.status.rank, wait.call, run.place.participants, silent)
        return diagnose(self.status.rank, wait, heartbeats, silent)
