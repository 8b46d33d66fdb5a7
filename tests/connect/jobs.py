"""Ranks of separate jobs as threads of one process: each has a connection and a group of its own."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import tricomm
from tricomm import Meeting, World

SECRET = "a secret of the tests"
SIZES = {"trainer": 2, "server": 3}


def together(*calls: Callable[[], Any], timeout_seconds: float = 60.0) -> list[Any]:
    """What each of the calls returns or raises, made at once on threads of their own."""
    found: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            found[index] = calls[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_seconds)
        assert not thread.is_alive(), "a rank hangs"
    return found


def raised(found: Sequence[Any]) -> list[Any]:
    """The results, where none is an error."""
    for one in found:
        if isinstance(one, Exception):
            raise one
    return list(found)


def join(meeting: Meeting, side: str, rank: int, sizes: dict[str, int | None], **options: Any) -> World:
    return tricomm.connect(
        meeting.address,
        side=side,
        side_rank=rank,
        side_sizes=sizes,
        **{"secret": SECRET, "timeout_seconds": 20.0, "device": "cpu", **options},
    )


def worlds_of(meeting: Meeting, sizes: dict[str, int], **options: Any) -> list[World]:
    """One for each rank, in the order of the group."""
    places = [(side, rank) for side, size in sizes.items() for rank in range(size)]
    return raised(together(*(lambda p=p: join(meeting, *p, dict(sizes), **options) for p in places)))


def usage() -> tuple[int, int]:
    """Threads and open files of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
