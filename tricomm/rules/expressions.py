"""What a destination tensor consists of, in torch's words: immutable expressions over source tensors.

An expression is a value: it prints as the line that makes it, and two that were written alike are equal. Its
shape is known, and checked, as soon as the shapes of its sources are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import EllipsisType

from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.dtype import dtype_name
from tricomm.rules.checks import (
    Entry,
    Shape,
    Span,
    checked_shape,
    expanded_shape,
    index_entry,
    integer,
    integers,
    joined_shape,
    new_dim,
    unflattened_shape,
)
from tricomm.rules.names import parse


class Expression:
    """A tensor that is made of source tensors by moving elements, with the methods of a torch tensor.

    Attributes:
        shape: None as long as a source's shape is not known.

    Example:
        >>> from tricomm.rules import source
        >>> source("q", (8, 6))[::2].unflatten(0, (2, 2)).permute(1, 0, 2).flatten(0, 1).shape
        (4, 6)
    """

    __slots__ = ()
    __iter__ = None
    shape: Shape | None

    def __getitem__(self, index: object) -> "Expression":
        """Basic indexing as torch has it: positions, slices with positive steps, ``...`` and None.

        A position may be an index variable in braces: ``source("experts.up")["{e}"]``.
        """
        entries = index if isinstance(index, tuple) else (index,)
        return Indexed(self, tuple(index_entry(self, entry) for entry in entries))

    def unsqueeze(self, dim: int) -> "Expression":
        """A new dim of size 1, as ``torch.unsqueeze``.

        >>> Source("down", (8, 6)).unsqueeze(0).shape
        (1, 8, 6)
        """
        if new_dim(self, dim) >= 0:
            return self[(slice(None),) * dim + (None,)]
        return self[(..., None) + (slice(None),) * (-1 - dim)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> "Expression":
        """One dim as several, row-major, as ``torch.unflatten``; one size may be -1.

        >>> Source("q", (32, 64)).unflatten(0, (4, -1)).shape  # 4 heads
        (4, 8, 64)
        """
        return Unflattened(self, integer("dim", dim), integers("sizes", sizes))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "Expression":
        """Several neighbouring dims as one, row-major, as ``torch.flatten``.

        >>> Source("q", (4, 8, 64)).flatten(0, 1).shape
        (32, 64)
        """
        return Flattened(self, integer("start_dim", start_dim), integer("end_dim", end_dim))

    def permute(self, *dims: int) -> "Expression":
        """The dims in another order, as ``torch.permute``.

        >>> Source("conv1d", (64, 192)).permute(1, 0).shape  # as GPT-2 keeps it
        (192, 64)
        """
        return Permuted(self, integers("dims", dims))

    def expand(self, *sizes: int) -> "Expression":
        """Dims of size 1 repeated, as ``torch.Tensor.expand``: -1 keeps a dim, more sizes add dims in front.

        >>> Source("k", (2, 1, 8)).expand(-1, 4, -1).flatten(0, 1).shape  # each head four times
        (8, 8)
        """
        return Expanded(self, integers("sizes", sizes))

    def to(self, dtype: object) -> "Expression":
        """Cast, with torch's rounding, as ``torch.Tensor.to``; once on the way from a source to a destination.

        >>> print(Source("bias", (256,)).to("float32"))
        bias.to('float32')
        """
        return Cast(self, dtype_name(dtype))

    def __repr__(self) -> str:
        return self._text(repr)

    def __str__(self) -> str:
        return self._text(str)

    def _text(self, show: "Callable[[object], str]") -> str:
        raise NotImplementedError

    def _children(self) -> "tuple[Expression | Each, ...]":
        raise NotImplementedError

    def _with(self, children: "tuple[Expression | Each, ...]") -> "Expression":
        raise NotImplementedError

    def _inferred(self) -> Shape:
        """The shape, from the children's, which are known. Raises SpecError where they do not fit."""
        raise NotImplementedError

    def _check(self) -> None:
        """Set the shape if it can be known."""
        shapes = [child.shape for child in self._children()]
        object.__setattr__(self, "shape", None if None in shapes else self._inferred())


