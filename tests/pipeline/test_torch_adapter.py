"""The adapter for torch.distributed.pipelining: gradients of a pipeline on unequal meshes are those of one process."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import pipelining

from tests.oracle import pick
from tricomm import Mesh, Partial, PlanError, Replicate, Shard, ShardingSpec, SpecError
from tricomm.launch import RankError, Ranks
from tricomm.pipeline import Costs, Queues, Schedule, eager_one_f_one_b, in_turn, one_f_one_b, torch_stage
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.torch_adapter import PlannedSchedule, ReshardStage, ScheduleEager1F1B, check_torch
from tricomm.pipeline.torch_stage import TORCH_RUNTIME

WIDTH = 8
ROWS = 6
MICROBATCHES = 8
TOLERANCE = 1e-12
"""Relative, in float64: sums in another order, and nothing else."""

ONE = (Replicate(),)
ROWS_CUT = (Shard(0),)
COLUMNS_CUT = (Shard(1),)


@dataclass(frozen=True)
class Place:
    """Where a stage is: its ranks, how its input lies on them, and how its output does."""

    ranks: tuple[int, ...]
    input: tuple[Any, ...]
    output: tuple[Any, ...]

    def spec(self, placements: tuple[Any, ...], dtype: str = "float64") -> ShardingSpec:
        return ShardingSpec(Mesh(self.ranks, ("axis",)), placements, (ROWS, WIDTH), dtype)


PIPELINES = {
    "2 -> 1": (Place((0, 1), ROWS_CUT, ROWS_CUT), Place((2,), ONE, ONE)),
    "2 sharded -> 2 replicated": (Place((0, 1), ROWS_CUT, ROWS_CUT), Place((2, 3), ONE, ONE)),
    "2 -> 3 -> 1": (Place((0, 1), ROWS_CUT, ROWS_CUT), Place((4, 3, 2), ROWS_CUT, ROWS_CUT), Place((5,), ONE, ONE)),
    # The second stage multiplies its columns by its rows of the weight, and its outputs are to be added.
    "1 -> 2 by columns -> 2 by rows": (
        Place((7,), ONE, ONE),
        Place((0, 1), COLUMNS_CUT, (Partial(),)),
        Place((2, 3), ROWS_CUT, ROWS_CUT),
    ),
}


class Layer(nn.Module):
    """One stage; ``columns`` are those of the input that this rank has."""

    def __init__(self, number: int, columns: slice = slice(None), tanh: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
        self.weight = nn.Parameter(weight[:, columns].clone())
        self.tanh = tanh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return torch.tanh(y) if self.tanh else y


def is_linear(place: Place) -> bool:
    return place.output == (Partial(),)


def microbatches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(MICROBATCHES)]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum()


def reference(places: tuple[Place, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """THE DEFINITION: the gradients of all layers and the output, in one process."""
    layers = [Layer(number, tanh=not is_linear(place)) for number, place in enumerate(places)]
    outputs = []
    for x, target in zip(microbatches(100), microbatches(200), strict=True):
        for layer in layers:
            x = layer(x)
        outputs.append(x.detach())
        loss_of(x, target).backward()
    return [layer.weight.grad for layer in layers], torch.cat(outputs)


def tensors(places: tuple[Place, ...], number: int) -> list[EdgeTensor]:
    before, after = places[number], places[number + 1]
    return [EdgeTensor(before.spec(before.output), after.spec(after.input))]


def make_stage(rank: int, places: tuple[Place, ...], number: int, **options: Any) -> ReshardStage:
    place = places[number]
    columns = slice(None)
    if place.input == COLUMNS_CUT:
        half = WIDTH // len(place.ranks)
        columns = slice(half * place.ranks.index(rank), half * (place.ranks.index(rank) + 1))
    return ReshardStage(
        Layer(number, columns, not is_linear(place)),
        number,
        len(places),
        arriving=tensors(places, number - 1) if number else (),
        leaving=tensors(places, number) if number < len(places) - 1 else (),
        **options,
    )


def on_rank(tensors: list[torch.Tensor], spec: ShardingSpec, rank: int) -> torch.Tensor:
    """A rank's part of each microbatch, one after the other: what it gives to ``step``."""
    return torch.cat([pick(tensor, spec, rank) for tensor in tensors])


def make_schedule(name: str, stages: list[ReshardStage]) -> Any:
    single = {"ScheduleGPipe", "Schedule1F1B"}
    if name == "in turn":
        count = stages[0].num_stages
        eager = eager_one_f_one_b(count, MICROBATCHES, depth=1, split=True, weight_delay=1)
        turned = in_turn(eager, Costs.uniform(count, 1, 1, 1, 2), trials=20)
        return PlannedSchedule(stages, turned, loss_of, queues=Queues.PER_DIRECTION, scale_grads=False)
    if name.startswith("eager"):
        _, depth, *split = name.split()
        return ScheduleEager1F1B(stages, MICROBATCHES, loss_of, depth=int(depth), split=bool(split), scale_grads=False)
    kind = getattr(pipelining, name)
    return kind(stages[0] if name in single else stages, MICROBATCHES, loss_of, scale_grads=False)


