"""torch's meshes and placements in tricomm's words and back: every rank holds what torch itself would cut for it."""

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

import tricomm
from tests.cases import RANKS
from tests.interop.layouts import cut_in_order, cut_word_by_word, random_mesh, random_placements
from tests.oracle import pick, require_equal
from tests.refusals.torch_types import OF_A_GROUP
from tricomm import Mesh, Resharder, ShardingSpec, SpecError, TricommError, make_plan
from tricomm.launch import Ranks

LAYOUTS = 500


class MeshOfSizes:
    """What torch asks of a mesh when it reads an order of cuts."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def size(self, axis: int) -> int:
        return self._mesh.shape[axis]


@pytest.mark.parametrize("as_order", [True, False])
def test_a_layout_of_torch_holds_what_torch_cuts(as_order: bool) -> None:
    choose = random.Random(int(as_order))
    orders = 0
    for _ in range(LAYOUTS):
        mesh = random_mesh(choose, 12)
        shape = tuple(choose.choice((0, 1, 2, 3, 5, 7, 8, 12, 13)) for _ in range(choose.randint(1, 3)))
        placements = random_placements(choose, mesh.ndim, len(shape))
        order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(placements, MeshOfSizes(mesh))
        full = torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)
        spec = ShardingSpec.from_placements(mesh, placements, shape, "int64", strided_as_order=as_order)
        is_order = as_order and order is not None
        orders += is_order
        for rank in mesh.ranks:
            cut = cut_in_order(full, mesh, order, rank) if is_order else cut_word_by_word(full, mesh, placements, rank)
            require_equal(pick(full, spec, rank), cut.contiguous(), f"{placements} of {shape} on {mesh}, rank {rank}")
    assert orders > 100 or not as_order


def test_placements_come_back_from_a_spec() -> None:
    choose = random.Random(2)
    for _ in range(LAYOUTS):
        mesh = random_mesh(choose, 12)
        shape = tuple(choose.choice((1, 2, 3, 5, 7, 8)) for _ in range(2))
        order = choose.sample(range(mesh.ndim), mesh.ndim)
        placements = [choose.choice((tricomm.Shard(choose.randint(-2, 1)), tricomm.Replicate())) for _ in order]
        spec = ShardingSpec(mesh, placements, shape, "float32", order)
        back = ShardingSpec.from_placements(mesh, spec.to_placements(), shape, "float32")
        assert [back.holding(rank) for rank in mesh.ranks] == [spec.holding(rank) for rank in mesh.ranks]
    average = ShardingSpec(Mesh([0, 1], ("x",)), (tricomm.Partial("avg"),), (4,), "float32")
    assert average.to_placements() == (Partial("avg"),)
    segmented = ShardingSpec(Mesh([0, 1], ("x",)), (tricomm.Shard(0, (3, 2)),), (5,), "float32")
    assert ShardingSpec.from_placements(segmented.mesh, segmented.to_placements(), (5,), "float32") == segmented


def test_fsdp2_keeps_its_data_in_the_order_of_cuts() -> None:
    """The case in which the two readings differ: 7 rows over dp=3 and tp=2."""
    mesh = Mesh([[0, 1], [2, 3], [4, 5]], ("dp", "tp"))
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    ordered, literal = (
        ShardingSpec.from_placements(mesh, placements, (7,), strided_as_order=way) for way in (True, False)
    )
    assert (ordered.holding(4), ordered.holding(5)) == (((),), (((6, 7),),))
    assert (literal.holding(4), literal.holding(5)) == ((((6, 7),),), ((),))


def test_a_mesh_of_torch_and_parts_of_it() -> None:
    root = DeviceMesh("cpu", torch.arange(8).reshape(2, 2, 2), mesh_dim_names=None, _init_backend=False, _rank=0)
    assert str(Mesh.of(root)) == "(dim_0=2 dim_1=2 dim_2=2: ranks 0-7)"
    assert str(Mesh.of(root, dim_1=1)) == "(dim_0=2 dim_2=2: ranks 2-3,6-7)"
    assert Mesh.of(root, dim_0=1, dim_2=0) == Mesh([4, 6], ("dim_1",))
    assert Mesh.of(root, dim_0=1, dim_2=0, dim_1=1).ranks == (6,)


def test_sides_in_torchs_words_make_the_same_plan() -> None:
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"), _init_backend=False, _rank=0)
    local = DTensor.from_local(torch.zeros(4, 6), mesh, [Replicate(), Shard(0)], run_check=False)
    server = Mesh([4, 5], ("tp",))
    ours = ShardingSpec(Mesh.of(mesh), (tricomm.Replicate(), tricomm.Shard(0)), (8, 6), "float32")
    plan = make_plan(ours, ShardingSpec(server, (tricomm.Shard(1),)))
    for source in (local, (mesh, [Replicate(), Shard(0)], (8, 6), torch.float32)):
        for destination in ((server, [Shard(-1)]), (server, (tricomm.Shard(1),), (8, 6), "float32")):
            assert make_plan(source, destination) == plan


def of_a_group(rank: int) -> None:
    """Ranks 3 to 6 of the job are ranks 0 to 3 of a group, and what a DeviceMesh names is translated."""
    members = list(range(3, 7))
    # All make it: alone, ranks that have made unequally many groups before would name it differently.
    group = dist.new_group(members)
    if rank not in members:
        return
    mesh = DeviceMesh("cpu", members, _init_backend=False)
    assert Mesh.of(mesh, group=group).ranks == (0, 1, 2, 3)
    outside = DeviceMesh("cpu", [rank, 0], _init_backend=False, _rank=rank)
    with pytest.raises(SpecError, match=r"rank 0 of .* is not in the given process group"):
        Mesh.of(outside, group=group)
    full = torch.arange(24.0).reshape(6, 4)
    local = DTensor.from_local(full.chunk(4)[rank - 3] if rank < 6 else full[:0], mesh, [Shard(0)], run_check=False,
                               shape=full.shape, stride=full.stride())  # fmt: skip
    columns = tricomm.reshard(local, None, (mesh, [Shard(1)]), group=group, timeout_seconds=30)
    assert columns is not None
    require_equal(columns, full[:, rank - 3 : rank - 2].contiguous(), f"rank {rank}")


def test_a_device_mesh_in_the_ranks_of_a_group(ranks: Ranks) -> None:
    ranks.run(of_a_group)


def moves_dtensors(rank: int) -> None:
    """From two ranks to three others and back, with what the others pass where they hold nothing."""
    full = torch.arange(35.0).reshape(7, 5)
    pairs = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",), _init_backend=False)
    threes = DeviceMesh("cpu", [2, 3, 4], mesh_dim_names=("tp",), _init_backend=False)
    source = (pairs, (Shard(0),), full.shape, full.dtype)
    held = None
    if rank < 2:
        held = DTensor.from_local(
            full.chunk(2)[rank], pairs, [Shard(0)], run_check=False, shape=full.shape, stride=(5, 1)
        )
    there = tricomm.redistribute(held, threes, (Shard(-1),), source=source, timeout_seconds=30)
    assert isinstance(there, DTensor)
    assert there.shape == full.shape
    assert there.to_local().shape == (full.chunk(3, 1)[rank - 2].shape if 2 <= rank < 5 else (0,))
    if 2 <= rank < 5:
        require_equal(there.to_local(), full.chunk(3, 1)[rank - 2].contiguous(), f"rank {rank}")
    back = there if 2 <= rank < 5 else None
    source = (threes, (Shard(1),), full.shape, full.dtype)
    home = pairs if rank < 2 else Mesh.of(pairs)
    narrow = tricomm.redistribute(back, home, (Replicate(),), source=source, dtype=torch.bfloat16, timeout_seconds=30)
    assert (narrow is None) == (rank >= 2)
    if rank < 2:
        require_equal(narrow.to_local(), full.bfloat16(), f"rank {rank}")


def test_a_dtensor_goes_to_a_mesh_of_other_ranks_and_back(ranks: Ranks) -> None:
    ranks.run(moves_dtensors)


def fsdp_parameters(rank: int) -> None:
    """FSDP2 on dp=4 x tp=2 with uneven parts: its parameters are read, and written in place."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 13, bias=False)
    weight = model.weight.detach().clone()
    model.weight = torch.nn.Parameter(distribute_tensor(weight, mesh["tp"], [Shard(0)]))
    fully_shard(model, mesh=mesh["dp"])
    parameter = model.weight
    assert type(parameter.placements[0]) is _StridedShard
    everywhere = (mesh, (Replicate(), Replicate()))
    whole = tricomm.reshard(parameter.detach(), None, everywhere, timeout_seconds=30)
    assert whole is not None
    require_equal(whole, weight, f"rank {rank}")
    mover = Resharder((*everywhere, (13, 3), "float32"), parameter, timeout_seconds=30)
    with pytest.raises(SpecError, match=r"requires grad.*torch\.no_grad"):
        mover(whole, out=parameter)
    version = parameter._version
    with torch.no_grad():
        assert mover(whole * 2, out=parameter) is parameter
    assert parameter._version > version
    require_equal(parameter.full_tensor(), weight * 2, f"rank {rank}")
    units = distribute_tensor(torch.eye(3), mesh["tp"], [Replicate()])
    require_equal(model(units).full_tensor().detach(), (weight * 2).T.contiguous(), "the next forward sees it")


def test_fsdp2_parameters_are_read_and_written_in_place(ranks: Ranks) -> None:
    ranks.run(fsdp_parameters)


def under_way(rank: int) -> None:
    """A DTensor whose shard a collective of torch is still writing."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("x",))
    full = torch.arange(48.0).reshape(16, 3)
    rows = distribute_tensor(full, mesh, [Shard(0)])
    waiting = rows.redistribute(mesh, [Replicate()], async_op=True)
    moved = tricomm.reshard(waiting, None, (mesh, [Shard(1)]), timeout_seconds=30)
    assert moved is not None
    require_equal(moved, pick(full, ShardingSpec.from_placements(mesh, [Shard(1)], (16, 3)), rank), f"rank {rank}")
    alone = Resharder((mesh, [Replicate()], full.shape, full.dtype), (mesh, [Shard(1)]), timeout_seconds=30)
    many = Resharder({"w": waiting}, {"w": (mesh, [Shard(1)])}, timeout_seconds=30)
    for call in (alone, lambda shard: alone.start(shard).wait(), lambda shard: many({"w": shard})["w"]):
        shard = rows.redistribute(mesh, [Replicate()], async_op=True).to_local()
        assert type(shard) is AsyncCollectiveTensor
        assert torch.equal(call(shard), moved)
    rows.requires_grad_()
    again = tricomm.redistribute(rows.redistribute(mesh, [Replicate()], async_op=True), mesh, [Shard(1)])
    (again.to_local() * (1 + rank)).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.full_tensor(), torch.tensor([1.0, 2.0, 3.0]).expand(16, 3))


def test_a_shard_that_a_collective_still_writes_is_waited_for(ranks: Ranks) -> None:
    ranks.run(under_way)


def refused_together(rank: int) -> str:
    """One rank's DTensor has another layout; all are told."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("x",))
    rows = distribute_tensor(torch.arange(48.0).reshape(16, 3), mesh, [Shard(0)])
    mover = Resharder(rows, (mesh, [Replicate()]), timeout_seconds=30)
    columns = DTensor.from_local(torch.zeros(16, 1 if rank < 3 else 0), mesh, [Shard(1)], shape=(16, 3), stride=(3, 1))
    given = rows if rank else columns
    with pytest.raises(TricommError) as caught:
        mover(given)
    assert mover(rows) is not None
    return str(caught.value)


def test_a_dtensor_of_another_layout_is_refused_on_all_ranks(ranks: Ranks) -> None:
    for told in ranks.run(refused_together):
        assert "the tensor of rank 0 is a DTensor of float32[16, 3/x]" in told


def refusals_in_a_group(rank: int) -> None:
    if rank:
        return
    for name, (call, error, value, rule, remedy) in OF_A_GROUP.items():
        with pytest.raises(error) as caught:
            call()
        assert all(part in str(caught.value) for part in (value, rule, remedy)), (name, str(caught.value))


@pytest.mark.processes
def test_importing_tricomm_does_not_import_dtensor() -> None:
    code = "import sys, tricomm; mesh = tricomm.Mesh([0], ('x',))\n"
    code += "tricomm.make_plan((mesh, (tricomm.Shard(0),), (2,), 'int8'), (mesh, (tricomm.Replicate(),)))\n"
    code += "assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def one_process(call: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        call(0)
    finally:
        dist.destroy_process_group()


def test_refusals_of_redistribute() -> None:
    one_process(refusals_in_a_group)
