"""What pipelines may look like: gradient rules, layouts inside of a pipeline rank, receive buffers, what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from tests.pipeline import models
from tests.pipeline.chain import (
    BATCH,
    CHAIN,
    MICROBATCHES,
    TIMEOUT_SECONDS,
    WIDTH,
    attempt,
    chain,
    data,
    expected,
    layout,
    linear,
    require_trained,
)
from tricomm import Mesh, Partial, PlanError, Replicate, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.pipeline import Edge, Kind, Schedule, eager_one_f_one_b, gpipe, one_f_one_b, receive_ring
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.run.replicas import ReplicaCheck
from tricomm.pipeline.run.stage import Stage, StageRun
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.run.wiring import check_wiring
from tricomm.pipeline.schedule.communication import with_communication

# ---- rules beside the common ones

PAIR = (Mesh([0], ("x",)), Mesh([1, 2], ("tp",)))


class Columns(nn.Module):
    """Each rank has some columns of the input's features; nobody sums the gradients of the input."""

    def __init__(self, full: nn.Linear, line: models.Line) -> None:
        super().__init__()
        self.line, self.weight = line, nn.Parameter(line.cut(full.weight.detach(), 0))
        self.after = nn.Parameter(line.cut(full.weight.detach(), 1))

    def forward(self, x):
        return models.over(models.Leave, (x @ self.weight.T).exp() @ self.after.T, self.line)


