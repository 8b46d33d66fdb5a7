"""Reading memory by runs, of this very process: any cutting on either side, and what cannot be read."""

import ctypes
import mmap
import os
import random

import pytest
import torch

from tricomm.packing.runs import Runs, one_run, runs_in
from tricomm.transport.memory.reading import MAX_RUNS, UnreadableError, read_run, read_runs

ME = os.getpid()


def cut(base: int, nbytes: int, pieces: int, drawn: random.Random) -> Runs:
    """The same bytes in their order, cut into so many runs."""
    ends = [*sorted(drawn.sample(range(1, nbytes), pieces - 1)), nbytes]
    starts = [0, *ends[:-1]]
    return runs_in(torch.tensor([[base + start, end - start] for start, end in zip(starts, ends, strict=True)]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(1, 1), (1, 7), (7, 1), (1, MAX_RUNS), (MAX_RUNS + 1, 1), (3 * MAX_RUNS + 1, 2 * MAX_RUNS + 5), (5000, 4999)],
)
def test_bytes_arrive_however_both_sides_are_cut(ours: int, theirs: int) -> None:
    drawn = random.Random(ours + theirs)
    source = torch.randint(0, 256, (20_000,), dtype=torch.uint8)
    into = torch.zeros_like(source)
    here, there = (
        cut(tensor.data_ptr(), len(source), pieces, drawn) for tensor, pieces in ((into, ours), (source, theirs))
    )
    before = here.table.clone(), there.table.clone()
    for _ in range(2):
        into.zero_()
        read_runs(ME, here, there)
        assert torch.equal(into, source)
    assert torch.equal(here.table, before[0])
    assert torch.equal(there.table, before[1])


def test_rows_are_scattered() -> None:
    source, into = torch.arange(12.0), torch.zeros(3, 8)
    rows = runs_in(torch.tensor([[into[row].data_ptr(), 16] for row in range(3)]))
    read_runs(ME, rows, one_run(source.data_ptr(), source.nbytes))
    assert torch.equal(into[:, :4].reshape(-1), source)
    assert not into[:, 4:].any()


def test_a_hole_is_told() -> None:
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 3 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + page), page, 0) == 0
    into = torch.zeros(3 * page, dtype=torch.uint8)
    with pytest.raises(UnreadableError, match=f"only {page} of {3 * page} bytes"):
        read_run(ME, into.data_ptr(), base, 3 * page)
    halves = runs_in(torch.tensor([[base + page // 2, page], [base + 2 * page, page]]))
    with pytest.raises(UnreadableError, match=rf"only {page // 2} of"):
        read_runs(ME, one_run(into.data_ptr(), 2 * page), halves)
    with pytest.raises(UnreadableError, match="Bad address"):
        read_run(ME, into.data_ptr(), base + page, 8)
    libc.mprotect(ctypes.c_void_p(base + page), page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_process_that_is_not_there_is_told() -> None:
    into = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(UnreadableError, match="No such process"):
        read_run(2**22 + 1, into.data_ptr(), into.data_ptr(), 8)
