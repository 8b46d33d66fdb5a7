"""torch's meshes, placements and DTensors that are refused."""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _MaskPartial, _StridedShard

import tricomm
from tests.refusals.common import COLUMNS, GRID, ROWS, Refusal
from tricomm import ArgumentError, Mesh, Options, Partial, Replicate, Shard, ShardingSpec, SpecError, make_plan
from tricomm.autograd import layouts as autograd
from tricomm.layout.sides import as_spec, shards_of
from tricomm.layout.torch_layout import read_placements
from tricomm.plan.ends.ends import Ends
from tricomm.plan.stacks import Item

TORCH_GRID = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"), _init_backend=False, _rank=0)
TORCH_ROWS = DTensor.from_local(
    torch.zeros(4, 4), DeviceMesh("cpu", [0, 1], _init_backend=False, _rank=0), [TorchShard(0)], run_check=False
)
LEARNED = DTensor.from_local(torch.zeros(4, 4), TORCH_ROWS.device_mesh, [TorchShard(0)]).requires_grad_()
ODD = _StridedShard(0, split_factor=3)


def on_grid(*placements: Any, shape: Any = (8, 4), **options: Any) -> ShardingSpec:
    return ShardingSpec.from_placements(TORCH_GRID, placements, shape, "float32", **options)


def segmented(*segments: int) -> Any:
    mesh = Mesh([[[0, 1], [2, 3]]], ("pp", "dp", "tp"))
    spec = ShardingSpec(mesh, (Shard(0, segments), Shard(1), Shard(1)), (8, 4), "float32", ("pp", "tp", "dp"))
    return spec.to_placements()


def shards(tensor: Any, out: Any = None, spec: ShardingSpec = ROWS) -> Any:
    return shards_of(tensor, out, Ends.of([Item("", spec, ROWS)]), 0, None)


# fmt: off
REFUSALS: dict[str, Refusal] = {
    # mesh.py and interop.py
    "mesh of a list": (lambda: Mesh.of([0, 1]), ArgumentError, "[0, 1]", "not a DeviceMesh", "init_device_mesh"),
    "mesh index": (lambda: Mesh.of(TORCH_GRID, tp=2), SpecError, "tp=2", "not an index", "use 0 to 1"),
    "mesh group": (lambda: Mesh.of(TORCH_GRID, group="all"), ArgumentError,
        "'all'", "not a process group", "new_group"),
    "masked partial": (lambda: on_grid(_MaskPartial(), TorchReplicate()), SpecError,
        "_MaskPartial", "not reduced or cut by its layout alone", "redistribute the DTensor to Replicate()"),
    # torch_layout.py
    "placements in one string": (lambda: on_grid_of("S0"), ArgumentError, "'S0'", "not a sequence", "one per mesh"),
    "too few placements": (lambda: on_grid(TorchShard(0)), SpecError, "1 placements", "2 axes", "one placement per"),
    "a placement of nobody": (lambda: on_grid(0, 1), ArgumentError, "placement 0", "neither", "Replicate()"),
    "a product": (lambda: on_grid(TorchPartial("product"), TorchReplicate()), SpecError,
        "'product'", "sum, avg, max, min", "redistribute"),
    "dim of a placement": (lambda: on_grid(TorchShard(2), TorchReplicate()), SpecError,
        "dim 2", "shape (8, 4)", "use a dim"),
    "strided, no shape": (lambda: on_grid(ODD, TorchShard(0), shape=None), SpecError,
        "sf=3", "only with the tensor's shape", "give the shape"),
    "strided beside a sum": (
        lambda: ShardingSpec.from_placements(
            Mesh([[[0, 1], [2, 3]]], ("pp", "dp", "tp")), (TorchPartial(), TorchShard(0), ODD), (8, 4), "float32"),
        SpecError, "Partial('sum')", "no order of cuts", "redistribute"),
    "segments without a word": (lambda: segmented(6, 2), SpecError,
        "segments=(6, 2)", "no placement for", "keep the ShardingSpec"),
    "segments like an order": (lambda: segmented(4, 4), SpecError,
        "(4, 4)", "order of cuts", "keep the ShardingSpec"),
    # spec.py
    "mesh of placements": (lambda: ShardingSpec.from_placements([0], (TorchShard(0),)), ArgumentError,
        "[0]", "neither a DeviceMesh nor a Mesh", "init_device_mesh"),
    "no DTensor": (lambda: ShardingSpec.from_dtensor(3), ArgumentError, "3", "not a DTensor", "write ShardingSpec"),
    "explicit to placements": (
        lambda: ShardingSpec.explicit({0: (((0, 8),),)}, (8,)).to_placements(), SpecError,
        "explicit", "no placements for", "keep the ShardingSpec"),
    # sides.py
    "a side of three": (lambda: as_spec((TORCH_GRID, (), (8,))), ArgumentError, "3 parts", "neither", "write one"),
    "a DTensor of other ranks": (lambda: shards(TORCH_ROWS, spec=ShardingSpec(Mesh([0, 2], ("x",)), (Shard(0),),
        (8, 4), "float32")), SpecError, "the tensor of rank 0", "ranks differ", "redistribute it"),
    "a DTensor of another shape": (lambda: shards(TORCH_ROWS, spec=ShardingSpec(ROWS.mesh, (Shard(0),), (6, 4),
        "float32")), SpecError, "float32[8/dim_0, 4]", "shape or dtype differ", "redistribute it"),
    "a DTensor cut otherwise": (lambda: shards(TORCH_ROWS, spec=ShardingSpec(ROWS.mesh, (Shard(1),), (8, 4),
        "float32")), SpecError, "float32[8/dim_0, 4]", "rank 0 holds", "redistribute it"),
    "a DTensor that is no sum": (lambda: shards(
        DTensor.from_local(torch.zeros(8, 4), TORCH_ROWS.device_mesh, [TorchReplicate()], run_check=False),
        spec=ShardingSpec(ROWS.mesh, (Partial(),), (8, 4), "float32")), SpecError,
        "replicated", "partial where the other", "redistribute it"),
    "a learned DTensor as out": (lambda: shards(TORCH_ROWS, LEARNED), SpecError,
        "out of rank 0", "requires grad", "torch.no_grad()"),
    # autograd.py
    "gradients cut otherwise": (lambda: gradients(Shard(0)), SpecError,
        "Shard(0)", "lies as the result does", "or is Partial()"),
    "gradients of a maximum of replicas": (lambda: gradients(Partial("max")), SpecError,
        "Partial('max')", "on axis 'x'", "or is Partial()"),
    "gradients of an explicit result": (lambda: autograd.gradient_specs(
        ROWS, ShardingSpec.explicit({2: (((0, 8),), ((0, 4),))}, (8, 4), "float32"), (Replicate(),)), SpecError,
        "Replicate()", "cannot be those of", "leave them out"),
    "differentiable": (lambda: Options(differentiable=1), ArgumentError,
        "differentiable=1", "no truth value", "pass True or False"),
    "grad_placements": (lambda: Options(grad_placements="Partial"), ArgumentError,
        "'Partial'", "not a sequence", "one per mesh axis"),
    "grad_placements of other kinds": (lambda: Options(grad_placements=(3,)), ArgumentError,
        "has 3", "no placement", "write Shard(0)"),
    "strides neither way": (lambda: ShardingSpec.from_placements(GRID, (), strided_as_order=3), ArgumentError,
        "strided_as_order=3", "no truth value", "pass True or False"),
    "gradients of integers": (lambda: autograd.check_differentiable_layouts(
        make_plan(replace(ROWS, dtype="int32"), COLUMNS), None), SpecError,
        "int32", "has no gradients", "leave differentiable out"),
}
# fmt: on


