"""Names with index variables: "layers.{l}.q", "experts.{global_of[e]}.up".

``{l}`` stands for each value of the variable ``l`` in turn, ``{table[l]}`` for what a table says for it. Both are
given to ``Rules`` by keyword: a range or a sequence of values for a variable, a sequence or a mapping for a table.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from tricomm.errors import ArgumentError, SpecError, shown

Value = int | str
Values = range | tuple[Value, ...]

_BRACES = re.compile(r"\{([^{}]*)\}")
_REFERENCE = re.compile(r"((?:[A-Za-z_]\w*\[)*)([A-Za-z_]\w*)(\]*)")


class Reference(NamedTuple):
    """``{variable}``, or ``{outer[inner[variable]]}`` with the tables in the order in which they are asked."""

    variable: str
    tables: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """A mapping, frozen."""

    items: tuple[tuple[Value, Value], ...]
    entries: Mapping[Value, Value] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", dict(self.items))

    def get(self, key: Value) -> Value | None:
        """What it says for a key."""
        return self.entries.get(key)

    def __repr__(self) -> str:
        return repr(dict(self.items))


@lru_cache(4096)
def parse(template: str) -> tuple[str | Reference, ...]:
    """The text and the references of a name, in turn.

    Example: ``parse("l.{l}.q")`` is ``("l.", Reference("l", ()), ".q")``.
    """
    parts: list[str | Reference] = []
    end = 0
    for found in _BRACES.finditer(template):
        whole = _REFERENCE.fullmatch(found[1])
        if whole is None or whole[1].count("[") != len(whole[3]):
            raise SpecError(f"{{{found[1]}}} in {template!r} is no index; write {{l}} or {{table[l]}}")
        parts += [template[end : found.start()], Reference(whole[2], tuple(whole[1].split("[")[-2::-1]))]
        end = found.end()
    parts.append(template[end:])
    if any(isinstance(part, str) and set(part) & set("{}") for part in parts):
        raise SpecError(f"{template!r} has a brace without its partner; write {{l}} or {{table[l]}}")
    return tuple(part for part in parts if part)


@lru_cache(4096)
def _as_format(template: str) -> tuple[str, tuple[str, ...]]:
    """A name as a format and the variables that it takes: names are many, so that filling them in is worth a word.

    A reference that asks tables is no variable's name, and so none that is bound.
    """
    parts = parse(template)
    text = "".join(part.replace("%", "%%") if isinstance(part, str) else "%s" for part in parts)
    found = [part for part in parts if isinstance(part, Reference)]
    return text, tuple("" if part.tables else part.variable for part in found)


def require_free(variable: str, bound: Collection[str]) -> None:
    """Refuse an ``each`` over a variable that has a value already."""
    if variable in bound:
        raise SpecError(f"index {variable!r} is bound already; each() needs a variable of its own")


def references(template: str) -> tuple[Reference, ...]:
    """The references of a name."""
    return tuple(part for part in parse(template) if isinstance(part, Reference))


def frozen(name: str, values: object) -> Values | Table:
    """What a keyword of ``Rules`` says, as an immutable value."""
    if isinstance(values, range):
        return values
    if isinstance(values, Mapping):
        entries = [entry for pair in values.items() for entry in pair]
    elif isinstance(values, list | tuple):
        entries = list(values)
    else:
        entries = [None]
    if not all(isinstance(entry, int | str) for entry in entries):
        raise ArgumentError(
            f"{name}={shown(values)} must be index values; give a range, a list, or a mapping of ints and strings"
        )
    return Table(tuple(values.items())) if isinstance(values, Mapping) else tuple(entries)


@dataclass(frozen=True, slots=True)
class Scope:
    """The index variables and tables of some rules, and the values of those variables that are bound just now."""

    indices: tuple[tuple[str, Values | Table], ...]
    bound: tuple[tuple[str, Value], ...] = ()

    def values(self, variable: str) -> Values:
        """The values of a variable."""
        found = dict(self.indices).get(variable)
        if found is None or isinstance(found, Table):
            raise SpecError(f"index {variable!r} has no values; pass {variable}=range(...) to Rules")
        return found

    def over(self, variables: tuple[str, ...]) -> Iterator["Scope"]:
        """This scope with those variables bound to each combination of their values, the last one fastest."""
        for variable in variables:
            require_free(variable, dict(self.bound))
        for values in product(*map(self.values, variables)):
            yield Scope(self.indices, (*self.bound, *zip(variables, values, strict=True)))

    def names(self, template: str, variables: tuple[str, ...]) -> list[str]:
        """The name in each of the scopes ``over`` these variables: names are many, and a scope for each is costly."""
        found = references(template)
        if self.bound or tuple([reference.variable for reference in found]) != variables:
            return [scope.name(template) for scope in self.over(variables)]
        columns = [[self._through(one.tables, value) for value in self.values(one.variable)] for one in found]
        text, _ = _as_format(template)
        return [text % values for values in product(*columns)]

    def count(self, variables: tuple[str, ...]) -> int:
        """How many scopes there are over these variables."""
        return prod(len(self.values(variable)) for variable in variables)

    def name(self, template: str) -> str:
        """A name with its indices filled in."""
        if "{" not in template:
            return template
        text, variables = _as_format(template)
        bound = dict(self.bound)
        try:
            return text % tuple([bound[variable] for variable in variables])
        except KeyError:  # a table, or not bound, which _value says
            return "".join([part if isinstance(part, str) else str(self._value(part)) for part in parse(template)])

    def position(self, template: str) -> int:
        """The integer that an index in braces says."""
        value = self._value(references(template)[0])
        if not isinstance(value, int):
            raise SpecError(
                f"{template} is {value!r} here, and only an integer can index a dim; give a table of integers"
            )
        return value

    def _value(self, reference: Reference) -> Value:
        values = [value for variable, value in self.bound if variable == reference.variable]
        if not values:
            raise SpecError(
                f"index {reference.variable!r} is bound neither by the destination's name nor by "
                f"each({reference.variable!r}, ...); use it in one of them"
            )
        return self._through(reference.tables, values[0])

    def _through(self, tables: tuple[str, ...], value: Value) -> Value:
        """What tables say, each for what the one before it said."""
        for name in tables:
            value = self._looked_up(name, value)
        return value

    def _looked_up(self, name: str, key: Value) -> Value:
        table = dict(self.indices).get(name)
        if table is None:
            raise SpecError(f"table {name!r} is not given; pass {name}=[...] or {name}={{...}} to Rules")
        if isinstance(table, Table):
            found = table.get(key)
        else:
            found = table[key] if isinstance(key, int) and 0 <= key < len(table) else None
        if found is None:
            count = len(table.items if isinstance(table, Table) else table)
            raise SpecError(f"table {name!r} has no entry for {key!r}; it has {count}; extend it")
        return found
