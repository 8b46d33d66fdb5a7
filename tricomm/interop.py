"""torch's own types: DTensor, DeviceMesh and placements, read and made. The only importer of torch.distributed.tensor.

That import takes a third of a second and more, so it happens when a value of these types is met or asked for. While the
module is not loaded nobody holds one, which is what is looked at first.
"""

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tricomm.errors import ArgumentError, SpecError, shown

if TYPE_CHECKING:
    import torch


class TorchLayout(NamedTuple):
    """What a DTensor says of its layout.

    Attributes:
        device_mesh, placements: as in torch.
        shape: global.
        dtype: torch's.
        is_ordered: whether strided placements say in which order mesh axes cut, or are to be taken word by word.
        order: the mesh axes that cut each dim, first cut first, where that is not the order of the axes.
    """

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    is_ordered: bool
    order: tuple[int, ...] | None


class TorchPlacement(NamedTuple):
    """A placement of torch in plain words.

    Attributes:
        kind: "shard", "strided", "replicate" or "partial".
        dim: of a shard.
        split_factor: of a strided one.
        op: of a sum and the like.
    """

    kind: str
    dim: int = 0
    split_factor: int = 1
    op: str = "sum"


def _loaded() -> Any:
    """torch.distributed.tensor if it has been imported by anybody, else None."""
    return sys.modules.get("torch.distributed.tensor")


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; imports nothing."""
    module = _loaded()
    return module is not None and isinstance(value, getattr(module, "DTensor", ()))


def is_device_mesh(value: object) -> bool:
    """Whether a value is torch's DeviceMesh; imports nothing."""
    module = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(value, getattr(module, "DeviceMesh", ()))


def is_waiting(value: object) -> bool:
    """Whether a value is what torch wraps around a tensor that a collective is still writing; imports nothing."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and isinstance(value, module.AsyncCollectiveTensor)


def is_wrapped(value: object) -> bool:
    """Whether what has to be moved is inside of a value: it is a DTensor, or still written by a collective of torch."""
    return is_dtensor(value) or is_waiting(value)


def wrapper_types() -> tuple[type, ...]:
    """The types of which ``is_wrapped`` holds. Imports them."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    return (DTensor, AsyncCollectiveTensor)


def ready(tensor: Any) -> Any:
    """A local tensor without what torch wraps around one that a collective is still writing; for autograd too."""
    if not is_waiting(tensor):
        return tensor
    return _waited().apply(tensor) if records(tensor) else tensor.wait()


