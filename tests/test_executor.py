"""Pipelines train as the model does in one process: every loss and every gradient, whatever the schedule."""

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from tests import pipeline_models as models
from tricomm import Mesh, Replicate, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import eager_one_f_one_b, gpipe, interleaved_one_f_one_b, one_f_one_b, zero_bubble
from tricomm.pipeline.executor import Executor
from tricomm.pipeline.schedule import Schedule
from tricomm.pipeline.tied import Tied

MODELS = {"gpt": models.gpt, "u-transformer": models.u_transformer}
MICROBATCHES, BATCH = 4, 4
AXES = ("dp", "tp")
# Positions of unequal meshes: tp=2 -> dp=2,tp=2 -> tp=1, and one more.
MESHES = {
    2: (Mesh([[0, 1]], AXES), Mesh([[2, 3], [4, 5]], AXES)),
    3: (Mesh([[0, 1]], AXES), Mesh([[2, 3], [4, 5]], AXES), Mesh([[6]], AXES)),
    4: (Mesh([[7]], AXES), Mesh([[0], [1]], AXES), Mesh([[4, 5], [2, 3]], AXES), Mesh([[6]], AXES)),
}


def batch_of(name: str, step: int, length: int = models.CONTEXT) -> dict[str, tuple[torch.Tensor, ...]]:
    """The data of a step, cut into microbatches."""
    torch.manual_seed(1000 + step)
    size = MICROBATCHES * BATCH
    if name == "gpt":
        tokens = torch.randint(0, models.VOCABULARY, (size, length + 1))
        data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    else:
        image, noise = torch.randn(2, size, 2, models.LENGTH, dtype=torch.float64)
        data = {"image": image + noise, "noise": noise}
    return {key: value.chunk(MICROBATCHES) for key, value in data.items()}


