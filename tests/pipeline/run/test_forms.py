"""Arguments of pipelines have one form, which their documentation names; what is near it is refused by name."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.pipeline.chain import BATCH, CHAIN, MICROBATCHES, TIMEOUT_SECONDS, WIDTH, attempt, chain, data
from tricomm import ArgumentError, Partial, PlanError, Replicate, ShardingSpec, SpecError
from tricomm.launch import Ranks
from tricomm.pipeline import Channel, Costs, Edge, EdgeTensor, Executor, Limits, StageCost, TransferCost, gpipe

SOURCE = ShardingSpec(CHAIN[0], (Replicate(),), (2, 3), "float32")
UNSIZED = ShardingSpec(CHAIN[0], (Replicate(),), None, "float32")
THERE = ShardingSpec(CHAIN[1], (Replicate(),))
STAGES = (StageCost(1, 1, 1),) * 2
HOP = TransferCost(1.0)


@pytest.mark.parametrize("gradient", [False, 0, "", "none", Partial(), (None,)])
def test_a_gradient_is_a_tuple_of_placements_or_none(gradient: object) -> None:
    """Above all False, which would have been taken for a gradient as its tensor's."""
    with pytest.raises(ArgumentError, match="gradient must be a tuple of"):
        EdgeTensor(SOURCE, THERE, gradient)


@pytest.mark.parametrize("shape", [None, "ab", (True, 3), (2.0, 3), ("rows", -1), ("", 3)])
def test_a_shape_is_a_tuple_of_sizes_and_names(shape: Any) -> None:
    with pytest.raises(SpecError, match="shape"):
        EdgeTensor(UNSIZED, THERE, shape=shape)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Costs(STAGES, {Channel(0, 1): 1.0}), ArgumentError, "transfers must be a mapping of Channels"),
        (lambda: Costs(STAGES, {Edge(0, 1): HOP}), ArgumentError, "transfers must be a mapping of Channels"),
        (lambda: Costs(STAGES, {Channel(0, 0): HOP}), PlanError, "no channel between two stages"),
        (lambda: Costs(STAGES, {Channel(-1, 0): HOP}), PlanError, "no channel between two stages"),
        (lambda: Costs(STAGES, (), 1.0), ArgumentError, "other must be a TransferCost"),
        (lambda: Costs(None), ArgumentError, "stages must be a tuple of StageCosts"),
        (lambda: Limits(activations=0), PlanError, "activations=0 leaves room for nothing"),
        (lambda: Limits(nbytes=-1), PlanError, "nbytes=-1 leaves room for nothing"),
        (lambda: Limits(nbytes=1e9), ArgumentError, "nbytes must be an integer or None"),
    ],
)
def test_costs_and_limits_are_what_they_say(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_pairs_of_stages_are_channels() -> None:
    assert Costs(STAGES, {(0, 1): HOP}) == Costs(STAGES, {Channel(0, 1): HOP})


def step_with(rank: int, given: Mapping[str, Any]) -> tuple[str, str]:
    """A step with arguments of a wrong kind on all ranks, then one that is right."""
    stages, edges = chain(rank, meshes=CHAIN[:2])
    ends = [ShardingSpec(mesh, (Replicate(),), None, "float64") for mesh in CHAIN[:2]]
    edges[0, 1]["x1"] = EdgeTensor(*ends, shape=("rows", WIDTH))
    with Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        right = {"data": data(), "sizes": {"rows": BATCH}}
        outcome = attempt(lambda: executor.step(**{**right, **given}))
        executor.step(**{**right, "sizes": {"rows": torch.tensor(BATCH)}})
    return outcome


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"data": None}, "data of a step are a NoneType, and inputs have names"),
        ({"data": [torch.ones(1)]}, "data of a step are a list, and inputs have names"),
        ({"sizes": 3}, "sizes must be a mapping of strings to (an integer or a sequence of integers) or None"),
        ({"sizes": {"rows": 6.0}}, "sizes must be a mapping of strings to (an integer or a sequence of integers)"),
        ({"sizes": {"rows": True}}, "sizes must be a mapping of strings to (an integer or a sequence of integers)"),
        ({"loss_weights": 1.0}, "loss_weights must be a sequence of numbers or None"),
        ({"loss_weights": ["a"] * MICROBATCHES}, "loss_weights must be a sequence of numbers or None"),
        ({"loss_weights": torch.ones(MICROBATCHES)}, "loss_weights must be a sequence of numbers or None"),
    ],
)
def test_arguments_of_a_step_are_refused_by_name_and_the_next_one_works(ranks: Ranks, given, text: str) -> None:
    for kind, found in ranks.run(step_with, given)[:2]:
        assert kind in ("ArgumentError", "TransportError")
        assert text in found
