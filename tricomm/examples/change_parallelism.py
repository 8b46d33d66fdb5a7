"""Go on training on three ranks instead of four, without a checkpoint: FSDP2 parameters and the state of AdamW move.

torchrun --nproc-per-node 4 -m tricomm.examples.change_parallelism
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import tricomm

WIDTH, BATCH, STEPS = 10, 12, 6  # the batch stays, and is cut into 4 or 3 equal parts


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)).double()


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.flip(-1)


def train(model: nn.Module, optimizer: Any, mesh: DeviceMesh, steps: range) -> None:
    """Train on the ranks of a mesh; each has its part of the batch."""
    for step in steps:
        x, target = (one.chunk(mesh.size())[mesh.get_local_rank()] for one in make_batch(step))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        mean = loss.detach() / mesh.size()
        dist.all_reduce(mean, group=mesh.get_group())
        if dist.get_rank() == 0:
            print(f"step {step} on {mesh.size()} ranks: loss {mean.item()!r}", flush=True)


def main() -> None:
    """Train, change the number of ranks, and go on."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    four, three = DeviceMesh("cpu", [0, 1, 2, 3]), DeviceMesh("cpu", [0, 1, 2])  # made by all ranks
    model = make_model()
    fully_shard(model, mesh=four)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, four, range(STEPS))

    stays = rank in (0, 1, 2)
    old = dict(model.state_dict())  # DTensors, which share memory with the parameters
    changed = make_model()
    if stays:
        fully_shard(changed, mesh=three)
    new = dict(changed.named_parameters()) if stays else {}
    renewed = torch.optim.AdamW(new.values(), lr=1e-2) if stays else None
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    for name, parameter in old.items():
        with torch.no_grad():  # in place, where FSDP2 keeps it
            tricomm.reshard(parameter, None, (three, [Shard(0)]), out=new.get(name))
        moments = {key: tricomm.redistribute(states[name][key], three, [Shard(0)]) for key in ("exp_avg", "exp_avg_sq")}
        if renewed is not None:
            renewed.state[new[name]] = {"step": states[name]["step"], **moments}
    if stays:
        train(changed, renewed, three, range(STEPS, 2 * STEPS))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
