"""Moves over the stand-in for NCCL: what crosses is right, though every copy and message is only queued."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from tests.oracle import pick, require_equal, source_and_result
from tests.standin.device import Limits
from tests.standin.ranks import Threads
from tricomm import Broadcast, Mesh, Partial, Replicate, Resharder, SendRecv, Shard, ShardingSpec

SHAPE = (33, 26)
CASES = {
    "rows to columns": (
        ShardingSpec(Mesh([0, 1, 2, 3], ("x",)), (Shard(0),), SHAPE, "float32"),
        ShardingSpec(Mesh([3, 1, 0, 2], ("x",)), (Shard(1),), SHAPE, "float32"),
        SendRecv(256),
    ),
    "a chain": (
        ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32"),
        ShardingSpec(Mesh([1, 2, 3], ("x",)), (Replicate(),), SHAPE, "float32"),
        Broadcast(256),
    ),
    "a sum": (
        ShardingSpec(Mesh([0, 1, 2], ("x",)), (Partial("sum"),), SHAPE, "float32"),
        ShardingSpec(Mesh([1, 2, 3], ("x",)), (Shard(0),), SHAPE, "float32"),
        SendRecv(),
    ),
}


@pytest.fixture
def four() -> Iterator[Threads]:
    """Four ranks."""
    with Threads(4) as threads:
        yield threads


def move(
    rank: int, threads: Threads, name: str, confirm: bool, cases: Mapping[str, Any] = CASES
) -> list[torch.Tensor | None]:
    """Three calls of a mover, one of them in the background."""
    source, destination, strategy = cases[name]
    shards, _ = source_and_result(source, destination)
    options: dict[str, Any] = {"strategy": strategy, "confirm": confirm, "timeout_seconds": 10, **threads.options(rank)}
    mover = Resharder(source, destination, **options)
    shard = shards.get(rank)
    found = [mover(shard), mover.start(shard).wait(), mover(shard)]
    threads.finish(rank)
    return found


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_move_is_right(four: Threads, name: str, confirm: bool) -> None:
    source, destination, _ = CASES[name]
    _, full = source_and_result(source, destination)
    for rank, results in enumerate(four.run(move, four, name, confirm)):
        for found in results:
            if rank in destination.mesh:
                assert found is not None
                require_equal(found, pick(full, destination, rank), f"rank {rank}")
            else:
                assert found is None


def start_late(rank: int, threads: Threads, gate: Any) -> tuple[float, bool, bool]:
    """Rank 0 has something else to compute first; (seconds that the call took, done before, done after)."""
    source, destination, strategy = CASES["rows to columns"]
    shards, _ = source_and_result(source, destination)
    mover = Resharder(source, destination, strategy=strategy, timeout_seconds=10, **threads.options(rank))
    mover.connect()
    device = threads.standins[rank].device
    if rank == 0:
        device.current.launch(lambda: None, gate)
    began = time.monotonic()
    mover(shards.get(rank))
    mover.start(shards.get(rank)).wait()
    seconds = time.monotonic() - began
    event = device.current.record_event()
    threads.barrier.wait()
    before = event.query()
    threads.barrier.wait()
    if rank == 0:
        gate.open()
    threads.finish(rank)
    return seconds, before, event.query()


def test_a_call_returns_before_the_device_has_come_to_it(four: Threads) -> None:
    """The host is never blocked, but once for each pair, which connects when it is first used."""
    for seconds, before, after in four.run(start_late, four, four.gate()):
        assert seconds < 2.0
        assert not before
        assert after


def test_eight_queues_are_enough_for_a_few_channels() -> None:
    with Threads(4, Limits(queues=8)) as threads:
        threads.run(move, threads, "a chain", True)
