"""Which tensors of a plan a rank has, and in which order a move takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from tricomm.packing.selection import Planned

Tensors = Sequence[torch.Tensor]
"""Of one rank at one end: those that it has, in the order of the plan's items or of a move's stacks."""


@dataclass(frozen=True, slots=True)
class RankHoldings:
    """What a rank has of a plan's items.

    Attributes:
        source_items, destination_items: the numbers of those that it holds before, and after.
        partial_items: the numbers of those with a Partial source, whoever holds them.
        source_order, destination_order: where, among those that it holds, each tensor of the last move stands.
    """

    source_items: tuple[int, ...]
    destination_items: tuple[int, ...]
    partial_items: frozenset[int]
    source_order: tuple[int, ...]
    destination_order: tuple[int, ...]

    @property
    def is_in_order(self) -> bool:
        """Whether the last move takes all as the plan has them."""
        orders = self.source_order, self.destination_order
        return all(order == tuple(range(len(order))) for order in orders)

    @classmethod
    def of(cls, plan: Planned, rank: int) -> "RankHoldings":
        """Of one rank."""
        sources = tuple(number for number, item in enumerate(plan.items) if rank in item.source.mesh)
        destinations = tuple(number for number, item in enumerate(plan.items) if rank in item.destination.mesh)
        partial = frozenset(number for one in plan.classes if one.reduction is not None for number in one.items)
        taken = [number for stack in plan.stacks[-1] for number in stack.items]
        orders = []
        for items in (sources, destinations):
            place = {number: at for at, number in enumerate(items)}
            orders.append(tuple(place[number] for number in taken if number in place))
        return cls(sources, destinations, partial, orders[0], orders[1])

    def sources(self, tensors: Tensors) -> Tensors:
        """The sources, in the order of the last move."""
        return _ordered(tensors, self.source_order)

    def destinations(self, tensors: Tensors) -> Tensors:
        """The destinations, in the order of the last move."""
        return _ordered(tensors, self.destination_order)


def tensors_of_rank(plan: Planned, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the tensors that a rank gives, of the plan's sources, and of those that it gets."""
    ends = plan.ends
    read = None if ends.bound is None else {item.part.source for item in plan.items if item.part is not None}
    return (
        tuple([at for at, one in enumerate(ends.sources) if rank in one.spec.mesh and (read is None or at in read)]),
        tuple([at for at, one in enumerate(ends.destinations) if rank in one.spec.mesh]),
    )


def _ordered(tensors: Tensors, order: tuple[int, ...]) -> Tensors:
    return itemgetter(*order)(tensors) if len(order) > 1 else tensors
