"""Shards of a full tensor."""

import torch

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.kinds import explains_missing
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.copy_program import torch_dtype
from tricomm.plan.arguments import check_spec


@explains_missing
def local_shard(tensor: torch.Tensor, spec: ShardingSpec, rank: int) -> torch.Tensor:
    """Cut out the shard that ``rank`` holds of a full tensor (for a Partial spec: its region, not a contribution).

    Args:
        tensor: the full tensor, ``spec.shape``.
        spec: the layout.
        rank: of its mesh.

    Raises:
        SpecError: the tensor does not have the spec's shape or dtype, or the rank is not on its mesh; an ArgumentError
            where an argument is of the wrong kind.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> columns = ShardingSpec(Mesh([0, 1], ("tp",)), [Shard(1)], (2, 6), "int64")
        >>> local_shard(torch.arange(12).reshape(2, 6), columns, rank=1)
        tensor([[ 3,  4,  5],
                [ 9, 10, 11]])
    """
    check_spec("spec", spec)
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"tensor={shown(tensor)} is not a torch.Tensor; pass the full tensor of {spec}")
    if tuple(tensor.shape) != spec.global_shape:
        raise SpecError(f"tensor of shape {tuple(tensor.shape)} is not the full tensor of {spec}; pass all of it")
    if spec.dtype is not None and tensor.dtype != (dtype := torch_dtype(spec.dtype)):
        raise SpecError(
            f"tensor has dtype {tensor.dtype}, and its spec says {dtype}; pass tensor.to({dtype}) or change the spec"
        )
    shard = tensor
    for dim, intervals in enumerate(spec.holding(rank)):
        pieces = [shard.narrow(dim, start, stop - start) for start, stop in intervals]
        shard = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else shard.narrow(dim, 0, 0)
    return shard.contiguous()
