"""From rules to a bound map: names filled in, shapes and dtypes checked, pieces made, uses of sources proven.

Layers and experts are alike, so work is done once for each rule and kind of shapes; an instance differs by names.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from math import prod
from typing import NamedTuple

from tricomm.errors import SpecError
from tricomm.rules.bound import BoundRules, BoundSource, BoundTensor
from tricomm.rules.boxes import Piece, renumbered
from tricomm.rules.checks import Shape
from tricomm.rules.cover import cover, defines_exactly_once
from tricomm.rules.expressions import Expression, Source
from tricomm.rules.lower import lower
from tricomm.rules.names import Scope
from tricomm.rules.resolve import element_type, positions, reads, resolved


class Definition(NamedTuple):
    """A rule: its name in errors, its expression, the name of each destination, and the scope and index variables over
    which these are.
    """

    target: str
    expression: Expression
    names: Sequence[str]
    scope: Scope
    variables: tuple[str, ...]


Reads = tuple[list[Source], list[tuple[str, ...]]]
"""Sources, and for every instance of a rule their names."""


class Form(NamedTuple):
    """What the instances of a rule with equal shapes share.

    Attributes:
        shape, dtype: of the destination.
        pieces: by the place of a source among the distinct sources.
        uses: for each of those sources, where its elements are used: pieces of which it is the destination.
    """

    shape: Shape
    dtype: str | None
    pieces: tuple[Piece, ...]
    uses: tuple[tuple[Piece, ...], ...]


def bound(
    definitions: Sequence[Definition],
    regions: Sequence[Definition],
    patterns: Sequence[str],
    shapes: Mapping[str, Shape] | None,
    dtypes: Mapping[str, str] | None,
) -> BoundRules:
    """The map of some definitions; ``regions`` and ``patterns`` say which sources may stay unused."""
    read_by = [_reads(definition) for definition in (*definitions, *regions)]
    declared = _declared([*definitions, *regions], read_by, shapes)
    tensors: list[BoundTensor] = []
    uses: dict[str, tuple[Piece, ...]] = {}
    users: dict[str, str] = {}
    for number, definition in enumerate([*definitions, *regions]):
        forms: dict[object, tuple[Form, tuple[int, ...]]] = {}
        scopes = definition.scope.over(definition.variables)
        for target, scope, read in zip(definition.names, scopes, read_by[number][1], strict=True):
            form, names = _form(definition, scope, read, forms, declared, dtypes)
            for name, used in zip(names, form.uses, strict=True):
                uses[name] = uses[name] + used if name in uses else used
                users.setdefault(name, definition.target)
            if number < len(definitions):
                tensors.append(BoundTensor(target, form.shape, form.dtype, names, form.pieces, definition.target))
    _require_used(declared, uses, users, patterns)
    sources = tuple(BoundSource(name, shape, dtypes[name] if dtypes else None) for name, shape in declared.items())
    return BoundRules(tuple(tensors), sources)


def _reads(definition: Definition) -> Reads:
    """The sources that a rule reads, and for every instance their names."""
    try:
        return reads(definition.expression, definition.scope, definition.variables)
    except SpecError as error:
        raise SpecError(f"rule {definition.target!r}: {error}") from None


def _declared(
    definitions: Sequence[Definition],
    read_by: Sequence[Reads],
    shapes: Mapping[str, Shape] | None,
) -> dict[str, Shape]:
    """The shape of every source: as given, or as the rules say."""
    result = dict(shapes or {})
    for definition, (leaves, rows) in zip(definitions, read_by, strict=True):
        for leaf, name in ((leaf, name) for row in rows for leaf, name in zip(leaves, row, strict=True)):
            if shapes is None and leaf.shape is not None:
                result.setdefault(name, leaf.shape)
            if name not in result:
                raise SpecError(_unknown(definition.target, name, shapes))
            if leaf.shape is not None and result[name] != leaf.shape:
                raise SpecError(
                    f"rule {definition.target!r}: source {name!r} has shape {result[name]}, but the rule says "
                    f"{leaf.shape}; correct the rule's sizes, or choose another tensor"
                )
    return result


def _unknown(target: str, name: str, shapes: Mapping[str, Shape] | None) -> str:
    if shapes is None:
        return f"rule {target!r}: source {name!r} has no shape; pass source_shapes, or write source(name, shape)"
    near = get_close_matches(name, islice(shapes, 2000), 1)
    hint = f"; did you mean {near[0]!r}?" if near else "; pass its shape, or correct the name"
    return f"rule {target!r}: source {name!r} is not among the {len(shapes)} source tensors{hint}"


def _form(
    definition: Definition,
    scope: Scope,
    read: Sequence[str],
    forms: dict[object, tuple[Form, tuple[int, ...]]],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | None,
) -> tuple[Form, tuple[str, ...]]:
    """The form of one instance, and the names of its sources in the order in which its pieces count them."""
    try:
        names = tuple(dict.fromkeys(read))
        if dtypes is not None:
            _require_dtypes(names, dtypes)
        repeated = () if len(names) == len(read) else tuple(map(names.index, read))
        kinds = tuple([shapes[name] for name in names]), tuple([dtypes[name] for name in names]) if dtypes else ()
        key = (repeated, kinds, tuple(positions(definition.expression, scope)))
        if key not in forms:
            place = {name: index for index, name in enumerate(names)}
            forms[key] = _made(definition.expression, scope, place, shapes, dtypes)
    except SpecError as error:
        raise SpecError(f"rule {definition.target!r}: {error}") from None
    form, order = forms[key]
    return form, tuple([names[index] for index in order])


def _made(
    expression: Expression,
    scope: Scope,
    place: Mapping[str, int],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | None,
) -> tuple[Form, tuple[int, ...]]:
    expression = resolved(expression, scope, shapes)
    shape = expression.shape
    assert shape is not None, "every source has a shape by now"
    pieces, order = renumbered(lower(expression, place))
    # What reads nothing says its own.
    dtype = None if dtypes is None and place else element_type(expression, dtypes or {})
    if not defines_exactly_once(shape, pieces):
        raise SpecError(
            f"{expression} is not defined exactly once by its pieces; this is a fault of tricomm, report it"
        )
    uses = [tuple([piece.turned() for piece in pieces if piece.tensor == index]) for index in range(len(order))]
    return Form(shape, dtype, pieces, tuple(uses)), order


def _require_dtypes(names: Sequence[str], dtypes: Mapping[str, str]) -> None:
    for name in names:
        if name not in dtypes:
            raise SpecError(f"source {name!r} has no dtype among the {len(dtypes)}; pass it, or pass no dtypes at all")


def _require_used(
    shapes: Mapping[str, Shape],
    uses: Mapping[str, tuple[Piece, ...]],
    users: Mapping[str, str],
    patterns: Sequence[str],
) -> None:
    """Prove that every source element is used or dropped."""
    dropped = re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in patterns) or "(?!)")
    kept = [name for name in shapes if prod(shapes[name]) and not dropped.fullmatch(name)]
    unused = [name for name in kept if name not in uses]
    if unused:
        raise SpecError(
            f"{len(unused)} of {len(shapes)} source tensors are used by no rule, the first is {unused[0]!r} "
            f"{shapes[unused[0]]}; write a rule for each, or name them in drop=[{unused[0]!r}]"
        )
    # Layers and experts share pieces, which are long to compare.
    alike = {(shapes[name], id(uses[name])): name for name in kept[::-1]}
    for name in [name for name in kept if alike[shapes[name], id(uses[name])] == name]:
        found = cover(shapes[name], uses[name])
        if found.missing is not None:
            raise SpecError(
                f"rule {users[name]!r}: {found.missing_numel} of {prod(shapes[name])} elements of source {name!r} "
                f"{shapes[name]} are used nowhere, the first at {list(found.missing)}; use them, or name them in "
                f"drop=[source({name!r})[...]]"
            )
