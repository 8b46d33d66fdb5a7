"""Beside communicators of the user's own: which orders NCCL runs, where a device has little room."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.standin.device import Limits, Stream
from tests.standin.nccl import Backend
from tests.standin.ranks import HOST, Threads
from tricomm import Mesh, Replicate, Resharder, ShardingSpec
from tricomm.transport.base import Operation
from tricomm.transport.device.alive import AliveConnections
from tricomm.transport.nccl import MOST_CONNECTIONS, connect, post_group

TIMEOUT_SECONDS = 1.0
FINISH_SECONDS = 2.0
CROWDED = Limits(room=1, error_seconds=None)
"""A device on which one kernel that waits leaves no room for another."""
SOURCE = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (64,), "float32")
TARGET = ShardingSpec(Mesh([1], ("x",)), (Replicate(),), (64,), "float32")


def communicator(rank: int, threads: Threads, name: str) -> Any:
    """A communicator of the user's, whose pair is connected."""
    standin = threads.standins[rank]
    backend = connect(standin, dist.PrefixStore(name, standin.store), rank, 2, HOST, timedelta(seconds=5))
    exchange(rank, threads, backend).synchronize()
    threads.finish(rank, FINISH_SECONDS)
    return backend


def exchange(rank: int, threads: Threads, backend: Any) -> Any:
    tensors = torch.full((8,), rank, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    group = [Operation(True, 1 - rank, tensors[0]), Operation(False, 1 - rank, tensors[1])]
    return post_group(threads.standins[rank], backend, HOST, {0: 0, 1: 1}, group)


def two_streams(rank: int, threads: Threads) -> None:
    """The hosts queue A, then B, each on a stream of its own; on rank 0 that of A computes first."""
    standin = threads.standins[rank]
    backends = [communicator(rank, threads, name) for name in ("a", "b")]
    streams: list[Stream] = [standin.device.new_stream() for _ in backends]
    threads.barrier.wait()
    if rank == 0:
        streams[0].launch(lambda: None, seconds=0.1)
    for stream, backend in zip(streams, backends, strict=True):
        with standin.on_stream(stream):
            exchange(rank, threads, backend).synchronize()
    for stream in streams:
        with standin.on_stream(stream):
            threads.finish(rank, FINISH_SECONDS)


def test_streams_of_their_own_can_hang_on_a_crowded_device() -> None:
    with Threads(2, CROWDED) as threads, pytest.raises(AssertionError, match="hangs"):
        threads.run(two_streams, threads)


@pytest.mark.parametrize("limits", [Limits(), Limits(room=1, implicit_order=True)], ids=["room", "launch order"])
def test_with_room_or_in_the_order_of_launches_they_run(limits: Limits) -> None:
    with Threads(2, limits) as threads:
        threads.run(two_streams, threads)


def beside_a_move(rank: int, threads: Threads, how: str) -> None:
    """The user's communicator and a Resharder, by turns."""
    backend = communicator(rank, threads, "user")
    mover = Resharder(SOURCE, TARGET, timeout_seconds=TIMEOUT_SECONDS, **threads.options(rank))
    tensor = torch.ones(64) if rank == 0 else None
    out = mover(tensor)
    threads.finish(rank, FINISH_SECONDS)
    threads.barrier.wait()
    for _ in range(3):
        if how == "direct":
            out = mover(tensor)
            exchange(rank, threads, backend).synchronize()
        elif how == "waited for":
            out = mover.start(tensor).wait()
            exchange(rank, threads, backend).synchronize()
        else:
            # Rank 0 begins with the move, rank 1 with what the user sends.
            handle = mover.start(tensor) if rank == 0 else None
            while handle is not None and not handle.done():
                time.sleep(0.001)
            exchange(rank, threads, backend)
            out = (handle or mover.start(tensor)).wait()
    threads.finish(rank, FINISH_SECONDS)
    last = mover._session.last_run
    assert last is None or last.failure is None, f"TransportError, found out late: {last.failure}"
    assert out is None or bool((out == 1).all())


@pytest.mark.parametrize("how", ["direct", "waited for"])
def test_one_order_of_streams_on_all_ranks_runs_on_a_crowded_device(how: str) -> None:
    with Threads(2, CROWDED) as threads:
        threads.run(beside_a_move, threads, how)


def test_different_orders_hang_on_a_crowded_device_and_run_with_room() -> None:
    with Threads(2, CROWDED) as threads, pytest.raises(AssertionError, match=r"hangs|TransportError"):
        threads.run(beside_a_move, threads, "crossed")
    with Threads(2, Limits()) as threads:
        threads.run(beside_a_move, threads, "crossed")


def connected(rank: int, threads: Threads, count: int) -> list[Backend]:
    """So many channels at once."""
    movers = [
        Resharder(SOURCE, TARGET, timeout_seconds=5, channel=str(number), **threads.options(rank))
        for number in range(count)
    ]
    for mover in movers:
        mover.connect()
    return threads.standins[rank].backends


def test_one_hardware_queue_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with Threads(2) as threads, pytest.warns(RuntimeWarning, match="CUDA_DEVICE_MAX_CONNECTIONS=1 .* set it to 32"):
        threads.run(connected, threads, 1)


def test_more_channels_than_streams_are_warned_of() -> None:
    with Threads(2) as threads:
        threads.run(connected, threads, MOST_CONNECTIONS)
    with Threads(2) as threads, pytest.warns(RuntimeWarning, match="more than 16 channels are connected on cpu"):
        threads.run(connected, threads, MOST_CONNECTIONS + 1)


class Channel:
    """What is counted of connections."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


def test_channels_are_counted_while_other_threads_connect() -> None:
    alive: Any = AliveConnections()
    kept: list[Channel] = []

    def connect_and_count(_: int) -> int:
        for _ in range(2000):
            channel = Channel(HOST)
            kept.append(channel)
            alive.add(channel)
        return max(len(alive.on(HOST)) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(connect_and_count, range(4))) == len(kept) == 8000
