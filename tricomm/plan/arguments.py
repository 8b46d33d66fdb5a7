"""What make_plan takes, checked for its kind before anything else."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache

from tricomm.errors import ArgumentError, PlanError, SpecError, shown
from tricomm.layout.dtype import check_cast
from tricomm.layout.mesh import Mesh, format_ranks
from tricomm.layout.placement import Partial
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.routes.strategies import Auto
from tricomm.plan.stacks import Item


def check_spec(name: str, spec: object) -> None:
    """Refuse what is not a layout.

    Raises:
        ArgumentError: not a ShardingSpec.
    """
    if not isinstance(spec, ShardingSpec):
        raise ArgumentError(
            f"{name}={shown(spec)} is not a ShardingSpec; write ShardingSpec(mesh, placements, shape, dtype)"
        )


def check_strategy(strategy: object) -> None:
    """Refuse what does not route.

    Raises:
        ArgumentError: not a strategy, or one that cannot be hashed.
    """
    is_strategy = hasattr(strategy, "route") or isinstance(strategy, Auto)
    if isinstance(strategy, type) or not is_strategy or not _is_hashable(strategy):
        raise ArgumentError(
            f"strategy={shown(strategy)} is not a strategy; pass Auto(), Broadcast(), LocalAllGather(), "
            "GlobalAllGather() or SendRecv()"
        )


def check_balance(balance: object) -> None:
    """Refuse what does not choose senders.

    Raises:
        ArgumentError: not a choice of senders, or one that cannot be hashed.
    """
    if isinstance(balance, type) or not hasattr(balance, "assign") or not _is_hashable(balance):
        raise ArgumentError(
            f"balance={shown(balance)} is not a sender policy; pass Split(), LeastLoaded(), Search(), "
            "RandomizedGreedy(), Ensemble() or Naive()"
        )


def check_topology(topology: object) -> None:
    """Refuse what names no hosts.

    Raises:
        ArgumentError: neither a Topology nor None.
    """
    if topology is not None and not isinstance(topology, Topology):
        raise ArgumentError(
            f"topology={shown(topology)} is not a Topology; write Topology(hosts), one host name per rank, or leave "
            "it out"
        )


def check_staging_bytes(staging_bytes: object) -> None:
    """Refuse a staging budget that is no budget.

    Raises:
        ArgumentError: not an integer.
        PlanError: none or less.
    """
    if isinstance(staging_bytes, bool) or not isinstance(staging_bytes, int):
        raise ArgumentError(
            f"staging_bytes={shown(staging_bytes)} must be a number of bytes, an integer such as 256 << 20"
        )
    if staging_bytes <= 0:
        raise PlanError(f"staging_bytes={shown(staging_bytes)} must be a positive number of bytes, such as 256 << 20")


def check_rank(rank: object, participants: Sequence[int]) -> None:
    """Refuse a rank that is not one, or has no part in what moves.

    Raises:
        ArgumentError: neither an integer from 0 on nor None.
        SpecError: on no mesh, if there is any.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ArgumentError(f"rank={shown(rank)} is not a rank; pass an integer from 0 on, or None for all ranks")
    if rank is not None and participants and rank not in participants:
        ranks = format_ranks(participants)
        raise SpecError(f"rank={rank} is on neither mesh, so it has no plan; pass one of {ranks}, or None for all")


