"""Whether two sides say the same of how the tensors of one are made of those of the other."""

from collections.abc import Mapping
from itertools import chain

from tricomm.connect.told.maps import Map
from tricomm.errors import PlanError, SpecError, TransportError
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.bound import BoundRules, BoundTensor
from tricomm.rules.rules import Rules

Specs = Mapping[str, ShardingSpec]
Pair = tuple[str, str]
"""(source, destination): names of sides."""

MAX_SHOWN = 300
"""Characters of an expression in an error."""


class DifferenceError(TransportError):
    """Sides contradict each other in what their code says, so that to pair anew would not help."""


class Told(dict[str, dict[str, ShardingSpec]]):
    """What each side told in an exchange: {side: {name: spec}}, on ranks of the group.

    Attributes:
        rules: how the tensors of a side are made of those of another, by (source, destination), where one of the two
            told it. A :class:`tricomm.Feed` takes them from here.
    """

    def __init__(self, specs: Mapping[str, dict[str, ShardingSpec]], rules: Mapping[Pair, Map]) -> None:
        super().__init__(specs)
        self.rules: dict[Pair, Map] = dict(rules)


def agree(told: Mapping[str, Mapping[Pair, Map]], specs: Mapping[str, Specs]) -> dict[Pair, Map]:
    """Return one map for each pair of sides of which somebody told one.

    Args:
        told: by who told it.
        specs: of all sides.

    Raises:
        DifferenceError: the two sides of a pair mean different things. It is the same on all ranks.
    """
    found: dict[Pair, Map] = {}
    for pair in sorted(set(chain.from_iterable(told.values()))):
        said = [(side, told[side][pair]) for side in pair if pair in told[side]]
        found[pair] = said[0][1]
        if len(said) == 2 and said[0][1] != said[1][1]:
            problem = _difference(said, specs[pair[0]])
            if problem:
                raise DifferenceError(
                    f"sides {pair[0]!r} and {pair[1]!r} tell different rules for how the tensors of {pair[1]!r} are "
                    f"made of those of {pair[0]!r}: {problem}; give the same on both sides, or on one side only"
                )
    return found


def _difference(said: list[tuple[str, Map]], sources: Specs) -> str:
    """Say of which tensor two maps mean different things; "" if they mean the same, however they are written."""
    (one, first), (other, second) = said
    try:
        ours, theirs = (_bound(map_, sources) for map_ in (first, second))
    except (SpecError, PlanError) as error:
        return str(error)
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            return f"only side {one if name in ours else other!r} makes {name!r}"
        if not _is_same(ours[name], theirs[name]):
            texts = [_text(map_, bound[name]) for map_, bound in ((first, ours), (second, theirs))]
            return f"{name!r} is {texts[0]} for side {one!r}, and {texts[1]} for side {other!r}"
    return ""


def _bound(told: Map, sources: Specs) -> dict[str, BoundTensor]:
    if isinstance(told, Rules):
        shapes = {name: spec.global_shape for name, spec in sources.items()}
        told = told.bind(shapes, {name: spec.element_type for name, spec in sources.items()})
    return {tensor.name: tensor for tensor in told.tensors}


def _is_same(one: BoundTensor, other: BoundTensor) -> bool:
    """Whether they mean the same; a map that was bound without dtypes says nothing of them."""
    dtypes = {one.dtype, other.dtype} - {None}
    return len(dtypes) < 2 and (one.shape, one.sources, one.pieces) == (other.shape, other.sources, other.pieces)


def _text(told: Map, tensor: BoundTensor) -> str:
    """A tensor as its rule says it, or as its pieces."""
    if isinstance(told, BoundRules):
        found = f"{tensor} ({'; '.join(map(str, tensor.pieces))})"
    else:
        found = next(
            str(expression) for group in told.groups for name, expression in group.definitions if name == tensor.rule
        )
    return found if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]}..."
