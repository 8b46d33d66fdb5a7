"""What a user writes, checked by ``mypy --strict`` against an installed tricomm; it is never run."""

from typing import assert_type

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

import tricomm
from tricomm import Handle, Mesh, Plan, Replicate, Resharder, Shard, ShardingSpec
from tricomm.kernels.boxes import Boxes
from tricomm.kernels.pack import Table, pack
from tricomm.pipeline import EdgeTensor, Executor, Stage, eager_one_f_one_b

trainer = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
server = Mesh([4, 5, 6, 7], ("tp",))
source = ShardingSpec(trainer, [Replicate(), Shard(0)], [8, 6], torch.bfloat16)
destination = ShardingSpec(server, (Shard(1),), dtype=torch.float32)
shard = torch.zeros(4, 6, dtype=torch.bfloat16)

plan = tricomm.make_plan(source, destination, strategy=tricomm.Broadcast(chunk_bytes=1 << 20))
assert_type(plan, Plan)
assert_type(tricomm.reshard(shard, source, destination, timeout_seconds=60.0), torch.Tensor | None)
assert_type(tricomm.reshard_async(None, source, destination), Handle)
assert_type(tricomm.reshard({"w": shard}, {"w": source}, {"w": destination}), dict[str, torch.Tensor])
many = tricomm.reshard_async({"w": shard}, {"w": source}, {"w": destination})
assert_type(many, Handle[dict[str, torch.Tensor]])
assert_type(many.wait()["w"], torch.Tensor)
assert_type(tricomm.local_shard(shard, source, 0), torch.Tensor)
with Resharder(source, destination, confirm=True, strategy=tricomm.Auto()) as mover:
    assert_type(mover(shard), torch.Tensor | None)
    assert_type(mover.start(shard).wait(), torch.Tensor | None)
with Resharder({"w": source}, {"w": destination}) as pusher:
    assert_type(pusher({"w": shard}), dict[str, torch.Tensor])
    assert_type(pusher(only=["w"]), dict[str, torch.Tensor])
    assert_type(pusher.start().wait(), dict[str, torch.Tensor])
    assert_type(pusher.only(["w"]).reverse().start({"w": shard}).join(), dict[str, torch.Tensor])
    started: list[Handle[object]] = [many, pusher.start(depends_on=[many])]
assert_type(tricomm.pipeline.gpipe(2, 4), tricomm.pipeline.Schedule)
assert_type(tricomm.draw.plan_svg(plan), str)

first, last = Mesh([0], ("dp",)), Mesh([1, 2], ("dp",))
hidden = EdgeTensor(
    ShardingSpec(first, (Replicate(),), (16, 64), torch.bfloat16),
    ShardingSpec(last, (Shard(0),)),
)
stages = [
    Stage(first, ("x",), ("hidden",), nn.Linear(64, 64)),
    Stage(last, ("hidden",), ("loss",), None),
]
executor = Executor(eager_one_f_one_b(2, 8, split=True), stages, {(0, 1): {"hidden": hidden}})
assert_type(executor.step({"x": torch.zeros(8, 16, 64)}), torch.Tensor | None)


def packed(tensor: torch.Tensor, boxes: Boxes, buffer: torch.Tensor) -> Table:
    table = Table(boxes)
    pack([tensor], table, buffer)
    return table


def pushed(weight: DTensor, mesh: DeviceMesh) -> None:
    assert_type(tricomm.make_plan(weight, (mesh, [TorchShard(0)])), Plan)
    assert_type(tricomm.reshard(weight, None, (mesh, [TorchShard(1)])), torch.Tensor | None)
    back = Resharder(weight, (mesh, [TorchShard(0)]), differentiable=True)
    assert_type(back(weight), torch.Tensor | None)
    assert_type(back.gradient(), Resharder)
    tricomm.backward(weight.sum())
    tricomm.redistribute(weight, mesh, [TorchShard(0)], dtype=torch.bfloat16)
