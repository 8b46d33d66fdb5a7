"""Ranks on this machine."""

import os

import pytest

from tricomm.launch import RankError, Ranks


def leave(rank: int) -> None:
    if rank == 1:
        os._exit(3)


@pytest.mark.processes
def test_ranks_that_do_not_start_leave_no_process_behind() -> None:
    ranks = Ranks(2, wrap=leave, start_timeout_seconds=5)
    with pytest.raises(RankError, match=r"did not answer|has ended"), ranks:
        pass
    assert not any(process.is_alive() for process in ranks._processes)
