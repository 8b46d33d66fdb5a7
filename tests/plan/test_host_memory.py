"""Copies within a host: what its memory is to the simulator and the planner."""

from dataclasses import replace

import pytest

from tests.plan.test_plan import LARGE, WHOLE, rated, spec
from tricomm import Replicate, SendRecv, ShardingSpec, Topology, make_plan


def test_copies_within_a_host_share_its_memory() -> None:
    hosts = ("a", "b", "b", "b", "c", "c")
    alone = rated(hosts, intra_bytes_per_second=2 * WHOLE)
    shared = replace(alone, memory_bytes_per_second=4 * WHOLE)

    def seconds(source: ShardingSpec, destination: ShardingSpec, topology: Topology) -> float:
        return make_plan(source, destination, strategy=SendRecv(), topology=topology).simulated_seconds()

    whole = spec([1], Replicate())
    assert seconds(whole, spec([2], Replicate()), alone) == 1 / 2
    assert seconds(whole, spec([2], Replicate()), shared) == 1 / 2  # the reader is slower than the memory
    # Two read one rank: that is not busy, their host's memory is.
    assert seconds(whole, spec([2, 3], Replicate()), alone) == 1
    assert seconds(whole, spec([2, 3], Replicate()), shared) == 1 / 2
    slow = replace(alone, memory_bytes_per_second=WHOLE)
    assert seconds(whole, spec([2, 3], Replicate()), slow) == 2
    # Each of two hosts has a memory of its own.
    apart = ShardingSpec.explicit(dict.fromkeys((1, 4), (((0, 12),), ((0, 8),))), (12, 8), "float32")
    both = ShardingSpec.explicit(dict.fromkeys((2, 5), (((0, 12),), ((0, 8),))), (12, 8), "float32")
    assert seconds(apart, both, slow) == 1


def test_a_broadcast_enters_each_host_once_and_its_other_ranks_read_it_there() -> None:
    hosts = ("a", "b", "b", "b", "c", "c", "c")
    topology = Topology(hosts, 1e9, intra_bytes_per_second=5e9, memory_bytes_per_second=8e9)
    replicas = spec([1, 2, 3, 4, 5, 6], Replicate(), shape=LARGE)
    sending, receiving = make_plan(spec([0], Replicate(), shape=LARGE), replicas, topology=topology).nic_seconds()
    once = LARGE[0] * LARGE[1] * 4 / 1e9
    assert receiving.tolist() == pytest.approx([0, once, once])
    assert sending.sum() == pytest.approx(2 * once)
