"""Ends: the tensors of a plan as callers name them, on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tricomm.layout.spec import ShardingSpec
from tricomm.plan.stacks import Item
from tricomm.rules.bound import BoundRules
from tricomm.rules.boxes import Piece


class Named(NamedTuple):
    """A tensor of one side.

    Attributes:
        name: among the others of its side; "" where a tensor is alone.
        spec: its layout, with shape and dtype.
    """

    name: str
    spec: ShardingSpec


class Fill(NamedTuple):
    """Elements of a destination tensor that are all one value, which nobody sends.

    Attributes:
        tensor: its number among the destinations.
        piece: where they are.
    """

    tensor: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Ends:
    """What a plan leads from and to.

    Attributes:
        sources, destinations: the tensors, each by its own side's name.
        fills: what no item brings.
        bound: the map between the sides; None where each tensor goes to the one of its name.
    """

    sources: tuple[Named, ...]
    destinations: tuple[Named, ...]
    fills: tuple[Fill, ...] = ()
    bound: BoundRules | None = field(default=None, compare=False)

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Ends":
        """The ends of a plan without rules: every item is a tensor on both sides."""
        return cls(
            tuple([Named(item.name, item.source) for item in items]),
            tuple([Named(item.name, item.destination) for item in items]),
        )

    @property
    def specs(self) -> list[tuple[str, ShardingSpec]]:
        """(side, layout) of every tensor."""
        sources = [("source", one.spec) for one in self.sources]
        return sources + [("destination", one.spec) for one in self.destinations]
