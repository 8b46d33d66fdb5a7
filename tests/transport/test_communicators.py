"""Connections and threads go with the Resharders that used them."""

import gc
import os
import re
import time

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.oracle import pick, require_equal
from tests.pipeline.chain import CHAIN, MICROBATCHES, TIMEOUT_SECONDS, chain, data, linear
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.pipeline import one_f_one_b
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.transport.group import context_of

TRAIN = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SERVE = Mesh([4, 5, 6], ("tp",))
SOURCE = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (12, 8), "float32")
DESTINATION = ShardingSpec(SERVE, (Shard(1),), (12, 8), "float32")
FULL = torch.arange(96.0).reshape(12, 8)
PARTICIPANTS = (*TRAIN.ranks, *SERVE.ranks)
CHANNELS = 12


def usage() -> tuple[int, int]:
    """Threads and open files of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def settled(most: tuple[int, int]) -> tuple[int, int]:
    """Usage once it is at most that, or after five seconds."""
    for _ in range(100):
        gc.collect()
        now = usage()
        if now[0] <= most[0] and now[1] <= most[1]:
            break
        time.sleep(0.05)
    return now


def require_less(rank: int, after: tuple[int, int], before: tuple[int, int]) -> None:
    assert after[0] <= before[0], f"rank {rank} has {after[0]} threads, and {before[0]} before"
    assert after[1] <= before[1], f"rank {rank} has {after[1]} open files, and {before[1]} before"


def shard_of(rank: int) -> torch.Tensor | None:
    return pick(FULL, SOURCE, rank) if rank in TRAIN else None


def check(rank: int, output: torch.Tensor | None) -> None:
    if rank in SERVE:
        require_equal(output, pick(FULL, DESTINATION, rank), f"rank {rank}")


def many_channels(rank: int, how: str) -> tuple[tuple[int, int], ...]:
    """Usage before, with, and after Resharders on channels of their own."""
    check(rank, tricomm.reshard(shard_of(rank), SOURCE, DESTINATION, timeout_seconds=20))
    before = usage()
    movers = [Resharder(SOURCE, DESTINATION, channel=f"{how} {i}", timeout_seconds=20) for i in range(CHANNELS)]
    for mover in movers:
        check(rank, mover.start(shard_of(rank)).wait() if how == "start" else mover(shard_of(rank)))
    during = usage()
    if how == "close":
        for mover in movers:
            mover.close()
    else:
        movers.clear()
        del mover
    return before, during, settled(before)


@pytest.mark.parametrize("how", ["start", "close", "drop"])
def test_connections_and_threads_go_with_the_resharders(ranks: Ranks, how: str) -> None:
    for rank, (before, during, after) in enumerate(ranks.run(many_channels, how)):
        if rank in TRAIN or rank in SERVE:
            assert during[1] > before[1] + CHANNELS, "the channels have connections"
            # The run itself is on a thread of its own if it was started; gloo has one for each direction.
            assert during[0] <= before[0] + (3 if how == "start" else 2) * CHANNELS, "gloo's loops are shared"
        require_less(rank, after, before)


def close_and_call(rank: int) -> None:
    """A call of a closed Resharder is refused, and those that call it tell why; the ranks go on with another."""
    with Resharder(SOURCE, DESTINATION, timeout_seconds=20) as mover:
        check(rank, mover(shard_of(rank)))
        if rank in TRAIN or rank in SERVE:
            with Resharder(SOURCE, DESTINATION, timeout_seconds=20) as second:
                check(rank, second(shard_of(rank)))
        check(rank, mover(shard_of(rank)))  # the second one's end leaves the first its connections
    with pytest.raises(SpecError, match="a call of a Resharder that was closed; make another"):
        mover(shard_of(rank))


def test_a_closed_resharder_refuses(ranks: Ranks) -> None:
    ranks.run(close_and_call)


def forget_on_some(rank: int) -> None:
    """Ranks forget what reshard keeps at different times, as they do when their caches fill differently."""
    for turn in range(4):
        check(rank, tricomm.reshard(shard_of(rank), SOURCE, DESTINATION, timeout_seconds=20))
        if rank % 4 == turn:
            context_of(dist.group.WORLD).clear()
            gc.collect()


def close_on_one(rank: int, is_shared: bool) -> str:
    """What a rank that goes on calling is told."""
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=5)
    other = Resharder(SOURCE, DESTINATION, timeout_seconds=5)
    check(rank, mover(shard_of(rank)))
    check(rank, other(shard_of(rank)))
    if not is_shared:
        other.close()
        context_of(dist.group.WORLD).clear()
    if rank == 4:
        mover.close()
    try:
        for _ in range(3):
            mover(shard_of(rank))
            time.sleep(0.2)
    except (SpecError, TransportError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_resharder_that_one_rank_closed_names_it(ranks: Ranks, is_shared: bool) -> None:
    """Whether or not the rank keeps the connections for another."""
    texts = ranks.run(close_on_one, is_shared)
    assert "was closed" in texts[4]
    assert re.search("rank 4 .*closed", texts[0])
    ranks.run(forget_on_some)


def close_after_a_failure(rank: int) -> float:
    """One rank refuses, so all connections are lost; another closes its Resharder, and then all call."""
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=8, confirm=True)
    check(rank, mover(shard_of(rank)))
    if rank in PARTICIPANTS:
        with pytest.raises((SpecError, TransportError)):
            mover(torch.zeros(1) if rank == 0 else shard_of(rank))
    context_of(dist.group.WORLD).clear()
    gc.collect()
    if rank == 4:
        mover.close()
        gc.collect()
    dist.barrier()
    begin = time.monotonic()
    if rank in PARTICIPANTS:
        with pytest.raises((SpecError, TransportError), match="was closed"):
            mover(shard_of(rank))
    return time.monotonic() - begin


def test_a_closed_resharder_ends_the_meeting_of_the_others(ranks: Ranks) -> None:
    for rank, seconds in enumerate(ranks.run(close_after_a_failure)):
        assert seconds < 4, f"rank {rank} waited {seconds} s"
    ranks.run(forget_on_some)


def test_ranks_that_lost_their_connections_get_new_ones(ranks: Ranks) -> None:
    ranks.run(forget_on_some)


def links_come_and_go(rank: int) -> tuple[tuple[int, int], ...]:
    before = usage()
    for number in range(3):
        with Link(f"links {number}", [EdgeTensor(SOURCE, DESTINATION)], microbatches=1, timeout_seconds=20) as link:
            if rank in TRAIN or rank in SERVE:
                link.connect()
            if rank in TRAIN:
                link.send(shard_of(rank), 0)
                link.flush()
            elif rank in SERVE:
                check(rank, link.recv(0).wait())
    return before, settled(before)


def test_links_leave_nothing_behind(ranks: Ranks) -> None:
    for rank, (before, after) in enumerate(ranks.run(links_come_and_go)):
        require_less(rank, after, before)


def executors_come_and_go(rank: int) -> tuple[tuple[int, int], ...]:
    stages, edges = chain(rank, linear, CHAIN)
    schedule = one_f_one_b(len(CHAIN), MICROBATCHES)
    before = usage()
    options = {"timeout_seconds": TIMEOUT_SECONDS}
    with Executor(schedule, stages, edges, name="communicators", **options) as closed:
        closed.step(data())
    with pytest.raises(SpecError, match="a step of an executor that was closed"):
        closed.step(data())
    for number in range(2):
        Executor(schedule, stages, edges, name=f"links {number}", **options).step(data())
    return before, settled(before)


def test_executors_leave_nothing_behind(ranks: Ranks) -> None:
    ranks.run(executors_come_and_go)  # autograd starts a thread of its own
    for rank, (before, after) in enumerate(ranks.run(executors_come_and_go)):
        require_less(rank, after, before)


class SlowStore(dist.Store):
    """A store whose answers take a while: so do the connections that are made with it, one after the other."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store = store

    def set(self, key, value):
        self.store.set(key, value)

    def get(self, key):
        time.sleep(0.05)
        return self.store.get(key)

    def wait(self, keys, *timeout):
        self.store.wait(keys, *timeout)

    def check(self, keys):
        return self.store.check(keys)

    def add(self, key, value):
        return self.store.add(key, value)

    def deleteKey(self, key):  # noqa: N802 - torch's name
        return self.store.delete_key(key)


def connect_slowly(rank: int, lagging: int) -> None:
    """All but one rank are done, and close, long before that one has all its connections."""
    if rank not in PARTICIPANTS:
        return
    mover = Resharder(SOURCE, DESTINATION, channel=f"slow {lagging}", timeout_seconds=TIMEOUT_SECONDS)
    context = mover.context
    store = context.store
    if rank == lagging:
        context.store = SlowStore(store)
    try:
        mover.connect()
    finally:
        context.store = store
    mover.close()


@pytest.mark.parametrize("lagging", [0, 3, 6])
def test_no_rank_closes_before_all_are_connected(ranks: Ranks, lagging: int) -> None:
    ranks.run(connect_slowly, lagging)