SCHEDULES = (
    "ScheduleGPipe",
    "Schedule1F1B",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "eager 0 split",
    "eager 1",
    "eager 1 split",
    "eager 2",
    "in turn",
)


def run_pipeline(rank: int, places: tuple[Place, ...], name: str, pipeline_ranks: int | None = None) -> Any:
    """Two training steps and an evaluation; this rank's gradients by stage, losses, and outputs of the last stage."""
    mine = [number for number, place in enumerate(places) if rank in place.ranks]
    if not mine:
        return None
    stages = [make_stage(rank, places, number, pipeline_ranks=pipeline_ranks) for number in mine]
    schedule = make_schedule(name, stages)
    first, last = places[0], places[-1]
    inputs = [on_rank(microbatches(100), first.spec(first.input), rank)] if 0 in mine else []
    is_last = len(places) - 1 in mine
    target = on_rank(microbatches(200), last.spec(last.output), rank) if is_last else None
    for _ in range(2):
        for stage in stages:
            stage.submod.zero_grad()
        losses: list[torch.Tensor] = []
        output = schedule.step(*inputs, target=target, losses=losses)
    with torch.no_grad():
        again = schedule.eval(*inputs, target=target)
    if is_last:
        assert torch.equal(output, again)
    gradients = {stage.stage_index: stage.submod.weight.grad for stage in stages}
    return gradients, output.detach() if is_last else None, [loss.detach() for loss in losses]


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def require_reference(found: list[Any], places: tuple[Place, ...], what: str) -> None:
    gradients, output = reference(places)
    for number, place in enumerate(places):
        parts = [found[rank][0][number] for rank in place.ranks]
        if place.input == COLUMNS_CUT:
            require_close(torch.cat(parts, 1), gradients[number], f"{what}, stage {number}")
        elif place.input == ROWS_CUT:
            require_close(torch.stack(parts).sum(0), gradients[number], f"{what}, stage {number}")
        else:
            for part in parts:
                require_close(part, gradients[number], f"{what}, stage {number}")
    last = places[-1]
    for rank in last.ranks:
        expected = on_rank(list(output.split(ROWS)), last.spec(last.output), rank)
        require_close(found[rank][1], expected, f"{what}, output")
        assert len(found[rank][2]) == MICROBATCHES


