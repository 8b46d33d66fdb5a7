"""The same random layouts through eight gloo processes: the real transport does what the specification does."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import tricomm
from tests.cases import RANKS, Case, cases, of_random_draws
from tests.oracle import pick, require_equal, source_and_result
from tests.transport.test_properties import restrided
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError, make_plan
from tricomm.launch import Ranks
from tricomm.transport.communicator import CONNECTING_TAG, Communicator


def run_case(rank: int, case: Case, api: str, **others) -> int:
    """Reshard on this rank, with some other options, and compare; the bytes that this rank has sent."""
    sent = 0
    post = Communicator.post

    def counting(communicator, operations):
        nonlocal sent
        operations = list(operations)
        token = communicator._token.untyped_storage().data_ptr()
        sent += sum(
            op.buffer.numel()
            for op in operations
            if op.is_send
            and op.buffer.untyped_storage().data_ptr() != token  # not the barrier at the end
            and communicator.call.tag != CONNECTING_TAG
        )
        return post(communicator, operations)

    shards, result = source_and_result(case.source, case.destination, rank)
    shard = shards.get(rank)
    tensor = None if shard is None else restrided(shard, case.strides)
    options = {**case.plan_arguments(), "timeout_seconds": 20.0, "transport": "network", **others}
    Communicator.post = counting
    try:
        output = call(rank, case, api, tensor, options)
    finally:
        Communicator.post = post
    if rank in case.destination.mesh:
        require_equal(output, pick(result, case.destination, rank), f"rank {rank}")
    else:
        assert output is None
    if shard is not None:
        require_equal(tensor, shard, f"source of rank {rank}")
    return sent


def call(rank: int, case: Case, api: str, tensor, options):
    if api == "reshard":
        return tricomm.reshard(tensor, case.source, case.destination, **options)
    if api == "async":
        return tricomm.reshard_async(tensor, case.source, case.destination, **options).wait()
    mover = Resharder(case.source, case.destination, **options)
    out = None
    if api == "out" and rank in case.destination.mesh:
        shape = case.destination.local_shape(rank)
        out = restrided(torch.zeros(shape).to(getattr(torch, case.destination.dtype)), case.strides)
    output = mover(tensor, out=out)
    if out is not None:
        assert output.data_ptr() == out.data_ptr()
    return output


def drawable(case: Case) -> bool:
    return not case.destination.dtype.startswith(("bits", "float4"))


@of_random_draws("TRICOMM_FUZZ_GLOO", 300)
@given(case=cases().filter(drawable), api=st.sampled_from(["reshard", "async", "resharder", "out"]))
def test_any_layout_to_any_layout(ranks: Ranks, case: Case, api: str) -> None:
    sent = ranks.run(run_case, case, api)
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    plan.verify()
    assert sum(sent) == plan.wire_nbytes == plan.minimum_nbytes


TRAIN = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SERVE = Mesh([4, 5, 6, 7], ("tp",))


def repeat_with_changing_data(rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    for step in range(5):
        full = torch.arange(96 * 40, dtype=torch.float32).reshape(96, 40) + step
        tensor = pick(full, source, rank) if rank in source.mesh else None
        output = mover(tensor)
        if rank in destination.mesh:
            require_equal(output, pick(full, destination, rank), f"step {step} rank {rank}")


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
def test_a_resharder_is_called_again_and_again(ranks: Ranks, placement) -> None:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (96, 40), "float32")
    ranks.run(repeat_with_changing_data, source, ShardingSpec(SERVE, (placement,), (96, 40), "float32"))


def overlapping_starts(rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
    """Several in flight, then a direct call: each gets its own data, in order."""
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    fulls = [torch.full((96, 40), float(step)) for step in range(4)]
    tensors = [pick(full, source, rank) if rank in source.mesh else None for full in fulls]
    handles = [mover.start(tensor) for tensor in tensors[:3]]
    last = mover(tensors[3])
    outputs = [handle.wait() for handle in handles] + [last]
    assert all(handle.done() for handle in handles)
    if rank in destination.mesh:
        for full, output in zip(fulls, outputs, strict=True):
            require_equal(output, pick(full, destination, rank), f"rank {rank}")


def test_starts_follow_each_other(ranks: Ranks) -> None:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (96, 40), "float32")
    ranks.run(overlapping_starts, source, ShardingSpec(SERVE, (Replicate(),), (96, 40), "float32"))


def opposite_orders(rank: int, there: tuple[ShardingSpec, ShardingSpec]) -> None:
    """Two channels between the same ranks, used in opposite orders by the two sides: neither waits for the other."""
    movers = {
        name: Resharder(*specs, timeout_seconds=20, transport="network", channel=name)
        for name, specs in (("down", there), ("up", there[::-1]))
    }
    if rank not in movers["down"].participants:
        return
    full = torch.arange(96 * 40, dtype=torch.float32).reshape(96, 40)
    for mover in movers.values():
        mover.connect()
    for step in range(3):
        handles = {}
        first = rank in there[0].mesh
        for name in ("down", "up") if first else ("up", "down"):
            source = there[0] if name == "down" else there[1]
            tensor = pick(full + step, source, rank) if rank in source.mesh else None
            handles[name] = movers[name].start(tensor)
        # The first side waits for what the other started last.
        for name in ("up", "down") if first else ("down", "up"):
            output = handles[name].wait()
            destination = there[1] if name == "down" else there[0]
            if rank in destination.mesh:
                require_equal(output, pick(full + step, destination, rank), f"{name} {step} rank {rank}")


def test_channels_between_the_same_ranks_are_independent(ranks: Ranks) -> None:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (96, 40), "float32")
    ranks.run(opposite_orders, (source, ShardingSpec(SERVE, (Shard(1),), (96, 40), "float32")))


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that make new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.names.append(str(func))
        return result


def warm_call(rank: int, source: ShardingSpec, destination: ShardingSpec) -> tuple[list[str], int]:
    """What a warm call allocates, and how many tables the mover has made by then and after."""
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    tensor = torch.zeros(source.local_shape(rank)) if rank in source.mesh else None
    out = torch.zeros(destination.local_shape(rank)) if rank in destination.mesh else None
    mover(tensor, out=out)
    channel = mover._session.channel
    communicator = channel.communicator
    before = {key: id(table) for key, table in mover._execution._copy_programs.items()}
    bound = {key: id(cached) for key, cached in mover._execution.kept.bindings.items()}
    staging = channel.staging(0).data_ptr()
    with Allocations() as allocations:
        mover(tensor, out=out)
    assert {key: id(table) for key, table in mover._execution._copy_programs.items()} == before
    last = len(mover.plan.moves) - 1
    assert id(mover._execution.kept.bindings[last]) == bound[last] or mover.plan.reduction is not None
    assert channel.communicator is communicator
    assert channel.staging(0).data_ptr() == staging
    staged = sum(table.staged_chunks for table in mover._execution._copy_programs.values())
    return allocations.names, staged


@pytest.mark.parametrize("kind", ["packed", "partial", "chain"])
def test_a_warm_resharder_allocates_nothing(ranks: Ranks, kind: str) -> None:
    first = tricomm.Partial() if kind == "partial" else Replicate()
    source = ShardingSpec(TRAIN, (first, Shard(0)), (96, 40), "float32")
    placement = Replicate() if kind == "chain" else Shard(1)
    destination = ShardingSpec(SERVE, (placement,), (96, 40), "float32")
    for names, _ in ranks.run(warm_call, source, destination):
        assert names == []


def test_pieces_that_are_contiguous_on_both_sides_travel_without_a_copy(ranks: Ranks) -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (96, 40), "float32")
    destination = ShardingSpec(SERVE, (Shard(0),), (96, 40), "float32")
    assert [staged for _, staged in ranks.run(warm_call_or_none, source, destination)] == [0] * 8
    columns = ShardingSpec(SERVE, (Shard(1),), (96, 40), "float32")
    staged = [staged for _, staged in ranks.run(warm_call_or_none, source, columns)]
    assert staged == [4, 4, 0, 0, 0, 0, 0, 0]


def warm_call_or_none(rank: int, source: ShardingSpec, destination: ShardingSpec):
    if rank in source.mesh or rank in destination.mesh:
        return warm_call(rank, source, destination)
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    assert mover() is None
    return [], 0


def subgroup_case(rank: int) -> None:
    """Meshes name ranks of the group, not of the world."""
    members = [2, 5, 6]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(SpecError, match="not in the given group"):
            Resharder(SPEC_OF_THREE, SPEC_OF_ONE, group=group)
        return
    mine = dist.get_rank(group)
    full = torch.arange(12.0)
    tensor = pick(full, SPEC_OF_THREE, mine)
    output = tricomm.reshard(tensor, SPEC_OF_THREE, SPEC_OF_ONE, group=group, timeout_seconds=20, transport="network")
    assert (output is None) == (mine != 1)
    if output is not None:
        require_equal(output, full, "group rank 1")


SPEC_OF_THREE = ShardingSpec(Mesh([0, 1, 2], ("x",)), (Shard(0),), (12,), "float32")
SPEC_OF_ONE = ShardingSpec(Mesh([1], ("x",)), (Replicate(),))


def test_meshes_name_ranks_of_the_group(ranks: Ranks) -> None:
    ranks.run(subgroup_case)


def detect(rank: int) -> tricomm.Topology:
    return tricomm.Topology.detect(nic_bytes_per_second=1e9)


def test_topology_is_detected(ranks: Ranks) -> None:
    found = ranks.run(detect)
    assert len(set(found)) == 1
    assert len(found[0].hosts) == RANKS
    assert len(set(found[0].hosts)) == 1
    assert found[0].nic_bytes_per_second == 1e9


def gradients(rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
    """The gradient of sum(w * result) is w, in the layout of the source."""
    weight = torch.arange(6 * 10, dtype=torch.float32).reshape(6, 10)
    tensor = pick(torch.ones(6, 10), source, rank).requires_grad_()
    for _ in range(2):
        tensor.grad = None
        output = tricomm.reshard(tensor, source, destination, timeout_seconds=20, transport="network")
        (output * pick(weight, destination, rank)).sum().backward()
        scale = 1 / 2 if source.placements[0] == tricomm.Partial("avg") else 1.0
        require_equal(tensor.grad, pick(weight * scale, source, rank), f"gradient on rank {rank}")


@pytest.mark.parametrize("first", [Replicate(), tricomm.Partial(), tricomm.Partial("avg"), Shard(1)], ids=str)
def test_gradients_flow_back(ranks: Ranks, first) -> None:
    mesh = Mesh([[0, 1], [2, 3], [4, 5], [6, 7]], ("dp", "tp"))
    source = ShardingSpec(Mesh([[0, 1, 2, 3], [4, 5, 6, 7]], ("dp", "tp")), (first, Shard(0)), (6, 10), "float32")
    ranks.run(gradients, source, ShardingSpec(mesh, (Shard(1), Replicate()), (6, 10), "float32"))


def gradients_by_hand(rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
    """Different ranks: autograd refuses, and the mover of the gradients is called by hand."""
    weight = torch.arange(6 * 10, dtype=torch.float32).reshape(6, 10)
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    if rank in source.mesh:
        tensor = torch.zeros(source.local_shape(rank), requires_grad=True)
        with pytest.raises(SpecError, match=r"requires grad.*Resharder.gradient"):
            mover(tensor)
        with pytest.raises(SpecError, match="in the background"):
            mover.start(tensor)
    else:
        for _ in range(2):
            with pytest.raises(TransportError, match=r"rank \d refused the call: SpecError: .*requires grad"):
                mover()
    moved = mover.gradient()(pick(weight, destination, rank) if rank in destination.mesh else None)
    if rank in source.mesh:
        require_equal(moved, pick(weight, source, rank), f"gradient on rank {rank}")


def test_gradients_between_different_ranks_are_moved_by_hand(ranks: Ranks) -> None:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (6, 10), "float32")
    ranks.run(gradients_by_hand, source, ShardingSpec(SERVE, (Shard(1),), (6, 10), "float32"))


def forgotten(rank: int, source: ShardingSpec, destination: ShardingSpec) -> None:
    """A mover keeps no tensor alive, and notices one that moved to other memory under the same name."""
    mover = Resharder(source, destination, timeout_seconds=20, transport="network")
    tensor = torch.zeros(source.local_shape(rank)) if rank in source.mesh else None
    for salt in range(3):
        full = torch.arange(96 * 40, dtype=torch.float32).reshape(96, 40) + salt
        if tensor is not None:
            tensor.data = pick(full, source, rank)
        output = mover(tensor)
        if output is not None:
            require_equal(output, pick(full, destination, rank), f"rank {rank}, data {salt}")
    assert list(mover._execution.kept.bindings) == [0]
    del tensor, output
    assert not mover._execution.kept.bindings


def test_a_resharder_keeps_no_tensor_and_sees_new_memory(ranks: Ranks) -> None:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (96, 40), "float32")
    ranks.run(forgotten, source, ShardingSpec(SERVE, (Shard(1),), (96, 40), "float32"))
