"""A Resharder in compiled functions, exported programs, fake tensors and selective checkpoints."""

import shutil
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tricomm
from tests.cases import RANKS
from tests.oracle import pick
from tricomm import Mesh, Partial, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError, TricommError
from tricomm.launch import Ranks

ALL = Mesh(list(range(RANKS)), ("x",))
ROWS = ShardingSpec(ALL, (Shard(0),), (16, 8), "float32")
COLUMNS = ShardingSpec(ALL, (Shard(1),), (16, 8), "float32")
PAIR = ShardingSpec(Mesh([0, 1], ("a",)), (Shard(0),), (16, 8), "float32")
OTHERS = ShardingSpec(Mesh([1, 2], ("b",)), (Replicate(),), (16, 8), "bfloat16")
AVERAGE = Partial("avg")
COMPILING = 2
"""Ranks that compile: what one of many finds, each of two does, and to compile takes them most of a second each."""
COMPILED_WITHIN = 300.0
"""Seconds, on a busy machine, by which one rank may compile longer than another."""
FULL = torch.arange(128.0).reshape(16, 8)


def over(ranks: int) -> tuple[ShardingSpec, ShardingSpec]:
    """Rows and columns over so many ranks."""
    mesh = Mesh(list(range(ranks)), ("x",))
    return ShardingSpec(mesh, (Shard(0),), (16, 8), "float32"), ShardingSpec(mesh, (Shard(1),), (16, 8), "float32")


