"""DTensors at the boundaries of a stage: what arrives is wrapped, what leaves is looked at and taken apart."""

from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.interop import is_dtensor, local_of, make_dtensor
from tricomm.layout.sides import shard_of
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.copy_program import torch_dtype


def wrapped(shard: torch.Tensor, spec: ShardingSpec, device_mesh: Any) -> torch.Tensor:
    """A shard that arrived as a DTensor, a leaf; as it is if the stage has no DeviceMesh.

    Args:
        shard: this rank's.
        spec: its layout.
        device_mesh: of the stage, or None.
    """
    if device_mesh is None:
        return shard
    found: torch.Tensor = make_dtensor(shard, device_mesh, spec.to_placements(), spec.global_shape)
    return found


def shard_to_send(tensor: torch.Tensor, spec: ShardingSpec, rank: int) -> torch.Tensor:
    """The shard of what a stage computed.

    Raises:
        SpecError: it is a DTensor of another layout than the edge says.
    """
    found: torch.Tensor = shard_of(tensor.detach(), spec, rank, None, "the output")
    return found


def gradient_to_send(
    gradient: torch.Tensor | None, spec: ShardingSpec, rank: int, device: torch.device
) -> torch.Tensor:
    """The shard of the gradient of what arrived, brought to the layout in which it travels; zeros if there is none.

    Args:
        gradient: what autograd found.
        spec: the layout.
        rank: this one.
        device: of the stage.
    """
    if gradient is None:
        return torch.zeros(spec.local_shape(rank), dtype=torch_dtype(spec.element_type), device=device)
    if not is_dtensor(gradient):
        return gradient
    found: Any = gradient
    wanted = spec.to_placements()
    if tuple(found.placements) != wanted:
        found = found.redistribute(placements=wanted)
    shard: torch.Tensor = local_of(found.detach())
    return shard


def check_stage_mesh(device_mesh: Any, specs: list[ShardingSpec]) -> None:
    """Whether the tensors of a stage lie on its DeviceMesh.

    Raises:
        SpecError: one has other ranks, or axes of another shape.
    """
    if device_mesh is None:
        return
    nested = device_mesh.mesh
    for spec in specs:
        if tuple(nested.shape) != spec.mesh.shape or tuple(nested.flatten().tolist()) != spec.mesh.ranks:
            raise SpecError(
                f"device_mesh={device_mesh!r} is not the mesh of {spec}, which arrives at the stage or leaves it; pass "
                "the DeviceMesh of the stage, or write the edge with Mesh.of(device_mesh)"
            )
