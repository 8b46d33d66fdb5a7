"""What tricomm.backward promises beside right gradients: limits are errors at once, on all ranks, and name the move."""

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Shard as TorchShard
from torch.utils.checkpoint import checkpoint

import tricomm
from tests.cases import RANKS
from tests.oracle import pick
from tricomm import Mesh, Partial, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks

SENDER, RECEIVER = Mesh([0], ("s",)), Mesh([1], ("r",))
HERE = ShardingSpec(SENDER, (Replicate(),), (4,), "float64")
THERE = ShardingSpec(RECEIVER, (Replicate(),), (4,), "float64")
AGAIN = ShardingSpec(RECEIVER, (Shard(0),), (4,), "float64")
ALL = Mesh(list(range(RANKS)), ("x",))
ROWS = ShardingSpec(ALL, (Shard(0),), (16, 8), "float64")
COLUMNS = ShardingSpec(ALL, (Shard(1),), (16, 8), "float64")
SECONDS_AT_ONCE = 20.0
"""Far below the timeout of the calls, however busy the machine is."""


def movers() -> tuple[Resharder, Resharder]:
    return (
        Resharder(HERE, THERE, differentiable=True, timeout_seconds=120, name="first"),
        Resharder(HERE, AGAIN, differentiable=True, timeout_seconds=120, name="second"),
    )


def leaf() -> torch.Tensor:
    return torch.arange(4.0, dtype=torch.float64).requires_grad_()


def told_at_once(rank: int, receive: Any) -> str:
    """Two moves from rank 0 to rank 1, whose backward is a wrong one; afterwards all is well again."""
    if rank > 1:
        return ""
    first, second = movers()
    x = leaf() if rank == 0 else None
    results = first(x), second(x)
    began = time.monotonic()
    with pytest.raises(TransportError if rank == 0 else SpecError) as caught:
        tricomm.backward() if rank == 0 else receive(*results)
    assert time.monotonic() - began < SECONDS_AT_ONCE
    fresh = leaf() if rank == 0 else None
    result = first(fresh), second(fresh)
    tricomm.backward(*(2 * one.sum() for one in result if one is not None))
    if fresh is not None:
        assert torch.equal(fresh.grad, torch.full((4,), 4.0, dtype=torch.float64))
    return str(caught.value)


def misses_the_last(first: torch.Tensor, second: torch.Tensor) -> None:
    first.sum().backward()


def asks_for_second_gradients(first: torch.Tensor, second: torch.Tensor) -> None:
    tricomm.backward((first * second).sum(), create_graph=True)


def fails_in_a_hook(first: torch.Tensor, second: torch.Tensor) -> None:
    def hook(gradient: torch.Tensor) -> None:
        raise SpecError("the hook of this rank failed")

    first.register_hook(hook)
    tricomm.backward((first * second).sum())


@pytest.mark.parametrize(
    ("receive", "words"),
    [
        (misses_the_last, "does not run the gradient of Resharder 'second' (number"),
        (asks_for_second_gradients, "create_graph=True asks for gradients of the gradient of Resharder 'second'"),
        (fails_in_a_hook, "the hook of this rank failed"),
    ],
)
def test_a_backward_that_cannot_be_is_told_to_all_at_once(ranks: Ranks, receive: Any, words: str) -> None:
    told = ranks.run(told_at_once, receive)
    assert words in told[1]
    assert words in told[0]


def loss_of_its_own(rank: int) -> None:
    """loss.backward() is enough where the loss reaches the last move; an unused result gets zeros."""
    if rank > 1:
        return
    first, second = movers()
    x = leaf() if rank == 0 else None
    unused, used = first(x), second(x)
    if rank == 0:
        tricomm.backward()
        assert torch.equal(x.grad, torch.full((4,), 3.0, dtype=torch.float64))
    else:
        assert unused.requires_grad
        (3 * used).sum().backward()
    with torch.no_grad():
        moved = first(x)
    assert moved is None or not moved.requires_grad
    tricomm.backward()  # nothing stands on the tape


