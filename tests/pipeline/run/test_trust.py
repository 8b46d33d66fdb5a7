"""Nothing trains wrong, or in silence: what an executor refuses, what it never writes to, and how it goes on."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.pipeline.chain import (
    BATCH,
    CHAIN,
    MICROBATCHES,
    TIMEOUT_SECONDS,
    WIDTH,
    Faulty,
    attempt,
    chain,
    data,
    expected,
    layout,
    linear,
    require_trained,
)
from tricomm import Mesh, Partial, PlanError, Replicate, ShardingSpec, SpecError
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Channel,
    Costs,
    EdgeTensor,
    Executor,
    Kind,
    Link,
    PerDirectionFifo,
    Stage,
    Tied,
    TransferCost,
    WithLoss,
    eager_one_f_one_b,
    in_turn,
    one_f_one_b,
)
from tricomm.pipeline.run.stage import StageRun

PAIR = CHAIN[:2]


def executor_of(stages, edges, schedule=None, **options) -> Executor:
    schedule = schedule or one_f_one_b(len(stages), MICROBATCHES)
    return Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS, **options)


def require_gradients(rank: int, stages: list[Stage], layers: list[nn.Module]) -> None:
    for stage, layer in zip(stages, layers, strict=True):
        if rank in stage.mesh:
            for found, wanted in zip(stage.module.parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)


def zero(stages: list[Stage]) -> None:
    for stage in stages:
        if stage.module is not None:
            stage.module.zero_grad()


# ---- arguments of a step


def wrong_call(rank: int, how: str) -> tuple[str, str]:
    """A step that some rank refuses, then one that is right, by the same executor."""
    stages, edges = chain(rank)
    with executor_of(stages, edges) as executor:
        given = data()
        if how == "a name":
            given = {"Data": given["data"], "target": given["target"]}
        elif how == "too few" and rank == 3:
            given["target"].pop()
        elif how == "no tensors" and rank == 0:
            given["data"] = [1.0] * MICROBATCHES
        with torch.no_grad() if how == "no_grad" else torch.inference_mode(how == "inference_mode"):
            outcome = attempt(lambda: executor.step(given))
        if rank < len(CHAIN):
            assert all(one.grad is None for stage in stages if stage.module for one in stage.module.parameters())
        executor.step(data())
        require_gradients(rank, stages, expected())
    return outcome


@pytest.mark.parametrize(
    ("how", "culprits", "text"),
    [
        ("a name", [0], "input 'data' of stage 0 is not in the step's data on rank 0, which names 'Data', 'target'"),
        ("too few", [3], "input 'target' of stage 3 has 3 elements (Tensor) in the step's data on rank 3"),
        ("no tensors", [0], "input 'data' of stage 0 has 4 elements (float) in the step's data on rank 0"),
        ("no_grad", [0, 1, 2, 3], "call executor.evaluate(data), or leave that block"),
        ("inference_mode", [0, 1, 2, 3], "call executor.evaluate(data), or leave that block"),
    ],
)
def test_a_refused_step_says_why_everywhere_and_the_next_one_works(ranks: Ranks, how, culprits, text) -> None:
    for rank, (kind, found) in enumerate(ranks.run(wrong_call, how)[:4]):
        assert kind == ("SpecError" if rank in culprits else "TransportError"), found
        assert text in found


# ---- what trains nothing, or something else than was meant


class Detached(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).detach()


def detached(rank: int, victim: int) -> tuple[str, str]:
    stages, edges = chain(rank, lambda index: Detached(linear(index)) if index == victim else linear(index))
    with executor_of(stages, edges) as executor:
        outcome = attempt(lambda: executor.step(data()))
    require_trained(rank)
    return outcome


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stage_that_would_train_nothing_is_refused_in_its_first_step(ranks: Ranks, victim: int) -> None:
    outcomes = ranks.run(detached, victim)
    text = f"what stage {victim} returns as ('x{victim + 1}',) does not require grad, so its parameters would not be"
    for rank, (kind, found) in enumerate(outcomes[:4]):
        assert kind == ("SpecError" if rank == victim else "TransportError")
        assert text in found


def frozen_first(rank: int) -> None:
    """Parameters that are frozen may give what does not require grad, and are left alone."""
    stages, edges = chain(rank, meshes=PAIR)
    if stages[0].module is not None:
        stages[0].module.requires_grad_(False)
    with executor_of(stages, edges) as executor:
        executor.step(data())
    if rank == 0:
        assert all(one.grad is None for one in stages[0].module.parameters())
    if rank == 1:
        require_gradients(rank, stages[1:], expected(count=2)[1:])


def test_a_frozen_stage_is_no_error_and_gets_no_gradient(ranks: Ranks) -> None:
    ranks.run(frozen_first)


TWO = (Mesh([0], ("x",)), Mesh([1, 2], ("dp",)))


def loss_of_parts(rank: int, placement: object) -> tuple[str, str]:
    """Each of two ranks has the loss of its own half of the batch."""
    stages, edges = chain(rank, meshes=TWO)
    stages[1] = replace(stages[1], loss=(placement,))
    given = data()
    if rank in TWO[1]:
        given["target"] = [one * rank for one in given["target"]]
    edge = edges[0, 1]["x1"]
    edges[0, 1]["x1"] = replace(edge, gradient=(Partial(),))
    with executor_of(stages, edges) as executor:
        return attempt(lambda: executor.step(given))


def test_a_loss_that_is_said_to_be_replicated_is_compared(ranks: Ranks) -> None:
    kind, text = ranks.run(loss_of_parts, Replicate())[2]
    assert kind == "SpecError"
    assert "ranks 1 and 2 hold the same elements of the loss of stage 1, and computed different ones" in text
    assert 'declare Stage(..., loss=(Partial("avg"),)) for that axis' in text
    assert {kind for kind, _ in ranks.run(loss_of_parts, Partial("avg"))[:3]} == {"returned"}


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_have_no_gradient(dtype: str) -> None:
    source, destination = layout(CHAIN[0], dtype=dtype), ShardingSpec(CHAIN[1], (Replicate(),))
    with pytest.raises(SpecError, match=f"an EdgeTensor of {dtype} cannot have a gradient.*gradient=None"):
        EdgeTensor(source, destination)
    with pytest.raises(SpecError, match=f"an EdgeTensor of {dtype} cannot have a gradient"):
        EdgeTensor(layout(CHAIN[0]), ShardingSpec(CHAIN[1], (Replicate(),), dtype=dtype))
    assert EdgeTensor(source, destination, gradient=None).gradient is None


# ---- stages that change their input in place


class Add(nn.Module):
    def forward(self, x):
        x += 1.0
        return x


@pytest.mark.parametrize("kind", [Kind.BACKWARD, Kind.INPUT_GRADIENT])
@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), Add(), nn.Identity()])
def test_a_stage_may_begin_with_an_operation_in_place(first: nn.Module, kind: Kind) -> None:
    torch.manual_seed(0)
    module, x, back = nn.Sequential(first, linear(1)), torch.randn(BATCH, WIDTH).double(), torch.randn(BATCH, WIDTH)
    entry = x.clone().requires_grad_()
    module(entry * 1).backward(back.double())
    wanted = [entry.grad, *(one.grad for one in module.parameters())]
    module.zero_grad()
    run = StageRun(1, Stage(CHAIN[1], ("x",), ("y",), module), ("x",), ("y",))
    run.begin([1.0])
    run.forward(0, {"x": x.clone()})
    found = [run.backward(kind, 0, {"y": [back.double()]})["x"]]
    if kind is Kind.INPUT_GRADIENT:
        run.weight_gradients(0)
    found += [one.grad for one in module.parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_change_in_place_that_would_spoil_a_backward_is_still_refused() -> None:
    """As in one process: the stage before keeps its output for its own backward."""
    first = StageRun(0, Stage(CHAIN[0], ("x",), ("h",), nn.Sequential(linear(0), nn.Sigmoid())), (), ("h",))
    second = StageRun(1, Stage(CHAIN[0], ("h",), ("y",), Add()), ("h",), ("y",))
    for run in (first, second):
        run.begin([1.0])
    second.forward(0, first.forward(0, {"x": torch.ones(BATCH, WIDTH).double()}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward(Kind.BACKWARD, 0, {"h": [torch.ones(BATCH, WIDTH).double()]})


# ---- tied parameters

WEIGHT = (WIDTH, WIDTH)


class Unused(nn.Module):
    """A linear layer beside a weight that the loss may not depend on."""

    def __init__(self, seed: int, used: bool) -> None:
        super().__init__()
        self.layer, self.used = linear(seed), used
        self.weight = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64))

    def forward(self, x):
        return self.layer(x @ self.weight if self.used else x)


def tied_pair(rank: int, uses: tuple[bool, bool], frozen: tuple[bool, bool], name: str = "weight"):
    """(outcome, gradient of this rank's copy)."""
    stages, edges = chain(rank, lambda index: Unused(index, uses[index]), PAIR)
    for index, stage in enumerate(stages):
        module = stage.module.module if isinstance(stage.module, WithLoss) else stage.module
        if module is not None:
            module.weight.requires_grad_(not frozen[index])
    specs = [ShardingSpec(mesh, (Replicate(),), WEIGHT, "float64") for mesh in PAIR]
    tied = Tied({0: (name, specs[0]), 1: ("module.weight", specs[1])})
    kind, text = attempt(lambda: executor_of(stages, edges, tied=[tied]).step(data()))
    if rank > 1:
        return kind, text, None
    module = stages[rank].module
    weight = module.module.weight if isinstance(module, WithLoss) else module.weight
    return kind, text, weight.grad


@pytest.mark.parametrize(
    ("uses", "frozen", "have"),
    [
        ((True, True), (False, False), (True, True)),
        ((True, False), (False, False), (True, True)),
        ((False, False), (False, False), (False, False)),
        ((True, True), (True, False), (False, True)),
        ((True, True), (True, True), (False, False)),
    ],
)
def test_tied_copies_that_are_frozen_or_unused_get_no_gradient(ranks: Ranks, uses, frozen, have) -> None:
    results = ranks.run(tied_pair, uses, frozen)[:2]
    gradients = [gradient for _, _, gradient in results]
    assert [kind for kind, *_ in results] == ["returned", "returned"]
    assert tuple(gradient is not None for gradient in gradients) == have
    if have == (True, True):
        assert torch.equal(*gradients)
        assert gradients[0].abs().max() > 0


def test_a_tied_name_that_no_parameter_has_is_refused_on_all_ranks(ranks: Ranks) -> None:
    results = ranks.run(tied_pair, (True, True), (False, False), "embedding")[:2]
    text = "stage 0 has no parameter 'embedding' to tie; its parameters are: weight, layer.weight, layer.bias"
    assert results[0][:2] == ("SpecError", text)
    assert results[1][0] == "TransportError"
    assert text in results[1][1]


# ---- turns, and going on after a failure


def fifo_on_one_rank(rank: int) -> tuple[str, str]:
    specs = [ShardingSpec(mesh, (Replicate(),), (2,), "float32") for mesh in PAIR]
    fifo = PerDirectionFifo() if rank == 0 else None
    link = Link("one fifo", [EdgeTensor(*specs)], microbatches=1, fifo=fifo, timeout_seconds=TIMEOUT_SECONDS)
    return attempt(link.connect) if rank < 2 else ("", "")


def test_ranks_take_turns_together_or_not_at_all(ranks: Ranks) -> None:
    for kind, text in ranks.run(fifo_on_one_rank)[:2]:
        assert kind == "TransportError"
        assert "about whether its transfers take turns (fifo)" in text


def test_in_turn_looks_at_its_costs() -> None:
    with pytest.raises(PlanError, match="costs are of 3 stages and the schedule has 2; give one StageCost for each"):
        in_turn(one_f_one_b(2, 4), Costs.uniform(3, 1, 1, 1))
    skip = Costs.uniform(3, 1, 1, 1).with_transfers([Channel(0, 2)], TransferCost(9.0))
    with pytest.raises(PlanError, match="the costs name edge 0-2, and the schedule has 0-1, 1-2; pass edges="):
        in_turn(one_f_one_b(3, 4), skip)


def three_calls(rank: int, victim: int, in_backward: bool) -> list[tuple[str, str]]:
    """All ranks make the same three calls, of which the last is right on all."""

    def make(index: int) -> nn.Module:
        return Faulty(linear(index), in_backward) if index == victim else linear(index)

    stages, edges = chain(rank, make)
    schedule = eager_one_f_one_b(4, MICROBATCHES)
    outcomes = []
    with executor_of(stages, edges, schedule) as executor:
        for _ in range(3):
            zero(stages)
            outcomes.append(attempt(lambda: executor.step(data())))
        require_gradients(rank, stages, expected())
    return outcomes


@pytest.mark.parametrize(("victim", "in_backward"), [(2, False), (0, True), (1, True)])
def test_after_a_failure_the_ranks_come_together_again(ranks: Ranks, victim: int, in_backward: bool) -> None:
    """Whoever was done already hears of it one call later, and the others wait for it."""
    for rank, outcomes in enumerate(ranks.run(three_calls, victim, in_backward)[:4]):
        kinds = [kind for kind, _ in outcomes]
        assert kinds[2] == "returned", outcomes
        if rank == victim:
            assert outcomes[0] == ("RuntimeError", "out of paper")
        else:
            blame = outcomes[0] if kinds[0] != "returned" else outcomes[1]
            assert "RuntimeError: out of paper" in blame[1], outcomes
        if in_backward:
            assert "returned" not in kinds[1:2]
