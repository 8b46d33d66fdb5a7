"""Run: a stretch of waiting, which the thread that runs and the monitor share."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

from tricomm.transport.base import GroupLostError, Pending
from tricomm.transport.coordination.background import ANSWER_SECONDS, Question
from tricomm.transport.coordination.board import CallBoard
from tricomm.transport.coordination.status import Wait

MAX_HEARTBEAT_SECONDS = 1.0

COMPUTING_FACTOR = 20.0
SPARE_HEARTBEATS = 3.0
"""The monitor ends waits at their deadline, which moves on while this rank computes. Should it be unable to, they end
by themselves, after so many timeouts and heartbeats."""


def heartbeat_seconds(timeout_seconds: float) -> float:
    """Return the time between two heartbeats: a tenth of the timeout, at most a second."""
    return min(MAX_HEARTBEAT_SECONDS, timeout_seconds / 10)


def waiting_seconds(timeout_seconds: float) -> float:
    """Return how long a wait lasts: a little less than its timeout, within which its error is to be there."""
    return timeout_seconds - min(0.25, 0.05 * timeout_seconds)


def deadline_after(timeout_seconds: float) -> float:
    """Return when a wait that begins now must end."""
    return time.monotonic() + waiting_seconds(timeout_seconds)


class Place(NamedTuple):
    """Where runs wait: what those of one communicator or rendezvous have in common, made once.

    Attributes:
        name: on the store.
        participants: the ranks that connect, where runs connect.
        heartbeat_seconds: between two heartbeats.
        waiting_seconds: until a run's deadline.
    """

    name: str
    participants: tuple[int, ...]
    heartbeat_seconds: float
    waiting_seconds: float

    @classmethod
    def of(cls, name: str, timeout_seconds: float, participants: tuple[int, ...] = ()) -> "Place":
        """One where runs have this timeout."""
        return cls(name, participants, heartbeat_seconds(timeout_seconds), waiting_seconds(timeout_seconds))

    def limit_after(self, timeout_seconds: float) -> timedelta:
        """When waits there end by themselves."""
        return timedelta(seconds=COMPUTING_FACTOR * timeout_seconds + SPARE_HEARTBEATS * self.heartbeat_seconds)


class CallId:
    """A call: the ``number``-th of the Resharder with a tag, and how errors name it."""

    def __init__(self, tag: int, number: int, name: str) -> None:
        self.tag = tag
        self.number = number
        self.name = name

    def __str__(self) -> str:
        return f"call {self.number} of {self.name}" if self.number else self.name


class RunOwner(Protocol):
    """Who can end a run."""

    def end_run(self, run: "Run", text: str, late: int | None) -> None:
        """End it for a reason, unless it has ended by itself; called on the monitor's thread. See ``Run.end``."""
        ...


class Run(CallId):
    """A call, the connecting before it, or a rendezvous: it ends by a deadline.

    The thread that runs and the monitor share it. What a call begins with is written before the monitor sees it and
    never again, but for ``waiting_for`` and ``behind``: each one value, written by the thread that runs alone; the
    monitor may read that of a moment ago. What follows it on a device is the monitor's.

    Args:
        tag, number, name: see CallId.
        place: where it waits.
        owner: who ends it; None if the thread that runs looks by itself. Gone when it has ended.
        position: see Wait.
    """

    waiting_for: int | None = None
    behind: "Run | None" = None
    """A call before it, of which others have still to read what this rank gave: where this rank is until then."""
    computed_before = 0.0
    """How long this rank had computed when the run began."""
    pending: Pending | None = None
    """What of it goes on on a device."""
    awaited: tuple[int, ...] | None = ()
    """The ranks whose messages the device waits for, one of which is at fault; None before it comes to the run."""
    lost: tuple[float, RuntimeError] | None = None
    """When the backend said that it lost some connection, and what it said."""
    failure: str | None = None
    """Why it failed on the device, after its call had returned."""
    board: CallBoard | None = None
    """Where it stands which calls were made, if messages do not say it."""
    is_told = False
    """Whether somebody has raised that failure."""

    def __init__(
        self, tag: int, number: int, name: str, place: Place, owner: RunOwner | None = None, position: int = 0
    ) -> None:
        self.tag = tag
        self.number = number
        self.name = name
        self.place = place
        self.owner = owner
        self.position = position
        self.began = began = time.monotonic()
        self.deadline = began + place.waiting_seconds

    @property
    def candidates(self) -> tuple[int, ...]:
        """The ranks that it waits for: one, or some of which one is at fault."""
        return (self.awaited or ()) if self.waiting_for is None else (self.waiting_for,)

    def wait(self) -> Wait:
        """Return what the run waits for now."""
        peer, others = (self.candidates or (None,))[0], self.candidates[1:]
        at = self if self.behind is None else self.behind
        return Wait(self.place.name, peer, str(at), others, at.position)

    def is_done(self) -> bool:
        """Whether the device has done all of it; for the thread that runs."""
        try:
            return self.pending is not None and self.pending.is_begun() and self.pending.awaited() is None
        except RuntimeError:
            return False  # the monitor finds the same

    def end(self, text: str, late: int | None = None) -> None:
        """End it for a reason, unless it has ended by itself; ``late`` is the rank that did not come in time."""
        owner = self.owner
        if owner is not None:
            owner.end_run(self, text, late)

    def follow(self, now: float) -> bool:
        """Look how far the device is; true when it has done all. For the monitor's thread."""
        if self.pending is None or self.lost is not None:
            return False
        try:
            if not self.pending.is_begun():
                self.awaited = None
                self.deadline = now + self.place.waiting_seconds
                return False
            awaited = self.pending.awaited()
        except RuntimeError as error:
            if isinstance(error, GroupLostError):
                self.awaited = error.peers
            self.lost = (now, error)
            return False
        self.awaited = awaited or ()
        return awaited is None


class DeviceQuestions:
    """Ask how far devices are. While a driver loads a kernel, which may wait for what the monitor is there to end, it
    answers nobody: then what was known before stands, deadlines too.
    """

    def __init__(self) -> None:
        self._last: Question[list[Run]] | None = None

    @property
    def are_unanswered(self) -> bool:
        """Whether the last question has no answer yet."""
        return self._last is not None and self._last.is_open

    def done(self, runs: Sequence[Run], now: float) -> list[Run]:
        """Return the runs that a device has done, as far as it says so in time.

        Args:
            runs: all that go on on devices.
            now: by time.monotonic().
        """
        if not runs:
            return []
        if self._last is None or not self._last.is_open:
            self._last = Question(lambda: [run for run in runs if run.follow(now)])
        return self._last.answer(min([ANSWER_SECONDS, *(run.place.heartbeat_seconds for run in runs)])) or []
