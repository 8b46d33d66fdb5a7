"""Pipelines train as the model does in one process: every loss and every gradient, whatever the schedule."""

import io
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from tests.pipeline import models
from tricomm import Mesh, Replicate, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Costs,
    Queues,
    eager_one_f_one_b,
    gpipe,
    in_turn,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble,
)
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.schedule.schedule import Schedule

MODELS = {"gpt": models.gpt, "u-transformer": models.u_transformer}
MICROBATCHES, BATCH = 4, 4
AXES = ("dp", "tp")
# Pipeline ranks of unequal meshes: tp=2 -> dp=2,tp=2 -> tp=1, and one more.
MESHES = {
    2: (Mesh([[0, 1]], AXES), Mesh([[2, 3], [4, 5]], AXES)),
    3: (Mesh([[0, 1]], AXES), Mesh([[2, 3], [4, 5]], AXES), Mesh([[6]], AXES)),
    4: (Mesh([[7]], AXES), Mesh([[0], [1]], AXES), Mesh([[4, 5], [2, 3]], AXES), Mesh([[6]], AXES)),
}


def batch_of(name: str, step: int, microbatches: int, length: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """The data of a step, cut into microbatches."""
    torch.manual_seed(1000 + step)
    size = microbatches * BATCH
    if name == "gpt":
        tokens = torch.randint(0, models.VOCABULARY, (size, length + 1))
        data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    else:
        image, noise = torch.randn(2, size, 2, models.LENGTH, dtype=torch.float64)
        data = {"image": image + noise, "noise": noise}
    return {key: value.chunk(microbatches) for key, value in data.items()}


def typed(data: dict[str, Sequence[torch.Tensor]], dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    return {key: [x.to(dtype) if x.is_floating_point() else x for x in value] for key, value in data.items()}


class Momentum:
    """Gradient descent with momentum. (That of torch.optim imports a compiler first, for seconds on each rank.)"""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.rate = 0.05 if name == "gpt" else 0.002
        self.speeds = {parameter: torch.zeros_like(parameter) for parameter in module.parameters()}

    def zero_grad(self) -> None:
        for parameter in self.speeds:
            parameter.grad = None

    def step(self) -> None:
        with torch.no_grad():
            for parameter, speed in self.speeds.items():
                speed.mul_(0.9).add_(parameter.grad)
                parameter.sub_(self.rate * speed)


Trace = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Per step, the loss and the gradients by name."""


@lru_cache
def packed_reference(*arguments) -> bytes:
    """Computed once, for all ranks. On one thread, as the ranks do: small products are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    torch.save(reference(*arguments), buffer)
    torch.set_num_threads(threads)
    return buffer.getvalue()


def reference(name: str, steps: int, microbatches: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> Trace:
    """THE DEFINITION: the model in one process, microbatch by microbatch."""
    model = MODELS[name]()
    module = models.Part(model, range(len(model.units)), models.ALONE, dtype)
    for unit, parameter in model.tied[1:]:
        first, first_name = model.tied[0]
        setattr(module.parts[str(unit)], parameter, getattr(module.parts[str(first)], first_name))
    optimizer = Momentum(name, module)
    trace = []
    for step in range(steps):
        optimizer.zero_grad()
        data = typed(batch_of(name, step, microbatches, lengths[step % len(lengths)]), dtype)
        total = torch.zeros((), dtype=dtype)
        for microbatch in range(microbatches):
            loss = module(*(data[key][microbatch] for key in module.inputs)) / microbatches
            loss.backward()
            total += loss.detach()
        named = module.named_parameters(remove_duplicate=False)
        trace.append((total, {key: parameter.grad.clone() for key, parameter in named}))
        optimizer.step()
    return trace


def error_of(found: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """The largest difference, relative to the largest element (or to ``least``, where all are about zero)."""
    assert bool(expected.isfinite().all()), "the reference diverged"
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), least)


def tied_of(model: models.Model, spans: list[range], meshes: Sequence[Mesh], dtype: torch.dtype) -> list[Tied]:
    """The embedding is whole on the first stage, and its words are divided over "tp" on the last."""
    parts = {}
    for unit, parameter in model.tied:
        stage = next(index for index, span in enumerate(spans) if unit in span)
        placements = (Replicate(), Shard(0) if unit else Replicate())
        spec = ShardingSpec(meshes[stage], placements, (models.VOCABULARY, models.WIDTH), dtype)
        parts[stage] = (f"parts.{unit}.{parameter}", spec)
    return [Tied(parts)] if parts else []


def train(
    rank: int,
    name: str,
    schedules: tuple[Schedule, ...],
    meshes: tuple[Mesh, ...],
    trace: bytes,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    queues: Queues,
) -> tuple[float, float]:
    """(largest relative error of a loss, of a gradient) on this rank; the steps take the schedules in turn."""
    changing, microbatches = len(lengths) > 1, schedules[0].microbatches
    model = models.gpt("sequence") if changing else MODELS[name]()
    stages, edges, spans = models.cut_into_stages(model, meshes, dtype)
    tied = tied_of(model, spans, meshes, dtype)
    options = {"queues": queues, "tied": tied, "timeout_seconds": 30}
    executors = [Executor(schedule, stages, edges, **options) for schedule in schedules]
    mine = [stage for stage in stages if stage.module is not None]
    line = models.lines(mine[0].mesh, "dp") if mine else models.ALONE
    optimizers = [Momentum(name, stage.module) for stage in mine]
    worst = [0.0, 0.0]
    for step, (loss, gradients) in enumerate(torch.load(io.BytesIO(trace))):
        length = lengths[step % len(lengths)]
        data = typed(batch_of(name, step, microbatches, length), dtype)
        data = {key: [line.cut(x, 0) for x in value] for key, value in data.items()}
        for optimizer in optimizers:
            optimizer.zero_grad()
        sizes = {"sequence": length} if changing and rank in meshes[0] else None
        found = executors[step % len(executors)].step(data, sizes=sizes)
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


def errors_of(
    ranks: Ranks,
    name: str,
    schedules: tuple[Schedule, ...],
    meshes: tuple[Mesh, ...],
    steps: int,
    dtype: torch.dtype = torch.float64,
    lengths: tuple[int, ...] = (models.CONTEXT,),
    queues: Queues = Queues.PER_CHANNEL,
) -> list[tuple[float, float]]:
    """Per rank, the largest errors of a training."""
    trace = packed_reference(name, steps, schedules[0].microbatches, dtype, lengths)
    return ranks.run(train, name, schedules, meshes, trace, dtype, lengths, queues)


def require_below(bound: float, errors: list[tuple[float, float]]) -> None:
    worst = max(error for pair in errors for error in pair)
    assert worst < bound, f"(loss, gradient) errors per rank: {errors}"


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
    # It takes microbatches in groups of one per pipeline rank.
    "interleaved": lambda stages, edges: interleaved_one_f_one_b(stages, 3 if stages == 3 else 4, edges=edges),
}


def turned(schedule: Schedule) -> Schedule:
    """With hops that take turns (``Queues.PER_DIRECTION``), in an order for hops that are slow."""
    return in_turn(schedule, Costs.uniform(schedule.stages, 1, 1, 1, 2), trials=30)


def case_of(name: str, pipeline_ranks: int, kind: str) -> tuple[Schedule, tuple[Mesh, ...]]:
    """The schedule, with the edges that the model has when it is cut, and the mesh of each stage."""
    meshes = MESHES[pipeline_ranks] * (2 if kind == "interleaved" else 1)
    model = MODELS[name]()
    names = [models.names_of(model, span) for span in models.spans_of(len(model.units), len(meshes))]
    edges = [
        (source, destination)
        for source, (_, outputs) in enumerate(names)
        for destination, (inputs, _) in enumerate(names)
        if set(outputs) & set(inputs)
    ]
    return SCHEDULES[kind](pipeline_ranks, edges), meshes


@pytest.mark.parametrize("pipeline_ranks", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_trains_as_one_process_does(ranks: Ranks, name: str, pipeline_ranks: int) -> None:
    """20 steps, of which each is run by another schedule; ``python -m tests.pipeline.matrix`` runs 20 by each."""
    cases = [case_of(name, pipeline_ranks, kind) for kind in SCHEDULES if kind != "interleaved"]
    schedules = tuple(schedule for schedule, _ in cases)
    require_below(1e-10, errors_of(ranks, name, schedules, cases[0][1], 20))


@pytest.mark.parametrize("pipeline_ranks", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_interleaved_stages_train_as_one_process_does(ranks: Ranks, name: str, pipeline_ranks: int) -> None:
    schedule, meshes = case_of(name, pipeline_ranks, "interleaved")
    require_below(1e-10, errors_of(ranks, name, (schedule,), meshes, 6))


@pytest.mark.parametrize("kind", ["eager 2 split", "interleaved"])
@pytest.mark.parametrize("name", MODELS)
def test_hops_that_take_turns_train_as_one_process_does(ranks: Ranks, name: str, kind: str) -> None:
    """Skips, several tensors an edge, meshes of several ranks, two stages a pipeline rank: all in one order."""
    schedule, meshes = case_of(name, 4, kind)
    errors = errors_of(ranks, name, (turned(schedule),), meshes, 6, queues=Queues.PER_DIRECTION)
    require_below(1e-10, errors)


def test_single_precision(ranks: Ranks) -> None:
    schedule, meshes = case_of("gpt", 3, "eager 1 split")
    require_below(1e-4, errors_of(ranks, "gpt", (schedule,), meshes, 6, torch.float32))


def test_the_length_of_sequences_changes_from_step_to_step(ranks: Ranks) -> None:
    """Only the first stage knows it; each of three lengths is agreed on once, and comes back."""
    schedule, meshes = case_of("gpt", 3, "eager 1")
    require_below(1e-10, errors_of(ranks, "gpt", (schedule,), meshes, 8, torch.float64, (16, 5, 9, 5)))