@pytest.mark.parametrize("meshes", PIPELINES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_one_process(ranks: Ranks, name: str, meshes: str) -> None:
    places = PIPELINES[meshes]
    require_reference(ranks.run(run_pipeline, places, name), places, f"{name}, {meshes}")


def test_two_stages_at_each_position(ranks: Ranks) -> None:
    left, right = Place((0, 1), ROWS_CUT, ROWS_CUT), Place((2,), ONE, ONE)
    places = (left, right, left, right)
    found = ranks.run(run_pipeline, places, "ScheduleInterleaved1F1B", 2)
    require_reference(found, places, "interleaved")


class WithMask(nn.Module):
    """Gives integers and a tensor that nobody uses, besides its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(0)
        self.unused = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(x), (x > 0).long(), self.unused * x


class UsesMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return self.layer(x * mask)


def run_mask(rank: int, name: str) -> Any:
    if rank > 2:
        return None
    left, right = PIPELINES["2 -> 1"]
    several = [
        EdgeTensor(left.spec(ROWS_CUT, dtype), right.spec(ONE, dtype), gradient)
        for dtype, gradient in (("float64", ()), ("int64", None), ("float64", ()))
    ]
    if rank < 2:
        stage = ReshardStage(WithMask(), 0, 2, leaving=several)
    else:
        stage = ReshardStage(UsesMask(), 1, 2, arriving=several)
    schedule = make_schedule(name, [stage])
    inputs = [on_rank(microbatches(100), left.spec(ROWS_CUT), rank)] if rank < 2 else []
    schedule.step(*inputs, target=torch.cat(microbatches(200)) if rank == 2 else None)
    unused = stage.submod.unused.grad if rank < 2 else None
    return stage.submod.layer.weight.grad, unused


# Before 2.13, torch's split backward asks autograd for the gradient of every input, also of integers, and fails.
SPLIT_TAKES_INTEGERS = torch.__version__ >= torch.torch_version.TorchVersion("2.13")


@pytest.mark.parametrize("name", ["Schedule1F1B", *(["eager 1 split"] if SPLIT_TAKES_INTEGERS else [])])
def test_integers_and_tensors_without_use_cross_too(ranks: Ranks, name: str) -> None:
    found = ranks.run(run_mask, name)
    first, second = WithMask(), UsesMask()
    for x, target in zip(microbatches(100), microbatches(200), strict=True):
        loss_of(second(*first(x)), target).backward()
    require_close(found[0][0] + found[1][0], first.layer.weight.grad, "stage 0")
    require_close(found[2][0], second.layer.weight.grad, "stage 1")
    assert found[0][1].item() == 0.0


# ---- the first step


def run_first(rank: int, places: tuple[Place, ...], name: str) -> Any:
    """As on a device that loads kernels: results, and for each step that was made whether anything was under way."""
    orders: list[bool] = []
    step = TORCH_RUNTIME.step

    def noted(schedule: Any, *args: Any, **kwargs: Any) -> Any:
        orders.append(all(stage.is_synchronous for stage in schedule._own_stages))
        return step(schedule, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedSchedule, "_loads_kernels", True)
        patch.setattr(TORCH_RUNTIME, "step", noted)
        found = run_pipeline(rank, places, name)
    return found, orders


@pytest.mark.parametrize("name", ["eager 1", "eager 1 split", "in turn"])
def test_the_first_step_hides_nothing_where_kernels_are_loaded(ranks: Ranks, name: str) -> None:
    places = PIPELINES["2 -> 1"]
    found = ranks.run(run_first, places, name)
    require_reference([one[0] for one in found], places, name)
    assert [orders for _, orders in found][:3] == [[True, False, True]] * 3, "a step, another one, an evaluation"


# ---- receives


def run_order(rank: int) -> list[str] | None:
    places = PIPELINES["2 -> 1"]
    number = 0 if rank < 2 else 1
    if rank > 2:
        return None
    schedule = ScheduleEager1F1B([make_stage(rank, places, number)], 4, loss_of, split=True)
    return [str(action) for action in schedule.pipeline_order_with_comms[number]]


def test_the_runtime_does_what_the_schedule_says(ranks: Ranks) -> None:
    found = ranks.run(run_order)
    expected = ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0F2", "0SEND_F2", "0I0", "0W0"]
    moved = [text for text in found[0] if "SHARD" not in text and "WAIT" not in text]
    assert moved[: len(expected)] == expected
    assert found[2].index("1RECV_F1") == found[2].index("1W0") - 1


# ---- torch


def test_this_torch_is_known() -> None:
    check_torch()


def test_a_torch_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_stage.USED_OF_STAGE, "get_fwd_send_ops", ("chunk",))
    monkeypatch.setitem(torch_stage.USED_OF_RUNTIME, "_run", ())
    with pytest.raises(SpecError) as caught:
        check_torch()
    assert str(caught.value) == (
        f"torch {torch.__version__} is not one that tricomm.pipeline.torch_adapter knows: "
        "PipelineStage.get_fwd_send_ops takes no chunk; _PipelineScheduleRuntime._run is missing; "
        "use torch 2.11 to 2.15, or run the pipeline with tricomm.pipeline's own executor, which needs none of this"
    )


# ---- errors


def run_wrong(rank: int, what: str) -> None:
    places = PIPELINES["2 -> 1"]
    one = tensors(places, 0)
    if what == "no leaving" and rank == 0:
        ReshardStage(nn.Identity(), 0, 2)
    if what == "other rank" and rank == 3:
        ReshardStage(nn.Identity(), 0, 2, leaving=one)
    if what == "both" and rank == 0:
        wide = Place((0, 2), ONE, ONE)
        ReshardStage(nn.Identity(), 0, 2, leaving=[EdgeTensor(places[0].spec(ROWS_CUT), wide.spec(ONE))])
    if what == "other stages" and rank == 2:
        PlannedSchedule([make_stage(rank, places, 1)], Schedule.parse(["0F0 0B0"]))
    if what == "deadlock" and rank == 2:
        crossed = Schedule.parse(["0F0 0F1 0SEND_F1 0SEND_F0 0B0 0B1", "1F0 1B0 1F1 1B1"])
        PlannedSchedule([make_stage(rank, places, 1)], crossed)
    if what == "queues" and rank == 2:
        PlannedSchedule([make_stage(rank, places, 1)], one_f_one_b(2, 4), queues=Queues.PER_PIPELINE_RANK)
    if what == "order" and rank == 2:
        turned = Schedule.parse(["0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1"])
        PlannedSchedule([make_stage(rank, places, 1)], turned)
    if what == "skip" and rank == 2:
        stage = ReshardStage(nn.Identity(), 2, 3, arriving=one)
        skip = Schedule.parse(["0F0 0B0", "1F0 1B0", "2F0 2B0"], edges=[(0, 1), (1, 2), (0, 2)])
        PlannedSchedule([stage], skip)


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("no leaving", SpecError, "leaving of stage 0 of 2 has 0 tensors and needs at least one tensor"),
        ("other rank", SpecError, "only the ranks of a stage's mesh make it"),
        ("both", SpecError, "give neighbouring stages ranks of their own"),
        ("other stages", PlanError, "the schedule has 1 stages and the pipeline 2"),
        ("deadlock", PlanError, "0B0 at pipeline rank 0 comes before 0RECV_B0, but what is received is an input"),
        ("queues", PlanError, "describes other systems; transfers of tricomm have queues PER_CHANNEL or PER_DIRECTION"),
        ("order", PlanError, "1F1 comes where microbatch 0 is due"),
        ("skip", PlanError, "edge 0-2 joins stages that are no neighbours"),
    ],
)
def test_errors_say_what_is_wrong(ranks: Ranks, what: str, error: type, text: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(run_wrong, what)
    assert error.__name__ in str(caught.value)
    assert text in str(caught.value)
