"""From rules and the layouts of both sides to the items of a plan.

A rule says which elements of the sources a destination is, as pieces: boxes of digits that walk through one tensor on
either side. What a rank holds of a tensor is a product of intervals, and of a piece too, once that is cut where it is
not; so a piece is an ordinary tensor with a layout on both sides. Each is an item of the plan, of which the rank's
shard is a strided view of the shard that the caller gave. The planner, the transports and the kernels move it as any
other, tensors in between are never made, and a map without rules is the set of one piece per tensor that is all of it:
there is one path. Pieces that are alike, of layers and experts, are one class, planned once.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

from tricomm.errors import ArgumentError, PlanError, SpecError, shown
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.arguments import check_mapping, items_of, resolved
from tricomm.plan.ends.ends import Ends, Fill, Named
from tricomm.plan.stacks import Item, Part
from tricomm.plan.tasks import unit_tasks
from tricomm.rules.bound import BoundRules, BoundTensor
from tricomm.rules.boxes import Piece
from tricomm.rules.rules import Rules
from tricomm.rules.views.laid import laid
from tricomm.rules.views.settle import settled
from tricomm.rules.views.view import View

Sides = Mapping[str, ShardingSpec]


def items_and_ends(source: object, destination: object, rules: object = None) -> tuple[tuple[Item, ...], Ends]:
    """Find the items of a plan, and what callers name at its ends; see :func:`items_of` and :func:`ends_of_rules`."""
    if rules is not None:
        return ends_of_rules(rules, source, destination)
    items = items_of(source, destination)
    return items, Ends.of(items)


def require_held(items: Sequence[Item]) -> None:
    """Refuse an item of which an element is needed and held by nobody.

    Raises:
        PlanError: the first of them, by name.
    """
    for item in items:
        try:
            unit_tasks(item.source, item.destination)
        except PlanError as error:
            raise PlanError(f"rule for {item.name}: {error}") from error


def ends_of_rules(rules: object, source: object, destination: object) -> tuple[tuple[Item, ...], Ends]:
    """Find the items between tensors of two sides whose names, shapes and orders differ.

    Args:
        rules: Rules, or a map that is bound already.
        source, destination: the layout of each tensor by its own side's name; the destination's shapes and dtypes
            default to what the rules make.

    Raises:
        SpecError: names, shapes or dtypes that do not fit; an ArgumentError where an argument is of the wrong kind.
        PlanError: what a rule reads is held by nobody. All of them name the rule or the tensor.
    """
    if not isinstance(rules, Rules | BoundRules):
        raise ArgumentError(
            f"rules={shown(rules)} must be Rules; write Rules({{'name': source('name')}}), or leave it out"
        )
    for side, given in (("source", source), ("destination", destination)):
        if not isinstance(given, Mapping):
            raise ArgumentError(
                f"{side}={given!r} is not a mapping, and rules are between many tensors by name; give "
                "{name: ShardingSpec} on both sides"
            )
        check_mapping(side, given)
    assert isinstance(source, Mapping)
    assert isinstance(destination, Mapping)
    return _ends(rules, *(tuple([Named(name, side[name]) for name in sorted(side)]) for side in (source, destination)))


@lru_cache(maxsize=32)
def _ends(
    rules: Rules | BoundRules, sources: tuple[Named, ...], given: tuple[Named, ...]
) -> tuple[tuple[Item, ...], Ends]:
    known: dict[ShardingSpec, ShardingSpec] = {}  # work on pieces is shared by tensors that share a spec
    sources, given = (
        tuple([Named(name, known.setdefault(spec, spec)) for name, spec in side]) for side in (sources, given)
    )
    bound = _bound(rules, sources)
    by_name = {tensor.name: tensor for tensor in bound.tensors}
    specs = dict(given)
    _check_names(by_name, specs)
    held = dict(sources)
    made = [Named(name, _destination(by_name[name], held, spec)) for name, spec in specs.items()]
    destinations = tuple([Named(name, known.setdefault(spec, spec)) for name, spec in made])
    numbers = {named.name: number for number, named in enumerate(sources)}
    maker = _Items(sources, numbers)
    items: list[Item] = []
    fills: list[Fill] = []
    for number, named in enumerate(destinations):
        tensor = by_name[named.name]
        for piece in tensor.pieces:
            if piece.tensor is None:
                fills.append(Fill(number, piece))
                continue
            try:
                items += maker.of(tensor, number, piece, named.spec)
            except (SpecError, PlanError) as error:
                raise type(error)(_where(tensor, str(error))) from error
    return tuple(items), Ends(sources, destinations, tuple(fills), bound)


def _where(tensor: BoundTensor, text: str) -> str:
    return f"rule {tensor.rule!r}, tensor {tensor.name!r}: {text}"


def _bound(rules: Rules | BoundRules, sources: tuple[Named, ...]) -> BoundRules:
    """The map for these sources."""
    shapes = {name: spec.global_shape for name, spec in sources}
    dtypes = {name: spec.element_type for name, spec in sources}
    if isinstance(rules, Rules):
        return rules.bind(shapes, dtypes)
    for one in rules.sources:
        if one.name not in shapes:
            raise SpecError(
                f"the rules read {one.name!r}, which the source has not; give its layout, or bind them anew"
            )
        if one.shape != shapes[one.name] or one.dtype not in (None, dtypes[one.name]):
            raise SpecError(
                f"the rules were bound to {one.name!r} of {one.shape} {one.dtype or ''}, and the source has it as "
                f"{shapes[one.name]} {dtypes[one.name]}; bind them to the shapes and dtypes of the source"
            )
    known = {one.name for one in rules.sources}
    strange = next((name for name in shapes if name not in known), None)
    if strange is not None:
        raise SpecError(f"the rules were bound without source {strange!r}; bind them with it, or leave it out")
    return rules


def _check_names(made: Mapping[str, BoundTensor], wanted: Sides) -> None:
    """Refuse names that the rules do not make, or that nobody asked for."""
    for name in wanted:
        if name not in made:
            near = get_close_matches(name, list(made)[:2000], 1)
            hint = f"did you mean {near[0]!r}?" if near else "write a rule for it, or leave it out"
            raise SpecError(f"destination {name!r} is made by no rule; they make {len(made)} tensors: {hint}")
    for name, tensor in made.items():
        if name not in wanted:
            raise SpecError(
                f"rule {tensor.rule!r} makes {name!r}, which the destination has not; give its layout, or leave out "
                "the rule and name its sources in drop"
            )


def _destination(tensor: BoundTensor, sources: Sides, given: ShardingSpec) -> ShardingSpec:
    """The layout of a destination tensor, with the shape and dtype that its rule gives it."""
    of_sources = [sources[name].element_type for name in tensor.sources]
    dtype = tensor.dtype or (of_sources[0] if of_sources else given.dtype)
    if dtype is None:
        raise SpecError(_where(tensor, "it is made of fills alone and has no dtype; give one in its layout"))
    if given.shape is not None and given.shape != tensor.shape:
        raise SpecError(
            _where(
                tensor, f"the rule makes shape {tensor.shape}, and its layout says {given.shape}; correct one of them"
            )
        )
    if given.dtype not in (None, dtype) and of_sources and dtype not in of_sources:
        raise SpecError(
            _where(tensor, f"the rule casts to {dtype}, and its layout says {given.dtype}; cast in one place only")
        )
    like = ShardingSpec(given.mesh, (Replicate(),) * given.mesh.ndim, tensor.shape, dtype)
    try:
        return resolved(like, given)
    except SpecError as error:
        raise type(error)(_where(tensor, str(error))) from error


class _Known(NamedTuple):
    """A part of a piece, as what does not depend on names."""

    views: tuple[View, View] | None
    source: ShardingSpec
    destination: ShardingSpec


class _Items:
    """Makes items; pieces of equal digits and layouts once.

    Args:
        sources: the source tensors.
        numbers: their numbers by name.
    """

    def __init__(self, sources: tuple[Named, ...], numbers: Mapping[str, int]) -> None:
        self._sources, self._numbers = sources, numbers
        self._known: dict[object, list[_Known]] = {}

    def of(self, tensor: BoundTensor, number: int, piece: Piece, destination: ShardingSpec) -> list[Item]:
        """The items that a piece is."""
        assert piece.tensor is not None
        name = tensor.sources[piece.tensor]
        source = self._sources[self._numbers[name]].spec
        # By value but for the specs, which alike tensors often share: hashing long meshes takes time.
        key = (piece.digits, piece.start, piece.source_start, id(source), id(destination))
        if key not in self._known:
            self._known[key] = _parts(piece, source, destination)
        ends = self._numbers[name], number
        return [
            Item(f"{tensor.name} <- {name}", one.source, one.destination, Part(*ends, one.views))
            for one in self._known[key]
        ]


def _parts(piece: Piece, source: ShardingSpec, destination: ShardingSpec) -> list[_Known]:
    if _is_whole(piece, source, destination):
        return [_Known(None, source, resolved(source, destination))]
    parts = []
    for part in settled(piece, source, destination):
        read, written = View.of(part, True), View.of(part, False)
        here, there = laid(read, source), laid(written, destination)
        if there is None:
            continue
        if here is None:
            raise PlanError(
                f"it needs elements, from {list(part.source_start)} on, that no rank of {source} holds; "
                "add them to a holding, or take them out of the destination"
            )
        if source.partial_axes and not here.partial_axes:
            raise SpecError(
                f"its source is laid out as {source}, of which a piece is no whole part, and contributions are added "
                "before they are taken apart; reshard it to Shard or Replicate first"
            )
        parts.append(_Known((read, written), here, resolved(here, there)))
    return parts


def _is_whole(piece: Piece, source: ShardingSpec, destination: ShardingSpec) -> bool:
    """Whether a piece is all of a tensor on both sides, in one order."""
    shape = source.global_shape
    if shape != destination.global_shape or any(piece.start) or any(piece.source_start):
        return False
    whole = tuple([(size, dim, 1, dim, 1) for dim, size in enumerate(shape) if size > 1])
    return piece.digits == whole
