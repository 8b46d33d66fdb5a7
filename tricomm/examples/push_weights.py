"""Push weights from a trainer, on four ranks with FSDP2, to servers with tensor parallelism on two others, as bfloat16.

torchrun --nproc-per-node 6 -m tricomm.examples.push_weights
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tricomm import Resharder

WIDTH, PUSHES = 50, 3
SERVED = {  # how tensor parallelism cuts each weight: the first layer by rows, the second by columns
    "0.weight": Shard(0),
    "0.bias": Shard(0),
    "2.weight": Shard(1),
    "2.bias": Replicate(),
}


def make_model() -> nn.Module:
    """Shapes and names are the same everywhere."""
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of something."""
    optimizer.zero_grad()
    model(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()


def main() -> None:
    """Train, push, and check on every server that it has what the trainer has."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trainer, server = DeviceMesh("cpu", [0, 1, 2, 3]), DeviceMesh("cpu", [4, 5])  # made by all ranks
    torch.manual_seed(0)
    model = make_model()
    shapes = {name: one.shape for name, one in model.named_parameters()}
    mover = Resharder(  # made once: later pushes are data alone, of all weights at once
        {name: (trainer, [Shard(0)], shape, torch.float32) for name, shape in shapes.items()},
        {name: (server, [SERVED[name]], shape, torch.bfloat16) for name, shape in shapes.items()},
    )
    if rank < 4:
        fully_shard(model, mesh=trainer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        weights = {  # as a server holds them
            name: distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), server, [SERVED[name]])
            for name, shape in shapes.items()
        }
    for push in range(PUSHES):
        if rank < 4:
            train(model, optimizer)
            state = model.state_dict()  # DTensors
            mover(state)
        else:
            mover(out=weights)  # in place
        norms: list[DTensor] = [one.float().norm() for one in (state if rank < 4 else weights).values()]
        total = sum(norm.full_tensor().item() for norm in norms)
        if rank in (0, 4):
            print(f"push {push}, {'trainer' if rank == 0 else 'server'}: norms of the weights add up to {total:.2f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
