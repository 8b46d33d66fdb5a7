"""Evaluation, microbatches of unequal sizes and clipping, each against the model in one process."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from tests.pipeline import models
from tests.pipeline.chain import CHAIN, MICROBATCHES, TIMEOUT_SECONDS, attempt, chain, data, linear
from tests.pipeline.test_executor import MESHES, batch_of, case_of, reference, tied_of, typed
from tricomm import Replicate, Shard
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Executor,
    Queues,
    Schedule,
    clip_gradients,
    eager_one_f_one_b,
    gpipe,
    in_turn,
    interleaved_one_f_one_b,
    zero_bubble,
)
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.run.stage import Stage

# ---- forward only


class LossAndOutput(nn.Module):
    """A last stage of two outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, target):
        y = self.layer(x)
        return nn.functional.mse_loss(y, target), y


def evaluated(rank: int, schedule: Schedule, queues: Queues) -> None:
    """Evaluations before, between and after steps; the net in one process says what they give."""
    count = schedule.stages
    meshes = CHAIN if count == 4 else CHAIN[:2] * 2 if count != 2 else CHAIN[:2]
    if schedule.pipeline_ranks == 2:
        meshes = CHAIN[:2] * (count // 2)
    stages, edges = chain(rank, linear, meshes)
    last = stages[-1]
    module = None if last.module is None else LossAndOutput(last.module.module)
    stages[-1] = Stage(last.mesh, last.inputs, ("loss", "y"), module, last.loss)
    net = nn.Sequential(*(linear(index) for index in range(count)))
    wanted = [net(x) for x in data()["data"]]
    losses = [nn.functional.mse_loss(*pair) for pair in zip(wanted, data()["target"], strict=True)]
    with Executor(schedule, stages, edges, queues=queues, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for _ in range(2):
            found = executor.evaluate(data())
            parameters = [one for stage in stages if stage.module for one in stage.module.parameters()]
            assert all(one.grad is None for one in parameters)
            if rank in stages[-1].mesh:
                torch.testing.assert_close(found.loss, sum(losses).detach() / MICROBATCHES)
                torch.testing.assert_close(list(found.losses), [one.detach() for one in losses])
                torch.testing.assert_close(list(found.outputs["y"]), [one.detach() for one in wanted])
                assert not found.loss.requires_grad
            else:
                assert (found.loss, found.losses, found.outputs) == (None, (), {})
            loss = executor.step(data())
            if loss is not None:
                torch.testing.assert_close(loss, found.loss)
            for one in parameters:
                one.grad = None


@pytest.mark.parametrize(
    "schedule",
    [
        gpipe(4, MICROBATCHES),
        eager_one_f_one_b(4, MICROBATCHES, depth=1, split=True),
        zero_bubble(4, MICROBATCHES),
        interleaved_one_f_one_b(2, MICROBATCHES),
    ],
    ids=["gpipe", "eager", "zero bubble", "interleaved"],
)
def test_an_evaluation_gives_losses_and_outputs_and_no_gradient(ranks: Ranks, schedule: Schedule) -> None:
    ranks.run(evaluated, schedule, Queues.PER_CHANNEL)


def test_an_evaluation_keeps_to_turns(ranks: Ranks) -> None:
    schedule = in_turn(eager_one_f_one_b(4, MICROBATCHES), Costs.uniform(4, 1, 1, 1, 2), trials=20)
    ranks.run(evaluated, schedule, Queues.PER_DIRECTION)


def in_inference_mode(rank: int, split: bool) -> None:
    """Receive buffers that an evaluation makes serve the steps after it."""
    stages, edges = chain(rank, meshes=CHAIN[:2])
    schedule = eager_one_f_one_b(2, MICROBATCHES, split=split)
    with Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for _ in range(2):
            with torch.inference_mode():
                before = executor.evaluate(data()).loss
            assert executor.step(data()) == before


@pytest.mark.parametrize("split", [False, True])
def test_an_evaluation_in_inference_mode_comes_before_a_step(ranks: Ranks, split: bool) -> None:
    ranks.run(in_inference_mode, split)


def test_forwards_only_run_wherever_the_whole_does() -> None:
    schedule = Schedule.parse(["0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1W0 1I1 1W1"])
    forwards = schedule.forward_only()
    assert str(forwards) == "0: 0F0 0F1\n1: 1F0 1F1"
    assert not forwards.has_backward
    assert [str(channel) for channel in forwards.channels] == ["0>1"]


# ---- clipping


def cut_of(module: models.Part, name: str) -> tuple:
    """The placements over ("dp", "tp") of a parameter of the models of the tests."""
    _, unit, parameter = name.split(".")
    cut = module.parts[unit].cuts[parameter]
    return (Replicate(), Shard(cut.keywords["dim"]) if isinstance(cut, partial) else Replicate())


def clipped(rank: int, schedule: Schedule, name: str, says: bool):
    """(norm, largest error of a gradient) of a step whose gradients are clipped to a tenth of their norm."""
    meshes = MESHES[4]
    model = models.gpt() if name == "gpt" else models.u_transformer()
    stages, edges, spans = models.cut_into_stages(model, meshes, torch.float64)
    tied = tied_of(model, spans, meshes, torch.float64)
    mine = [stage for stage in stages if stage.module is not None]
    line = models.lines(mine[0].mesh, "dp") if mine else models.ALONE
    given = typed(batch_of(name, 0, MICROBATCHES, models.CONTEXT), torch.float64)
    given = {key: [line.cut(x, 0) for x in value] for key, value in given.items()}
    (_, gradients), *_ = reference(name, 1, MICROBATCHES, torch.float64, (models.CONTEXT,))
    tied_name = f"parts.{model.tied[1][0]}.{model.tied[1][1]}" if model.tied else None
    squares = sum(one.square().sum() for key, one in gradients.items() if key != tied_name)
    with Executor(schedule, stages, edges, tied=tied, timeout_seconds=TIMEOUT_SECONDS) as executor:
        executor.step(given)

        def layout_of(index: int, key: str) -> tuple:
            return cut_of(stages[index].module, key)

        kind, text = attempt(lambda: clip_gradients(executor, 1.0)) if not says else ("", "")
        if not says:
            return kind, text
        norm = clip_gradients(executor, float(squares.sqrt()) / 10, layout_of=layout_of)
        again = clip_gradients(executor, 1e9, layout_of=layout_of)
    worst = 0.0
    for stage in mine:
        wanted = stage.module.expected(gradients)
        for key, parameter in stage.module.named_parameters():
            worst = max(worst, float((parameter.grad - wanted[key] / 10).abs().max() / squares.sqrt()))
    return float(norm / squares.sqrt()), float(again / squares.sqrt()), worst


@pytest.mark.parametrize("name", ["gpt", "u-transformer"])
def test_clipping_goes_by_the_norm_of_one_process(ranks: Ranks, name: str) -> None:
    """Stages with tensor and data parallelism, and a tied embedding, which counts once."""
    schedule, _ = case_of(name, 4, "eager 1")
    for norm, again, worst in [one for one in ranks.run(clipped, schedule, name, True) if one[0]]:
        assert norm == pytest.approx(1.0, rel=1e-9)
        assert again == pytest.approx(0.1, rel=1e-6)
        assert worst < 1e-6


def test_clipping_finds_what_is_cut_and_not_said_to_be(ranks: Ranks) -> None:
    schedule, _ = case_of("gpt", 4, "eager 1")
    outcomes = [one for one in ranks.run(clipped, schedule, "gpt", False) if one[0] != "returned"]
    assert outcomes
    for kind, text in outcomes:
        assert kind == "SpecError"
        assert "are said to hold the same gradients, and the norms of theirs are" in text


def clip_refused(rank: int, how: str) -> tuple[str, str]:
    """Rank 1 calls differently; all hear of it at once, nothing is changed, and the next call works."""
    stages, edges = chain(rank, meshes=CHAIN[:2])
    with Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        executor.step(data())
        parameters = [one for stage in stages if stage.module for one in stage.module.parameters()]
        before = [one.grad.clone() for one in parameters]
        norm = {"negative": -1.0, "a word": "1", "another": 2e-3}.get(how, 1e-3) if rank == 1 else 1e-3
        began = time.monotonic()
        outcome = attempt(lambda: clip_gradients(executor, norm))
        assert time.monotonic() - began < TIMEOUT_SECONDS / 2
        for one, other in zip(parameters, before, strict=True):
            assert torch.equal(one.grad, other)
        clip_gradients(executor, 1e-3)
        executor.step(data())
    return outcome


@pytest.mark.parametrize(
    ("how", "kinds", "text"),
    [
        ("negative", ["TransportError", "SpecError"], "max_norm=-1.0 must be above 0"),
        ("a word", ["TransportError", "ArgumentError"], "max_norm must be a number"),
        ("another", ["SpecError", "SpecError"], "rank 0 was given max_norm=0.001"),
    ],
)
def test_a_rank_that_clips_otherwise_is_heard_of(ranks: Ranks, how: str, kinds: list[str], text: str) -> None:
    for (kind, found), wanted in zip(ranks.run(clip_refused, how)[:2], kinds, strict=True):
        assert kind == wanted, found
        assert text in found


def clip_when_closed(rank: int) -> tuple[tuple[str, str], tuple[str, str]]:
    stages, edges = chain(rank, meshes=CHAIN[:2])
    executor = Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    executor.step(data())
    executor.close()
    return attempt(lambda: clip_gradients(executor, 1.0)), attempt(lambda: executor.evaluate(data()))


def test_a_closed_executor_clips_nothing_and_stays_closed(ranks: Ranks) -> None:
    for clipped, evaluated in ranks.run(clip_when_closed)[:2]:
        assert clipped == ("SpecError", "the ranks of executor 'pipeline' cannot tell each other numbers: closed")
        assert evaluated[0] == "SpecError"


class Some(nn.Module):
    """A frozen layer, one without a gradient and one that trains."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer, self.frozen, self.unused = linear(seed), linear(seed + 7), linear(seed + 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.frozen(x))


def clip_as_torch(rank: int, max_norm: float, spoiled: float | None) -> None:
    """Norms that are infinite, gradients that are not finite, frozen and unused parameters."""
    stages, edges = chain(rank, Some, CHAIN[:2])
    with Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        executor.step(data())
        layers = [Some(0), Some(1)]
        for x, target in zip(*data().values(), strict=True):
            (nn.functional.mse_loss(layers[1](layers[0](x)), target) / MICROBATCHES).backward()
        for module in (stages[0].module, layers[0]):
            if module is not None and spoiled is not None:
                module.layer.weight.grad[0, 0] = spoiled
        norm = clip_gradients(executor, max_norm)
    if rank > 1:
        return
    parameters = [one for layer in layers for one in layer.parameters()]
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(parameters, max_norm), equal_nan=True)
    for stage, layer in zip(stages, layers, strict=True):
        pairs = zip(stage.module.parameters(), layer.parameters(), strict=True) if stage.module is not None else ()
        for one, other in pairs:
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, equal_nan=True)


@pytest.mark.parametrize(
    ("max_norm", "spoiled"), [(1e-2, None), (float("inf"), None), (1.0, float("inf")), (1.0, float("nan"))]
)
def test_clipping_does_what_torch_does(ranks: Ranks, max_norm: float, spoiled: float | None) -> None:
    ranks.run(clip_as_torch, max_norm, spoiled)
