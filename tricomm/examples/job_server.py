"""A server, tensor parallel, that takes weights from a trainer between two batches; ``job_trainer`` is the other job.

torchrun --nproc-per-node 3 -m tricomm.examples.job_server --meeting tcp://127.0.0.1:29600 --versions 20
"""

import argparse
import os

import torch
import torch.distributed as dist

from tricomm import Mesh, ShardingSpec, Subscriber, TransportError
from tricomm.examples.job_rules import RULES

SHAPES = {"up": (31, 17), "down": (31, 16), "down_bias": (16,)}
CUTS = {"up": ["S0", "R"], "down": ["S0", "R"], "down_bias": ["R"]}  # by mesh axis 0


def serve(weights: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Compute a batch, each rank its part of the hidden features."""
    hidden = torch.relu(batch @ weights["up"][:, :-1].T + weights["up"][:, -1])
    output = hidden @ weights["down"]
    dist.all_reduce(output)
    return output + weights["down_bias"]


def main() -> None:
    """Serve until so many versions have come."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--meeting", required=True)
    parser.add_argument("--versions", type=int, default=20)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    probe = torch.linspace(-1, 1, 16).reshape(1, 16)
    ranks = Mesh(list(range(size)), ("tp",))
    specs = {name: ShardingSpec.from_dims(ranks, CUTS[name], shape, "float32") for name, shape in SHAPES.items()}
    weights = {name: torch.zeros(spec.local_shape(rank)) for name, spec in specs.items()}
    with Subscriber(
        options.meeting, side="server", side_rank=rank, side_size=size, source="trainer", specs=specs, out=weights,
        secret=os.environ["TRICOMM_SECRET"], rules=RULES,
    ) as subscriber:  # fmt: skip
        taken = 0
        while taken < options.versions:
            try:
                version = subscriber.poll()
            except TransportError as error:  # the weights are a mix: serve nothing until the next version
                print(f"rank {rank}: {error}", flush=True)
                continue
            output = serve(weights, probe).sum().item()
            if version is not None:
                taken += 1
                if rank == 0:
                    print(f"version {version}: output {output:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
