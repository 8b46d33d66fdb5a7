"""A pipeline of two stages on two ranks that share the GPU, against the same model in one process."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.transport import ranks_of
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import EdgeTensor, Executor, Schedule, Stage, WithLoss, eager_one_f_one_b, one_f_one_b

MICROBATCHES, STEPS = 6, 2
LARGEST_ERROR = 1e-5
"""Relative to the largest element: the same kernels in the same order, but for the weight of a microbatch."""
SCHEDULES: dict[str, Schedule] = {
    "1F1B": one_f_one_b(2, MICROBATCHES),
    "eager 1F1B": eager_one_f_one_b(2, MICROBATCHES, depth=1),
}


def two_stages(setting: Setting) -> Iterator[Outcome]:
    """The part "pipeline"."""
    with ranks_of(setting, 2) as ranks:
        for name, schedule in SCHEDULES.items():
            outcome = guarded(name, partial(trained, ranks, name, schedule, setting))
            yield outcome
            if not outcome.passed:
                return  # a rank may have been left in the middle


def trained(ranks: Ranks, name: str, schedule: Schedule, setting: Setting) -> str:
    """Train on the ranks; the largest error of any of them."""
    found = ranks.run(errors_of, name, schedule, setting)
    worst = max(found)
    if worst > LARGEST_ERROR:
        raise ValueError(f"relative errors of losses and gradients are {found} on ranks 0 and 1")
    return f"{STEPS} steps of {MICROBATCHES} microbatches as in one process; largest relative error {worst:.1e}"


def _half(index: int, width: int, device: str) -> nn.Module:
    torch.manual_seed(index)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to(device)


def errors_of(rank: int, name: str, schedule: Schedule, setting: Setting) -> float:
    """The largest relative error of a loss or a gradient on this rank; runs on both."""
    batch, width, device = 32, setting.scaled(1024, 32), setting.device
    halves = [_half(index, width, device) for index in range(2)]
    meshes = [Mesh([index], ("x",)) for index in range(2)]
    layouts = [ShardingSpec(mesh, (Replicate(),), (batch, width), "float32") for mesh in meshes]
    last = WithLoss(_half(1, width, device), nn.functional.mse_loss)
    stages = [
        Stage(meshes[0], ("data",), ("hidden",), _half(0, width, device) if rank == 0 else None),
        Stage(meshes[1], ("hidden", "target"), ("loss",), last if rank == 1 else None, (Replicate(),)),
    ]
    edges = {(0, 1): {"hidden": EdgeTensor(layouts[0], layouts[1])}}
    worst = 0.0
    timeout_seconds = 0.5 * setting.seconds
    with Executor(schedule, stages, edges, name=name, device=device, timeout_seconds=timeout_seconds) as executor:
        module = stages[rank].module
        assert module is not None
        mine = module.module if isinstance(module, WithLoss) else module
        for step in range(STEPS):
            torch.manual_seed(100 + step)
            data, target = torch.randn(2, MICROBATCHES, batch, width).to(device)
            loss = executor.step({"data": list(data), "target": list(target)})
            expected = torch.zeros((), device=device)
            for x, y in zip(data, target, strict=True):
                part = nn.functional.mse_loss(halves[1](halves[0](x)), y) / MICROBATCHES
                part.backward()  # type: ignore[no-untyped-call]
                expected += part.detach()
            pairs = [(p.grad, q.grad) for p, q in zip(mine.parameters(), halves[rank].parameters(), strict=True)]
            pairs += [] if loss is None else [(loss, expected)]
            worst = max(worst, *(relative_error(*pair) for pair in pairs))
    return worst


def relative_error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest difference by the largest element; infinite if one is not finite, or there is nothing."""
    if found is None or expected is None:
        return math.inf
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf
