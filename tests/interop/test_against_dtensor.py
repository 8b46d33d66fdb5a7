"""Where DTensor can do a move itself, tricomm does the same: every rank gets the same shard, bit for bit."""

import math
import random
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed import multi_threaded_pg as threaded

import tricomm
from tests.interop.layouts import EXTENTS, cut_in_order
from tests.oracle import require_equal
from tricomm import LocalTransport, Mesh, ShardingSpec, make_plan
from tricomm.launch import Ranks
from tricomm.layout.placement import REDUCTIONS

ON_THREADS, ON_GLOO = 500, 60
if not hasattr(threaded.ThreadLocalWorld, "comms"):  # torch 2.11 forgot there what its destroy_process_group asks for
    threaded.ThreadLocalWorld.comms = []
THREADS = 6
MESHES = ((6,), (2, 3), (3, 2), (1, 6), (6, 1), (1, 2, 3), (2, 3, 1), (3, 1, 2))
OPS = (("sum",), ("sum", "avg"), ("avg",), ("max",), ("min",))
"""Reductions that one source may have: torch mixes sums and averages over axes, and nothing else."""
GLOO_MESHES = ((8,), (2, 4), (4, 2), (2, 2, 2))


@dataclass(frozen=True)
class Case:
    """A move within one mesh of all ranks."""

    mesh_shape: tuple[int, ...]
    shape: tuple[int, ...]
    source: tuple[Placement, ...]
    destination: tuple[Placement, ...]

    @property
    def mesh(self) -> Mesh:
        ranks = torch.arange(math.prod(self.mesh_shape)).reshape(self.mesh_shape).tolist()
        return Mesh(ranks, tuple("abc"[: len(self.mesh_shape)]))

    @property
    def ops(self) -> set[str]:
        """What reduces the contributions."""
        return {one.reduce_op for one in self.source if isinstance(one, Partial)}

    @property
    def reduced(self) -> tuple[Placement, ...]:
        """The source as it lies when the contributions are reduced where they are."""
        return tuple(Replicate() if isinstance(one, Partial) else one for one in self.source)

    def source_shard(self, rank: int) -> torch.Tensor:
        """What a rank holds: whole numbers, which are summed without rounding, and multiples of 720, whose average over
        up to 8 is whole; contributions differ, and which is the largest differs by element.
        """
        full = torch.arange(math.prod(self.shape), dtype=torch.float64).reshape(self.shape)
        if self.ops:
            coordinate = self.mesh.coordinate(rank)
            salt = [index + 1 for index, one in zip(coordinate, self.source, strict=True) if isinstance(one, Partial)]
            full = (full + 1) * (7 * math.prod(salt) + sum(salt)) % 101 * 720
        shard = full
        for axis in order_of(self.source, self.mesh_shape):
            placement = self.source[axis]
            parts, _ = Shard(placement.dim)._split_tensor(shard, self.mesh_shape[axis], with_padding=False)
            shard = parts[self.mesh.coordinate(rank)[axis]]
        return shard.contiguous()


class SizesOf:
    """What torch asks of a mesh when it reads an order of cuts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def size(self, axis: int) -> int:
        return self._shape[axis]


def order_of(placements: tuple[Placement, ...], mesh_shape: tuple[int, ...]) -> list[int] | None:
    """The mesh axes that cut, in torch's order; None for strided placements that describe none."""
    found = DTensorSpec._maybe_convert_StridedShard_to_shard_order(placements, SizesOf(mesh_shape))
    return None if found is None else [axis for entry in found for axis in entry.mesh_dims]


def draw_placements(choose: random.Random, mesh_shape: tuple[int, ...], dims: int, ops: Sequence[str]) -> Any:
    """Axes cut in any order, which torch writes with strided placements; of others DTensor finds no whole tensor. And
    axes over which one of the given reductions is left to do.
    """
    found: list[Placement] = []
    for _ in mesh_shape:
        kind = choose.choice(("shard", "shard", "shard", "replicate", "partial" if ops else "shard"))
        if kind == "shard":
            found.append(Shard(choose.randrange(dims)))
        else:
            found.append(Replicate() if kind == "replicate" else Partial(choose.choice(ops)))
    entries = []
    for dim in range(dims):
        axes = [axis for axis, one in enumerate(found) if isinstance(one, Shard) and one.dim == dim]
        if axes:
            entries.append(ShardOrderEntry(tensor_dim=dim, mesh_dims=tuple(choose.sample(axes, len(axes)))))
    return DTensorSpec._convert_shard_order_to_StridedShard(tuple(entries), tuple(found), SizesOf(mesh_shape))


def draw_cases(count: int, meshes: tuple[tuple[int, ...], ...], seed: int) -> list[Case]:
    choose = random.Random(seed)
    cases = []
    for number in range(count):
        mesh_shape = choose.choice(meshes)
        shape = tuple(choose.choice(EXTENTS) for _ in range(choose.randint(1, 3)))
        source = draw_placements(choose, mesh_shape, len(shape), OPS[number % len(OPS)])
        cases.append(Case(mesh_shape, shape, source, draw_placements(choose, mesh_shape, len(shape), ())))
    strided = [case for case in cases if any(isinstance(p, _StridedShard) for p in (*case.source, *case.destination))]
    assert len(strided) > count // 10
    for op in REDUCTIONS:
        assert sum(op in case.ops for case in cases) > count // 30, f"few sources are to be reduced by {op}"
    return cases


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def moved_by_dtensor(case: Case, mesh: DeviceMesh, rank: int, reduce_first: bool = False) -> tuple[DTensor, DTensor]:
    """(before, after)"""
    before = DTensor.from_local(
        case.source_shard(rank),
        mesh,
        case.source,
        run_check=False,
        shape=torch.Size(case.shape),
        stride=contiguous_stride(case.shape),
    )
    reduced = before.redistribute(mesh, case.reduced) if reduce_first else before
    return before, reduced.redistribute(mesh, case.destination)


def on_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Run a function as every rank of a process group whose ranks are threads of this process."""
    store, results, failures = dist.HashStore(), [None] * size, []

    def rank_of(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            results[rank] = function(rank)
        except BaseException as error:
            failures.append(traceback.format_exc())
            threaded.ProcessLocalGroup.exception_handle(error)  # the other threads do not wait for this one
        finally:
            dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
        assert not failures, failures[0]
        assert not any(thread.is_alive() for thread in threads)
    finally:
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return results


def test_random_moves_end_as_in_dtensor() -> None:
    cases = draw_cases(ON_THREADS, MESHES, seed=0)

    def as_rank(rank: int) -> list[tuple[torch.Tensor, tuple[ShardingSpec, ShardingSpec]]]:
        meshes = {
            shape: DeviceMesh("cpu", torch.arange(THREADS).reshape(shape), mesh_dim_names=tuple("abc"[: len(shape)]))
            for shape in MESHES
        }
        found = []
        for case in cases:
            is_largest = bool(case.ops & {"max", "min"})  # which torch's threads do not reduce to shards
            before, after = moved_by_dtensor(case, meshes[case.mesh_shape], rank, reduce_first=is_largest)
            specs = (ShardingSpec.from_dtensor(before), ShardingSpec.from_dtensor(after))
            found.append((after.to_local().clone(), specs))
        return found

    by_rank = on_threads(THREADS, as_rank)
    for number, case in enumerate(cases):
        source, destination = by_rank[0][number][1]
        outputs = LocalTransport().run(
            make_plan(source, destination), {rank: case.source_shard(rank) for rank in range(THREADS)}
        )
        for rank in range(THREADS):
            expected, specs = by_rank[rank][number]
            assert specs == (source, destination)
            require_equal(outputs[rank], expected.contiguous(), f"{case}, rank {rank}")


def on_gloo(rank: int, cases: list[Case]) -> None:
    meshes = {
        shape: DeviceMesh("cpu", torch.arange(8).reshape(shape), mesh_dim_names=tuple("abc"[: len(shape)]))
        for shape in GLOO_MESHES
    }
    for case in cases:
        before, after = moved_by_dtensor(case, meshes[case.mesh_shape], rank)
        found = tricomm.redistribute(before, meshes[case.mesh_shape], case.destination, timeout_seconds=60)
        assert found.placements == after.placements
        assert found.shape == after.shape
        require_equal(found.to_local(), after.to_local().contiguous(), f"{case}, rank {rank}")


def test_random_moves_end_as_in_dtensor_on_gloo(ranks: Ranks) -> None:
    ranks.run(on_gloo, draw_cases(ON_GLOO, GLOO_MESHES, seed=1))


def test_the_splitting_is_torchs_own() -> None:
    """Both helpers cut the case of the facts alike: 7 rows, tp first and dp second."""
    case = Case((3, 2), (7,), (_StridedShard(0, split_factor=2), Shard(0)), (Replicate(), Replicate()))
    order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(case.source, SizesOf(case.mesh_shape))
    full = torch.arange(7, dtype=torch.float64)
    for rank in range(6):
        assert torch.equal(case.source_shard(rank), cut_in_order(full, case.mesh, order, rank))
