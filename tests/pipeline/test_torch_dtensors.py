"""Stages of torch.distributed.pipelining whose modules take and return DTensors, on meshes of their own."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.pipeline.test_torch_adapter import (
    MICROBATCHES,
    ROWS,
    WIDTH,
    Layer,
    loss_of,
    make_schedule,
    microbatches,
    require_close,
)
from tricomm import Mesh, ShardingSpec, SpecError
from tricomm.launch import Ranks
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.torch_adapter import ReshardStage

SCHEDULES = ("ScheduleGPipe", "Schedule1F1B", "eager 1", "eager 1 split")


class TensorParallel(nn.Module):
    """A layer whose weight is cut over its DeviceMesh; the last one gives a plain tensor."""

    def __init__(self, number: int, mesh: DeviceMesh, placement: Any, is_last: bool) -> None:
        super().__init__()
        self.mesh, self.is_last = mesh, is_last
        self.weight = nn.Parameter(distribute_tensor(Layer(number).weight.detach(), mesh, [placement]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        y = torch.tanh(x @ self.weight.T)
        return y.full_tensor() if self.is_last else y


def run_dtensors(rank: int, name: str) -> torch.Tensor | None:
    """Rows of the first weight are cut over two ranks, columns of the second over three: its input's gradient is whole
    or a sum, as DTensor finds it, and its output a sum.
    """
    first = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    second = DeviceMesh("cpu", [2, 3, 4], mesh_dim_names=("tp",))
    if rank > 4:
        dist.barrier()
        return None
    edge = EdgeTensor(
        ShardingSpec.from_placements(first, [Shard(1)], (ROWS, WIDTH), torch.float64),
        ShardingSpec.from_placements(second, [Replicate()]),
    )
    if rank < 2:
        module = TensorParallel(0, first, Shard(0), is_last=False)
        stage = ReshardStage(module, 0, 2, leaving=[edge], device_mesh=first)
    else:
        module = TensorParallel(1, second, Shard(0), is_last=True)
        stage = ReshardStage(module, 1, 2, arriving=[edge], device_mesh=second)
    schedule = make_schedule(name, [stage])
    inputs = [torch.cat(microbatches(100))] if rank < 2 else []
    schedule.step(*inputs, target=torch.cat(microbatches(200)) if rank > 1 else None)
    gradient = module.weight.grad.full_tensor()
    stage.close()
    dist.barrier()
    return gradient


@pytest.mark.parametrize("name", SCHEDULES)
def test_dtensor_stages_have_the_gradients_of_one_process(ranks: Ranks, name: str) -> None:
    found = ranks.run(run_dtensors, name)
    layers = [Layer(0), Layer(1)]
    for x, target in zip(microbatches(100), microbatches(200), strict=True):
        loss_of(layers[1](layers[0](x)), target).backward()
    assert MICROBATCHES > 1
    for rank in range(5):
        require_close(found[rank], layers[rank > 1].weight.grad, f"rank {rank}")


def on_another_mesh(rank: int) -> None:
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",), _init_backend=False)
    if rank == 0:
        reversed_mesh, other = (Mesh(ranks, ("tp",)) for ranks in ([1, 0], [2]))
        edge = EdgeTensor(
            ShardingSpec.from_placements(reversed_mesh, [Replicate()], (4, 4), "float64"),
            ShardingSpec.from_placements(other, [Replicate()]),
        )
        with pytest.raises(SpecError, match=r"is not the mesh of .* pass the DeviceMesh of the stage"):
            ReshardStage(nn.Identity(), 0, 2, leaving=[edge], device_mesh=mesh)


def test_a_stage_on_another_mesh_is_refused(ranks: Ranks) -> None:
    ranks.run(on_another_mesh)