def gradients(placement: Any) -> Any:
    whole = ShardingSpec(Mesh([2, 3], ("x",)), (Replicate(),), (8, 4), "float32")
    return autograd.gradient_specs(ROWS, whole, (placement,))


def on_grid_of(placements: Any) -> Any:
    return read_placements(GRID, placements, (8, 4))


OF_A_GROUP: dict[str, Refusal] = {
    "redistribute a tensor": (
        lambda: tricomm.redistribute(torch.zeros(8, 4), TORCH_GRID, (TorchShard(0), TorchShard(0))),
        ArgumentError,
        "this is a Tensor",
        "moves a DTensor",
        "call tricomm.reshard",
    ),
    "redistribute to a list": (
        lambda: tricomm.redistribute(None, [0], (TorchShard(0),)),
        ArgumentError,
        "[0]",
        "neither a DeviceMesh nor a Mesh",
        "pass one of these",
    ),
    "redistribute from nowhere": (
        lambda: tricomm.redistribute(None, TORCH_GRID, (TorchShard(0), TorchShard(0))),
        SpecError,
        "holds no DTensor",
        "cannot know",
        "pass source=",
    ),
    "redistribute without a shape": (
        lambda: tricomm.redistribute(
            None, Mesh([0], ("x",)), (TorchShard(0),), source=(Mesh([0], ("x",)), (Shard(0),))
        ),
        SpecError,
        "source=(Mesh([0]",
        "has no shape or dtype",
        "write source=",
    ),
    "redistribute to a mesh of one's own": (
        lambda: tricomm.redistribute(
            None, Mesh([0], ("x",)), (TorchShard(0),), source=(Mesh([0], ("x",)), (Shard(0),), (4,), "float32")
        ),
        ArgumentError,
        "rank 0 is in",
        "a Mesh is not enough",
        "pass the DeviceMesh",
    ),
}
"""Refusals that need a process group."""
