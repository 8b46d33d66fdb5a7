"""What a process keeps for a group goes with the group: files, threads and memory do not grow with the groups made."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.transport.test_communicators import settled, usage
from tricomm import Mesh, Partial, Replicate, Resharder, ShardingSpec
from tricomm.launch import Ranks

GROUPS = int(os.environ.get("TRICOMM_GROUPS", "1000"))
FIRST = 40
"""Groups after which everything that is made once has been made."""

PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
MOST_GROWN_NBYTES_PER_GROUP = 8 << 10
"""torch's own groups leave some KiB of keys on the store, which the process of rank 0 does not host here."""

BOTH = Mesh([0, 1], ("x",))
SOURCE = ShardingSpec(BOTH, (Partial("sum"),), (64, 64), "float32")
DESTINATION = ShardingSpec(BOTH, (Replicate(),))


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE_NBYTES


def groups_come_and_go(rank: int) -> list[tuple[tuple[int, int], int, float]]:
    """(files and threads, resident bytes, seconds) without a group, after the first few and after all."""
    found, began = [], time.monotonic()
    gc.collect()
    gc.freeze()  # what stands already need not be looked through a thousand times
    tensor, before = torch.full((64, 64), 1.0 + rank), usage()
    for number in range(GROUPS + 1):
        if number in (0, FIRST, GROUPS):
            found.append((settled(before), resident_nbytes(), time.monotonic() - began))
        group = dist.new_group([0, 1])
        options = {"group": group, "timeout_seconds": 20}
        if number % 4 == 0:
            output = tricomm.reshard(tensor, SOURCE, DESTINATION, **options)
        elif number % 4 == 1:
            with Resharder(SOURCE, DESTINATION, **options) as mover:
                output = mover(tensor)
            del mover
        elif number % 4 == 2:
            output = Resharder(SOURCE, DESTINATION, **options).start(tensor).wait()
        else:
            leaf = tensor.clone().requires_grad_()
            output = tricomm.reshard(leaf, SOURCE, DESTINATION, **options)
            output.sum().backward()
            del leaf
        assert bool((output == 3.0).all()), f"group {number}, rank {rank}"
        dist.destroy_process_group(group)
        del group, options, output
        gc.collect()
    gc.unfreeze()
    return found


@pytest.mark.processes
def test_a_thousand_groups_leave_nothing_behind() -> None:
    with Ranks(2, timeout_seconds=300) as two:
        for rank, found in enumerate(two.run(groups_come_and_go)):
            (at_first, _, _), (_, early, _), (at_end, late, seconds) = found
            print(f"rank {rank}: {at_first} -> {at_end}, {early >> 20} -> {late >> 20} MiB, {seconds:.0f} s")
            assert at_end <= at_first, f"rank {rank}: (threads, files) grew from {at_first} to {at_end}"
            grown = (late - early) / (GROUPS - FIRST)
            assert grown < MOST_GROWN_NBYTES_PER_GROUP, f"rank {rank}: {grown:.0f} bytes a group"