def check_ranks(side: str, mesh: Mesh, size: int) -> None:
    """Refuse a mesh with ranks outside of a process group.

    Raises:
        SpecError: there is one.
    """
    outside = [rank for rank in mesh.ranks if rank >= size]
    if outside:
        raise SpecError(
            f"rank {outside[0]} of the {side} mesh {mesh} is outside of the process group, which has ranks 0 to "
            f"{size - 1}; use ranks of the group, or pass the group that has them"
        )


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def items_of(source: object, destination: object) -> tuple[Item, ...]:
    """Pair the layouts of one tensor, or of each of many by its name, sorted: ranks write mappings in any order.

    Raises:
        SpecError: names that only one side has, or layouts that contradict each other; an ArgumentError where an
            argument is of the wrong kind.
    """
    if not isinstance(source, Mapping) and not isinstance(destination, Mapping):
        check_spec("source", source)
        check_spec("destination", destination)
        assert isinstance(source, ShardingSpec)
        assert isinstance(destination, ShardingSpec)
        return (Item("", source, resolved(source, destination)),)
    for side, given in (("source", source), ("destination", destination)):
        check_mapping(side, given)
    assert isinstance(source, Mapping)
    assert isinstance(destination, Mapping)
    _check_names(source, destination)
    known: dict[tuple[int, int], ShardingSpec] = {}
    items = []
    for name in sorted(source):
        spec = source[name]
        identity = (id(spec), id(destination[name]))
        if identity not in known:
            try:
                known[identity] = resolved(spec, destination[name])
            except SpecError as error:
                raise type(error)(f"tensor {name!r}: {error}") from error
        items.append(Item(name, spec, known[identity]))
    return tuple(items)


def check_in_group(specs: Iterable[tuple[str, ShardingSpec]], size: int) -> None:
    """Refuse meshes with ranks outside of a process group of so many.

    Args:
        specs: (side, layout) of every tensor.
        size: of the group.

    Raises:
        SpecError: there is one.
    """
    meshes = {(side, id(spec.mesh)): spec.mesh for side, spec in specs}
    for (side, _), mesh in meshes.items():
        check_ranks(side, mesh, size)


def participants_of(specs: Iterable[tuple[str, ShardingSpec]]) -> tuple[int, ...]:
    """Every rank of some mesh, sorted; see :func:`check_in_group`."""
    meshes = {id(spec.mesh): spec.mesh for _, spec in specs}
    return _ranks_of(tuple(meshes.values()))


@lru_cache(maxsize=64)
def _ranks_of(meshes: tuple[Mesh, ...]) -> tuple[int, ...]:
    return tuple(sorted({rank for mesh in meshes for rank in mesh.ranks}))


def check_mapping(side: str, given: object) -> None:
    """Refuse what is no mapping of names to layouts.

    Raises:
        SpecError: it is empty; an ArgumentError where it is of the wrong kind.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"{side}={shown(given)} is not a mapping, and the other side is; give both as {{name: ShardingSpec}}, "
            "or both as one ShardingSpec"
        )
    if not given:
        raise SpecError(f"{side} is a mapping without tensors; give {{name: ShardingSpec}} with at least one of them")
    for name, spec in given.items():
        if not isinstance(name, str):
            raise ArgumentError(
                f"{side} has the name {shown(name)}, which is not a text; names are such as 'layers.0.wq'"
            )
        check_spec(f"{side}[{name!r}]", spec)


def _check_names(source: Mapping[str, object], destination: Mapping[str, object]) -> None:
    """Refuse a name that one side only has."""
    for side, here, there in (("source", source, destination), ("destination", destination, source)):
        alone = [name for name in here if name not in there]
        if alone:
            near = get_close_matches(alone[0], [name for name in there if name not in here][:2000], 1)
            hint = f"did you mean {near[0]!r}, which only the other side has?" if near else "leave it out, or give both"
            raise SpecError(
                f"tensor {alone[0]!r} is in the {side} only ({len(alone)} such of {len(here)}); names must be the same "
                f"on both sides: {hint}"
            )


def resolved(source: ShardingSpec, destination: ShardingSpec) -> ShardingSpec:
    """The destination with the source's shape and dtype where it has none, checked against it.

    Raises:
        SpecError: the two contradict each other.
    """
    source.element_type, source.global_shape  # noqa: B018  raises if either is missing
    destination = destination.resolved(source)
    if destination.shape != source.shape:
        raise SpecError(
            f"source shape {source.shape} and destination shape {destination.shape} differ; resharding moves elements "
            "and reshapes nothing: leave the destination's shape out or make them equal"
        )
    if any(isinstance(placement, Partial) for placement in destination.placements):
        raise SpecError(
            f"destination {destination} is Partial, and there is no one way to split a value into contributions; "
            "reshard to Replicate() or Shard(dim)"
        )
    check_cast(source.element_type, destination.element_type)
    return destination
