"""reshard and reshard_async: one call, compared by all ranks before anything is sent."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Unpack, overload

import torch

from tricomm.compiled.outside import eagerly
from tricomm.interop import is_dtensor
from tricomm.kinds import explains_missing
from tricomm.layout.sides import Side, Sides, as_specs
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions
from tricomm.packing.tensor_checker import Given, NamedTensors
from tricomm.plan.ends.mapped import items_and_ends
from tricomm.resharder import Resharder
from tricomm.transport.group import context_of, resolve_group
from tricomm.transport.handle import Handle
from tricomm.transport.telling import tell_all


def _one_shot(tensors: tuple[Any, Any], sides: tuple[Any, Any], given: ReshardOptions, caller: str) -> Resharder:
    """The Resharder of calls with these arguments, made in the first of them; the ranks meet in each."""
    group = resolve_group(given.get("group"))
    context = context_of(group)
    # As written before with these very objects, which do not change: nothing is hashed or compared in Python.
    written = (*map(id, sides), *given, *map(id, given.values()))
    known = context.as_written.get(written)
    if known is not None:
        same: Resharder = known[0]
        return same
    key = _quick_key(sides, given)
    if key is None:
        return _found(group, tensors, sides, given, caller)
    found: Resharder = context.kept(key, lambda: _found(group, tensors, sides, given, caller))
    context.note_written(written, found, key)
    return found


def _quick_key(sides: tuple[Any, Any], given: ReshardOptions) -> Hashable | None:
    """What tells calls of a group apart as written, which are checked once; None where that takes a closer look.

    Values of another type may be equal, and be refused. The group is left out, which nothing here keeps alive.
    """
    if not all(type(side) is ShardingSpec for side in sides):
        return None
    key = sides, tuple((name, type(value), value) for name, value in given.items() if name != "group")
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _found(
    group: Any, tensors: tuple[Any, Any], sides: tuple[Any, Any], given: ReshardOptions, caller: str
) -> Resharder:
    # A side that is left out is that of the DTensor that is read or written.
    source, destination = (
        one if side is None and is_dtensor(one) else side for one, side in zip(tensors, sides, strict=True)
    )
    try:
        source, destination = as_specs(source, destination, given.get("group"))
        options = Options.of(given, caller)
        items, ends = items_and_ends(source, destination, options.rules)
    except BaseException as error:
        tell_all(context_of(group), error, given, source, destination)
        raise
    confirm = True if options.confirm is None else options.confirm
    key = (
        items,
        ends if options.rules is not None else None,
        isinstance(source, Mapping),
        replace(options, group=None, confirm=confirm),
    )

    def make() -> Resharder:
        given = replace(options, group=group, confirm=confirm).given()
        return Resharder._made(source, destination, given, meets_always=True)

    found: Resharder = context_of(group).kept(key, make)
    return found


@overload
def reshard(
    tensor: torch.Tensor | None,
    source: Side | None,
    destination: Side | None,
    *,
    out: torch.Tensor | None = None,
    **options: Unpack[ReshardOptions],
) -> torch.Tensor | None: ...
@overload
def reshard(
    tensor: NamedTensors | None,
    source: Mapping[str, Side],
    destination: Mapping[str, Side],
    *,
    out: NamedTensors | None = None,
    **options: Unpack[ReshardOptions],
) -> dict[str, torch.Tensor]: ...
@explains_missing
def reshard(
    tensor: Given,
    source: Sides | None,
    destination: Sides | None,
    *,
    out: Given = None,
    **options: Unpack[ReshardOptions],
) -> Any:
    """Move a sharded tensor to another layout, on the same, other, or partly other ranks.

    Called by every rank of either mesh; others may call too and get None. Each call is checked: the ranks
    compare what they are about to do before anything is sent, and return only when all have what they need. Calls with
    equal layouts and options cannot be told apart if ranks make them in another order: give each its ``name``.

    Many tensors move at once as mappings by name, equal on all ranks and sides: then ``tensor`` and ``out`` have those
    that this rank holds, and so has the result. They share messages, and gradients do not come back.

    Args:
        tensor: this rank's shard, shape ``source.local_shape(rank)``, any strides; None off the source mesh.
            It is not changed. A DTensor stands for its shard.
        source, destination: layouts: a ShardingSpec, ``(DeviceMesh, placements, shape, dtype)`` in torch's words, or a
            DTensor that has it. The destination's shape and dtype default to the source's. None is the layout of
            ``tensor``, or of ``out``, where that is a DTensor.
        out: where the result goes, shape ``destination.local_shape(rank)``; None makes a new tensor. A DTensor is
            written in place: under ``torch.no_grad()`` it may be a parameter of FSDP2.
        options: those of :class:`tricomm.Options`.

    Returns:
        This rank's shard of the destination; None off the destination mesh. Of many tensors, those that this rank
        needs: {} off all destination meshes.

    Raises:
        SpecError: the layouts contradict each other, or the tensor is not the shard that its spec describes;
            nothing has been sent. An ArgumentError where there is no such option, or one of the wrong kind.
        PlanError: an element that is needed is held by nobody; nothing has been sent.
        TransportError: ranks call with different arguments, or one of them died, stopped or never called; the
            message names it. ``tensor`` is untouched, and ``out``, if given, holds garbage.

    Example:
        >>> import torch.distributed as dist
        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> mesh = Mesh([0], ("tp",))
        >>> rows = ShardingSpec(mesh, (Shard(0),), (2, 3), "float32")
        >>> whole = ShardingSpec(mesh, (Replicate(),), dtype="bfloat16")
        >>> reshard(torch.ones(2, 3), rows, whole)
        tensor([[1., 1., 1.],
                [1., 1., 1.]], dtype=torch.bfloat16)
        >>> weights = {"wq": torch.ones(2, 3), "wk": torch.zeros(2, 3)}
        >>> moved = reshard(weights, dict.fromkeys(weights, rows), dict.fromkeys(weights, whole))
        >>> {name: float(tensor.sum()) for name, tensor in moved.items()}
        {'wk': 0.0, 'wq': 6.0}
        >>> dist.destroy_process_group()
    """
    if torch.compiler.is_compiling():
        return eagerly(reshard, tensor, source, destination, out=out, **options)
    mover: Any = _one_shot((tensor, out), (source, destination), options, "reshard")
    return mover(tensor, out=out)


@overload
def reshard_async(
    tensor: torch.Tensor | None,
    source: Side | None,
    destination: Side | None,
    *,
    out: torch.Tensor | None = None,
    **options: Unpack[ReshardOptions],
) -> Handle: ...
@overload
def reshard_async(
    tensor: NamedTensors | None,
    source: Mapping[str, Side],
    destination: Mapping[str, Side],
    *,
    out: NamedTensors | None = None,
    **options: Unpack[ReshardOptions],
) -> Handle[dict[str, torch.Tensor]]: ...
@explains_missing
def reshard_async(
    tensor: Given,
    source: Sides | None,
    destination: Sides | None,
    *,
    out: Given = None,
    **options: Unpack[ReshardOptions],
) -> Handle[Any]:
    """As :func:`reshard`, in the background: ``handle.wait()`` gives the result.

    The ranks compare what they are about to do before this returns; data moves afterwards, and the tensor must
    not change until then. It is the same call: other ranks may make it as :func:`reshard`.

    Example:
        >>> import torch.distributed as dist
        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> mesh = Mesh([0], ("tp",))
        >>> rows = ShardingSpec(mesh, (Shard(0),), (2, 3), "float32")
        >>> whole = ShardingSpec(mesh, (Replicate(),), dtype="bfloat16")
        >>> handle = reshard_async(torch.ones(2, 3), rows, whole)
        >>> handle.wait()  # compute something else before
        tensor([[1., 1., 1.],
                [1., 1., 1.]], dtype=torch.bfloat16)
        >>> dist.destroy_process_group()
    """
    if torch.compiler.is_compiling():
        handle: Handle[Any] = eagerly(reshard_async, tensor, source, destination, out=out, **options)
        return handle
    mover = _one_shot((tensor, out), (source, destination), options, "reshard_async")
    return mover.start(tensor, out=out)