def test_a_loss_that_reaches_the_last_move_runs_all(ranks: Ranks) -> None:
    ranks.run(loss_of_its_own)


def twice_through(rank: int) -> None:
    """A retained graph is run again."""
    if rank > 1:
        return
    first, _ = movers()
    x = leaf() if rank == 0 else None
    y = first(x)
    losses = () if y is None else ((y * y).sum(),)
    tie = first.context.tapes[""].tie
    tricomm.backward(*losses, retain_graph=True)
    torch.autograd.backward([*losses, torch.autograd.graph.get_gradient_edge(tie)], [*(None for _ in losses), tie])
    if x is not None:
        assert torch.equal(x.grad, 4 * x.detach())


def test_a_retained_graph_runs_again(ranks: Ranks) -> None:
    ranks.run(twice_through)


def checkpointed(rank: int) -> str:
    """A move is computed again where all ranks are on both meshes; elsewhere that is refused."""
    both = Resharder(ROWS, COLUMNS, differentiable=True, timeout_seconds=120)
    x = pick(torch.arange(128.0, dtype=torch.float64).reshape(16, 8), ROWS, rank).requires_grad_()
    tricomm.backward(checkpoint(lambda one: torch.sin(both(torch.sin(one))), x, use_reentrant=False).sum())
    plain = x.detach().clone().requires_grad_()
    tricomm.backward(torch.sin(both(torch.sin(plain))).sum())
    assert torch.equal(x.grad, plain.grad)
    if rank > 1:
        return ""
    first, _ = movers()
    y = leaf() if rank == 0 else torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def region(one: torch.Tensor) -> torch.Tensor:
        moved = first(torch.sin(one) if rank == 0 else None)
        return torch.sin(one if moved is None else torch.sin(moved))

    loss = checkpoint(region, y, use_reentrant=False).sum()
    with pytest.raises((TransportError, SpecError)) as caught:
        tricomm.backward(loss)
    return str(caught.value)


def test_a_checkpoint_computes_a_move_again_or_says_that_it_cannot(ranks: Ranks) -> None:
    for told in ranks.run(checkpointed)[:2]:
        assert "is called again inside of a backward, as in a checkpoint" in told


def asks_for_some_inputs(rank: int) -> str:
    """One rank wants the gradient of one leaf alone, which leaves out a move that all others make."""
    one, other = (Resharder(ROWS, COLUMNS, differentiable=True, timeout_seconds=120, name=name) for name in "ab")
    leaves = [pick(torch.ones(16, 8, dtype=torch.float64), ROWS, rank).requires_grad_() for _ in range(2)]
    loss = (one(leaves[0]) * other(leaves[1])).sum()
    began = time.monotonic()
    with pytest.raises(SpecError if rank == 3 else TransportError) as caught:
        torch.autograd.grad(loss, leaves[1]) if rank == 3 else tricomm.backward(loss)
    assert time.monotonic() - began < SECONDS_AT_ONCE
    fresh = leaves[0].detach().requires_grad_()
    tricomm.backward(one(fresh).sum())
    assert torch.equal(fresh.grad, torch.ones_like(fresh))
    return str(caught.value)


def test_a_backward_to_some_inputs_names_the_move_that_it_leaves_out(ranks: Ranks) -> None:
    for told in ranks.run(asks_for_some_inputs):
        assert "does not run the gradient of Resharder 'a'" in told


