"""Pipelines that are wired wrongly, fail in the middle, or use rules beside the common ones."""

import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import pipeline_models as models
from tricomm import Mesh, Partial, PlanError, Replicate, Shard, ShardingSpec, SpecError, TransportError, TricommError
from tricomm.launch import Ranks
from tricomm.pipeline import Edge, Schedule, eager_one_f_one_b, gpipe, one_f_one_b, receive_ring
from tricomm.pipeline.communication import with_communication
from tricomm.pipeline.edge import EdgeTensor
from tricomm.pipeline.executor import Executor
from tricomm.pipeline.stage import Stage, WithLoss
from tricomm.pipeline.tied import Tied
from tricomm.pipeline.wiring import check_wiring

WIDTH, BATCH, MICROBATCHES = 4, 6, 4
TIMEOUT_SECONDS = 8.0
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


class Faulty(nn.Module):
    """Raises when it is called for the third time, or when its gradient comes for the third time."""

    def __init__(self, in_backward: bool) -> None:
        super().__init__()
        self.layer, self.in_backward, self.calls = linear(1), in_backward, 0

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


def stage_that_raises(rank: int, victim: int, in_backward: bool, split: bool) -> tuple[str, str, float, str]:
    def make(index: int) -> nn.Module:
        return Faulty(in_backward) if index == victim else linear(index)

    stages, edges = chain(rank, make)
    schedule = eager_one_f_one_b(4, MICROBATCHES, depth=1, split=split)
    executor = Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    began = time.monotonic()
    kind, text = attempt(lambda: executor.step(data()))
    seconds = time.monotonic() - began
    again = attempt(lambda: executor.step(data()))[1]
    require_trained(rank)
    return kind, text, seconds, again


def attempt(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except (TricommError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "returned", ""


@pytest.mark.parametrize(
    ("victim", "in_backward", "split", "action"),
    [
        (0, False, False, "0F2"),
        (2, False, True, "2F2"),
        (0, True, False, "0B2"),
        (2, True, False, "2B2"),
        (0, True, True, "0W2"),  # a first stage has no input to give a gradient to
        (2, True, True, "2I1"),  # the hook runs in 2W0 too, as its tensor leads to a parameter
    ],
)
def test_a_stage_that_raises_is_named_by_all_others(ranks: Ranks, victim, in_backward, split, action) -> None:
    """At once by those that wait for it; in their next step by those that were done."""
    outcomes = ranks.run(stage_that_raises, victim, in_backward, split)
    blame = f"rank {victim} failed in {action}: RuntimeError: out of paper"
    for rank, (kind, text, seconds, again) in enumerate(outcomes[:4]):
        if rank == victim:
            assert (kind, text) == ("RuntimeError", "out of paper")
        elif kind == "returned":
            assert in_backward
            assert rank > victim
            assert blame in again
        else:
            assert kind == "TransportError"
            assert text == blame
            assert again == f"the executor failed in an earlier step; make a new one ({blame})"
        assert seconds < TIMEOUT_SECONDS / 2
    assert [kind for kind, *_ in outcomes[4:]] == ["returned"] * 4


def bad_data(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    given = data()
    if rank == 3:
        given["target"].pop()
    outcome = attempt(lambda: executor.step(given))
    require_trained(rank)
    return outcome


def test_missing_data_are_an_error_everywhere_before_anything_is_sent(ranks: Ranks) -> None:
    outcomes = ranks.run(bad_data)
    text = "input 'target' of stage 3 has 3 tensors in the step's data on rank 3, and the schedule has 4 microbatches"
    assert outcomes[3][0] == "SpecError"
    for kind, found in outcomes[:3]:
        assert kind == "TransportError"
        assert text in found


def different_schedules(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    schedule = gpipe(4, MICROBATCHES) if rank == 2 else one_f_one_b(4, MICROBATCHES)
    outcome = attempt(lambda: Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS))
    require_trained(rank)
    return outcome


def test_ranks_with_different_schedules_do_not_begin(ranks: Ranks) -> None:
    for kind, text in ranks.run(different_schedules)[:4]:
        assert kind == "TransportError"
        assert "rank 2 disagrees with rank 0 about schedule" in text


def refused_by_one(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    if rank == 1:
        stages[1] = replace(stages[1], module=None)
    outcome = attempt(lambda: Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS))
    require_trained(rank)
    return outcome


def test_a_rank_that_cannot_make_its_executor_tells_the_others(ranks: Ranks) -> None:
    outcomes = ranks.run(refused_by_one)
    text = "stage 1 has no module on a rank of its mesh (x=1: rank 1); pass module=..."
    assert outcomes[1] == ("SpecError", text)
    for rank in (0, 2, 3):
        assert outcomes[rank] == ("TransportError", f"rank 1 refused the call: SpecError: {text}")


def wrong_output(rank: int) -> tuple[str, str]:
    """A tensor that is not what its edge declares: the stage that gives it gets the error."""
    stages, edges = chain(rank, lambda index: nn.Linear(WIDTH, WIDTH + (index == 1)).double())
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    outcome = attempt(lambda: executor.step(data()))
    require_trained(rank)
    return outcome


def test_an_output_of_another_shape_is_refused(ranks: Ranks) -> None:
    outcomes = ranks.run(wrong_output)
    assert outcomes[1][0] == "SpecError"
    assert "the tensor of rank 1 has shape (6, 5), and its spec gives it (6, 4)" in outcomes[1][1]
    for rank in (0, 2, 3):
        assert outcomes[rank][0] == "TransportError"
        assert "the tensor of rank 1 has shape (6, 5)" in outcomes[rank][1]


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
    assert max(ranks.run(partial_gradient, ())) > 1e-3, "without saying so, one share is taken for the whole"


def relaid_inside(rank: int) -> None:
    """Two stages at one position with different layouts, and one with the same: no schedule sends, yet it is moved."""
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
        (schedule, stages, {(0, 1): edges[0, 1]}, "edges are given for 0-1, and the schedule has 0-1, 1-2, 2-3"),
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
            "rank 0 is on the meshes of positions 0 and 1; a rank follows one list of actions",
        ),
        (
            Schedule.parse(["0F0 0B0 1F0 1B0"]),
            [first, replace(stages[3], inputs=("x1", "target"))],
            {(0, 1): {"x1": EdgeTensor(layout(CHAIN[0]), layout(CHAIN[3]))}},
            "stages 0 and 1 are at position 0 of the schedule, on (x=1: rank 0) and (x=1: rank 3)",
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
        with pytest.raises((PlanError, TransportError), match="0B0 at position 0 comes before 0F0"):
            Executor(Schedule(lists), stages, edges, name="impossible", timeout_seconds=TIMEOUT_SECONDS)


def test_transport_errors_are_runtime_errors() -> None:
    assert issubclass(TransportError, RuntimeError)
