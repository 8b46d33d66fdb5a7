"""Any layout to any layout by memory of devices, on the stand-in; mixed with NCCL; and that nothing stays behind."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.cases import RANKS, Case, cases, of_random_draws
from tests.oracle import pick, require_equal, source_and_result
from tests.standin.device import Limits
from tests.standin.ranks import PATIENT_SECONDS, Threads
from tests.standin.test_moves import CASES
from tests.transport.test_gloo import drawable
from tests.transport.test_properties import restrided
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, TransportError
from tricomm.transport.device.alive import alive

WAYS = ("all by memory", "two devices", "one refuses")


@contextmanager
def started_in_ways(**options: Any) -> Iterator[dict[str, Threads]]:
    """All ranks on one device; odd ranks on another; and those of whom one is still to be made to refuse."""
    options |= {"limits": Limits(loads=True), "timeout_seconds": 2 * PATIENT_SECONDS, "transport": "auto"}
    made = {way: Threads(RANKS, **options) for way in WAYS}
    made["two devices"].exports.identities |= dict.fromkeys(range(1, RANKS, 2), "other")
    yield made
    for threads in made.values():
        threads.__exit__()
        assert threads.exports.faults == []


@pytest.fixture
def ways() -> Iterator[dict[str, Threads]]:
    """See ``started_in_ways``; one may open nothing."""
    with started_in_ways() as made:
        made["one refuses"].exports.refused[1] = "CUDA_ERROR_NOT_SUPPORTED (801)"
        yield made


def move(rank: int, threads: Threads, case: Case) -> tuple[list[torch.Tensor | None], Any]:
    """Three calls of a mover, one of them in the background, of shards that change in between."""
    shards, _ = source_and_result(case.source, case.destination, rank)
    shard = shards.get(rank)
    tensor = None if shard is None else restrided(shard, case.strides)
    options: dict[str, Any] = {**case.plan_arguments(), "timeout_seconds": PATIENT_SECONDS, **threads.options(rank)}
    mover = Resharder(case.source, case.destination, **options)
    if rank not in mover.participants:
        return [None] * 3, {}
    found = [mover(tensor), mover.start(tensor).wait(), mover(tensor)]
    threads.finish(rank)
    return found, mover.transports


@of_random_draws("TRICOMM_FUZZ_DEVICE", 30)
@given(case=cases().filter(drawable))
def test_any_layout_to_any_layout(ways: dict[str, Threads], case: Case) -> None:
    for way, threads in ways.items():
        _, full = source_and_result(case.source, case.destination)
        for rank, (results, transports) in enumerate(threads.run(move, threads, case)):
            for found in results if rank in case.destination.mesh else ():
                assert found is not None
                require_equal(found, pick(full, case.destination, rank), f"{way}, rank {rank}")
            for pair, told in transports.items():
                is_by_memory = way == "all by memory" or (way == "two devices" and sum(pair) % 2 == 0)
                is_by_memory |= way == "one refuses" and 1 not in pair
                assert (told.rung.value == "CUDA IPC") == is_by_memory, (way, pair, told)
    assert not any(standin.backends for standin in ways["all by memory"].standins)


def insist(rank: int, threads: Threads) -> tuple[str, str]:
    """What transport="memory" says where the driver refuses; and what is told then."""
    source, destination, _ = CASES["rows to columns"]
    shards, full = source_and_result(source, destination)
    options = {"timeout_seconds": 10, **threads.options(rank)}
    mover = Resharder(source, destination, **{**options, "transport": "memory"})
    text = ""
    try:
        mover(shards.get(rank))
    except TransportError as error:
        text = str(error)
    with Resharder(source, destination, **{**options, "transport": "network"}) as other:
        output = other(shards.get(rank))
        threads.finish(rank)
        require_equal(output, pick(full, destination, rank), "over NCCL")
    return text, "\n".join(str(way) for way in mover.transports.values())


def test_memory_raises_where_it_cannot_and_tells_why() -> None:
    with Threads(4, transport="auto") as threads:
        threads.exports.refused[1] = "CUDA_ERROR_NOT_SUPPORTED (801)"
        for text, told in threads.run(insist, threads):
            assert 'transport="memory", but rank' in text
            assert "its device memory cannot be opened: CUDA_ERROR_NOT_SUPPORTED (801); look at MIG" in text
            assert "network; its device memory cannot be opened" in told


def in_turns(rank: int, threads: Threads) -> None:
    """Movers of one channel, of which one is to take NCCL alone, which is connected when it comes."""
    source, destination, strategy = CASES["rows to columns"]
    shards, full = source_and_result(source, destination)
    for transport in ("memory", "network", "auto", "network"):
        options = {**threads.options(rank), "transport": transport}
        mover = Resharder(source, destination, strategy=strategy, timeout_seconds=10, **options)
        output = mover(shards.get(rank))
        threads.finish(rank)
        require_equal(output, pick(full, destination, rank), transport)


def test_movers_of_one_channel_choose_for_themselves() -> None:
    with Threads(4) as threads:
        threads.run(in_turns, threads)
        assert [len(standin.backends) for standin in threads.standins] == [1] * 4


def use_many(rank: int, threads: Threads, count: int) -> None:
    """Communicators that are made, used and dropped."""
    before, after = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (1 << 12,), "float32") for one in range(2))
    tensor = torch.arange(4096.0) if rank == 0 else None
    for step in range(count):
        with Resharder(before, after, timeout_seconds=10, **threads.options(rank)) as mover:
            output = mover(None if tensor is None else tensor + step)
            threads.finish(rank)
        if output is not None:
            require_equal(output, torch.arange(4096.0) + step, f"communicator {step}")
        del mover


def test_communicators_leave_nothing_behind() -> None:
    alive.cache_clear()  # devices of tests before this one, which were closed with something under way
    with Threads(2, Limits(loads=True), transport="memory") as threads, threads.keys_are_ours():
        threads.run(use_many, threads, 10)
        gc.collect()
        deadline = time.monotonic() + 20
        while threads.exports.memory and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not threads.exports.memory
        assert not threads.exports.opened
        assert not any(standin._memory.registered for standin in threads.standins)
        assert threads.exports.faults == []
        assert not [key for key in threads.store.list_keys() if "/device/" in key]


def leave_first(rank: int, threads: Threads, done: threading.Barrier) -> None:
    """Rank 2 holds nothing and needs nothing: its connections end before the others begin their last call."""
    source = ShardingSpec(Mesh([0, 1, 2], ("x",)), (Shard(0),), (2, 4), "float32")
    destination = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(1),), (2, 4), "float32")
    shards, full = source_and_result(source, destination)
    with Resharder(source, destination, timeout_seconds=10, **threads.options(rank)) as mover:
        mover(shards.get(rank))
        threads.finish(rank)
        done.wait(10)
        assert mover._session is not None
        communicator: Any = mover._session.communicator
        if rank == 2:
            for link in communicator._by_memory._links.values():
                link.signals.close()
        done.wait(10)
        output = mover(shards.get(rank)) if rank < 2 else None
        threads.finish(rank)
        done.wait(10)
    if output is not None:
        require_equal(output, pick(full, destination, rank), "after rank 2 has left")


def test_a_rank_that_has_nothing_to_do_may_leave_first() -> None:
    with Threads(3, transport="memory") as threads:
        threads.run(leave_first, threads, threading.Barrier(3))
