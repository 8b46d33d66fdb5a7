"""The promise over memory of devices, on the stand-in: as over NCCL, and sooner where a rank died."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.standin import test_promise as over_nccl
from tests.standin.device import Limits
from tests.standin.ranks import Threads
from tests.standin.test_promise import FINISH_SECONDS, SIZE


@pytest.fixture
def four() -> Iterator[Threads]:
    """Ranks on one device, that load kernels."""
    with Threads(SIZE, Limits(loads=True), transport="memory") as started:
        yield started
    assert started.exports.faults == []
    assert not any(standin.backends for standin in started.standins), "NCCL was connected"


def require_named_by_every_other(threads: Threads, how: str, victim: int, confirm: bool) -> None:
    with threads.keys_are_ours():
        found = threads.run(over_nccl.lose_one, threads, victim, how, confirm)
    over_nccl.require_named(found, victim, confirm)


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("victim", [1, 3])
@pytest.mark.parametrize("how", ["dies", "stops", "stays away"])
def test_a_rank_that_does_not_come_is_named_by_every_other(four: Threads, how: str, victim: int, confirm: bool) -> None:
    require_named_by_every_other(four, how, victim, confirm)


def test_a_slow_but_healthy_step_is_never_killed(four: Threads) -> None:
    with four.keys_are_ours():
        four.run(over_nccl.slow_but_healthy, four, four.gate())


def test_confirm_means_that_the_data_are_there_on_all_ranks(four: Threads) -> None:
    gate = four.gate()
    for returned in four.run(over_nccl.confirm_late, four, gate):
        assert returned >= gate.opened > 0


def test_the_next_call_of_all_works(four: Threads) -> None:
    for texts in four.run(over_nccl.fail_and_go_on, four)[:3]:
        assert "rank 3 " in texts[0]


def test_all_communicators_of_a_device_are_let_go_together(four: Threads) -> None:
    for rank, found in enumerate(four.run(over_nccl.wait_on_two_channels, four)[:2]):
        for text, _ in found:
            assert "rank 3 " in text.split(";")[0], f"rank {rank}: {text}"


def test_after_an_error_that_was_found_late_all_go_on(four: Threads) -> None:
    for rank, texts in enumerate(four.run(over_nccl.late_by_a_timeout, four)):
        assert any("rank 3 " in text.split(";")[0] for text in texts), f"rank {rank}: {texts}"


def come_late(rank: int, threads: Threads) -> tuple[float, bool]:
    """Rank 2 calls only when the devices of the others wait for it; (seconds of the call here, done before it came)."""
    mover = over_nccl.mover_of(rank, threads)
    mover(over_nccl.shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    threads.barrier.wait()
    began = time.monotonic()
    if rank == 2:
        threads.barrier.wait()
    output = mover(over_nccl.shard_of(rank))
    seconds = time.monotonic() - began
    event: Any = threads.standins[rank].device.current.record_event()
    is_done = event.query()
    if rank != 2:
        threads.barrier.wait()
    threads.finish(rank, FINISH_SECONDS)
    over_nccl.check(rank, output)
    return seconds, is_done


def test_no_host_waits_in_a_call(four: Threads) -> None:
    found = four.run(come_late, four)
    for rank in (0, 1):
        assert found[rank][1] is False, "its device went on though rank 2 had not come"
