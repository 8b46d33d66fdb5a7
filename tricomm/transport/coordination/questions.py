"""What devices are asked, on a thread of its own: an answer can take as long as what the one who asks has to end."""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tricomm.transport.coordination.run import Run

ANSWER_SECONDS = 0.25
"""For which an answer is waited for at most."""

T = TypeVar("T")


def in_background(name: str, work: Callable[[], object]) -> threading.Thread | None:
    """Do something on a thread of its own; None if the process ends, in which no thread begins any more."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


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