def partial_gradient(rank: int, gradient: tuple) -> float:
    """How far the first stage's gradient is from the right one."""
    line = models.lines(PAIR[1], "tp")
    stages, edges = chain(rank, lambda index: Columns(linear(1), line) if index else linear(0), PAIR)
    edges[0, 1]["x1"] = replace(edges[0, 1]["x1"], gradient=gradient)
    Executor(one_f_one_b(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS).step(data())
    layers = expected(lambda index: Columns(linear(1), models.ALONE) if index else linear(0), 2)
    if rank != 0:
        return 0.0
    assert stages[0].module is not None
    return float((stages[0].module.weight.grad - layers[0].weight.grad).abs().max())


def test_a_consumer_that_computes_shares_of_the_gradient_says_so(ranks: Ranks) -> None:
    assert max(ranks.run(partial_gradient, (Partial(),))) < 1e-12


def undeclared_share(rank: int) -> tuple[str, str]:
    outcome = attempt(lambda: partial_gradient(rank, ()))
    require_trained(rank)
    return outcome


def test_shares_that_are_not_declared_are_found_in_the_first_step(ranks: Ranks) -> None:
    """Rank 2 compares with rank 1; rank 0 may be done by then, with a gradient that is wrong."""
    outcomes = ranks.run(undeclared_share)
    kind, text = outcomes[2]
    assert kind == "SpecError"
    assert (
        "ranks 1 and 2 hold the same elements of the gradient of input 'x1' of stage 1, and computed different" in text
    )
    assert "if each computes a share" in text


def relaid_inside(rank: int) -> None:
    """Stages at one pipeline rank with different layouts, and one with the same: no schedule sends, yet it is moved."""
    mesh, other = Mesh([0, 1], ("x",)), Mesh([1, 0], ("x",))
    stages, edges = chain(rank, linear, (mesh, mesh, other))
    for index, stage in enumerate(stages):
        loss = (Partial("avg"),) if index == 2 else None
        stages[index] = replace(stage, loss=loss, after_backward=lambda module: models.sum_over_dp(module, line))
    line = models.lines(mesh, "x")
    rows, reverse = layout(mesh, Shard(0)), layout(other, Shard(0))
    edges[0, 1]["x1"] = EdgeTensor(rows, rows)
    edges[1, 2]["x2"] = EdgeTensor(rows, reverse)
    schedule = Schedule.parse(["0F0 1F0 2F0 2B0 1B0 0B0 0F1 1F1 0F2 1F2 2F1 2F2 2B2 2B1 1B1 1I2 0I2 1W2 0B1 0W2"])
    executor = Executor(schedule, stages, edges, loss_scale=1 / MICROBATCHES, timeout_seconds=TIMEOUT_SECONDS)
    given = {"data": [line.cut(x, 0) for x in data()["data"][:3]]}
    given["target"] = [models.Line(1 - line.index, 2).cut(x, 0) for x in data()["target"][:3]]
    executor.step(given)
    net = [linear(index) for index in range(3)]
    for x, target in zip(data()["data"][:3], data()["target"][:3], strict=True):
        (nn.functional.mse_loss(nn.Sequential(*net)(x), target) / MICROBATCHES).backward()
    for stage, layer in zip(stages, net, strict=True):
        if stage.module is not None:
            for found, wanted in zip(stage.module.parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)


def test_stages_of_one_position_may_have_different_layouts(ranks: Ranks) -> None:
    ranks.run(relaid_inside)


def buffers(rank: int, schedule: Schedule) -> int:
    stages, edges = chain(rank)
    executor = Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    executor.step(data())
    executor.step(data())
    return executor.ring_nbytes


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_receive_buffers_are_as_many_as_the_check_says(ranks: Ranks, depth: int) -> None:
    schedule = with_communication(eager_one_f_one_b(4, MICROBATCHES, depth=depth, split=True, weight_delay=1))
    found = ranks.run(buffers, schedule)
    for rank in range(4):
        channels = [channel for channel in schedule.channels if channel.receiver == rank]
        rings = sum(receive_ring(schedule, channel) for channel in channels)
        assert found[rank] == rings * BATCH * WIDTH * 8
    assert found[4:] == [0] * 4


def test_wiring_is_checked_by_its_text() -> None:
    stages, edges = chain(-1)
    schedule = gpipe(4, 2)
    check_wiring(schedule, stages, edges)
    tensor = edges[0, 1]["x1"]
    first = stages[0]
    wrong = [
        (gpipe(3, 2), stages, edges, "4 stages for a schedule of 3; give one Stage for each"),
        (
            schedule,
            stages,
            {(0, 1): edges[0, 1]},
            "edges are given for 0-1, and the schedule has 0-1, 1-2, 2-3; say what crosses 1-2, 2-3, or pass",
        ),
        (schedule, stages, {**edges, (0, 1): {}}, "edge 0-1 carries nothing; name its tensors or drop the edge"),
        (schedule, stages, {**edges, (0, 1): {"y": tensor}}, "an edge carries 'y', and stage 0 has outputs=('x1',)"),
        (schedule, stages, {**edges, (0, 1): edges[1, 2]}, "an edge carries 'x2', and stage 0 has outputs=('x1',)"),
        (
            schedule,
            stages,
            {**edges, (0, 1): {"x1": EdgeTensor(tensor.source, layout(CHAIN[2]))}},
            "tensor 'x1' among the inputs of stage 1 is laid out on ranks 2, and the stage is on (x=1: rank 1)",
        ),
        (
            schedule,
            [first, replace(stages[1], mesh=CHAIN[0]), *stages[2:]],
            edges,
            "rank 0 is on the meshes of pipeline ranks 0 and 1; a rank follows one list of actions",
        ),
        (
            Schedule.parse(["0F0 0B0 1F0 1B0"]),
            [first, replace(stages[3], inputs=("x1", "target"))],
            {(0, 1): {"x1": EdgeTensor(layout(CHAIN[0]), layout(CHAIN[3]))}},
            "stages 0 and 1 are at pipeline rank 0 of the schedule, on (x=1: rank 0) and (x=1: rank 3)",
        ),
        (
            schedule,
            [*stages[:3], replace(stages[3], outputs=("y",), loss=None)],
            edges,
            "stage 3 has no loss and no edge out of it",
        ),
        (
            gpipe(4, 2, edges=[*edges, (0, 2)]),
            [replace(first, outputs=("x1", "x2")), *stages[1:]],
            {**edges, (0, 2): {"x2": EdgeTensor(tensor.source, layout(CHAIN[2]))}},
            "input 'x2' of stage 2 comes from the stages [0, 1]; an input has one origin",
        ),
    ]
    for schedule, stages, edges, text in wrong:
        with pytest.raises(SpecError, match=re.escape(text)):
            check_wiring(schedule, stages, edges)


def test_stages_and_tied_parameters_are_checked_by_their_text() -> None:
    mesh = CHAIN[0]
    with pytest.raises(SpecError, match=r"inputs='x' of a stage must be a tuple of distinct names; write"):
        Stage(mesh, "x", ("y",))
    with pytest.raises(SpecError, match=r"outputs=\('y', 'y'\) of a stage must be a tuple of distinct names"):
        Stage(mesh, ("x",), ("y", "y"))
    with pytest.raises(SpecError, match="is not clear about its loss; name an output 'loss' and give its placements"):
        Stage(mesh, ("x",), ("loss",))
    with pytest.raises(SpecError, match="2 placements"):
        Stage(mesh, ("x",), ("loss",), None, (Replicate(), Replicate()))
    spec = layout(mesh)
    with pytest.raises(SpecError, match="is of one stage; name each stage that holds a copy"):
        Tied({0: ("weight", spec)})
    with pytest.raises(SpecError, match="are different tensors; give one shape and dtype"):
        Tied({0: ("weight", spec), 1: ("weight", layout(mesh, dtype="float32"))})
    shares = layout(Mesh([0, 1], ("x",)), Partial())
    with pytest.raises(SpecError, match=r"is Partial; sum its gradient in after_backward and say Replicate\(\)"):
        Tied({0: ("weight", shares), 1: ("weight", spec)})


def test_a_schedule_that_cannot_run_is_refused(ranks: Ranks) -> None:
    ranks.run(impossible)


def impossible(rank: int) -> None:
    stages, edges = chain(rank, linear, CHAIN[:2])
    schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1B0"], [Edge(0, 1)])
    Executor(schedule, stages, edges, name="possible", timeout_seconds=TIMEOUT_SECONDS)
    lists = (schedule.lists[0][2:] + schedule.lists[0][:2], schedule.lists[1])
    if rank in (0, 1):
        with pytest.raises((PlanError, TransportError), match="0B0 at pipeline rank 0 comes before 0F0"):
            Executor(Schedule(lists), stages, edges, name="impossible", timeout_seconds=TIMEOUT_SECONDS)


class Returns(nn.Module):
    """Something else than its stage says."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize(
    ("outputs", "value", "text"),
    [
        (("y",), (torch.zeros(1), torch.zeros(1)), "returned (Tensor, Tensor), and its outputs are ('y',)"),
        (("y", "z"), torch.zeros(1), "returned (Tensor), and its outputs are ('y', 'z')"),
        (("y",), None, "returned (NoneType), and its outputs are ('y',); return a tensor, or a tuple with one tensor"),
        (("loss",), torch.zeros(2), "the loss of stage 3 has shape (2,); it must be a scalar: take its mean"),
    ],
)
def test_what_a_module_returns_is_checked(outputs, value, text) -> None:
    stage = Stage(CHAIN[0], ("x",), outputs, Returns(value), (Replicate(),) if "loss" in outputs else None)
    with pytest.raises(SpecError, match=re.escape(text)):
        StageRun(3, stage, (), ()).forward(0, {"x": torch.zeros(1)})


@pytest.mark.parametrize("kind", [Kind.BACKWARD, Kind.INPUT_GRADIENT])
def test_what_a_stage_passes_on_is_not_its_receive_buffer(kind: Kind) -> None:
    """Else the next microbatch might fill the buffer while it is still being sent on."""
    run = StageRun(1, Stage(CHAIN[1], ("x",), ("y",), nn.Flatten(0)), ("x",), ("y",))
    buffer = torch.arange(6.0).reshape(2, 3)
    gradient = torch.arange(6.0)
    sent = run.forward(0, {"x": buffer})["y"]
    back = run.backward(kind, 0, {"y": [gradient]})["x"]
    buffer.zero_()
    gradient.zero_()
    assert sent.tolist() == [0, 1, 2, 3, 4, 5]
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]]


# ---- whether ranks that are said to compute equal gradients do


def compared(first: torch.Tensor, second: torch.Tensor) -> str:
    """What the second of two ranks says that hold the same elements."""
    store, spec = HashStore(), ShardingSpec(Mesh([0, 1], ("tp",)), (Replicate(),), tuple(first.shape), "float32")
    checks = [ReplicaCheck(store, rank, "test", 1.0) for rank in (0, 1)]
    for check, gradient in zip(checks, (first, second), strict=True):
        check.record_gradient("x", spec, gradient)
    return attempt(checks[1].compare)[1]


@pytest.mark.parametrize("numel", [16, 256, 1 << 14])
def test_gradients_that_differ_are_found_though_their_sums_agree(numel: int) -> None:
    torch.manual_seed(numel)
    for _ in range(5):
        first, second = torch.randn(2, numel)
        second += (first.sum() - second.sum()) / numel
        assert "computed different ones" in compared(first, second)
        assert compared(first, first + 1e-2 * first.abs() * torch.randn(numel)) == "", "rounding is no difference"
    assert compared(torch.zeros(numel), torch.zeros(numel)) == ""
