"""An expression with its index variables filled in: which sources it reads, and of which element type it is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain

from tricomm.errors import SpecError
from tricomm.layout.dtype import check_cast
from tricomm.rules.checks import Shape
from tricomm.rules.expressions import Cast, Each, Expression, Filled, Indexed, Joined, Source
from tricomm.rules.names import Reference, Scope, references, require_free


def leaves(expression: Expression | Each, scope: Scope) -> list[tuple[Source, str]]:
    """Every source that is read, in turn, and its name there."""
    if isinstance(expression, Source):
        return [(expression, scope.name(expression.name))]
    found: list[tuple[Source, str]] = []
    if isinstance(expression, Each):
        for inner in scope.over((expression.variable,)):
            found += leaves(expression.of, inner)
        return found
    for child in expression._children():
        found += leaves(child, scope)
    return found


def reads(
    expression: Expression | Each, scope: Scope, variables: tuple[str, ...]
) -> tuple[list[Source], list[tuple[str, ...]]]:
    """What :func:`leaves` says in each of the scopes over these variables: sources, and for each scope their names."""
    if isinstance(expression, Source):
        return [expression], [(name,) for name in scope.names(expression.name, variables)]
    if isinstance(expression, Each):
        require_free(expression.variable, variables)
        sources, rows = reads(expression.of, scope, (*variables, expression.variable))
        count = scope.count((expression.variable,))
        starts = range(0, count * scope.count(variables), count) if count else ()
        parts: Iterable[Sequence[tuple[str, ...]]] = (rows[at : at + count] for at in starts)
        sources *= count
    else:
        found = [reads(child, scope, variables) for child in expression._children()]
        sources = [one for some, _ in found for one in some]
        if len(found) == 1:
            return sources, found[0][1]
        parts = zip(*(rows for _, rows in found), strict=True)
    joined = [tuple(chain.from_iterable(rows)) for rows in parts]
    return sources, joined or [()] * scope.count(variables)


def positions(expression: Expression | Each, scope: Scope) -> list[int]:
    """Every position that an index variable says inside of an index, in turn."""
    if not _has_positions(expression):
        return []
    found: list[int] = []
    if isinstance(expression, Each):
        for inner in scope.over((expression.variable,)):
            found += positions(expression.of, inner)
        return found
    if isinstance(expression, Indexed):
        found += [scope.position(entry) for entry in expression.index if isinstance(entry, str)]
    for child in expression._children():
        found += positions(child, scope)
    return found


@lru_cache(1024)
def _has_positions(expression: Expression | Each) -> bool:
    if isinstance(expression, Each):
        return _has_positions(expression.of)
    own = isinstance(expression, Indexed) and any(isinstance(entry, str) for entry in expression.index)
    return own or any(map(_has_positions, expression._children()))


def resolved(expression: Expression, scope: Scope, shapes: Mapping[str, Shape] | None) -> Expression:
    """The expression without index variables, its sources of these shapes or of their own; raises where they misfit."""
    if isinstance(expression, Source):
        name = scope.name(expression.name)
        return Source(name, expression.shape if shapes is None else shapes[name])
    children: list[Expression | Each] = []
    for child in expression._children():
        if isinstance(child, Each):
            children += [resolved(child.of, inner, shapes) for inner in scope.over((child.variable,))]
        else:
            children.append(resolved(child, scope, shapes))
    if isinstance(expression, Indexed):
        of = children[0]
        assert isinstance(of, Expression)
        index = tuple(scope.position(entry) if isinstance(entry, str) else entry for entry in expression.index)
        return Indexed(of, index)
    if isinstance(expression, Joined) and not children:
        raise SpecError(
            f"{expression} joins nothing here, because its index variable has no values; leave the rule out"
        )
    return expression._with(tuple(children))


def element_type(expression: Expression, dtypes: Mapping[str, str]) -> str | None:
    """The dtype of a resolved expression; None for fills alone.

    Raises:
        SpecError: parts of several dtypes, a cast that loses more than rounding, or two casts one after the other.
    """
    if isinstance(expression, Source):
        return dtypes[expression.name]
    if isinstance(expression, Filled):
        return None
    children = [child for child in expression._children() if isinstance(child, Expression)]
    found = [(child, dtype) for child in children if (dtype := element_type(child, dtypes)) is not None]
    if isinstance(expression, Cast):
        if any(_casts(child) for child in children):
            raise SpecError(f"{expression} casts twice, which rounds twice; keep the last .to() only")
        for _, dtype in found:
            check_cast(dtype, expression.dtype)
        return expression.dtype
    for child, dtype in found:
        if dtype != found[0][1]:
            raise SpecError(f"{found[0][0]} is {found[0][1]} and {child} is {dtype}; cast one of them with .to()")
    return found[0][1] if found else None


def variables(what: str | Expression) -> dict[str, None]:
    """The index variables that are used and not bound by an ``each``, in turn."""
    return {reference.variable: None for reference in used(what)}


def used(what: str | Expression | Each, bound: frozenset[str] = frozenset()) -> Iterator[Reference]:
    """Every reference to an index variable that is not bound by an ``each``."""
    if isinstance(what, str):
        yield from (reference for reference in references(what) if reference.variable not in bound)
    elif isinstance(what, Source):
        yield from used(what.name, bound)
    elif isinstance(what, Each):
        yield from used(what.of, bound | {what.variable})
    else:
        if isinstance(what, Indexed):
            yield from (found for entry in what.index if isinstance(entry, str) for found in used(entry, bound))
        for child in what._children():
            yield from used(child, bound)


def words(what: str | Expression | Each) -> set[str]:
    """Every index variable and table that is named, also by an ``each``."""
    if isinstance(what, str):
        return {word for found in references(what) for word in (found.variable, *found.tables)}
    if isinstance(what, Source):
        return words(what.name)
    if isinstance(what, Each):
        return {what.variable} | words(what.of)
    entries = what.index if isinstance(what, Indexed) else ()
    named = [words(entry) for entry in entries if isinstance(entry, str)]
    return set().union(*named, *map(words, what._children()))


def _casts(expression: Expression | Each) -> bool:
    return isinstance(expression, Cast) or any(
        map(_casts, expression._children() if isinstance(expression, Expression) else ())
    )
