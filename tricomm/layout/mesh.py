"""Mesh: ranks of a process group arranged on named axes. A value; it owns no communicator."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, TypeAlias

from tricomm.errors import ArgumentError, SpecError, check_text, shown
from tricomm.interop import check_device_mesh, kept_mesh, mesh_of
from tricomm.kinds import explains_missing

NestedRanks: TypeAlias = "SupportsIndex | Iterable[NestedRanks]"
"""A rank, or a nest of them: lists, tuples, ranges, arrays, tensors."""


def _flatten(ranks: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, ranks in row-major order) of a nested sequence of ints."""
    if not isinstance(ranks, bool) and hasattr(ranks, "__index__"):
        try:
            return (), (operator.index(ranks),)
        except (TypeError, ValueError, RuntimeError):
            pass  # an array or a tensor of several ranks, whose rows come next
    try:
        rows = None if isinstance(ranks, str | bytes | Mapping) else list(ranks)  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is None:
        raise ArgumentError(
            f"a mesh is a nested sequence of integer ranks, and {shown(ranks)} is not one; write [[0, 1], [2, 3]]"
        )
    children = [_flatten(child) for child in rows]
    if not children:
        raise SpecError("a mesh axis holds no ranks; every axis needs at least one")
    shape = children[0][0]
    for index, (other, _) in enumerate(children):
        if other != shape:
            raise SpecError(
                f"a mesh must be rectangular, but entry 0 has shape {shape} and entry {index} has shape {other}; "
                "pad no axis, give every row the same number of ranks"
            )
    return (len(children), *shape), tuple(rank for _, flat in children for rank in flat)


