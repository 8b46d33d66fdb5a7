"""Mesh: ranks of a process group arranged on named axes. A value; it owns no communicator."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, TypeAlias

from tricomm.errors import ArgumentError, SpecError

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
            f"a mesh is a nested sequence of integer ranks, and {ranks!r} is not one; write [[0, 1], [2, 3]]"
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

    def __init__(self, ranks: NestedRanks, axis_names: Sequence[str]) -> None:
        shape, flat = _flatten(ranks)
        if isinstance(axis_names, str) or not isinstance(axis_names, Sequence):
            raise ArgumentError(
                f'axis_names={axis_names!r} is not a tuple of names; write one name per axis, such as ("dp", "tp")'
            )
        names = tuple(axis_names)
        if len(names) != len(shape):
            raise SpecError(
                f"axis_names={names} gives {len(names)} names for a mesh with {len(shape)} axes of shape {shape}; "
                "give one name per axis"
            )
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise SpecError(f"axis_names={names} must be distinct, non-empty strings; rename an axis")
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

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def __contains__(self, rank: object) -> bool:
        try:
            return rank in self._index
        except TypeError:  # not even hashable
            return False

    def position(self, rank: int) -> int:
        """Row-major position of a rank in the mesh."""
        if rank not in self:
            raise SpecError(f"rank {rank!r} is not in {self}; ask for one of its ranks {format_ranks(self.ranks)}")
        return self._index[rank]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position of a rank along every axis."""
        position = self.position(rank)
        coordinate = []
        for extent in reversed(self.shape):
            position, remainder = divmod(position, extent)
            coordinate.append(remainder)
        return tuple(reversed(coordinate))

    def axis(self, key: int | str) -> int:
        """The index of an axis given by index or by name."""
        if isinstance(key, str) and key in self.axis_names:
            return self.axis_names.index(key)
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < self.ndim:
            return key
        raise SpecError(f"axis {key!r} is not an axis of {self}; its axes are {self.axis_names}, numbered from 0")

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
