"""Rules: which expression each destination tensor is, for all layers and experts at once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tricomm.errors import ArgumentError, SpecError
from tricomm.kinds import checks_kinds
from tricomm.layout.dtype import dtype_name
from tricomm.rules.bind import Definition, bound
from tricomm.rules.bound import BoundRules
from tricomm.rules.evaluate import described
from tricomm.rules.expressions import Expression
from tricomm.rules.names import Scope, frozen
from tricomm.rules.resolve import leaves, resolved, variables, words


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that share their index variables.

    Attributes:
        definitions: destination name, with index variables, and what stands there.
        drop: patterns of source names, and expressions over sources, that no rule needs.
        scope: the values of the variables, and the tables.
    """

    definitions: tuple[tuple[str, Expression], ...]
    drop: tuple[str | Expression, ...]
    scope: Scope

    def instances(self, what: str | Expression) -> Iterator[Scope]:
        """The scope with each combination of values of the variables that are free in ``what``."""
        return self.scope.over(tuple(variables(what)))

    def __repr__(self) -> str:
        """As the line that makes it."""
        entries = ", ".join(f"{target!r}: {expression!r}" for target, expression in self.definitions)
        drop = f", drop={list(self.drop)!r}" if self.drop else ""
        indices = "".join(f", {name}={values!r}" for name, values in self.scope.indices)
        return f"Rules({{{entries}}}{drop}{indices})"

    def lines(self) -> list[str]:
        """One for each rule."""
        result = []
        for target, expression in self.definitions:
            indices = ", ".join(f"{name} in {_shown(self.scope, name)}" for name in variables(target))
            result.append(f"{target} <- {expression}" + (f"  for {indices}" if indices else ""))
        return result + [f"drop {what}" for what in self.drop]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Rules:
    """A map from named source tensors to named destination tensors: an immutable value.

    Args:
        definitions: destination name to expression. Names on both sides may hold index variables in braces.
        drop: sources that no rule needs: patterns of names ("mtp.*"), or expressions such as ``source("w")[8:]``.
        indices: the values of each index variable (a range or a list), and tables (a list or a mapping), by name.

    Raises:
        SpecError: a destination is defined twice, an index has no values, or known shapes do not fit.

    Example:
        >>> from tricomm.rules import Rules, cat, source
        >>> rules = Rules({"layers.{l}.qkv": cat([source("l.{l}.q"), source("l.{l}.k")], dim=0)}, l=range(2))
        >>> print(rules)
        layers.{l}.qkv <- cat([l.{l}.q, l.{l}.k], dim=0)  for l in 0:2
        >>> shapes = {"l.0.q": (8, 4), "l.0.k": (2, 4), "l.1.q": (8, 4), "l.1.k": (2, 4)}
        >>> rules.bind(shapes).shapes
        {'layers.0.qkv': (10, 4), 'layers.1.qkv': (10, 4)}
    """

    groups: tuple[Group, ...]

    def __init__(
        self, definitions: Mapping[str, Expression], *, drop: Sequence[str | Expression] = (), **indices: object
    ) -> None:
        if not isinstance(definitions, Mapping):
            raise ArgumentError(f"Rules({definitions!r}) takes a mapping; write Rules({{'name': source('name')}})")
        is_listed = isinstance(drop, Collection) and not isinstance(drop, str | Mapping)
        if not is_listed or not all(isinstance(one, str | Expression) for one in drop):
            raise ArgumentError(f"drop={drop!r} is no list of name patterns and expressions; write drop=['mtp.*']")
        for target, expression in definitions.items():
            if not isinstance(target, str) or not isinstance(expression, Expression):
                raise ArgumentError(
                    f"rule {target!r}: {expression!r} is no expression under a name; write source(name) or the like"
                )
        scope = Scope(tuple((name, frozen(name, values)) for name, values in indices.items()))
        self._take((Group(tuple(definitions.items()), tuple(drop), scope),))

    @classmethod
    @checks_kinds
    def of_groups(cls, groups: tuple[Group, ...]) -> "Rules":
        """The map of some groups, checked as if it were written.

        Raises:
            SpecError: as the class does.

        Example:
            >>> from tricomm.rules import Rules, source
            >>> rules = Rules({"b": source("a")}) + Rules({"d": source("c")})
            >>> Rules.of_groups(rules.groups) == rules
            True
        """
        made = object.__new__(cls)
        made._take(groups)
        return made

    def _take(self, groups: tuple[Group, ...]) -> None:
        for group in groups:
            _require_used(group)
            _require_fitting(group)
        object.__setattr__(self, "groups", groups)
        _require_unique(self)

    def __add__(self, other: "Rules") -> "Rules":
        """Both maps as one, for layers of different kinds."""
        if not isinstance(other, Rules):
            return NotImplemented
        both = object.__new__(Rules)
        object.__setattr__(both, "groups", self.groups + other.groups)
        _require_unique(both)
        return both

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.groups))

    def __str__(self) -> str:
        return "\n".join(line for group in self.groups for line in group.lines())

    @property
    def names(self) -> tuple[str, ...]:
        """Every destination tensor.

        >>> from tricomm.rules import Rules, source
        >>> Rules({"b.{l}": source("a.{l}")}, l=range(2)).names
        ('b.0', 'b.1')
        """
        return tuple(name for name, _ in _destinations(self))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Every source tensor that a rule reads, each once.

        >>> from tricomm.rules import Rules, cat, source
        >>> Rules({"qk": cat([source("q"), source("k")]), "k": source("k")}).source_names
        ('q', 'k')
        """
        found: dict[str, None] = {}
        for group in self.groups:
            for target, expression in group.definitions:
                found.update({name: None for scope in group.instances(target) for _, name in leaves(expression, scope)})
        return tuple(found)

    @checks_kinds
    def bind(
        self, source_shapes: Mapping[str, Sequence[int]] | None = None, dtypes: Mapping[str, object] | None = None
    ) -> BoundRules:
        """The map for source tensors of these shapes.

        Args:
            source_shapes: shape by source name. May be left out where every ``source`` says its shape.
            dtypes: dtype by source name. If left out, a destination has the dtype of its sources.

        Raises:
            SpecError: a source is missing, shapes or dtypes do not fit, or elements are used nowhere and not named
                in ``drop``. The message names the rule.

        Example:
            >>> from tricomm.rules import Rules, source
            >>> print(Rules({"b": source("a")[::2]}, drop=["a"]).bind({"a": (6,)}))
            b (3,): 1 piece of a
        """
        shapes = None if source_shapes is None else {name: tuple(shape) for name, shape in source_shapes.items()}
        types = None if dtypes is None else {name: dtype_name(dtype) for name, dtype in dtypes.items()}
        definitions, regions, patterns = [], [], []
        for group in self.groups:
            for target, expression in group.definitions:
                free = tuple(variables(target))
                names = group.scope.names(target, free)
                definitions.append(Definition(target, expression, names, group.scope, free))
            for what in group.drop:
                if isinstance(what, str):
                    patterns += [scope.name(what) for scope in group.instances(what)]
                else:
                    free = tuple(variables(what))
                    names = [str(what)] * group.scope.count(free)
                    regions.append(Definition(f"drop {what}", what, names, group.scope, free))
        return bound(definitions, regions, patterns, shapes, types)

    @checks_kinds
    def evaluate(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The destination tensors of these source tensors, numpy arrays or torch tensors, in one process.

        Example:
            >>> import numpy as np
            >>> from tricomm.rules import Rules, source
            >>> Rules({"b": source("a")[::2]}, drop=["a"]).evaluate({"a": np.arange(5)})
            {'b': array([0, 2, 4])}
        """
        return self.bind(*described(arrays)).evaluate(arrays)


