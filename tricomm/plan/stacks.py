"""Stacks: equal tensors planned as one, along a new dim 0 that counts them. A single tensor is the stack of one.

Layers and experts are alike: of 45,000 tensors of a model a few hundred differ. Tensors of equal layouts, shape and
dtypes hold and need the same coordinates everywhere, so a stack of n of them is an ordinary tensor of shape (n, ...) of
which every holder has all rows. It is planned once; only packing knows that its rows lie apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from tricomm.layout.intervals import clip, length, merged, without_repeats
from tricomm.layout.placement import Placement, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.reduction import Reduction, phases, reduction_of
from tricomm.plan.tasks import wire_dtype, wire_itemsize
from tricomm.rules.views.view import View


class Part(NamedTuple):
    """Of which tensors an item is a part.

    Attributes:
        source, destination: their numbers among those of each side.
        views: which elements of them it is, of the one that is read and of the one that is written; None if all of
            both.
    """

    source: int
    destination: int
    views: tuple[View, View] | None


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of a plan, or by rules a piece of one that is moved as a tensor.

    Attributes:
        name: among the others; "" where a tensor was given alone.
        source, destination: resolved specs.
        part: of which tensors; None for the whole tensor of its name on both sides.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> make_plan({"wq": rows}, {"wq": columns}).items[0].name
        'wq'
    """

    name: str
    source: ShardingSpec
    destination: ShardingSpec
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """Equal tensors that take part in a move.

    Attributes:
        items: their numbers among the items of the plan.
        source, destination: resolved specs of one global shape; with a dim 0 of their count in front if they are
            several.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> names = ("wq", "wk", "wv")
        >>> plan = make_plan(dict.fromkeys(names, rows), dict.fromkeys(names, columns))
        >>> (stack,) = plan.moves[0].stacks
        >>> stack.items, stack.source.shape, stack.wire_dtype
        ((0, 1, 2), (3, 8, 4), 'float32')
    """

    items: tuple[int, ...]
    source: ShardingSpec
    destination: ShardingSpec

    @property
    def wire_dtype(self) -> str:
        """The dtype between ranks."""
        return wire_dtype(self.source, self.destination)

    def missing_nbytes(self, rank: int) -> int:
        """Count the bytes of what a rank needs and does not hold, each element once: the least that comes to it."""
        if rank not in self.destination.mesh:
            return 0
        needed = [merged(sorted(without_repeats(one))) for one in self.destination.holding(rank)]
        missing = prod(map(length, needed))
        if rank in self.source.mesh:
            held = [merged(sorted(without_repeats(one))) for one in self.source.holding(rank)]
            missing -= prod(
                sum(length(clip(both, start, stop)) for start, stop in of_dim)
                for both, of_dim in zip(needed, held, strict=True)
            )
        return missing * wire_itemsize(self.source, self.destination)


def stacked(spec: ShardingSpec, count: int) -> ShardingSpec:
    """The layout of so many tensors that are laid out so; of one it is the same."""
    if count == 1:
        return spec
    shape = (count, *spec.global_shape)
    if spec.holdings is not None:
        holdings = tuple((((0, count),), *holding) for holding in spec.holdings)
        return replace(spec, shape=shape, holdings=holdings)
    placements: list[Placement] = [
        Shard(placement.dim + 1, placement.segments) if isinstance(placement, Shard) else placement
        for placement in spec.placements
    ]
    return ShardingSpec(spec.mesh, placements, shape, spec.dtype, spec.axis_order)


@dataclass(frozen=True, slots=True)
class Alike:
    """Items of equal layouts.

    Attributes:
        items: their numbers.
        source, destination: of each of them.
        reduction: what happens between the two moves of a Partial source, else None.
    """

    items: tuple[int, ...]
    source: ShardingSpec
    destination: ShardingSpec
    reduction: Reduction | None

    def stacks(self) -> list[Stack]:
        """The stack in each move that they take part in: the last, and for a Partial source the one before it."""
        count = len(self.items)
        return [
            Stack(self.items, stacked(source, count), stacked(destination, count))
            for source, destination in phases(self.source, self.destination, self.reduction)
        ]


def alike(items: Sequence[Item]) -> tuple[Alike, ...]:
    """Group the items of equal layouts, in the order in which they come first."""
    known: dict[tuple[int, int], list[int]] = {}  # specs are often the same object, and hashing long meshes takes time
    found: dict[tuple[ShardingSpec, ShardingSpec], list[int]] = {}
    for number, item in enumerate(items):
        identity = (id(item.source), id(item.destination))
        if identity not in known:
            known[identity] = found.setdefault((item.source, item.destination), [])
        known[identity].append(number)
    return tuple(Alike(tuple(numbers), *specs, _reduction(*specs)) for specs, numbers in found.items())


@lru_cache(maxsize=1024)
def _reduction(source: ShardingSpec, destination: ShardingSpec) -> Reduction | None:
    return reduction_of(source, destination)


def stacks_of_moves(classes: Sequence[Alike]) -> list[tuple[Stack, ...]]:
    """The stacks of each move, larger elements first: so each lies at a multiple of its size wherever they share a
    message. There is a move before the last one where some source is Partial.
    """
    last = [one.stacks()[-1] for one in classes]
    first = [one.stacks()[0] for one in classes if one.reduction is not None]
    moves = [first, last] if first else [last]
    return [tuple(sorted(stacks, key=lambda one: -wire_itemsize(one.source, one.destination))) for stacks in moves]
