"""Linear layers in a row as a pipeline: the smallest thing that trains, for tests of what surrounds it."""

from collections.abc import Callable

import torch
from torch import nn

from tricomm import Mesh, Replicate, ShardingSpec, TricommError
from tricomm.pipeline import one_f_one_b
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.run.stage import Stage, WithLoss

WIDTH, BATCH, MICROBATCHES = 4, 6, 4
TIMEOUT_SECONDS = 20.0
SHAPE = (BATCH, WIDTH)
CHAIN = tuple(Mesh([rank], ("x",)) for rank in range(4))


def layout(mesh: Mesh, *placements, dtype: str = "float64") -> ShardingSpec:
    return ShardingSpec(mesh, placements or (Replicate(),) * mesh.ndim, SHAPE, dtype)


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, WIDTH).double()


def chain(rank: int, make: Callable[[int], nn.Module] = linear, meshes: tuple[Mesh, ...] = CHAIN):
    """(stages, edges): linear layers in a row, and the mean square of what comes out."""
    last = len(meshes) - 1
    stages = []
    for index, mesh in enumerate(meshes):
        module = make(index) if rank in mesh else None
        inputs = (f"x{index}",) if index else ("data",)
        if index < last:
            stages.append(Stage(mesh, inputs, (f"x{index + 1}",), module))
        else:
            module = None if module is None else WithLoss(module, nn.functional.mse_loss)
            stages.append(Stage(mesh, (*inputs, "target"), ("loss",), module, (Replicate(),) * mesh.ndim))
    edges = {
        (index, index + 1): {f"x{index + 1}": EdgeTensor(layout(meshes[index]), layout(meshes[index + 1]))}
        for index in range(last)
    }
    return stages, edges


def data() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(99)
    return {name: list(torch.randn(MICROBATCHES, *SHAPE, dtype=torch.float64)) for name in ("data", "target")}


def expected(make: Callable[[int], nn.Module] = linear, count: int = 4) -> list[nn.Module]:
    """The layers in one process, with their gradients."""
    layers = [make(index) for index in range(count)]
    net = nn.Sequential(*layers)
    for x, target in zip(*data().values(), strict=True):
        (nn.functional.mse_loss(net(x), target) / MICROBATCHES).backward()
    return layers


def require_trained(rank: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """A pipeline over the same ranks, under the same name, that works."""
    stages, edges = chain(rank)
    executor = Executor(one_f_one_b(4, MICROBATCHES), stages, edges, timeout_seconds=timeout_seconds)
    loss = executor.step(data())
    assert (loss is None) == (rank != 3)
    for stage, layer in zip(stages, expected(), strict=True):
        if stage.module is not None:
            for found, wanted in zip(stage.module.parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)


def attempt(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except (TricommError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "returned", ""


class Faulty(nn.Module):
    """Raises when it is called for the third time, or when its gradient comes for the third time."""

    def __init__(self, layer: nn.Module, in_backward: bool) -> None:
        super().__init__()
        self.layer, self.in_backward, self.calls = layer, in_backward, 0

    def count(self, *_: object) -> None:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of paper")

    def forward(self, x):
        y = self.layer(x)
        if self.in_backward:
            y.register_hook(self.count)
        else:
            self.count()
        return y
