"""What nobody makes use of has no gradient, as in one process: not one of zeros, which an optimiser would act on."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.pipeline.chain import CHAIN, MICROBATCHES, TIMEOUT_SECONDS, WIDTH, attempt, data, layout, linear
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import (
    EdgeTensor,
    Executor,
    Schedule,
    Stage,
    Tied,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble,
)


class First(nn.Module):
    """A hidden tensor, and one beside it with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.side = linear(0), linear(1)

    def forward(self, x):
        return self.layer(x), self.side(x)


class Middle(nn.Module):
    """Passes on what stands beside through weights that nothing else uses."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer, self.side = linear(2 * index), linear(2 * index + 1)

    def forward(self, h, side):
        return self.layer(h), self.side(side)


class Last(nn.Module):
    """Uses what stands beside in some of the microbatches of some of the steps."""

    def __init__(self, uses: tuple[str, ...]) -> None:
        super().__init__()
        self.layer, self.uses, self.calls = linear(9), uses, 0

    def forward(self, h, side, target):
        step, microbatch = divmod(self.calls, MICROBATCHES)
        self.calls += 1
        y = self.layer(h)
        if self.uses[step] == "all" or (self.uses[step] == "third" and microbatch == 2):
            y = y + side
        return nn.functional.mse_loss(y, target)


def net(uses: tuple[str, ...], count: int) -> list[nn.Module]:
    return [First(), *(Middle(index) for index in range(1, count - 1)), Last(uses)]


def pipeline(rank: int, uses: tuple[str, ...], meshes) -> tuple[list[Stage], dict]:
    modules = net(uses, len(meshes))
    last = len(meshes) - 1
    stages = []
    for index, (mesh, module) in enumerate(zip(meshes, modules, strict=True)):
        inputs = (f"h{index}", f"s{index}") if index else ("data",)
        outputs = (f"h{index + 1}", f"s{index + 1}")
        here = module if rank in mesh else None
        if index == last:
            stages.append(Stage(mesh, (*inputs, "target"), ("loss",), here, (Replicate(),)))
        else:
            stages.append(Stage(mesh, inputs, outputs, here))
    edges = {
        (index, index + 1): {
            f"{name}{index + 1}": EdgeTensor(layout(meshes[index]), layout(meshes[index + 1])) for name in "hs"
        }
        for index in range(last)
    }
    return stages, edges


def require_same(found: nn.Module, wanted: nn.Module) -> None:
    for (name, one), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


def steps(rank: int, schedule: Schedule, uses: tuple[str, ...], zeroes: bool) -> None:
    """As many steps as are named, each beside the same in one process."""
    meshes = CHAIN if schedule.pipeline_ranks == 4 else CHAIN[:2] * (schedule.stages // 2)
    stages, edges = pipeline(rank, uses, meshes)
    reference = net(uses, len(meshes))
    with Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for _ in uses:
            executor.step(data())
            for x, target in zip(*data().values(), strict=True):
                values = reference[0](x)
                for module in reference[1:-1]:
                    values = module(*values)
                (reference[-1](*values, target) / MICROBATCHES).backward()
            for stage, module in zip(stages, reference, strict=True):
                if stage.module is not None:
                    require_same(stage.module, module)
                for one in (stage.module, module) if zeroes else ():
                    if one is not None:
                        one.zero_grad()


@pytest.mark.parametrize(
    "schedule",
    [gpipe(4, MICROBATCHES), zero_bubble(4, MICROBATCHES), interleaved_one_f_one_b(2, MICROBATCHES)],
    ids=["gpipe", "zero bubble", "interleaved"],
)
def test_what_nobody_uses_has_no_gradient(ranks: Ranks, schedule: Schedule) -> None:
    ranks.run(steps, schedule, ("none", "none"), True)


@pytest.mark.parametrize("uses", [("none", "all", "none", "third"), ("third", "third"), ("all", "all")])
@pytest.mark.parametrize("zeroes", [True, False])
def test_what_is_used_now_and_then_has_its_gradient(ranks: Ranks, uses: tuple[str, ...], zeroes: bool) -> None:
    ranks.run(steps, one_f_one_b(4, MICROBATCHES), uses, zeroes)


class Recomputed(nn.Module):
    """Weights behind a function whose backward computes anew, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.side = linear(0), linear(1)

    def forward(self, x):
        return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True), self.side(x)


