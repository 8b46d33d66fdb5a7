"""The sides of a move as people write them: a ShardingSpec, ``(mesh, placements)`` in torch's words, or a DTensor."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

from tricomm.errors import ArgumentError, SpecError
from tricomm.interop import (
    TorchLayout,
    describe_dtensor,
    is_device_mesh,
    is_dtensor,
    is_wrapped,
    local_of,
    ready,
    records,
)
from tricomm.layout.mesh import Mesh
from tricomm.layout.spec import ShardingSpec


class Laid(Protocol):
    """What lies on a DeviceMesh: a DTensor."""

    @property
    def device_mesh(self) -> Any:
        """Of torch."""
        ...

    @property
    def placements(self) -> Any:
        """One per axis."""
        ...


Side: TypeAlias = ShardingSpec | tuple[Any, ...] | Laid
"""A ShardingSpec; (DeviceMesh or Mesh, placements), with shape and dtype behind them where they are not known
otherwise; or a DTensor, whose layout is meant. Placements are torch's or tricomm's.
"""


Sides: TypeAlias = Side | Mapping[str, Side]
"""The layout of a tensor, or of many by name."""


def as_specs(source: Any, destination: Any, group: Any = None) -> tuple[Any, Any]:
    """Both sides as ShardingSpecs, in the ranks of a group; what is no side at all is left for others to refuse.

    Mappings are taken name by name. A destination's strided placements are read with the source's shape if it has none.

    Raises:
        SpecError: placements without a counterpart, or that do not fit.
    """
    source = as_spec(source, group=group)
    shape = source.shape if isinstance(source, ShardingSpec) else None
    if isinstance(source, Mapping) and isinstance(destination, Mapping):
        found = {}
        for name, one in destination.items():
            other = source.get(name)
            found[name] = as_spec(one, other.shape if isinstance(other, ShardingSpec) else None, group=group)
        return source, found
    return source, as_spec(destination, shape, group=group)


def as_spec(side: Any, shape: tuple[int, ...] | None = None, *, group: Any = None) -> Any:
    """One side as a ShardingSpec; see :func:`as_specs`.

    Args:
        side: what was given.
        shape: global, if the side has none.
        group: whose ranks are wanted.
    """
    if isinstance(side, ShardingSpec):
        return side
    if isinstance(side, Mapping):
        return {name: as_spec(one, shape, group=group) for name, one in side.items()}
    if is_dtensor(side):
        return spec_of(side, group)
    if not isinstance(side, tuple) or not side or not (is_device_mesh(side[0]) or isinstance(side[0], Mesh)):
        return side
    if len(side) not in (2, 4):
        raise ArgumentError(
            f"a side of {len(side)} parts, {side!r}, is neither (mesh, placements) nor (mesh, placements, shape, "
            "dtype); write one of these"
        )
    mesh, placements, given_shape, dtype = side if len(side) == 4 else (*side, None, None)
    whole = shape if given_shape is None else given_shape
    return ShardingSpec.from_placements(mesh, placements, whole, dtype, group=group)


def spec_of(dtensor: Any, group: Any = None) -> ShardingSpec:
    """The layout of a DTensor, read once for equal layouts in the ranks of the whole job."""
    return _kept(describe_dtensor(dtensor)) if group is None else ShardingSpec.from_dtensor(dtensor, group=group)


@lru_cache(maxsize=4096)
def _kept(layout: TorchLayout) -> ShardingSpec:
    return ShardingSpec.from_dtensor(layout)


def shard_of(tensor: Any, spec: ShardingSpec, rank: int, group: Any, what: str) -> Any:
    """This rank's shard of a DTensor, which shares its memory; None where the DTensor's mesh has not this rank.

    Args:
        tensor: a DTensor, or anything else, which is returned as it is once a collective of torch has written it.
        spec: the layout that it has to have.
        rank: this one, in the group.
        group: whose ranks the spec names; None for the whole job's.
        what: it in words, for errors.

    Raises:
        SpecError: the DTensor has another layout.
    """
    if not is_dtensor(tensor):
        return ready(tensor)
    found = spec_of(tensor, group)
    problem = _difference(found, spec, rank)
    if problem:
        raise SpecError(
            f"{what} of rank {rank} is a DTensor of {found}, and the call was made for {spec}: {problem}; redistribute "
            "it to that layout first, or pass its own"
        )
    return local_of(tensor) if rank in found.mesh else None


def has_wrapped(given: Any) -> bool:
    """Whether a tensor, or one of many by name, is a DTensor or still written by a collective of torch."""
    if given is None:
        return False
    # What is no mapping is asked first whether it has values: an abstract class takes longer to answer.
    return is_wrapped(given) or (hasattr(given, "keys") and isinstance(given, Mapping) and _has_one(given))


def _has_one(given: Mapping[Any, Any]) -> bool:
    return any(map(is_wrapped, given.values()))


class Ends(Protocol):
    """What is named on both sides of a move: names and layouts; a tensor that is alone has the name ""."""

    @property
    def sources(self) -> Sequence[tuple[str, ShardingSpec]]:
        """Before."""

    @property
    def destinations(self) -> Sequence[tuple[str, ShardingSpec]]:
        """After."""


def shards_of(
    tensor: Any,
    out: Any,
    ends: Ends,
    rank: int,
    group: Any,
) -> tuple[Any, Any]:
    """What is read and what is written on a rank, of DTensors or as given; of many tensors by name. See
    :func:`shard_of`.

    Args:
        tensor, out: what was given.
        ends: what is named on both sides.
        rank, group: as for shard_of.

    Raises:
        SpecError: a DTensor of another layout, or one to be written while autograd records.
    """
    read = _each(tensor, ends.sources, "the tensor", lambda *given: shard_of(given[0], given[1], rank, group, given[2]))
    written = _each(out, ends.destinations, "out", lambda *given: _written(given[0], given[1], rank, group, given[2]))
    return read, written


def _each(given: Any, ends: Sequence[tuple[str, ShardingSpec]], what: str, taken: Callable[..., Any]) -> Any:
    """What was given, each tensor taken by its layout."""
    if not isinstance(given, Mapping):
        return taken(given, ends[0][1], what) if not ends[0][0] else given
    found = {**given}
    for name, spec in ends:
        if name in found:
            found[name] = taken(found[name], spec, f"{what.removeprefix('the ')} {name!r}")
    return found


def _written(out: Any, destination: ShardingSpec, rank: int, group: Any, what: str) -> Any:
    if is_dtensor(out) and records(out):
        raise SpecError(
            f"{what} of rank {rank} is a DTensor that requires grad and would be written in place; call under "
            "torch.no_grad()"
        )
    return shard_of(out, destination, rank, group, what)


@lru_cache(maxsize=4096)
def _difference(found: ShardingSpec, wanted: ShardingSpec, rank: int) -> str:
    """How a layout differs from another in what one rank holds; "" if it does not. Names of axes do not matter."""
    if found == wanted:
        return ""
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return "shape or dtype differ"
    if set(found.mesh.ranks) != set(wanted.mesh.ranks):
        return "the ranks differ"
    if rank in found.mesh and found.holding(rank) != wanted.holding(rank):
        return f"rank {rank} holds {found.holding(rank)} instead of {wanted.holding(rank)}"
    sums = [
        sorted((spec.mesh.shape[a], repr(spec.placements[a])) for a in spec.partial_axes) for spec in (found, wanted)
    ]
    return "" if sums[0] == sums[1] else "one of them is partial where the other is not"