def _destinations(rules: Rules) -> Iterator[tuple[str, str]]:
    """Every destination, and the name of its rule."""
    for group in rules.groups:
        for target, _ in group.definitions:
            for name in group.scope.names(target, tuple(variables(target))):
                yield name, target


def _require_unique(rules: Rules) -> None:
    seen: dict[str, str] = {}
    for name, target in _destinations(rules):
        if name in seen:
            raise SpecError(
                f"destination {name!r} is defined twice, by rule {seen[name]!r} and by rule {target!r}; "
                "remove one, or give their index variables values that do not meet"
            )
        seen[name] = target


def _require_used(group: Group) -> None:
    named = set()
    for what in (*(part for definition in group.definitions for part in definition), *group.drop):
        named |= words(what)
    for name, values in group.scope.indices:
        if name not in named:
            raise SpecError(f"{name}={values!r} is used by no rule; write {{{name}}} in a name, or leave it out")


def _require_fitting(group: Group) -> None:
    """Check shapes where every source says its own: one instance of each rule stands for all."""
    for target, expression in group.definitions:
        scope = next(group.instances(target), None)
        try:
            if scope is not None and all(leaf.shape is not None for leaf, _ in leaves(expression, scope)):
                resolved(expression, scope, None)
        except SpecError as error:
            raise SpecError(f"rule {target!r}: {error}") from None


def _shown(scope: Scope, variable: str) -> str:
    values = scope.values(variable)
    return f"{values.start}:{values.stop}" if isinstance(values, range) and values.step == 1 else repr(values)
