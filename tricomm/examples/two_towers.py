"""Train a ranking model whose towers live on meshes of their own: users on two ranks, items on two, the loss on one.

torchrun --nproc-per-node 5 -m tricomm.examples.two_towers
"""

import torch
import torch.distributed as dist
from torch import nn

import tricomm
from tricomm import Mesh, Replicate, Shard, ShardingSpec

BATCH, USERS, ITEMS, WIDTH, STEPS = 32, 40, 60, 16, 60


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a user and the item that it liked."""
    users = torch.randperm(USERS, generator=torch.Generator().manual_seed(step))[:BATCH]
    return users, (users * 7 + 3) % ITEMS


def main() -> None:
    """Every rank makes the same moves in the same order; gradients come back through them."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    users, items, head = Mesh([0, 1], ("dp",)), Mesh([2, 3], ("dp",)), Mesh([4], ("dp",))
    whole = ShardingSpec(head, (Replicate(),))
    parts = [ShardingSpec(tower, (Shard(0),), (BATCH, WIDTH), "float32") for tower in (users, items)]
    moves = [
        tricomm.Resharder(part, whole, differentiable=True, name=name)
        for part, name in zip(parts, ("users", "items"), strict=True)
    ]
    torch.manual_seed(0)  # replicas of a tower begin alike
    towers = [nn.Sequential(nn.Embedding(rows, WIDTH), nn.Linear(WIDTH, WIDTH)) for rows in (USERS, ITEMS)]
    groups = [dist.new_group(list(tower.ranks)) for tower in (users, items)]
    mine = 0 if rank in users else 1 if rank in items else None
    optimizer = None if mine is None else torch.optim.Adam(towers[mine].parameters(), lr=1e-2)
    for step in range(STEPS):
        found: list[torch.Tensor | None] = [None, None]
        if mine is not None:
            part = make_batch(step)[mine].chunk(2)[rank % 2]
            found[mine] = towers[mine](part)
        seen = [move(one) for move, one in zip(moves, found, strict=True)]  # all five ranks
        losses = []
        if seen[0] is not None and seen[1] is not None:
            scores = seen[0] @ seen[1].T  # each user against all items of the batch
            losses.append(nn.functional.cross_entropy(scores, torch.arange(BATCH)))
            if step % 20 == 0 or step == STEPS - 1:
                print(f"step {step}: loss {losses[0].item():.4f}", flush=True)
        tricomm.backward(*losses)
        if optimizer is not None and mine is not None:
            for parameter in towers[mine].parameters():
                dist.all_reduce(parameter.grad, group=groups[mine])  # each rank had its part of the batch
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