def summed_on_the_way(rank: int) -> None:
    """Column-parallel: each rank of the receivers has a part of the weight, and gives a part of the gradient."""
    if rank > 2:
        return
    source = ShardingSpec(Mesh([0], ("s",)), (Replicate(),), (3, 4), "float64")
    destination = ShardingSpec(Mesh([1, 2], ("tp",)), (Replicate(),))
    x = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).requires_grad_()
    weight = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    moved = tricomm.reshard(
        x if rank == 0 else None, source, destination, differentiable=True, grad_placements=(Partial(),),
        timeout_seconds=120,
    )  # fmt: skip
    if moved is None:
        tricomm.backward()
        assert torch.equal(x.grad, torch.ones(3, 6, dtype=torch.float64) @ weight.T)
    else:
        tricomm.backward((moved @ weight.chunk(2, 1)[rank - 1]).sum())


def test_partial_gradients_are_summed_on_the_way(ranks: Ranks) -> None:
    ranks.run(summed_on_the_way)


def refused_at_the_door(rank: int) -> list[str]:
    told = []
    mover = Resharder(ROWS, COLUMNS, differentiable=True, timeout_seconds=120)
    x = pick(torch.zeros(16, 8, dtype=torch.float64), ROWS, rank)

    def in_a_thread() -> None:
        with pytest.raises(SpecError) as caught:
            mover(x)
        told.append(str(caught.value))

    mover(x)
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    tricomm.backward()
    for call in (
        lambda: mover.start(x),
        lambda: mover(x, out=torch.zeros(16, 1, dtype=torch.float64)),
        lambda: Resharder(ShardingSpec(ALL, (Partial("max"),), (16, 8), "float64"), COLUMNS, differentiable=True),
        lambda: Resharder(ROWS, COLUMNS, differentiable=1),
    ):
        with pytest.raises(SpecError) as caught:
            call()
        told.append(str(caught.value))
        dist.barrier()
    mover(x)
    tricomm.backward()
    return told


def test_limits_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    thread, start, out, maximum, kind = ranks.run(refused_at_the_door)[0]
    assert "1 differentiable moves of another thread stand on channel ''" in thread
    assert "cannot be moved in the background" in start
    assert "cannot go into out" in out
    assert "Partial('max') has no gradient" in maximum
    assert "differentiable=1 is no truth value" in kind


def on_some_ranks(rank: int) -> str:
    with pytest.raises(TransportError) as caught:
        tricomm.reshard(
            pick(torch.zeros(16, 8, dtype=torch.float64), ROWS, rank),
            ROWS,
            COLUMNS,
            differentiable=rank == 3,
            timeout_seconds=120,
        )
    return str(caught.value)


def test_gradients_asked_for_on_some_ranks_only_are_refused(ranks: Ranks) -> None:
    for told in ranks.run(on_some_ranks):
        assert "rank 3 disagrees with rank 0 about differentiable" in told


def dtensors_on_two_meshes(rank: int) -> None:
    """A tower on two ranks, a head on two others, DTensors all the way."""
    if rank > 3:
        return
    towers = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",), _init_backend=False)
    heads = DeviceMesh("cpu", [2, 3], mesh_dim_names=("dp",), _init_backend=False)
    full = torch.arange(24.0, dtype=torch.float64).reshape(6, 4)
    source = (towers, (TorchShard(1),), full.shape, full.dtype)
    held = None
    if rank < 2:
        local = full.chunk(2, 1)[rank].clone()
        held = DTensor.from_local(local, towers, [TorchShard(1)], run_check=False, shape=full.shape, stride=(4, 1))
        held.requires_grad_()
    arrived = tricomm.redistribute(
        held, heads, [TorchShard(0)], source=source, differentiable=True, timeout_seconds=120
    )
    if rank < 2:
        tricomm.backward()
        assert held.grad.placements == (TorchShard(1),)
        assert torch.equal(held.grad.to_local(), 2 * held.to_local().detach())
    else:
        local = arrived.to_local()
        assert torch.equal(local.detach(), full.chunk(2)[rank - 2])
        tricomm.backward((local**2).sum())


def test_gradients_of_dtensors_cross_meshes(ranks: Ranks) -> None:
    ranks.run(dtensors_on_two_meshes)
