"""Threads of their own for what may take long. So are devices asked: an answer may wait for what the asker has to end.

They are daemons, and hold up the end of a process for two seconds at most. But one that is inside of torch's or a
driver's C++ when the interpreter goes, and comes back, ends the process by a signal ("terminate called without an
active exception"). So the end waits for them, and those that wait for others end by themselves: what they were to give
back goes with the process.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from tricomm.transport.coordination.run import Run

LAST_WAIT_SECONDS = 2.0
"""For which the end of a process waits for a thread."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 0.2
"""Between two looks: each may ask a device, and the end of the process waits for the last one."""

ANSWER_SECONDS = 0.25
"""For which an answer is waited for at most."""

T = TypeVar("T")


class _ProcessEndsError(Exception):
    """What ends a thread that waits when the process ends."""


def in_background(name: str, work: Callable[[], object]) -> threading.Thread | None:
    """Do something on a thread of its own; None if the process ends, in which no thread begins any more."""

    def run() -> None:
        with suppress(_ProcessEndsError):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    weakref.finalize(thread, _wait_for, weakref.ref(thread), os.getpid())
    return thread


def process_ends() -> bool:
    """Whether the main thread is over, as when what is registered for the end of the process is called."""
    return not threading.main_thread().is_alive()


def wait_at_end(thread: threading.Thread) -> None:
    """If the process ends, wait until a thread is over, or for LAST_WAIT_SECONDS."""
    if process_ends() and thread is not threading.current_thread():
        thread.join(LAST_WAIT_SECONDS)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look again and again, after longer and longer pauses; ends this thread, one of its own, if the process ends."""
    pause = FIRST_PAUSE_SECONDS
    while not is_so():
        if process_ends():
            raise _ProcessEndsError
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)


def _wait_for(thread: "weakref.ref[threading.Thread]", process: int) -> None:
    found = thread()
    if found is not None and os.getpid() == process:
        wait_at_end(found)


class Question(Generic[T]):
    """Something that is asked on a thread of its own, from now on."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._answers: list[T] = []
        self._thread = in_background("tricomm-device", lambda: self._answers.append(ask()))

    @property
    def is_open(self) -> bool:
        """Whether there is no answer yet."""
        return self._thread is not None and self._thread.is_alive()

    def answer(self, seconds: float = ANSWER_SECONDS) -> T | None:
        """Return the answer, or None if it does not come in time."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._answers[0] if self._answers else None


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