def recomputed(rank: int) -> None:
    stages, edges = pipeline(rank, ("none",), CHAIN[:2])
    if rank == 0:
        stages[0] = Stage(CHAIN[0], ("data",), ("h1", "s1"), Recomputed())
    with Executor(one_f_one_b(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        executor.step(data())
    if rank == 0:
        assert all(one.grad is not None and one.grad.any() for one in stages[0].module.layer.parameters())


def test_what_a_function_computes_in_its_backward_stays(ranks: Ranks) -> None:
    ranks.run(recomputed)


def used_on_one(rank: int) -> tuple[bool, bool] | None:
    """Two ranks compute the last stage, and only one of them uses what stands beside."""
    meshes = (CHAIN[0], Mesh([1, 2], ("dp",)))
    stages, edges = pipeline(rank, ("all" if rank == 2 else "none",), meshes)
    stages[1] = Stage(meshes[1], stages[1].inputs, ("loss",), stages[1].module, (Replicate(),))
    with Executor(one_f_one_b(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        executor._generation.check = None  # the two ranks compute different things on purpose
        executor.step(data())
    return (stages[0].module.side.weight.grad is not None) if rank == 0 else None


def test_one_rank_that_uses_it_is_enough(ranks: Ranks) -> None:
    assert ranks.run(used_on_one)[0] is True


def tied_unused(rank: int) -> bool | None:
    """A tied copy behind what nobody uses gets the gradient of the other copy only."""
    stages, edges = pipeline(rank, ("none",), CHAIN[:2])
    specs = [ShardingSpec(mesh, (Replicate(),), (WIDTH, WIDTH), "float64") for mesh in CHAIN[:2]]
    tied = Tied({0: ("side.weight", specs[0]), 1: ("layer.weight", specs[1])})
    with Executor(
        one_f_one_b(2, MICROBATCHES), stages, edges, tied=[tied], timeout_seconds=TIMEOUT_SECONDS
    ) as executor:
        executor.step(data())
    if rank == 0:
        return stages[0].module.side.weight.grad
    return stages[1].module.layer.weight.grad if rank == 1 else None


def test_tied_copies_of_which_one_is_unused(ranks: Ranks) -> None:
    first, second, *_ = ranks.run(tied_unused)
    assert torch.equal(first, second)


class FailsLast(nn.Module):
    """Raises in the last weight gradient, after all that others wait for was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Last(("none",))
        self.count = 0
        self.inner.layer.weight.register_hook(self.hook)

    def hook(self, _: object) -> None:
        self.count += 1
        if self.count == MICROBATCHES:
            raise RuntimeError("out of paper")

    def forward(self, *inputs):
        return self.inner(*inputs)


def fails_last(rank: int) -> tuple[str, str]:
    stages, edges = pipeline(rank, ("none",), CHAIN[:2])
    if rank == 1:
        stages[1] = Stage(CHAIN[1], stages[1].inputs, ("loss",), FailsLast(), (Replicate(),))
    schedule = gpipe(2, MICROBATCHES)
    split = Schedule.parse([" ".join(f"0F{i}" for i in range(4)) + " 0I0 0W0 0I1 0W1 0I2 0W2 0I3 0W3", SPLIT])
    assert split.microbatches == schedule.microbatches
    with Executor(split, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        return attempt(lambda: executor.step(data()))


SPLIT = " ".join(f"1F{i} 1I{i}" for i in range(4)) + " 1W0 1W1 1W2 1W3"


def test_a_failure_after_the_last_gradient_is_heard_of_at_once(ranks: Ranks) -> None:
    first, second, *_ = ranks.run(fails_last)
    assert second == ("RuntimeError", "out of paper")
    assert first[0] == "TransportError"
    assert "out of paper" in first[1]
