"""A trainer that pushes its weights to a server while it trains; ``job_server`` is the other job.

export TRICOMM_SECRET=$(openssl rand -hex 32)
python -m tricomm meet --address tcp://127.0.0.1:29600 &
torchrun --nproc-per-node 4 -m tricomm.examples.job_trainer --meeting tcp://127.0.0.1:29600 --pushes 20
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tricomm import Mesh, Publisher, Shard, ShardingSpec


def main() -> None:
    """Train until so many pushes have started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--meeting", required=True)
    parser.add_argument("--pushes", type=int, default=20)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 31), nn.ReLU(), nn.Linear(31, 16))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = torch.linspace(-1, 1, 16).reshape(1, 16)
    ranks = Mesh(list(range(size)), ("fsdp",))
    specs = {name: ShardingSpec(ranks, (Shard(0),), p.shape, p.dtype) for name, p in model.named_parameters()}
    with Publisher(
        options.meeting, side="trainer", side_rank=rank, side_size=size, fleets=["server"], specs=specs,
        secret=os.environ["TRICOMM_SECRET"],
    ) as publisher:  # fmt: skip
        started = version = 0
        while started < options.pushes:
            batch = torch.randn(8, 16)
            (model(batch) - batch).square().mean().backward()
            publisher.wait_source()  # the last push has read the weights
            optimizer.step()
            optimizer.zero_grad()
            version += 1
            weights = {name: p.to_local() for name, p in model.state_dict().items()}
            push = publisher.push(weights, version)["server"]
            started += push.is_started
            if push.is_started and rank == 0:
                print(f"version {version}: pushed", flush=True)
            output = model(probe).sum().item()
            if push.is_started and rank == 0:
                print(f"version {version}: output {output:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
