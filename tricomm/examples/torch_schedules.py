"""torch's own pipeline schedules over stages on unequal meshes: one rank, then two with tensor parallelism by DTensor.

torchrun --nproc-per-node 3 -m tricomm.examples.torch_schedules
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tricomm import ShardingSpec
from tricomm.pipeline import EdgeTensor
from tricomm.pipeline.torch_adapter import ReshardStage

BATCH, MICROBATCHES, WIDTH, STEPS = 16, 4, 32, 20


class First(nn.Module):
    """A layer that gives a DTensor on its mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.mesh = mesh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute."""
        return DTensor.from_local(torch.tanh(self.layer(x)), self.mesh, [Replicate()])


class Last(nn.Module):
    """A layer whose weight is cut over its mesh; it takes a DTensor and gives a plain tensor."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, mesh, [Shard(1)]))

    def forward(self, hidden: DTensor) -> torch.Tensor:
        """Compute."""
        found: Any = hidden @ self.weight
        whole: torch.Tensor = found.full_tensor()
        return whole


def main() -> None:
    """Train with torch's Schedule1F1B."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    first, last = DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1, 2])  # made by all ranks
    edge = EdgeTensor(
        ShardingSpec.from_placements(first, [Replicate()], (BATCH // MICROBATCHES, WIDTH), torch.float32),
        ShardingSpec.from_placements(last, [Replicate()]),
    )
    if rank == 0:
        stage = ReshardStage(First(first), 0, 2, leaving=[edge], device_mesh=first)
    else:
        stage = ReshardStage(Last(last), 1, 2, arriving=[edge], device_mesh=last)
    schedule = Schedule1F1B(stage, MICROBATCHES, nn.functional.mse_loss)
    optimizer = torch.optim.Adam(stage.submod.parameters(), lr=1e-2)
    for step in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=x.flip(-1), losses=losses)
        optimizer.step()
        if rank == 1:
            print(f"step {step}: loss {torch.stack(losses).mean().item():.4f}", flush=True)
    stage.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
