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
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

LAST_WAIT_SECONDS = 2.0
"""For which the end of a process waits for a thread."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 0.2
"""Between two looks: each may ask a device, and the end of the process waits for the last one."""

ANSWER_SECONDS = 0.25
"""For which an answer is waited for at most."""

T = TypeVar("T")


class ProcessEndsError(Exception):
    """What ends a thread in the background that waits when its process ends."""


class BackgroundThread(threading.Thread):
    """A daemon that can be asked to end, as it is at the end of its process.

    Args:
        name: of the thread.
        work: what it does.
    """

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.is_to_end = False

    def run(self) -> None:
        """See threading.Thread."""
        with suppress(ProcessEndsError):
            super().run()

    def end(self) -> None:
        """Ask it to end, and wait for that for LAST_WAIT_SECONDS."""
        self.is_to_end = True
        self.join(LAST_WAIT_SECONDS)


def end_if_asked() -> None:
    """Between two looks at something: end this thread if it is one in the background whose process ends.

    Raises:
        ProcessEndsError: it is.
    """
    if getattr(threading.current_thread(), "is_to_end", False):
        raise ProcessEndsError("the process ends")


def in_background(name: str, work: Callable[[], object]) -> threading.Thread | None:
    """Do something on a thread of its own; None if the process ends, in which no thread begins any more."""
    thread = BackgroundThread(name, work)
    try:
        thread.start()
    except RuntimeError:
        return None
    weakref.finalize(thread, _end, weakref.ref(thread), os.getpid())
    return thread


def process_ends() -> bool:
    """Whether the main thread is over, as when what is registered for the end of the process is called."""
    return not threading.main_thread().is_alive()


def wait_until(is_so: Callable[[], bool]) -> None:
    """In the background: look again and again, after longer and longer pauses."""
    pause = FIRST_PAUSE_SECONDS
    while not is_so():
        end_if_asked()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)


def _end(thread: "weakref.ref[BackgroundThread]", process: int) -> None:
    found = thread()
    if found is not None and os.getpid() == process:  # else it is over, or another process's
        found.end()


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
