"""Arguments in their one form: integers, shapes, slices."""

import operator
from collections.abc import Sequence
from math import prod
from types import EllipsisType
from typing import NamedTuple

from tricomm.errors import ArgumentError, SpecError
from tricomm.kinds import is_integer
from tricomm.rules.names import parse, references

Shape = tuple[int, ...]

MAX_DIMS = 64
"""That a tensor of torch may have."""


class Span(NamedTuple):
    """A slice, as a value that can be hashed."""

    start: int | None
    stop: int | None
    step: int | None

    def of(self, size: int) -> range:
        """The coordinates that it takes of a dim."""
        return range(*slice(*self).indices(size))

    def __str__(self) -> str:
        start, stop = ("" if edge is None else str(edge) for edge in self[:2])
        return f"{start}:{stop}" + ("" if self.step is None else f":{self.step}")


Entry = int | str | Span | EllipsisType | None
"""Of an index: a position (or one in braces, "{e}"), a slice, ``...``, or None for a new dim."""


def integer(name: str, value: object) -> int:
    """An argument that is one."""
    if not is_integer(value):
        raise ArgumentError(f"{name}={value!r} is no integer; give one")
    return operator.index(value)  # type: ignore[arg-type]


def new_dim(of: object, dim: object) -> int:
    """The place of a new dim. ``of`` is what gets it, for errors."""
    place = integer("dim", dim)
    if not -MAX_DIMS <= place < MAX_DIMS:
        raise SpecError(f"{of}: a new dim {dim} must be from {-MAX_DIMS} to {MAX_DIMS - 1}; choose a place")
    return place


def integers(name: str, values: object) -> Shape:
    """Several, given one by one or as a tuple."""
    if isinstance(values, tuple | list) and len(values) == 1 and isinstance(values[0], tuple | list):
        values = values[0]  # permute((1, 0)) is torch's too
    if not isinstance(values, tuple | list):
        raise ArgumentError(f"{name}={values!r} must be integers; give a tuple of them")
    return tuple(integer(name, value) for value in values)


def checked_shape(where: str, shape: object) -> Shape:
    """A shape as a tuple of sizes."""
    sizes = integers("shape", shape)
    if any(size < 0 for size in sizes):
        raise SpecError(f"{where} has shape {sizes}; sizes are at least 0")
    return sizes


def index_entry(of: object, entry: object) -> Entry:
    """One entry of an index, as a value. ``of`` is what is indexed, for errors."""
    if entry is None or entry is ...:
        return entry
    if isinstance(entry, slice):
        edges = [
            None if edge is None else integer("a slice's edge", edge) for edge in (entry.start, entry.stop, entry.step)
        ]
        if edges[2] is not None and edges[2] < 1:
            raise SpecError(f"{of}[{Span(*edges)}]: a slice's step is at least 1; torch has no other")
        return Span(*edges)
    if isinstance(entry, str):
        if len(parse(entry)) != 1 or not references(entry):
            raise SpecError(f"{of}[{entry!r}] is no position; write an index variable in braces, such as '{{e}}'")
        return entry
    return integer(f"a position in {of}", entry)


def joined_shape(what: str, word: str, dim: int, parts: Sequence[tuple[str, Shape]]) -> Shape:
    """The shape of a cat or a stack.

    Args:
        what: the expression, for errors.
        word: "cat" or "stack".
        dim: in which they are joined.
        parts: each in words, and its shape.

    Raises:
        SpecError: the parts do not agree, or have no such dim.
    """
    stacks = word == "stack"
    name, first = parts[0]
    ndim = len(first) + stacks
    if not -ndim <= dim < ndim:
        raise SpecError(f"{what}: parts of shape {first} have no dim {dim} to join; choose 0 to {ndim - 1}")
    dim %= ndim
    for part, shape in parts:
        kept, wanted = (shape, first) if stacks else (shape[:dim] + shape[dim + 1 :], first[:dim] + first[dim + 1 :])
        if kept != wanted or len(shape) != len(first):
            raise SpecError(
                f"{what}: {part} has shape {shape} and {name} has {first}; the parts of a {word} "
                f"agree in every dim{'' if stacks else f' but {dim}'}; slice or fill one of them"
            )
    if stacks:
        return (*first[:dim], len(parts), *first[dim:])
    return (*first[:dim], sum(shape[dim] for _, shape in parts), *first[dim + 1 :])


def expanded_shape(what: str, name: str, shape: Shape, sizes: Shape) -> Shape:
    """The shape of what is expanded.

    Args:
        what: the expression, for errors.
        name: what it expands, in words.
        shape: of that.
        sizes: -1 keeps a dim.

    Raises:
        SpecError: a dim that is not of size 1 would be repeated.
    """
    added = len(sizes) - len(shape)
    old = (1,) * added + shape
    fits = added >= 0 and all(size in (-1, have) or have == 1 for size, have in zip(sizes, old, strict=True))
    if not fits or -1 in sizes[:added]:
        raise SpecError(
            f"{what}: {name} has shape {shape}, and only a dim of size 1 or a new one in front can be repeated; "
            "unsqueeze or unflatten first"
        )
    return tuple(have if size == -1 else size for size, have in zip(sizes, old, strict=True))


def unflattened_shape(what: str, name: str, shape: Shape, dim: int, sizes: Shape) -> Shape:
    """The shape of what has one dim as several.

    Args:
        what: the expression, for errors.
        name: what it unflattens, in words.
        shape: of that.
        dim: which, counted from the front.
        sizes: of the new dims; one may be -1.

    Raises:
        SpecError: their product is not the size of the dim.
    """
    known = prod(size for size in sizes if size >= 0)
    rest = shape[dim] // known if known else 0
    found = tuple(rest if size < 0 else size for size in sizes)
    if prod(found) != shape[dim] or (-1 in sizes and not known):
        raise SpecError(
            f"{what}: dim {dim} of {name} has size {shape[dim]}, which is not the product of {sizes}; "
            "give sizes that divide it, or slice or fill first"
        )
    return (*shape[:dim], *found, *shape[dim + 1 :])
