"""Staging is one buffer for all calls of a channel, on whichever streams they are queued."""

import time
from typing import Any

import torch

from tests.standin.ranks import HOST, Threads
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec

SHAPE = (16, 8)
SOURCE = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "float32")
COLUMNS = ShardingSpec(Mesh([1, 2], ("x",)), (Shard(1),), SHAPE, "float32")


def on_two_streams(rank: int, threads: Threads, gate: Any) -> list[bool]:
    """Two calls at once, each on a stream of its own; rank 2 comes late, so that what rank 0 packed waits for it."""
    standin = threads.standins[rank]
    mover = Resharder(SOURCE, COLUMNS, timeout_seconds=10, **threads.options(rank))
    tensors = [torch.full(SHAPE, float(value)) if rank == 0 else None for value in (1, 2)]
    outs = [None if rank == 0 else torch.zeros(COLUMNS.local_shape(rank)) for _ in range(2)]
    mover(tensors[0], out=outs[0])  # pairs connect
    if rank == 2:
        standin.current_stream(HOST).launch(lambda: None, gate)
        first = standin.current_stream(HOST).record_event()
    events = []
    for tensor, out in zip(tensors, outs, strict=True):
        stream = standin.new_stream(HOST)
        with standin.on_stream(stream):
            if rank == 2:
                stream.wait_event(first)
            mover(tensor, out=out)
            events.append(stream.record_event())
    threads.barrier.wait()
    gate.open()
    deadline = time.monotonic() + 5
    while not all(event.query() for event in events):
        assert time.monotonic() < deadline, f"the device of rank {rank} hangs"
        time.sleep(0.001)
    return [out is None or bool((out == value).all()) for value, out in enumerate(outs, start=1)]


def test_calls_on_two_streams_do_not_share_staging_at_the_same_time() -> None:
    """The second one packs into it only when the device is done with the first."""
    with Threads(3) as threads:
        assert threads.run(on_two_streams, threads, threads.gate()) == [[True, True]] * 3


def kept_alive(rank: int, threads: Threads) -> bool:
    """Whether the allocator is told of the stream of a background run, which uses what a direct call had allocated."""
    standin = threads.standins[rank]
    mover = Resharder(SOURCE, COLUMNS, timeout_seconds=10, **threads.options(rank))
    tensor = torch.ones(SHAPE) if rank == 0 else None
    mover(tensor)
    assert mover._session is not None
    channel = mover._session.channel
    before = len(standin.kept)
    mover.start(tensor).wait()
    streams = [stream for tensor, stream in standin.kept[before:] if tensor is channel.staged]
    return streams == [channel.stream_context.stream]


def test_staging_is_kept_from_others_while_any_stream_uses_it() -> None:
    with Threads(3) as threads:
        assert threads.run(kept_alive, threads) == [True] * 3
