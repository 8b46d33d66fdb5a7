"""Train two stages on meshes of one and of two ranks, measure what they cost, and tune the schedule for that.

torchrun --nproc-per-node 3 -m tricomm.examples.train_pipeline
"""

import torch
import torch.distributed as dist
from torch import nn

from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, Topology
from tricomm.pipeline import EdgeTensor, Executor, Measurement, Stage, WithLoss, Workload, eager_one_f_one_b, tune

MICROBATCHES, BATCH, WIDTH, STEPS = 8, 16, 64, 20


def make_executor(rank: int, module: nn.Module) -> Executor:
    """Stages, what crosses between them, and the schedule; every rank makes the same."""
    first, last = Mesh([0], ("dp",)), Mesh([1, 2], ("dp",))  # one rank, then two that share the batch
    data_parallel = dist.new_group(last.ranks)

    def sum_gradients(module: nn.Module) -> None:
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad, group=data_parallel)

    stages = [
        Stage(first, ("x",), ("hidden",), module if rank in first else None),
        Stage(
            last,
            ("hidden", "target"),
            ("loss",),
            module if rank in last else None,
            loss=(Partial("avg"),),  # each rank has the loss of its part of the batch
            after_backward=sum_gradients,
        ),
    ]
    whole = ShardingSpec(first, (Replicate(),), (BATCH, WIDTH), "float32")
    parts = ShardingSpec(last, (Shard(0),))  # the batch is cut in two on the way
    schedule = eager_one_f_one_b(2, MICROBATCHES, split=True)  # weight gradients later than input gradients
    return Executor(schedule, stages, {(0, 1): {"hidden": EdgeTensor(whole, parts)}})


def make_batch(rank: int, step: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """One tensor for each microbatch; ranks 1 and 2 have half of each target."""
    x = torch.randn(MICROBATCHES, BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    target = x.flip(-1)
    if rank in (1, 2):
        target = target.chunk(2, dim=1)[rank - 1]
    return {"x": x.unbind(), "target": target.unbind()}


def main() -> None:
    """Train, then measure one more step and print the schedule that is the fastest for what was measured."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    if dist.get_world_size() != 3:
        raise SystemExit(f"{dist.get_world_size()} processes, and this pipeline has stages of 1 and 2 ranks: start 3")
    rank = dist.get_rank()
    module: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    if rank > 0:
        module = WithLoss(nn.Linear(WIDTH, WIDTH), nn.functional.mse_loss)
    executor = make_executor(rank, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = executor.step(make_batch(rank, step))  # gradients are in .grad
        optimizer.step()
        if loss is not None:
            print(f"step {step}, rank {rank}: loss of its part {loss:.4f}")
    with Measurement(executor) as measurement:
        executor.step(make_batch(rank, STEPS))
    costs = measurement.costs(Topology.detect(nic_bytes_per_second=12.5e9))  # the same on every rank
    if rank == 0:
        print(costs.stages, tune(Workload.measured(costs, MICROBATCHES).costs, [4, 8, 16]), sep="\n")
    executor.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
