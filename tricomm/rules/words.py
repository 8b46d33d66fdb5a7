"""The functions that begin an expression: ``source``, ``fill``, ``cat``, ``stack`` and ``each``."""

from collections.abc import Sequence

from tricomm.errors import ArgumentError
from tricomm.rules.checks import checked_shape
from tricomm.rules.expressions import Each, Expression, Filled, Joined, Source


def source(name: str, shape: Sequence[int] | None = None) -> Expression:
    """A source tensor.

    Args:
        name: may hold index variables: "layers.{l}.q".
        shape: if known here, what is made of it is checked at once; otherwise when the rules are bound.

    Example:
        >>> source("q", (8, 16)).unflatten(0, (4, 2)).permute(1, 0, 2).shape
        (2, 4, 16)
    """
    return Source(name, None if shape is None else checked_shape(f"source({name!r})", shape))


def fill(value: float, shape: Sequence[int]) -> Expression:
    """A tensor of which every element is ``value``, as ``torch.full``.

    Example:
        >>> cat([source("embed", (10, 4)), fill(0, (6, 4))])
        cat([source('embed', (10, 4)), fill(0, (6, 4))], dim=0)
    """
    return Filled(value, checked_shape(f"fill({value!r})", shape))


def each(variable: str, of: Expression) -> Each:
    """Inside of ``cat`` or ``stack``: the expression once for each value of an index variable.

    Example:
        >>> stack([each("e", source("experts.{e}.up"))], dim=0)
        stack([each('e', source('experts.{e}.up'))], dim=0)
    """
    return Each(variable, of)


def cat(parts: Sequence[Expression | Each], dim: int = 0) -> Expression:
    """The parts one after the other along a dim, as ``torch.cat``.

    Example:
        >>> cat([source("gate", (6, 4)), source("up", (6, 4)), fill(0, (4, 4))], dim=0).shape
        (16, 4)
    """
    return Joined(_listed("cat", parts), dim, False)


def stack(parts: Sequence[Expression | Each], dim: int = 0) -> Expression:
    """The parts along a new dim, as ``torch.stack``.

    Example:
        >>> stack([source("gate", (6, 4)), source("up", (6, 4))], dim=1).shape
        (6, 2, 4)
    """
    return Joined(_listed("stack", parts), dim, True)


def _listed(word: str, parts: object) -> tuple[Expression | Each, ...]:
    if not isinstance(parts, list | tuple):
        raise ArgumentError(f"{word}({parts!r}) takes a list; write {word}([...], dim=0), with each() in it to repeat")
    return tuple(parts)
