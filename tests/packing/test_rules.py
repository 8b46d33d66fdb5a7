"""Tensors moved by random rules between random layouts, against numpy's own reshape, transpose and concatenate."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import tricomm
from tests.cases import RANKS, specs
from tests.oracle import pick, require_equal
from tests.packing.test_many import EXAMPLES, quick
from tests.rules.test_algebra import Pair, grown, sources
from tests.transport.test_properties import TRANSPORTS, restrided
from tricomm import (
    LocalTransport,
    Mesh,
    Partial,
    PlanError,
    Replicate,
    Resharder,
    Shard,
    ShardingSpec,
    SpecError,
    TransportError,
    make_plan,
)
from tricomm.launch import Ranks
from tricomm.rules import Rules, cat, fill, source

DTYPES = ["int64", "int32", "float32", "float64"]


class Mapped(NamedTuple):
    """Rules, the whole tensors of both sides, their layouts, and how local tensors lie in memory."""

    rules: Rules
    sources: dict[str, np.ndarray]
    made: dict[str, np.ndarray]
    before: dict[str, ShardingSpec]
    after: dict[str, ShardingSpec]
    strides: str


@st.composite
def maps(draw: Any) -> Mapped:
    """One or two rules over up to three sources, each tensor with a layout of its own."""
    leaves = draw(sources())
    pairs: list[Pair] = [draw(grown(leaves)) for _ in range(draw(st.integers(1, 2)))]
    whole = {f"s{number}": array for number, (_, array) in enumerate(leaves)}
    made = {f"out{number}": array for number, (_, array) in enumerate(pairs)}
    rules = Rules({name: pair[0] for name, pair in zip(made, pairs, strict=True)}, drop=["*"])
    dtype = draw(st.sampled_from(DTYPES))
    before = {name: draw(specs(array.shape, dtype, whole=True)) for name, array in whole.items()}
    after = {name: draw(specs(array.shape, draw(st.sampled_from([dtype, "int64"])))) for name, array in made.items()}
    strides = draw(st.sampled_from(["contiguous", "transposed", "padded"]))
    return Mapped(rules, whole, made, before, after, strides)


def shards(wholes: dict[str, np.ndarray], layouts: dict[str, ShardingSpec], rank: int) -> dict[str, torch.Tensor]:
    """What a rank holds, by the definition."""
    return {
        name: pick(torch.from_numpy(array.copy()).to(getattr(torch, layouts[name].dtype)), layouts[name], rank)
        for name, array in wholes.items()
        if rank in layouts[name].mesh
    }


def given_shards(drawn: Mapped, rank: int) -> dict[str, torch.Tensor]:
    return {name: restrided(one, drawn.strides) for name, one in shards(drawn.sources, drawn.before, rank).items()}


def check(drawn: Mapped, rank: int, output: dict[str, torch.Tensor]) -> None:
    wanted = shards(drawn.made, drawn.after, rank)
    assert sorted(output) == sorted(wanted)
    for name, tensor in wanted.items():
        require_equal(output[name], tensor, f"{name} on rank {rank} by\n{drawn.rules}")


def is_expressible(drawn: Mapped) -> bool:
    """Whether a plan can be made: a rank that is to hold an element twice may be refused."""
    try:
        make_plan(drawn.before, drawn.after, rules=drawn.rules)
    except SpecError as error:
        assert "several" in str(error), error
        return False
    return True


@settings(quick, max_examples=2 * EXAMPLES)
@given(drawn=maps(), transport=st.sampled_from(TRANSPORTS))
def test_any_rules_between_any_layouts(drawn: Mapped, transport: LocalTransport) -> None:
    if not is_expressible(drawn):
        reject()
    plan = make_plan(drawn.before, drawn.after, rules=drawn.rules)
    plan.verify()
    tensors = {rank: given_shards(drawn, rank) for rank in plan.participants}
    outputs, sent = transport.run_counted(plan, tensors)
    for rank in range(RANKS):
        check(drawn, rank, outputs.get(rank, {}))
        for name, tensor in given_shards(drawn, rank).items():
            require_equal(tensors[rank][name], tensor, f"source {name} of rank {rank}")
    assert sum(sent.values()) == plan.wire_nbytes == plan.minimum_nbytes
    str(plan)
