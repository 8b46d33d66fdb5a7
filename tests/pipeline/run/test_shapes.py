"""Evaluation and unequal microbatches where a pipeline is no plain chain: skip edges, several ranks a stage, turns."""

import pytest
import torch
from torch import nn

from tests.pipeline.chain import CHAIN, MICROBATCHES, TIMEOUT_SECONDS, WIDTH, linear
from tests.pipeline.run.test_rows import batch
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Costs,
    EdgeTensor,
    Executor,
    Queues,
    Schedule,
    Stage,
    clip_gradients,
    eager_one_f_one_b,
    gpipe,
    in_turn,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble,
)

SKIPS = ((0, 1), (1, 2), (2, 3), (0, 3))


class Joined(nn.Module):
    """The last stage: what came the long way and the short one, the loss and the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3)

    def forward(self, x, skip, target):
        y = self.layer(x + skip)
        return nn.functional.mse_loss(y, target), y


def parts() -> list[nn.Module]:
    return [linear(0), linear(1), linear(2), Joined()]


def spec(mesh: Mesh, rows: int) -> ShardingSpec:
    return ShardingSpec(mesh, (Shard(0),) if mesh.size > 1 else (Replicate(),), (rows, WIDTH), "float64")


def pipeline(rank: int, meshes, rows: int):
    """(stages, edges): a skip from the first stage to the last; ranks of a stage share the rows."""
    names = (("data",), ("x1",), ("x2",), ("x3", "x1", "target"))
    outputs = (("x1",), ("x2",), ("x3",), ("loss", "y"))
    loss = (Partial("avg"),) if meshes[3].size > 1 else (Replicate(),)
    stages = [
        Stage(mesh, names[index], outputs[index], module if rank in mesh else None, loss if index == 3 else None)
        for index, (mesh, module) in enumerate(zip(meshes, parts(), strict=True))
    ]
    edges = {
        (source, destination): {
            f"x{source + 1}": EdgeTensor(spec(meshes[source], rows), spec(meshes[destination], rows))
        }
        for source, destination in SKIPS
    }
    return stages, edges


def reference(given) -> tuple[torch.Tensor, torch.Tensor, list[nn.Module]]:
    first, second, third, last = modules = parts()
    x = first(torch.cat(given["data"]))
    loss, y = last(third(second(x)), x, torch.cat(given["target"]))
    loss.backward()
    return loss.detach(), y.detach(), modules


def trained(rank: int, schedule: Schedule, meshes, queues: Queues, rows) -> list:
    """A step between two evaluations, all against one process; ranks of a stage add their gradients."""
    stages, edges = pipeline(rank, meshes, max(rows))
    given = batch(rows)
    mine = next((mesh for mesh in meshes if rank in mesh), None)
    replica = 0 if mine is None else mine.ranks.index(rank)
    replicas, is_plain = 1 if mine is None else mine.size, all(mesh.size == 1 for mesh in meshes)
    share = {name: tuple(one.chunk(replicas)[replica] for one in values) for name, values in given.items()}
    loss, y, modules = reference(given)
    with Executor(schedule, stages, edges, queues=queues, timeout_seconds=TIMEOUT_SECONDS) as executor:
        before = executor.evaluate(share)
        parameters = [one for stage in stages if stage.module is not None for one in stage.module.parameters()]
        assert all(one.grad is None for one in parameters)
        executor.step(share)
        after = executor.evaluate(share)
        if rank in meshes[3]:
            wanted = torch.cat([one.chunk(replicas)[replica] for one in y.split(list(rows))])
            for found in (before, after):
                torch.testing.assert_close(torch.cat(found.outputs["y"]), wanted)
            if replicas == 1:
                torch.testing.assert_close(before.loss, loss)
        if is_plain and executor.runs:
            norm = clip_gradients(executor, 1e9)
            whole = [one.grad for module in modules for one in module.parameters()]
            torch.testing.assert_close(norm, torch.stack([one.norm() for one in whole]).norm())
    if is_plain:
        for stage, module in zip(stages, modules, strict=True):
            if stage.module is not None:
                for one, other in zip(stage.module.parameters(), module.parameters(), strict=True):
                    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)
    own = [(index, stage.module) for index, stage in enumerate(stages) if stage.module is not None]
    return [(index, [one.grad for one in module.parameters()]) for index, module in own]


ALONE = CHAIN
TURNED = in_turn(eager_one_f_one_b(4, MICROBATCHES, edges=SKIPS), Costs.uniform(4, 1, 1, 1, 1), trials=10)
UNEQUAL, EQUAL = (3, 3, 3, 1), (3, 3, 3, 3)


@pytest.mark.parametrize("rows", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(
    ("schedule", "queues"),
    [
        (gpipe(4, MICROBATCHES, edges=SKIPS), Queues.PER_CHANNEL),
        (one_f_one_b(4, MICROBATCHES, edges=SKIPS), Queues.PER_CHANNEL),
        (zero_bubble(4, MICROBATCHES, edges=SKIPS), Queues.PER_CHANNEL),
        (interleaved_one_f_one_b(2, MICROBATCHES, edges=SKIPS), Queues.PER_CHANNEL),
        (TURNED, Queues.PER_DIRECTION),
    ],
    ids=["gpipe", "1F1B", "zero bubble", "interleaved", "turns"],
)
def test_skip_edges(ranks: Ranks, schedule: Schedule, queues: Queues, rows) -> None:
    meshes = ALONE if schedule.pipeline_ranks == 4 else ALONE[:2] * 2
    ranks.run(trained, schedule, meshes, queues, rows)


PAIRS = tuple(Mesh([rank, rank + 1], ("dp",)) for rank in (0, 2, 4, 6))
MIXED = (PAIRS[0], Mesh([2], ("x",)), PAIRS[2], Mesh([6, 7], ("dp",)))


@pytest.mark.parametrize("rows", [(6, 6, 6, 6), (6, 6, 6, 2)])
@pytest.mark.parametrize("meshes", [PAIRS, MIXED], ids=["pairs", "mixed"])
def test_several_ranks_a_stage(ranks: Ranks, meshes, rows) -> None:
    """Each has its part of the rows; their gradients add up to those of one process."""
    results = ranks.run(trained, zero_bubble(4, MICROBATCHES, edges=SKIPS), meshes, Queues.PER_CHANNEL, rows)
    _, _, modules = reference(batch(rows))
    for index, module in enumerate(modules):
        found = [gradients for one in results for stage, gradients in one if stage == index]
        for number, parameter in enumerate(module.parameters()):
            total = torch.stack([gradients[number] for gradients in found]).sum(0)
            torch.testing.assert_close(total, parameter.grad, rtol=1e-12, atol=1e-14)
