"""CopyProgram bound to tensors: what is kept for the next call, and what must not be."""

import pytest
import torch

from tests.oracle import require_equal
from tricomm import Broadcast, Mesh, Replicate, Shard, ShardingSpec, make_plan
from tricomm.kernels import pack as kernels
from tricomm.transport.local import LocalEndpoint, LocalNetwork, _run_all
from tricomm.transport.runtime import PlanExecution

SHAPE = (8, 24)


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize(
    ("source", "destination"), [("float32", "float32"), ("int32", "int32"), ("float32", "bfloat16")]
)
def test_a_binding_goes_with_the_tensors(
    source: str, destination: str, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 keeps some of its elements, sends some and receives some; what packs them holds none of its tensors."""
    monkeypatch.setattr(kernels, "serves", lambda *_: with_kernels)
    before = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, source)
    after = ShardingSpec(Mesh([1, 2], ("x",)), (Shard(1),), SHAPE, destination)
    plan = make_plan(before, after)
    full = (torch.arange(8 * 24) % 61).reshape(SHAPE)
    tensors = {rank: full[4 * rank : 4 * rank + 4].to(getattr(torch, source)) for rank in (0, 1)}
    outs = {rank: torch.zeros(8, 12, dtype=getattr(torch, destination)) for rank in (1, 2)}
    stagings = {rank: torch.zeros(1 << 12, dtype=torch.uint8) for rank in (0, 1, 2)}
    executions = {rank: PlanExecution(plan, rank, torch.device("cpu")) for rank in (0, 1, 2)}
    network = LocalNetwork(True, (0, 2))
    _run_all(
        {
            rank: execution.steps(
                [tensors[rank]] if rank in tensors else [],
                [outs[rank]] if rank in outs else [],
                lambda _, rank=rank: stagings[rank],
                LocalEndpoint(network, rank),
            )
            for rank, execution in executions.items()
        },
        network,
    )
    for rank, out in outs.items():
        require_equal(out, full[:, 12 * (rank - 1) : 12 * rank].to(out.dtype), f"rank {rank}")
    del out
    assert all(execution.kept.bindings for execution in executions.values()), "kept for the next call of these tensors"
    tensors.clear()
    outs.clear()
    assert not any(execution.kept.bindings for execution in executions.values()), "something holds a tensor"


def test_a_binding_of_a_view_goes_with_it() -> None:
    """A view has a base, which must go too."""
    spec = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "int32")
    execution = PlanExecution(make_plan(spec, spec), 0, torch.device("cpu"))
    source, out = (torch.zeros(9, 24, dtype=torch.int32)[1:] for _ in range(2))
    staging = torch.zeros(1 << 12, dtype=torch.uint8)
    network = LocalNetwork(True, (0, 2))
    _run_all({0: execution.steps([source], [out], lambda _: staging, LocalEndpoint(network, 0))}, network)
    assert execution.kept.bindings
    del source, out
    assert not execution.kept.bindings


@pytest.mark.parametrize("depth", [(0, 0), (0, 2), (4, 2)])
def test_every_work_is_awaited_once(depth: tuple[int, int]) -> None:
    """Gloo's wait for a message that has been waited for does not return. Rank 1 sends on what it has received, with
    nothing open even after the round of its receive has ended.
    """
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "int32")
    plan = make_plan(source, ShardingSpec(Mesh([1, 2, 3], ("x",)), (Replicate(),)), strategy=Broadcast(chunk_bytes=128))
    full = torch.arange(8 * 24, dtype=torch.int32).reshape(SHAPE)
    outs = {rank: torch.zeros_like(full) for rank in (1, 2, 3)}
    executions = {rank: PlanExecution(plan, rank, torch.device("cpu")) for rank in plan.participants}
    network = LocalNetwork(True, depth)
    _run_all(
        {
            rank: execution.steps(
                [] if rank else [full],
                [outs[rank]] if rank else [],
                lambda nbytes: torch.full((nbytes,), 0xFF, dtype=torch.uint8),
                LocalEndpoint(network, rank),
            )
            for rank, execution in executions.items()
        },
        network,
    )
    forwarded = 0
    for rank, execution in executions.items():
        steps = execution.kept.bindings[0].bound.steps
        posted = sum(len(step.receives) + len(step.sends) for step in steps)
        completions = [one for step in steps for _, ended in step.ended for one in ended]
        ended = [number for number, _ in completions if number is not None]
        forwarded += sum(len(step.relayed) for step in steps)
        assert sorted([*(number for step in steps for number in step.relayed), *ended]) == [*range(posted)]
        if rank:
            require_equal(outs[rank], full, f"rank {rank}")
    assert forwarded or depth == (0, 0)