def typed(data: dict[str, Sequence[torch.Tensor]], dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    return {key: [x.to(dtype) if x.is_floating_point() else x for x in value] for key, value in data.items()}


def optimizer_of(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


Trace = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Per step, the loss and the gradients by name."""


@lru_cache
def reference(name: str, steps: int, dtype: torch.dtype, lengths: tuple[int, ...] = (models.CONTEXT,)) -> Trace:
    """THE DEFINITION: the model in one process, microbatch by microbatch."""
    model = MODELS[name]()
    module = models.Part(model, range(len(model.units)), models.ALONE, dtype)
    for unit, parameter in model.tied[1:]:
        first, first_name = model.tied[0]
        setattr(module.parts[str(unit)], parameter, getattr(module.parts[str(first)], first_name))
    optimizer = optimizer_of(module)
    trace = []
    for step in range(steps):
        optimizer.zero_grad()
        data = typed(batch_of(name, step, lengths[step % len(lengths)]), dtype)
        total = torch.zeros((), dtype=dtype)
        for microbatch in range(MICROBATCHES):
            loss = module(*(data[key][microbatch] for key in module.inputs)) / MICROBATCHES
            loss.backward()
            total += loss.detach()
        named = module.named_parameters(remove_duplicate=False)
        trace.append((total, {key: parameter.grad.clone() for key, parameter in named}))
        optimizer.step()
    return trace


def error_of(found: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """The largest difference, relative to the largest element (or to ``least``, where all are about zero)."""
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), least)


def train(
    rank: int,
    name: str,
    schedule: Schedule,
    meshes: tuple[Mesh, ...],
    steps: int,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (models.CONTEXT,),
) -> tuple[float, float]:
    """(largest relative error of a loss, of a gradient) on this rank."""
    model = MODELS[name]() if len(lengths) == 1 else models.gpt("sequence")
    stages, edges, spans = models.cut_into_stages(model, meshes, dtype)
    tied = []
    if model.tied:
        parts = {}
        for unit, parameter in model.tied:
            stage = next(index for index, span in enumerate(spans) if unit in span)
            cut = Shard(0) if unit else Replicate()
            spec = ShardingSpec(meshes[stage], (Replicate(), cut), (models.VOCABULARY, models.WIDTH), dtype)
            parts[stage] = (f"parts.{unit}.{parameter}", spec)
        tied = [Tied(parts)]
    executor = Executor(schedule, stages, edges, tied=tied, timeout_seconds=30)
    mine = [stage for stage in stages if stage.module is not None]
    optimizers = [optimizer_of(stage.module) for stage in mine]
    worst = [0.0, 0.0]
    for step, (loss, gradients) in enumerate(reference(name, steps, dtype, lengths)):
        length = lengths[step % len(lengths)]
        data = typed(batch_of(name, step, length), dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if mine:
            line = models.lines(mine[0].mesh, "dp")
            data = {key: [line.cut(x, 0) for x in value] for key, value in data.items()}
        sizes = {"sequence": length} if len(lengths) > 1 and rank in meshes[0] else None
        found = executor.step(data, sizes=sizes)
        if found is not None:
            found = found / line.size
            if line.size > 1:
                torch.distributed.all_reduce(found, group=line.group)
            worst[0] = max(worst[0], error_of(found, loss, 0.0))
        least = 1e-3 * max(float(one.abs().max()) for one in gradients.values())
        for stage in mine:
            expected = stage.module.expected(gradients)
            for key, parameter in stage.module.named_parameters():
                worst[1] = max(worst[1], error_of(parameter.grad, expected[key], least))
        for optimizer in optimizers:
            optimizer.step()
    return worst[0], worst[1]


SCHEDULES = {
    "gpipe": lambda stages, edges: gpipe(stages, MICROBATCHES, edges=edges),
    "gpipe split": lambda stages, edges: gpipe(stages, MICROBATCHES, split=True, weight_delay=1, edges=edges),
    "1f1b": lambda stages, edges: one_f_one_b(stages, MICROBATCHES, edges=edges),
    "1f1b split": lambda stages, edges: one_f_one_b(stages, MICROBATCHES, split=True, edges=edges),
    "eager 1": lambda stages, edges: eager_one_f_one_b(stages, MICROBATCHES, depth=1, edges=edges),
    "eager 1 split": lambda stages, edges: eager_one_f_one_b(
        stages, MICROBATCHES, depth=1, split=True, weight_delay=1, edges=edges
    ),
    "eager 2": lambda stages, edges: eager_one_f_one_b(stages, MICROBATCHES, depth=2, edges=edges),
    "eager 2 split": lambda stages, edges: eager_one_f_one_b(stages, MICROBATCHES, depth=2, split=True, edges=edges),
    "zero bubble": lambda stages, edges: zero_bubble(stages, MICROBATCHES, edges=edges),
    "zero bubble 2": lambda stages, edges: zero_bubble(stages, MICROBATCHES, depth=1, edges=edges),
    "interleaved": lambda stages, edges: interleaved_one_f_one_b(stages, MICROBATCHES, edges=edges),
}


def case_of(name: str, positions: int, kind: str) -> tuple[Schedule, tuple[Mesh, ...]]:
    """The schedule, with the edges that the model has when it is cut, and the mesh of each stage."""
    meshes = MESHES[positions] * (2 if kind == "interleaved" else 1)
    model = MODELS[name]()
    names = [models.names_of(model, span) for span in models.spans_of(len(model.units), len(meshes))]
    edges = [
        (source, destination)
        for source, (_, outputs) in enumerate(names)
        for destination, (inputs, _) in enumerate(names)
        if set(outputs) & set(inputs)
    ]
    return SCHEDULES[kind](positions, edges), meshes


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("positions", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_trains_as_one_process_does(ranks: Ranks, name: str, positions: int, kind: str) -> None:
    schedule, meshes = case_of(name, positions, kind)
    for loss, gradient in ranks.run(train, name, schedule, meshes, 20, torch.float64):
        assert loss < 1e-10
        assert gradient < 1e-10
