"""Large tensors, whose messages have several chunks: what small ones, as Hypothesis draws them, do not show."""

import pytest

from tests.plan.test_plan import without_indices
from tricomm import (
    Auto,
    Broadcast,
    GlobalAllGather,
    LocalAllGather,
    Mesh,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Topology,
)
from tricomm.plan import make_plan


@pytest.mark.parametrize("strategy", [Auto(), SendRecv(), Broadcast(), LocalAllGather(), GlobalAllGather()], ids=repr)
def test_a_rank_alone_cuts_large_messages_as_everybody_does(strategy) -> None:
    """Uneven messages of megabytes: what a rank does not see must not change how it cuts what it sends."""
    source = ShardingSpec(Mesh([0, 1], ("a",)), (Shard(0),), (7, 35_280, 64), "int32")
    destination = ShardingSpec(Mesh([2, 3, 4], ("b",)), (Shard(0),))
    arguments = {"strategy": strategy, "topology": Topology(tuple("abcde"), 25e6)}
    plan = make_plan(source, destination, **arguments)
    plan.verify()
    assert max(len(message.chunks) for message in plan.moves[0].messages) > 1
    for rank in range(5):
        alone = make_plan(source, destination, **arguments, rank=rank)
        assert alone.rank == rank
        assert [*map(without_indices, alone.for_rank(rank))] == [*map(without_indices, plan.for_rank(rank))]


def test_ranks_send_to_those_after_them_first() -> None:
    """If all began with the lowest rank, its NIC alone would be busy until the others' queues have filled."""
    mesh = Mesh(range(6), ("a",))
    source = ShardingSpec(mesh, (Shard(0),), (36, 36), "int32")
    plan = make_plan(source, ShardingSpec(mesh, (Shard(1),)))
    for rank in range(6):
        (step,) = plan.for_rank(rank)[0].rounds
        assert [transfer.peer for transfer in step.sends] == [(rank + distance) % 6 for distance in range(1, 6)]


def test_chunks_of_a_set_do_not_shrink_with_tensors_of_other_ranks() -> None:
    """Experts on ranks of their own: each rank has one peer or two, however many experts there are."""

    def most_nbytes(experts: int) -> int:
        sources, destinations = {}, {}
        for one in range(experts):
            pair, there = Mesh([2 * one, 2 * one + 1], ("fsdp",)), Mesh([2 * experts + one], ("expert",))
            sources[f"expert {one}"] = ShardingSpec(pair, (Shard(0),), (1 << 14, 1 << 10), "float32")
            destinations[f"expert {one}"] = ShardingSpec(there, (Replicate(),))
        plan = make_plan(sources, destinations, staging_bytes=64 << 20)
        messages = plan.moves[0].messages
        return max(message.chunk_nbytes(chunk) for message in messages for chunk in range(len(message.chunks)))

    assert most_nbytes(40) == most_nbytes(1)
