"""Arguments in their one form: integers, shapes, slices."""

import operator
from types import EllipsisType
from typing import NamedTuple

from tricomm.errors import ArgumentError, SpecError
from tricomm.rules.names import parse, references

Shape = tuple[int, ...]


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
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(f"{name}={value!r} is no integer; give one")
    return operator.index(value)


def integers(name: str, values: object) -> Shape:
    """Several, given one by one or as a tuple."""
    if isinstance(values, tuple | list) and len(values) == 1 and isinstance(values[0], tuple | list):
        values = values[0]  # permute((1, 0)) is torch's too
    if not isinstance(values, tuple | list):
        raise ArgumentError(f"{name}={values!r} are no integers; give a tuple of them")
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
