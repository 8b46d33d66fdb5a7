"""A DTensor goes to a mesh of other ranks and back, and gradients with it.

torchrun --nproc-per-node 5 -m tricomm.examples.two_meshes
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import tricomm


def main() -> None:
    """Rows on two ranks become columns on three, where the loss is."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3, 4])  # made by all ranks
    full = torch.arange(35.0).reshape(7, 5)
    x: DTensor | None = None
    if rank < 2:
        x = distribute_tensor(full, pair, [Shard(0)])
        x.requires_grad_()

    # Ranks without the DTensor say where it is.
    where = (pair, [Shard(0)], full.shape, full.dtype)
    y: DTensor = tricomm.redistribute(x, three, [Shard(1)], source=where, differentiable=True)
    loss = (y.to_local() ** 2).sum() if rank >= 2 else None
    tricomm.backward(*([] if loss is None else [loss]))  # all ranks, also those without a loss
    print(f"rank {rank}: has {tuple(y.to_local().shape)} of {tuple(y.shape)}", flush=True)
    if x is not None:
        assert isinstance(x.grad, DTensor)
        assert torch.equal(x.grad.to_local(), 2 * x.to_local())
        print(f"rank {rank}: its gradient is 2 x", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