def forward_and_backward(rank: int, backend: str, ranks: int = RANKS) -> None:
    """Two equal moves are not made one, and one whose result nobody uses is made: else ranks would wait for ever."""
    every = Mesh(list(range(ranks)), ("x",))
    rows, columns, average = (ShardingSpec(every, (one,), (16, 8), "float32") for one in (Shard(0), Shard(1), AVERAGE))
    mover, averages = (Resharder(source, columns, timeout_seconds=COMPILED_WITHIN) for source in (rows, average))
    before = mover._session.calls

    def step(x: torch.Tensor, contribution: torch.Tensor) -> torch.Tensor:
        mover(x * 2)
        return mover(x * 2) + mover(x * 2) + averages(contribution)

    torch.compiler.reset()
    x = pick(FULL, rows, rank).requires_grad_()
    contribution = FULL.clone().requires_grad_()
    result = torch.compile(step, backend=backend, fullgraph=True)(x, contribution)
    torch.testing.assert_close(result, 5 * pick(FULL, columns, rank))
    assert mover._session.calls == before + 3
    (result * pick(FULL, columns, rank)).sum().backward()
    torch.testing.assert_close(x.grad, 4 * pick(FULL, rows, rank))
    torch.testing.assert_close(contribution.grad, FULL / ranks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_resharder_stands_in_a_full_graph(ranks: Ranks, backend: str) -> None:
    ranks.run(forward_and_backward, backend)


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor compiles C++ on a CPU, and there is no compiler")
def test_a_resharder_stands_in_a_full_graph_of_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled goes to a folder of the test, so that it is compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with Ranks(2, timeout_seconds=2 * COMPILED_WITHIN) as two:
        two.run(forward_and_backward, "inductor", 2)


def between_meshes(rank: int) -> None:
    mover = Resharder(PAIR, OTHERS, timeout_seconds=60)

    def step(x: torch.Tensor | None) -> torch.Tensor | None:
        moved = mover(None if x is None else x + 1)
        return None if moved is None else moved * 2

    torch.compiler.reset()
    given = pick(FULL, PAIR, rank) if rank in (0, 1) else None
    result = torch.compile(step, backend="aot_eager", fullgraph=True)(given)
    assert (result is None) == (rank not in (1, 2))
    if result is not None:
        assert torch.equal(result, (FULL + 1).bfloat16() * 2)


def test_meshes_of_other_ranks_in_a_full_graph(ranks: Ranks) -> None:
    ranks.run(between_meshes)


def with_a_tape(rank: int) -> None:
    """Gradients between ranks that hold different things break the graph, and are right."""
    if rank >= COMPILING:
        return
    rows, columns = over(COMPILING)
    mover = Resharder(rows, columns, differentiable=True, timeout_seconds=60)

    def step(x: torch.Tensor) -> torch.Tensor:
        return mover(x * 2) + 1

    torch.compiler.reset()
    x = pick(FULL, rows, rank).requires_grad_()
    tricomm.backward(torch.compile(step, backend="aot_eager")(x).sum())
    assert torch.equal(x.grad, torch.full_like(x, 2))
    torch.compiler.reset()
    with pytest.raises(Exception, match="without out= and differentiable="):
        torch.compile(step, backend="aot_eager", fullgraph=True)(x)


def test_a_taped_move_is_one_explained_break(ranks: Ranks) -> None:
    ranks.run(with_a_tape)


class Layer(torch.nn.Module):
    def __init__(self, mover: Any) -> None:
        super().__init__()
        self.mover = mover

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mover(x * 2) + 1


def without_data(rank: int) -> None:
    """Shapes alone: nobody is asked for anything, so that one rank may do it by itself."""
    mover = Resharder(ROWS, COLUMNS, timeout_seconds=60)
    if rank:
        return
    shape, dtype = (16, 1), torch.float32
    with FakeTensorMode() as mode:
        fake = mover(torch.empty(2, 8))
        assert fake is not None
        assert (fake.shape, fake.dtype) == (shape, dtype)
        on_meta = mover(torch.empty(2, 8, device="meta"))
        assert (on_meta.shape, on_meta.device.type) == (shape, "meta")
    assert mover(mode.from_tensor(torch.empty(2, 8))).shape == shape
    for strict, device in product((False, True), ("cpu", "meta")):
        program = torch.export.export(Layer(mover), (torch.empty(2, 8, device=device),), strict=strict)
        assert "tricomm.move.default" in str(program.graph)
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        found = output.args[0][-1].meta["val"]
        assert (found.shape, found.device.type) == (shape, device)


def test_export_and_fake_tensors_give_shapes(ranks: Ranks) -> None:
    ranks.run(without_data)


def one_without_data(rank: int) -> None:
    """A meta tensor in a call that the other ranks make with data: nothing says that shapes are meant."""
    mover = Resharder(ROWS, COLUMNS, timeout_seconds=60)
    mover(pick(FULL, ROWS, rank))
    began = time.monotonic()
    with pytest.raises(TricommError, match=r"rank 1 .*on meta.*a meta tensor has no data"):
        mover(torch.empty(2, 8, device="meta") if rank == 1 else pick(FULL, ROWS, rank))
    assert time.monotonic() - began < 30, "the other ranks are told at once"
    assert torch.equal(mover(pick(FULL, ROWS, rank)), pick(FULL, COLUMNS, rank))


def test_a_meta_tensor_outside_of_a_trace_is_refused_and_all_hear_it(ranks: Ranks) -> None:
    ranks.run(one_without_data)


def in_a_fake_mode(rank: int) -> None:
    """Real tensors on one rank inside of a FakeTensorMode: the mode copies nothing, and the others wait for data."""
    mover = Resharder(ROWS, COLUMNS, timeout_seconds=60)
    shard, columns = pick(FULL, ROWS, rank), pick(FULL, COLUMNS, rank)
    leaf, out = shard.clone().requires_grad_(), torch.zeros_like(columns)
    calls = {
        "one-shot": lambda: tricomm.reshard(shard, ROWS, COLUMNS, timeout_seconds=60),
        "mover": lambda: mover(shard),
        "mover with out": lambda: mover(shard, out=out),
        "many": lambda: tricomm.reshard({"a": shard}, {"a": ROWS}, {"a": COLUMNS}, timeout_seconds=60)["a"],
        "asynchronous": lambda: mover.start(shard).wait(),
        "with gradients": lambda: mover(leaf),
    }
    for name, call in calls.items():
        began = time.monotonic()
        where = FakeTensorMode() if rank == 1 else nullcontext()
        with where, pytest.raises(TricommError, match=r"inside of a FakeTensorMode") as caught:
            call()
        assert isinstance(caught.value, SpecError) is (rank == 1), name
        assert time.monotonic() - began < 30, "the other ranks are told at once"
        assert torch.equal(call(), columns), name


def test_real_tensors_in_a_fake_mode_are_refused_and_all_hear_it(ranks: Ranks) -> None:
    ranks.run(in_a_fake_mode)


def kept_by_a_checkpoint(rank: int) -> None:
    from tricomm.compiled.graph import move_op

    mover = Resharder(ROWS, COLUMNS, timeout_seconds=60)
    x = pick(FULL, ROWS, rank).requires_grad_()

    def region(one: torch.Tensor) -> torch.Tensor:
        return torch.sin(mover(torch.sin(one)))

    contexts = partial(create_selective_checkpoint_contexts, [move_op])
    checkpoint(region, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert mover._session.calls == 1  # and not 2, as with a checkpoint that keeps nothing
    plain = x.detach().clone().requires_grad_()
    region(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_a_selective_checkpoint_keeps_what_was_moved(ranks: Ranks) -> None:
    ranks.run(kept_by_a_checkpoint)


def refused(rank: int) -> None:
    mover = Resharder(PAIR, OTHERS, timeout_seconds=60)
    torch.compiler.reset()
    if rank == 0:
        x = pick(FULL, PAIR, rank).requires_grad_()
        with pytest.raises(SpecError, match="pass differentiable=True on all ranks"):
            torch.compile(lambda one: mover(one * 2), backend="eager")(x)
    elif rank < 3:
        with pytest.raises(TransportError, match=r"rank 0 refused the call: .* pass differentiable=True on all ranks"):
            mover(pick(FULL, PAIR, rank) if rank == 1 else None)


def test_gradients_that_would_get_lost_are_refused(ranks: Ranks) -> None:
    ranks.run(refused)


def calls_made_while_compiling(rank: int) -> None:
    """Whatever talks to others or plans is done outside of the graph, which breaks around it, and is not compiled."""
    mesh = DeviceMesh("cpu", list(range(COMPILING)), mesh_dim_names=("x",))  # made by all ranks
    if rank >= COMPILING:
        return
    by_rows, by_columns = over(COMPILING)
    rows = DTensor.from_local(pick(FULL, by_rows, rank), mesh, (TorchShard(0),), run_check=False)
    taped = Resharder(by_rows, by_columns, differentiable=True, timeout_seconds=60)
    plain = Resharder(by_rows, by_columns, timeout_seconds=60)

    def makes(x: torch.Tensor) -> torch.Tensor:
        made = Resharder(by_rows, by_columns, timeout_seconds=60)
        return made(x * 2)

    def goes_back(x: torch.Tensor) -> torch.Tensor:
        moved = taped(x * 2)
        tricomm.backward(moved.sum())
        return moved.detach()

    def redistributes(_: torch.Tensor) -> torch.Tensor:
        return tricomm.redistribute(rows * 2, mesh, [TorchShard(1)], timeout_seconds=60).to_local()

    def moves_a_dtensor(_: torch.Tensor) -> torch.Tensor:
        return plain(rows * 2)

    for function in (makes, goes_back, redistributes, moves_a_dtensor):
        torch.compiler.reset()
        counters.clear()
        x = pick(FULL, by_rows, rank).requires_grad_(function is goes_back)
        assert torch.equal(torch.compile(function, backend="aot_eager")(x), 2 * pick(FULL, by_columns, rank)), function
        assert counters["frames"]["total"] < 20, f"{function}: {counters['frames']}"
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"with a plain tensor \(of to_local"):
        torch.compile(moves_a_dtensor, backend="aot_eager", fullgraph=True)(x)


def test_what_no_graph_can_hold_is_done_outside_of_it(ranks: Ranks) -> None:
    ranks.run(calls_made_while_compiling)
