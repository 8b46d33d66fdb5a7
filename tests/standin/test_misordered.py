"""Calls in another order on CUDA, where messages have no tags, and without ``confirm``: every rank is told both."""

import time

import pytest
import torch.distributed as dist

from tests.standin.ranks import PATIENT_SECONDS, Threads
from tests.standin.test_promise import attempt, check, shard_of
from tests.standin.test_promise import mover_of as mover_of_promise
from tricomm import Resharder
from tricomm.transport.coordination.board import LOOKS, CallBoard
from tricomm.transport.coordination.run import heartbeat_seconds
from tricomm.transport.coordination.status import StatusStore

SIZE = 4
ROUNDS = 4


def mover_of(rank: int, threads: Threads, name: str) -> Resharder:
    return mover_of_promise(rank, threads, name=name, timeout_seconds=PATIENT_SECONDS)


def in_another_order(rank: int, threads: Threads, odd: int, quick: int) -> list[str]:
    """One rank begins with the other of two Resharders; what is said until the next calls, and these work."""
    movers = [mover_of(rank, threads, name) for name in ("queries", "keys")]
    for mover in movers:
        output = mover(shard_of(rank))
        threads.finish(rank)
        check(rank, output)
    for _ in range(quick):
        movers[0](shard_of(rank))
        threads.finish(rank)
    threads.barrier.wait()
    found = [attempt(lambda mover=mover: mover(shard_of(rank)))[0] for mover in movers[:: -1 if rank == odd else 1]]
    threads.finish(rank)
    time.sleep(LOOKS * heartbeat_seconds(PATIENT_SECONDS) + 0.5)
    threads.barrier.wait()
    for _ in range(ROUNDS):
        for mover in movers:
            found.append(attempt(lambda mover=mover: mover(shard_of(rank)))[0])
            threads.finish(rank)
        threads.barrier.wait()
    for mover in movers:
        output = mover(shard_of(rank))
        threads.finish(rank)
        check(rank, output)
    return [text for text in found if text]


@pytest.mark.parametrize(("odd", "quick"), [(0, 0), (3, 0), (2, 100)])
def test_calls_in_another_order_are_told_on_every_rank_and_the_next_ones_work(odd: int, quick: int) -> None:
    with Threads(SIZE, timeout_seconds=2 * PATIENT_SECONDS) as threads:
        found = threads.run(in_another_order, threads, odd, quick)
    for rank, told in enumerate(found):
        assert told, f"rank {rank} was not told"
        for text in told:
            assert "of Resharder 'queries' (number 1)" in text, text
            assert "of Resharder 'keys' (number 1)" in text, text
            assert "every rank must make the same calls in the same order" in text


def boards(size: int) -> tuple[list[CallBoard], list[list[str]]]:
    store, told = dist.HashStore(), [[] for _ in range(size)]
    statuses = [StatusStore(store, rank) for rank in range(size)]
    made = [
        CallBoard(one, "here", range(size), lambda to=to: to.append) for one, to in zip(statuses, told, strict=True)
    ]
    return made, told


@pytest.mark.parametrize("lead", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("at", [None, 0, 5, 63, 64, 200, 1999])
def test_boards_find_two_calls_that_changed_places_and_nothing_else(at: int | None, lead: int) -> None:
    """However far one rank is ahead, and whoever looks last."""
    calls = [(tag, number) for number in range(1, 1002) for tag in (1, 2)]
    swapped = list(calls)
    if at is not None:
        swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    (one, other), told = boards(2)
    for mine, (tag, number) in enumerate(calls):
        one.add(tag, number, f"R{tag}")
        if mine >= lead:
            other.add(*swapped[mine - lead], "R")
        if mine % 500 == 499:
            one.compare()
            other.compare()
    for tag, number in swapped[len(calls) - lead :]:
        other.add(tag, number, "R")
    other.compare()
    one.compare()
    assert bool(told[0] or told[1]) == (at is not None), told


def test_a_difference_is_told_once_in_the_same_words() -> None:
    (one, other), told = boards(2)
    one.add(1, 4, "a")
    one.add(2, 4, "b")
    other.add(2, 4, "b")
    other.add(1, 4, "a")
    for _ in range(2):
        one.compare()
        other.compare()
        one.compare()
    text = (
        "rank 0 made call 4 of a, and rank 1 in its place call 4 of b, so that results may be those of another call; "
        "every rank must make the same calls in the same order"
    )
    assert told == [[text], [text]]
