"""redistribute: DTensor in, DTensor out, from any DeviceMesh to any other."""

from typing import Any, Unpack

import torch

from tricomm.compiled.outside import eagerly
from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.interop import is_device_mesh, is_dtensor, make_dtensor, read_placement, real_placement
from tricomm.kinds import explains_missing
from tricomm.layout.mesh import Mesh
from tricomm.layout.sides import Side, as_specs, spec_of
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions
from tricomm.packing.copy_program import torch_dtype
from tricomm.reshard import reshard
from tricomm.transport.group import context_of, is_whole_job, resolve_group
from tricomm.transport.telling import tell_all


@explains_missing
def redistribute(
    dtensor: torch.Tensor | None,
    device_mesh: Any,
    placements: Any,
    *,
    source: Side | None = None,
    dtype: "torch.dtype | str | None" = None,
    **options: Unpack[ReshardOptions],
) -> Any:
    """Move a DTensor to another layout, on the same DeviceMesh or on one of other ranks, which torch refuses.

    Called by every rank of either mesh, as :func:`tricomm.reshard`. Gradients come back as they do there.

    Args:
        dtensor: what is moved; None on ranks that hold none of it.
        device_mesh: where to. A rank that is not in it passes ``Mesh.of(root, pp=1)`` where it has no such DeviceMesh.
        placements: of the result, one per axis of the mesh; torch's, or tricomm's.
        source: the layout of what is moved, ``(mesh, placements, shape, dtype)``; needed where ``dtensor`` is None.
        dtype: of the result; None keeps it.
        options: those of :class:`tricomm.Options`.

    Returns:
        The DTensor. Off the mesh, one around an empty shard, with the global shape, as torch has it; None there if a
        Mesh was passed.

    Raises:
        SpecError: no layout to move from, or one that contradicts the DTensor.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> trainer = DeviceMesh("cpu", [0], mesh_dim_names=("dp",))
        >>> server = DeviceMesh("cpu", [[0]], mesh_dim_names=("dp", "tp"))
        >>> weight = distribute_tensor(torch.ones(2, 3), trainer, [Shard(0)])
        >>> redistribute(weight, server, [Replicate(), Shard(1)]).placements
        (Replicate(), Shard(dim=1))
        >>> dist.destroy_process_group()
    """
    if torch.compiler.is_compiling():
        return eagerly(redistribute, dtensor, device_mesh, placements, source=source, dtype=dtype, **options)
    group = resolve_group(options.get("group"))
    specs: tuple[Any, Any] = (source, None)
    try:
        if "out" in options:
            raise ArgumentError(
                "redistribute has no option 'out', as it makes a new DTensor; write reshard(dtensor, source, None, "
                "out=out), which writes into one that is there"
            )
        Options.of(options, "redistribute")
        specs = _specs(dtensor, device_mesh, placements, source, dtype, None if is_whole_job(group) else group)
        _check_holder(device_mesh, specs[1], context_of(group).rank)
        of_result = _in_torch(placements, specs[1])
    except BaseException as error:
        tell_all(context_of(group), error, options, *specs)
        raise
    moved = reshard(dtensor, *specs, **options)
    if isinstance(device_mesh, Mesh):
        return None
    if moved is None:
        moved = torch.empty(0, dtype=torch_dtype(specs[1].element_type), device=device_mesh.device_type)
    return make_dtensor(moved, device_mesh, of_result, specs[1].global_shape)


def _specs(
    dtensor: Any, device_mesh: Any, placements: Any, source: Any, dtype: Any, group: Any
) -> tuple[ShardingSpec, ShardingSpec]:
    if dtensor is not None and not is_dtensor(dtensor):
        raise ArgumentError(
            f"redistribute moves a DTensor, and this is a {type(dtensor).__name__}; pass a DTensor, or None with "
            "source=..., or call tricomm.reshard with plain shards"
        )
    if not is_device_mesh(device_mesh) and not isinstance(device_mesh, Mesh):
        raise ArgumentError(f"device_mesh={shown(device_mesh)} is neither a DeviceMesh nor a Mesh; pass one of these")
    if source is None:
        if dtensor is None:
            raise SpecError(
                "this rank holds no DTensor and cannot know where the tensor is; pass source=(mesh, placements, shape, "
                "dtype), which every rank may pass"
            )
        source = spec_of(dtensor, group)
    found, _ = as_specs(source, None, group)
    if not isinstance(found, ShardingSpec) or found.shape is None or found.dtype is None:
        raise SpecError(f"source={source!r} has no shape or dtype; write source=(mesh, placements, shape, dtype)")
    dtype = found.dtype if dtype is None else dtype
    target = ShardingSpec.from_placements(device_mesh, placements, found.shape, dtype, group=group)
    return found, target


def _check_holder(device_mesh: Any, target: ShardingSpec, rank: int) -> None:
    """Refuse a Mesh on a rank that is in it, which gets a DTensor and needs torch's mesh for that."""
    if isinstance(device_mesh, Mesh) and rank in target.mesh:
        raise ArgumentError(
            f"rank {rank} is in {device_mesh} and gets a DTensor, for which a Mesh is not enough; pass the DeviceMesh"
        )


def _in_torch(placements: Any, target: ShardingSpec) -> tuple[Any, ...]:
    """The placements of the result: as given where they are torch's."""
    if all(read_placement(one) is not None for one in placements):
        return tuple(map(real_placement, placements))
    return target.to_placements()
