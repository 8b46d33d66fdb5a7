"""Reading the memory of another process of this host, in one system call where its limits allow."""

import ctypes
import errno
import os
from bisect import bisect_right
from functools import cache
from typing import Any

import torch

from tricomm.packing.runs import ROW_NBYTES, Runs

MAX_RUNS = 1024
"""Of one call on either side; the kernel's UIO_MAXIOV."""

MAX_NBYTES = 0x7FFFF000
"""Of one call; the kernel's MAX_RW_COUNT."""


class UnreadableError(RuntimeError):
    """Bytes of another process could not be read, or not all of them.

    Attributes:
        number: the system's error number; 0 if fewer bytes came than were asked for.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number

    @property
    def is_of_dead(self) -> bool:
        """Whether there is no such process any more."""
        return self.number == errno.ESRCH


@cache
def _read() -> Any:
    """The C function; None where the C library has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        word = ctypes.c_ulong
        function.argtypes = (ctypes.c_int, ctypes.c_void_p, word, ctypes.c_void_p, word, word)
        function.restype = ctypes.c_ssize_t
    return function


def _called(pid: int, here: int, here_count: int, there: int, there_count: int) -> int:
    """The bytes that one call has read, at least one.

    Args:
        pid: of the other process.
        here, there: addresses of the tables of both sides, in this process.
        here_count, there_count: their rows.
    """
    read = _read()
    if read is None:
        raise UnreadableError(errno.ENOSYS, "this C library has no process_vm_readv")
    got: int = read(pid, here, here_count, there, there_count, 0)
    if got > 0:
        return got
    number = ctypes.get_errno() if got < 0 else 0
    text = f"process_vm_readv: {os.strerror(number)}" if number else "process_vm_readv read nothing"
    raise UnreadableError(number, text)


def read_run(pid: int, into: int, address: int, nbytes: int) -> None:
    """Read bytes at an address of another process to one of this process.

    Raises:
        UnreadableError: not all could be read.
    """
    done = 0
    while done < nbytes:
        some = min(nbytes - done, MAX_NBYTES)
        rows = (ctypes.c_uint64 * 4)(into + done, some, address + done, some)
        here = ctypes.addressof(rows)
        got = _called(pid, here, 1, here + ROW_NBYTES, 1)
        if got != some:
            raise _short(done + got, nbytes)
        done += got


def read_runs(pid: int, here: Runs, there: Runs) -> None:
    """Read runs of another process into runs of this one; both are the same bytes, cut in any way.

    Args:
        pid: of the other process.
        here: of this process.
        there: with addresses of the other process.

    Raises:
        UnreadableError: not all could be read.
    """
    total = here.nbytes
    assert total == there.nbytes
    done = 0
    while done < total:
        ours, first = _from(here, done)
        theirs, other = _from(there, done)
        reach = min(here.ends[first + len(ours) - 1], there.ends[other + len(theirs) - 1])
        some = min(reach - done, MAX_NBYTES)
        got = _called(pid, ours.data_ptr(), len(ours), theirs.data_ptr(), len(theirs))
        if got != some:
            raise _short(done + got, total)
        done += got


def _from(runs: Runs, done: int) -> tuple[torch.Tensor, int]:
    """(rows of a table for one call from byte ``done`` on, number of the first of them)."""
    first = bisect_right(runs.ends, done)
    rows = runs.table[first : first + MAX_RUNS]
    begun = done - (runs.ends[first - 1] if first else 0)
    if begun:
        rows = rows.clone()
        rows[0] += torch.tensor([begun, -begun], device="cpu")
    return rows, first


def _short(done: int, total: int) -> UnreadableError:
    return UnreadableError(0, f"only {done} of {total} bytes could be read")