@dataclass(frozen=True, slots=True, repr=False)
class _Unary(Expression):
    """An expression of one other, ``of``."""

    of: Expression
    shape: Shape | None = field(init=False, compare=False, default=None)

    def __post_init__(self) -> None:
        self._validate()
        self._check()

    def _validate(self) -> None:
        """Check what can be checked without shapes."""

    def _suffix(self) -> str:
        """What is written after ``of``."""
        raise NotImplementedError

    def _text(self, show: Callable[[object], str]) -> str:
        return self.of._text(show) + self._suffix()

    def _with(self, children: "tuple[Expression | Each, ...]") -> Expression:
        (child,) = children
        assert isinstance(child, Expression)
        return replace(self, of=child)

    def _children(self) -> "tuple[Expression | Each, ...]":
        return (self.of,)

    @property
    def _of_shape(self) -> Shape:
        assert self.of.shape is not None
        return self.of.shape

    def _dim(self, dim: int) -> int:
        """Which dim of ``of``, counted from the front."""
        ndim = len(self._of_shape)
        if not -ndim <= dim < ndim:
            raise SpecError(f"{self}: {self.of} has shape {self._of_shape}, so no dim {dim}")
        return dim % ndim


class _Leaf(Expression):
    """An expression of no other."""

    __slots__ = ()

    def _children(self) -> "tuple[Expression | Each, ...]":
        return ()

    def _with(self, children: "tuple[Expression | Each, ...]") -> Expression:
        return self


@dataclass(frozen=True, slots=True, repr=False)
class Source(_Leaf):
    """See :func:`source`."""

    name: str
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"source({self.name!r}) names no tensor; give its name, such as 'layers.{{l}}.q'")
        parse(self.name)
        if self.shape is not None:
            object.__setattr__(self, "shape", checked_shape(f"source({self.name!r})", self.shape))

    def _text(self, show: Callable[[object], str]) -> str:
        if show is str:
            return self.name
        return f"source({self.name!r})" if self.shape is None else f"source({self.name!r}, {self.shape})"


@dataclass(frozen=True, slots=True, repr=False)
class Filled(_Leaf):
    """See :func:`fill`."""

    value: float
    shape: Shape

    def __post_init__(self) -> None:
        if not isinstance(self.value, int | float):
            raise ArgumentError(f"fill({self.value!r}, ...) is no number; give the one value that fills")
        object.__setattr__(self, "shape", checked_shape(f"fill({self.value!r})", self.shape))

    def _text(self, show: Callable[[object], str]) -> str:
        return f"fill({self.value!r}, {self.shape})"


@dataclass(frozen=True, slots=True, repr=False)
class Each:
    """See :func:`each`."""

    variable: str
    of: Expression

    def __post_init__(self) -> None:
        if not isinstance(self.variable, str) or not self.variable.isidentifier():
            raise ArgumentError(
                f"each({self.variable!r}, ...) names no index variable; write each('e', source('up.{{e}}'))"
            )
        _require_expression("each()", self.of)

    @property
    def shape(self) -> None:
        """Not known: how often it stands there is said by ``Rules``."""

    def _text(self, show: Callable[[object], str]) -> str:
        return f"each({self.variable!r}, {self.of._text(show)})"

    def __repr__(self) -> str:
        return self._text(repr)


