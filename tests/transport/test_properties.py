"""Random layouts through the in-process transport: exact by global coordinate, proved, and no byte too many."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import Case, cases, of_random_draws
from tests.oracle import WORDS, pick, require_equal, source_and_result, torch_dtype
from tricomm import LocalTransport, make_plan

TRANSPORTS = [
    LocalTransport(),
    LocalTransport(rounds_open=0),
    LocalTransport(grouped=False, receives_ahead=3, rounds_open=1),
    LocalTransport(grouped=False, receives_ahead=4, rounds_open=2, reads=True),
]


def restrided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory: transposed, or inside a larger tensor."""
    if how == "transposed" and tensor.ndim > 1:
        order = list(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if how == "padded" and tensor.ndim:
        word = WORDS.get(tensor.element_size(), tensor.dtype)
        room = torch.zeros([2 * n + 3 for n in tensor.shape], dtype=word).view(tensor.dtype)
        view = room[tuple(slice(1, 2 * n + 1, 2) for n in tensor.shape)]
        view.copy_(tensor)
        return view
    return tensor


def expected_wire_nbytes(case: Case) -> int:
    """What must travel, from the holdings alone: each rank's needs that it does not hold, once each."""
    source, destination = case.source, case.destination
    if source.partial_axes:
        return -1
    item = min(torch_dtype(source.element_type).itemsize, torch_dtype(destination.element_type).itemsize)
    total = 0
    for rank in destination.mesh.ranks:
        needed = [
            {i for start, stop in intervals for i in range(start, stop)} for intervals in destination.holding(rank)
        ]
        numel = common = 1
        for wanted in needed:
            numel *= len(wanted)
        if rank in source.mesh:
            for wanted, intervals in zip(needed, source.holding(rank), strict=True):
                held = {i for start, stop in intervals for i in range(start, stop)}
                common *= len(wanted & held)
            numel -= common
        total += numel * item
    return total


@of_random_draws("TRICOMM_FUZZ", 2000)
@given(case=cases(), transport=st.sampled_from(TRANSPORTS))
def test_any_layout_to_any_layout(case: Case, transport: LocalTransport) -> None:
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    plan.verify()
    shards, result = source_and_result(case.source, case.destination)
    tensors = {rank: restrided(shard, case.strides) for rank, shard in shards.items()}
    outputs, sent = transport.run_counted(plan, tensors)
    assert sorted(outputs) == sorted(case.destination.mesh.ranks)
    for rank, output in outputs.items():
        require_equal(output, pick(result, case.destination, rank), f"rank {rank}")
    for rank, shard in shards.items():
        require_equal(tensors[rank], shard, f"source of rank {rank}")
    assert sum(sent.values()) == plan.wire_nbytes == plan.minimum_nbytes
    minimum = expected_wire_nbytes(case)
    if minimum >= 0:
        assert plan.wire_nbytes == minimum
    str(plan)
