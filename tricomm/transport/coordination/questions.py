"""What devices are asked, on a thread of its own: an answer can take as long as what the one who asks has to end."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from tricomm.transport.coordination.run import Run

ANSWER_SECONDS = 0.25
"""For which an answer is waited for at most."""

T = TypeVar("T")


def answer_of(question: Callable[[], T]) -> T | None:
    """Return the answer, or None if it does not come in time."""
    answers: list[T] = []
    thread = threading.Thread(target=lambda: answers.append(question()), name="tricomm-device", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None


class DeviceQuestions:
    """Ask how far devices are. While a driver loads a kernel, which may wait for what the monitor is there to end, it
    answers nobody: then what was known before stands, deadlines too.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._done: list[Run] = []

    @property
    def are_unanswered(self) -> bool:
        """Whether the last question has no answer yet."""
        return self._thread is not None and self._thread.is_alive()

    def done(self, runs: Sequence[Run], now: float) -> list[Run]:
        """Return the runs that a device has done, as far as it says so in time.

        Args:
            runs: all that go on on devices.
            now: by time.monotonic().
        """
        if not runs:
            return []
        if self._thread is None or not self.are_unanswered:
            self._done = []
            self._thread = threading.Thread(
                target=_ask, args=(runs, now, self._done), name="tricomm-device", daemon=True
            )
            self._thread.start()
        self._thread.join(min([ANSWER_SECONDS, *(run.place.heartbeat_seconds for run in runs)]))
        return [] if self.are_unanswered else self._done


def _ask(runs: Sequence[Run], now: float, done: list[Run]) -> None:
    done += [run for run in runs if run.follow(now)]