@dataclass(frozen=True, slots=True, repr=False)
class Joined(Expression):
    """``cat`` and ``stack``."""

    parts: tuple[Expression | Each, ...]
    dim: int
    stacks: bool
    shape: Shape | None = field(init=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise SpecError(f"{self._word}({self.parts!r}) joins nothing; give a list of expressions")
        for part in self.parts:
            _require_expression(f"{self._word}()", part.of if isinstance(part, Each) else part)
        integer("dim", self.dim)
        self._check()

    @property
    def _word(self) -> str:
        return "stack" if self.stacks else "cat"

    @property
    def joined_dim(self) -> int:
        """The dim, counted from the front."""
        assert self.shape is not None
        return self.dim % len(self.shape)

    def _children(self) -> tuple[Expression | Each, ...]:
        return self.parts

    def _with(self, children: tuple[Expression | Each, ...]) -> Expression:
        return Joined(children, self.dim, self.stacks)

    def _inferred(self) -> Shape:
        named = [(str(part), part.shape) for part in self.parts if part.shape is not None]
        return joined_shape(str(self), self._word, self.dim, named)

    def _text(self, show: Callable[[object], str]) -> str:
        return f"{self._word}([{', '.join(part._text(show) for part in self.parts)}], dim={self.dim})"


@dataclass(frozen=True, slots=True, repr=False)
class Indexed(_Unary):
    """``of[index]``."""

    index: tuple[Entry, ...]

    def _validate(self) -> None:
        if sum(entry is ... for entry in self.index) > 1:
            raise SpecError(f"{self}: an index has at most one '...'")

    def _inferred(self) -> Shape:
        sizes = iter(self._of_shape)
        shape: list[int] = []
        for entry in self.entries():
            if entry is None:
                shape.append(1)
                continue
            size = next(sizes)
            if isinstance(entry, Span):
                shape.append(len(entry.of(size)))
            elif isinstance(entry, int) and not -size <= entry < size:
                raise SpecError(f"{self}: position {entry} lies outside of a dim of size {size} in {self._of_shape}")
        return tuple(shape)

    def entries(self) -> tuple[int | str | Span | None, ...]:
        """One for each dim of ``of``, and one for each new dim."""
        missing = len(self._of_shape) - sum(entry is not None and entry is not ... for entry in self.index)
        if missing < 0:
            raise SpecError(
                f"{self}: {self.of} has shape {self._of_shape}, fewer dims than the index; leave entries out"
            )
        index = self.index if ... in self.index else (*self.index, ...)
        whole = (Span(None, None, None),) * missing
        return tuple(found for entry in index for found in (whole if isinstance(entry, EllipsisType) else (entry,)))

    def _text(self, show: Callable[[object], str]) -> str:
        texts = ["..." if one is ... else repr(one) if isinstance(one, str) else str(one) for one in self.index]
        return f"{self.of._text(show)}[{', '.join(texts) or '()'}]"


@dataclass(frozen=True, slots=True, repr=False)
class Unflattened(_Unary):
    """``of.unflatten(dim, sizes)``."""

    dim: int
    sizes: Shape

    def _validate(self) -> None:
        if not self.sizes or min(self.sizes) < -1 or self.sizes.count(-1) > 1:
            raise SpecError(f"{self}: sizes are at least 0, and at most one of them is -1")

    def _inferred(self) -> Shape:
        return unflattened_shape(str(self), str(self.of), self._of_shape, self._dim(self.dim), self.sizes)

    def _suffix(self) -> str:
        return f".unflatten({self.dim}, {self.sizes})"


@dataclass(frozen=True, slots=True, repr=False)
class Flattened(_Unary):
    """``of.flatten(start, end)``."""

    start: int
    end: int

    @property
    def dims(self) -> tuple[int, int]:
        """The first dim and the one after the last."""
        return self._dim(self.start), self._dim(self.end) + 1

    def _inferred(self) -> Shape:
        shape = self._of_shape
        start, stop = self.dims
        if start >= stop:
            raise SpecError(f"{self}: dim {start} stands after dim {stop - 1} in {shape}; give the earlier one first")
        return (*shape[:start], prod(shape[start:stop]), *shape[stop:])

    def _suffix(self) -> str:
        return f".flatten({self.start}, {self.end})"


@dataclass(frozen=True, slots=True, repr=False)
class Permuted(_Unary):
    """``of.permute(*dims)``."""

    dims: Shape

    def _validate(self) -> None:
        ndim = len(self.dims)
        if sorted(dim + ndim * (dim < 0) for dim in self.dims) != list(range(ndim)):
            raise SpecError(f"{self}: {self.dims} are not all dims once each; give an order of 0 to {ndim - 1}")

    def _inferred(self) -> Shape:
        shape = self._of_shape
        if len(shape) != len(self.dims):
            raise SpecError(f"{self}: {self.of} has shape {shape}; permute its {len(shape)} dims, not {len(self.dims)}")
        return tuple(shape[dim] for dim in self.dims)

    def _suffix(self) -> str:
        return f".permute({', '.join(map(str, self.dims))})"


@dataclass(frozen=True, slots=True, repr=False)
class Expanded(_Unary):
    """``of.expand(*sizes)``."""

    sizes: Shape

    def _validate(self) -> None:
        if min(self.sizes, default=0) < -1:
            raise SpecError(f"{self}: sizes are at least 0, or -1 to keep a dim")

    def _inferred(self) -> Shape:
        return expanded_shape(str(self), str(self.of), self._of_shape, self.sizes)

    def _suffix(self) -> str:
        return f".expand({', '.join(map(str, self.sizes))})"


@dataclass(frozen=True, slots=True, repr=False)
class Cast(_Unary):
    """``of.to(dtype)``."""

    dtype: str

    def _inferred(self) -> Shape:
        return self._of_shape

    def _suffix(self) -> str:
        return f".to({self.dtype!r})"


def _require_expression(where: str, value: object) -> None:
    if not isinstance(value, Expression):
        raise ArgumentError(f"{where} was given {value!r}, which is no expression; write source(name) or fill(...)")