@explains_missing
@dataclass(frozen=True, slots=True, init=False, repr=False)
class Mesh:
    """Arrange distinct ranks on named axes.

    Args:
        ranks: nested sequence of ranks of the process group, in any order, each at most once. Two meshes
            may share ranks or not: no parent mesh is assumed.
        axis_names: one distinct name per axis, outermost first.

    Attributes:
        shape: ranks along each axis.
        axis_names: as given.
        ranks: all ranks, row-major.

    Raises:
        SpecError: a ragged nest, a rank twice or negative, or names that do not match the axes; an ArgumentError where
            an argument is of the wrong kind.

    Example:
        >>> mesh = Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp"))
        >>> mesh.shape, mesh.size, mesh.coordinate(4)
        ((2, 3), 6, (1, 1))
        >>> print(mesh)
        (dp=2 tp=3: ranks 0-5)
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    ranks: tuple[int, ...]
    _index: dict[int, int] = field(compare=False)
    _hash: int = field(compare=False)

    def __init__(self, ranks: NestedRanks, axis_names: Sequence[str]) -> None:
        shape, flat = _flatten(ranks)
        if isinstance(axis_names, str) or not isinstance(axis_names, Sequence):
            raise ArgumentError(
                f'axis_names={shown(axis_names)} is not a tuple of names; write one name per axis, such as ("dp", "tp")'
            )
        names = tuple(axis_names)
        if len(names) != len(shape):
            raise SpecError(
                f"axis_names={shown(names)} gives {len(names)} names for a mesh with {len(shape)} axes of shape "
                f"{shape}; give one name per axis"
            )
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise SpecError(f"axis_names={shown(names)} must be distinct, non-empty strings; rename an axis")
        for name in names:
            check_text("axis name", name)
        index: dict[int, int] = {}
        for position, rank in enumerate(flat):
            if rank < 0:
                raise SpecError(f"rank {rank} is negative; ranks count from 0, so write the rank in its process group")
            if rank in index:
                raise SpecError(
                    f"rank {rank} stands twice in the mesh; a rank may hold one place only, so name it once"
                )
            index[rank] = position
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axis_names", names)
        object.__setattr__(self, "ranks", flat)
        object.__setattr__(self, "_index", index)
        # Once, for caches look up large meshes often; of numbers alone, as texts have other hashes in another process.
        object.__setattr__(self, "_hash", hash((shape, flat)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    @explains_missing
    def of(cls, device_mesh: Any, *, group: Any = None, **coordinates: int) -> "Mesh":
        """The ranks of torch's DeviceMesh, or those at some coordinates of it.

        A rank cannot slice a DeviceMesh that it is not in; ``Mesh.of(root, pp=1)`` is the mesh of stage 1 everywhere.

        Args:
            device_mesh: torch's; axes without a name are called dim_0, dim_1 ...
            group: a process group whose ranks are wanted; None is the whole job, whose ranks a DeviceMesh names.
            coordinates: an index for each axis that is left out of the result.

        Raises:
            SpecError: no such axis or index, or a rank outside of the group; an ArgumentError for another kind of mesh.

        Example:
            >>> import torch.distributed as dist
            >>> from torch.distributed.device_mesh import DeviceMesh
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
            >>> root = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pp", "tp"), _init_backend=False)
            >>> print(Mesh.of(root), Mesh.of(root, pp=1))
            (pp=2 tp=2: ranks 0-3) (tp=2: ranks 2-3)
            >>> dist.destroy_process_group()
        """
        check_device_mesh(device_mesh)
        ranks, names = kept_mesh(device_mesh) if group is None else mesh_of(device_mesh, group)
        mesh = cls(ranks, names)
        for name, index in coordinates.items():
            mesh = mesh._at(name, index)
        return mesh

    def _at(self, name: str, index: int) -> "Mesh":
        """The ranks at an index of an axis, on the other axes."""
        axis = self.axis(name)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self.shape[axis]:
            raise SpecError(
                f"{name}={index!r} is not an index of axis {name!r} of {self}; use 0 to {self.shape[axis] - 1}"
            )

        def pick(nested: Any, depth: int) -> Any:
            return nested[index] if depth == 0 else [pick(one, depth - 1) for one in nested]

        return Mesh(pick(self._nested(), axis), tuple(one for one in self.axis_names if one != name))

    @property
    def ndim(self) -> int:
        """Number of axes.

        >>> Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp")).ndim
        2
        """
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of ranks.

        >>> Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp")).size
        6
        """
        return len(self.ranks)

    def __contains__(self, rank: object) -> bool:
        try:
            return rank in self._index
        except TypeError:  # not even hashable
            return False

    def position(self, rank: int) -> int:
        """Row-major position of a rank in the mesh.

        >>> Mesh([4, 2, 7], ("tp",)).position(7)
        2
        """
        if rank not in self:
            raise SpecError(f"rank {shown(rank)} is not in {self}; ask for one of its ranks {format_ranks(self.ranks)}")
        return self._index[rank]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position of a rank along every axis.

        >>> mesh = Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp"))
        >>> dict(zip(mesh.axis_names, mesh.coordinate(5), strict=True))
        {'dp': 1, 'tp': 2}
        """
        position = self.position(rank)
        coordinate = []
        for extent in reversed(self.shape):
            position, remainder = divmod(position, extent)
            coordinate.append(remainder)
        return tuple(reversed(coordinate))

    def axis(self, key: int | str) -> int:
        """The index of an axis given by index or by name.

        >>> mesh = Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp"))
        >>> mesh.shape[mesh.axis("tp")]
        3
        """
        if isinstance(key, str) and key in self.axis_names:
            return self.axis_names.index(key)
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < self.ndim:
            return key
        raise SpecError(f"axis {shown(key)} is not an axis of {self}; its axes are {self.axis_names}, numbered from 0")

    def _nested(self) -> Any:
        nested: list[Any] = list(self.ranks)
        for extent in reversed(self.shape[1:]):
            nested = [nested[i : i + extent] for i in range(0, len(nested), extent)]
        return nested if self.shape else nested[0]

    def __repr__(self) -> str:
        return f"Mesh({self._nested()}, {self.axis_names})"

    def __str__(self) -> str:
        axes = " ".join(f"{name}={extent}" for name, extent in zip(self.axis_names, self.shape, strict=True))
        return f"({axes}: {'rank' if self.size == 1 else 'ranks'} {format_ranks(self.ranks)})"


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks as a person writes them: ``0-3,7,6``; long lists are cut in the middle."""
    pieces: list[list[int]] = []
    for rank in ranks:
        if pieces and pieces[-1][1] + 1 == rank:
            pieces[-1][1] = rank
        else:
            pieces.append([rank, rank])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in pieces]
    if len(words) > 12:
        words = [*words[:6], "...", *words[-3:]]
    return ",".join(words)
