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


def parent_of(rank: int) -> int:
    return os.getppid()


def test_the_fixed_ranks_are_forked_from_one_process_that_imported_for_all(ranks: Ranks) -> None:
    (parent,) = {*ranks.run(parent_of)}
    assert parent != os.getpid()
