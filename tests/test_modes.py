"""Modes of torch: inference and deterministic mode, torch.func, torch.compile, gradients on some ranks."""

import subprocess
import sys

import pytest
import torch

import tricomm
from tests.cases import RANKS
from tests.oracle import coded, pick, require_equal
from tricomm import LocalTransport, Mesh, Partial, Resharder, Shard, ShardingSpec, SpecError, make_plan
from tricomm.launch import Ranks
from tricomm.layout.dtype import ITEMSIZE
from tricomm.options import TransportName

ALL = Mesh(list(range(RANKS)), ("x",))
ROWS = ShardingSpec(ALL, (Shard(0),), (16, 8), "float32")
COLUMNS = ShardingSpec(ALL, (Shard(1),))
NARROW = ShardingSpec(ALL, (Shard(1),), dtype="bfloat16")
SUMS = ShardingSpec(ALL, (Partial(),), (16, 8), "float32")
FULL = torch.arange(128.0).reshape(16, 8)


def shard(rank: int) -> torch.Tensor:
    return FULL.chunk(RANKS, 0)[rank].clone()


def in_inference_mode(rank: int) -> None:
    columns = FULL.chunk(RANKS, 1)[rank]
    with torch.inference_mode():
        assert torch.equal(tricomm.reshard_async(shard(rank), ROWS, NARROW).wait(), columns.bfloat16())
        assert torch.equal(tricomm.reshard_async(FULL.clone(), SUMS, COLUMNS).wait(), RANKS * columns)
        weight = torch.zeros(16, 1, dtype=torch.bfloat16)
        mover = Resharder(SUMS, COLUMNS)
    assert torch.equal(tricomm.reshard(shard(rank), ROWS, NARROW, out=weight), columns.bfloat16())
    assert torch.equal(mover(FULL.clone()), RANKS * columns)
    with torch.inference_mode():
        assert torch.equal(mover(FULL.clone()), RANKS * columns)


def test_inference_mode_may_be_on_in_one_place_and_off_in_another(ranks: Ranks) -> None:
    ranks.run(in_inference_mode)


def under_another_default_device(rank: int, transport: TransportName) -> None:
    with torch.device("meta"):
        mover = Resharder(ROWS, NARROW, transport=transport, channel=f"meta {transport}", timeout_seconds=10.0)
        for _ in range(2):
            assert torch.equal(mover(shard(rank)), FULL.chunk(RANKS, 1)[rank].bfloat16())


@pytest.mark.parametrize("transport", ["auto", "network"])
def test_the_default_device_is_that_of_the_user_alone(ranks: Ranks, transport: TransportName) -> None:
    """What a connecting needs for itself is in host memory; the first call hung there."""
    ranks.run(under_another_default_device, transport)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_moves_in_deterministic_mode(dtype: str) -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (6, 4), dtype)
    plan = make_plan(source, ShardingSpec(Mesh([1, 2], ("x",)), (Shard(1),)))
    full = coded((6, 4), dtype)
    shards = {rank: pick(full, source, rank) for rank in (0, 1)}
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        result = LocalTransport().run(plan, shards)
    finally:
        torch.use_deterministic_algorithms(was)
    for rank in (1, 2):
        require_equal(result[rank], pick(full, plan.destination, rank), f"rank {rank}")


def under_transforms(rank: int) -> None:
    mover = Resharder(ROWS, COLUMNS, timeout_seconds=20)
    stack = torch.stack([shard(rank)] * 2)
    with pytest.raises(SpecError, match=r"inside of a torch\.func transform"):
        torch.vmap(mover)(stack)
    with pytest.raises(SpecError, match="for gradients"):
        torch.func.grad(lambda x: mover(x).sum())(shard(rank))
    with pytest.raises(SpecError, match=r"inside of a torch\.func transform"):
        torch.vmap(lambda x: tricomm.reshard(x, ROWS, COLUMNS, timeout_seconds=20))(stack)
    assert torch.equal(mover(shard(rank)), FULL.chunk(RANKS, 1)[rank])


def test_transforms_are_refused_at_the_door(ranks: Ranks) -> None:
    ranks.run(under_transforms)


def with_gradient_on_one_rank(rank: int) -> tuple[str, str]:
    tensor = shard(rank).requires_grad_(rank == 1)
    told = []
    for call in (
        lambda: tricomm.reshard(tensor, ROWS, COLUMNS, timeout_seconds=20),
        lambda: Resharder(ROWS, COLUMNS, timeout_seconds=20)(tensor),
    ):
        with pytest.raises(tricomm.TransportError) as caught:
            call()
        told.append(str(caught.value))
    everywhere = shard(rank).requires_grad_()
    tricomm.reshard(everywhere, ROWS, COLUMNS, timeout_seconds=20).sum().backward()
    assert torch.equal(everywhere.grad, torch.ones(16 // RANKS, 8))
    return told[0], told[1]


def test_gradients_asked_for_on_some_ranks_only_are_refused_in_the_meeting(ranks: Ranks) -> None:
    for told in ranks.run(with_gradient_on_one_rank):
        for text in told:
            assert "rank 1 disagrees with rank 0 about whether the tensor requires grad" in text


def compiled(rank: int, fullgraph: bool) -> str:
    def call(x: torch.Tensor) -> torch.Tensor:
        return tricomm.reshard(x * 2, ROWS, COLUMNS, timeout_seconds=60) + 1

    mover = Resharder(ROWS, COLUMNS, timeout_seconds=60)
    want = FULL.chunk(RANKS, 1)[rank] * 2 + 1
    torch.compiler.reset()
    if fullgraph:
        with pytest.raises(Exception, match="tricomm talks to other ranks") as caught:
            torch.compile(call, backend="eager", fullgraph=True)(shard(rank))
        return type(caught.value).__name__
    for function in (call, lambda x: mover(x * 2) + 1, lambda x: mover.start(x * 2).wait() + 1):
        assert torch.equal(torch.compile(function, backend="eager")(shard(rank)), want)
    return ""


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_breaks_its_graph_around_a_call(ranks: Ranks, fullgraph: bool) -> None:
    ranks.run(compiled, fullgraph)


def breaks(rank: int) -> list[str]:
    """Why the graph of a function breaks that computes, moves and computes."""
    torch.compiler.reset()
    explained = torch._dynamo.explain(lambda x: tricomm.reshard(x * 2, ROWS, COLUMNS, timeout_seconds=60) + 1)(
        shard(rank)
    )
    assert explained.graph_count == 2
    return [str(found.reason) for found in explained.break_reasons]


def test_reshard_is_one_explained_break(ranks: Ranks) -> None:
    for told in ranks.run(breaks):
        assert len(told) == 1
        assert "tricomm talks to other ranks, which no graph can hold" in told[0]


@pytest.mark.processes
def test_importing_tricomm_does_not_import_the_compiler() -> None:
    code = "import sys, tricomm; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
