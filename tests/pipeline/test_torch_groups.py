"""A stage for torch.distributed.pipelining makes no process group, so that others may be made beside it as ever."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Schedule1F1B

from tests.cases import RANKS
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.torch_adapter import ReshardStage

OPTIONS: Any = getattr(dist, "config", None)
ROWS, WIDTH = 4, 3
EDGE = EdgeTensor(
    ShardingSpec(Mesh([0], ("a",)), (Replicate(),), (ROWS, WIDTH), "float32"),
    ShardingSpec(Mesh([1], ("b",)), (Replicate(),)),
)


def sum_over(ranks: list[int]) -> float:
    """What a group that all ranks make after that adds up."""
    group = dist.new_group(ranks)
    found = torch.ones(1)
    if dist.get_rank() in ranks:
        dist.all_reduce(found, group=group)
    return found.item()


def stages_on_some_ranks(rank: int) -> None:
    """Ranks make unequally many stages, and name the next group alike."""
    groups = len(dist.distributed_c10d._world.pg_map)
    for _ in range((2, 1)[rank] if rank < 2 else 0):
        here = {"leaving": [EDGE]} if rank == 0 else {"arriving": [EDGE]}
        assert ReshardStage(nn.Identity(), rank, 2, **here).num_stages == 2
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert sum_over([0, 1, RANKS - 1]) == (3 if rank in (0, 1, RANKS - 1) else 1)


def test_a_stage_leaves_the_names_of_groups_to_the_others(ranks: Ranks) -> None:
    ranks.run(stages_on_some_ranks)


def two_stages(rank: int) -> None:
    """torch is told to give each direction a communicator: a stage has those of its Links, and torch makes none."""
    if rank > 1:
        return
    with OPTIONS.patch("pipeline_per_direction_p2p", True):
        here = {"leaving": [EDGE]} if rank == 0 else {"arriving": [EDGE]}
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.ones_(layer.weight)
        stage = ReshardStage(layer, rank, 2, timeout_seconds=60, **here)
        schedule = Schedule1F1B(stage, 2, nn.functional.mse_loss)
        x = torch.ones(2 * ROWS, WIDTH)
        losses: list[torch.Tensor] = []
        schedule.step(x) if rank == 0 else schedule.step(target=torch.zeros_like(x), losses=losses)
    assert rank == 0 or [loss.item() for loss in losses] == [81.0, 81.0]
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 18.0))
    stage.close()


@pytest.mark.skipif(not hasattr(OPTIONS, "pipeline_per_direction_p2p"), reason="torch before 2.14 has no such option")
def test_torchs_option_of_two_communicators_asks_nothing_of_a_stage(ranks: Ranks) -> None:
    ranks.run(two_stages)