@cache
def _waited() -> Any:
    """The function of autograd that waits; the gradient goes back as it comes."""
    import torch

    class Waited(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            return tensor.wait()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient

    return Waited


def local_of(dtensor: Any, grad_placements: Sequence[Any] | None = None) -> Any:
    """This rank's shard of a DTensor, for autograd too; it shares the DTensor's memory."""
    if records(dtensor):
        return ready(dtensor.to_local(grad_placements=grad_placements))
    return ready(dtensor._local_tensor.detach())


def records(tensor: Any) -> bool:
    """Whether autograd records what is done with a tensor."""
    import torch

    return bool(tensor.requires_grad and torch.is_grad_enabled())


def describe_dtensor(dtensor: Any) -> TorchLayout:
    """Read a DTensor's layout."""
    spec = dtensor._spec
    is_ordered = bool(getattr(spec, "use_strided_shard_as_shard_order", True))
    order: list[int] = []
    if not any(type(placement).__name__ == "_StridedShard" for placement in spec.placements):
        for entry in getattr(spec, "shard_order", None) or ():
            order += entry.mesh_dims
    rest = [axis for axis in range(len(spec.placements)) if axis not in order]
    return TorchLayout(
        spec.mesh,
        tuple(spec.placements),
        tuple(dtensor.shape),
        dtensor.dtype,
        is_ordered,
        (*order, *rest) if order else None,
    )


def mesh_of(device_mesh: Any, group: Any = None) -> tuple[Any, tuple[str, ...]]:
    """(nested ranks, axis names) of a DeviceMesh.

    Args:
        device_mesh: torch's; it names ranks of the whole job.
        group: a process group whose ranks are wanted instead.

    Raises:
        SpecError: a rank of the mesh is not in the group; an ArgumentError for another kind of group.
    """
    import torch.distributed as dist

    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(f"group={shown(group)} is not a process group of torch; pass what new_group gave, or None")
    names = device_mesh.mesh_dim_names or tuple(f"dim_{axis}" for axis in range(device_mesh.ndim))
    ranks = device_mesh.mesh.tolist()
    return (ranks if group is None else _in_group(ranks, group, device_mesh)), tuple(names)


def _in_group(ranks: Any, group: Any, device_mesh: Any) -> Any:
    import torch.distributed as dist

    if isinstance(ranks, list):
        return [_in_group(one, group, device_mesh) for one in ranks]
    try:
        return dist.get_group_rank(group, ranks)
    except ValueError:
        raise SpecError(
            f"rank {ranks} of {device_mesh!r} is not in the given process group; pass the group that has all its "
            "ranks, or None for that of the whole job"
        ) from None


def real_placement(placement: object) -> object:
    """A placement as it was made: torch 2.13 hands on a stand-in of one made in a compiled function behind an operation
    on a DTensor.
    """
    return getattr(placement, "real_obj", placement) if type(placement).__name__ == "FakeScriptObject" else placement


def read_placement(placement: object) -> TorchPlacement | None:
    """A placement of torch in plain words; None if it is none of torch's.

    Raises:
        SpecError: one whose meaning depends on more than the layout, or a reduction without a name.
    """
    placement = real_placement(placement)
    if not type(placement).__module__.startswith("torch.distributed"):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    found: Any = placement
    if type(placement) is Shard:
        return TorchPlacement("shard", found.dim)
    if type(placement) is _StridedShard:
        return TorchPlacement("strided", found.dim, found.split_factor)
    if type(placement) is Replicate:
        return TorchPlacement("replicate")
    if type(placement) is Partial:
        return TorchPlacement("partial", op=str(found.reduce_op))
    raise SpecError(
        f"{placement!r} is a {type(placement).__name__}, which is not reduced or cut by its layout alone; redistribute "
        "the DTensor to Replicate() on that axis first"
    )


def make_placement(described: TorchPlacement) -> Any:
    """The placement of torch that plain words describe."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if described.kind == "shard":
        return Shard(described.dim)
    if described.kind == "strided":
        return _StridedShard(described.dim, split_factor=described.split_factor)
    return Replicate() if described.kind == "replicate" else Partial(described.op)


def make_dtensor(local: Any, device_mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    """A DTensor around a contiguous shard; off the mesh, around none, as torch has it.

    Args:
        local: this rank's shard, or an empty one of shape (0,) off the mesh; it may require grad.
        device_mesh, placements: of the DTensor.
        shape: global.
    """
    import torch
    from torch.distributed.tensor import DTensor

    stride: list[int] = [1]
    for extent in reversed(tuple(shape)[1:]):
        stride.insert(0, stride[0] * max(extent, 1))
    return DTensor.from_local(
        local,
        device_mesh,
        tuple(placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride[: len(tuple(shape))]),
    )


@lru_cache(maxsize=256)
def kept_mesh(device_mesh: Any) -> tuple[Any, tuple[str, ...]]:
    """As :func:`mesh_of` in the ranks of the whole job, read once for equal meshes."""
    return mesh_of(device_mesh)


def check_device_mesh(value: object) -> None:
    """Refuse what is not a DeviceMesh.

    Raises:
        ArgumentError: it is none.
    """
    if not is_device_mesh(value):
        raise ArgumentError(f"device_mesh={shown(value)} is not a DeviceMesh of torch; pass what init_device_mesh gave")
