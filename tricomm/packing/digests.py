"""Digests of what was moved: the bits of every element, weighted by where it belongs, added up on both sides.

For each pair of a rank that holds elements first and one that receives them, and for each tensor of the destination,
both add the same numbers if every element has come whole and to its place. Nothing of the transport is trusted for
that: the one reads what it was given, the other what it wrote.
"""

from collections.abc import Sequence
from copy import copy
from itertools import product
from typing import NamedTuple, Self

import torch

from tricomm.errors import SpecError
from tricomm.layout.intervals import Region, first_runs
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.holdings import RankHoldings, Tensors
from tricomm.packing.selection import Selection
from tricomm.plan import Plan
from tricomm.plan.tasks import Task

MAX_NUMEL = 1 << 20
"""How many elements are weighted at once: each takes some 40 bytes while it is."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
FIRST_FACTOR, SECOND_FACTOR = 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51
ITEM_SHIFT = 40
"""Elements of one item count below 2 to this."""


class Digested(NamedTuple):
    """A region of an item that one rank holds first.

    Attributes:
        item: its number among the plan's.
        tensor: the number of the destination tensor that it is of.
        region: in the item's coordinates.
        others: numbers of the ranks on the other side, among all of that side.
    """

    item: int
    tensor: int
    region: Region
    others: tuple[int, ...]


class Digests:
    """What one rank adds up.

    Args:
        plan: global, or built for this rank.
        rank: whose digests.

    Raises:
        SpecError: a source is Partial, so that what comes is not what was given.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        partial = next((item.name for item in plan.items if item.source.partial_axes), None)
        if partial is not None:
            raise SpecError(
                f"checksum=True compares what comes with what was given, and tensor {partial!r} is Partial: it is "
                "reduced on the way; leave it out, or move it without checksum"
            )
        self.plan, self.rank = plan, rank
        self.holders = tuple(sorted({rank for _, spec in plan.ends.sources for rank in spec.mesh.ranks}))
        self.receivers = tuple(sorted({rank for _, spec in plan.ends.destinations for rank in spec.mesh.ranks}))
        held = RankHoldings.of(plan, rank)
        self._places = [
            {item: at for at, item in enumerate(one)} for one in (held.source_items, held.destination_items)
        ]
        self._sent: list[Digested] = []
        self._come: list[Digested] = []
        holders, receivers = ({rank: at for at, rank in enumerate(side)} for side in (self.holders, self.receivers))
        for number, tasks in enumerate(plan.moves[-1].refined):
            for task in tasks:
                if task.holders[0] == rank:
                    self._sent += self._regions(number, task, tuple([receivers[one] for one in task.receivers]))
                if rank in task.receivers:
                    self._come += self._regions(number, task, (holders[task.holders[0]],))

    def _regions(self, stack: int, task: Task, others: tuple[int, ...]) -> list[Digested]:
        """The regions of items that a task is; dim 0 of a stack of several counts them."""
        items, found = self.plan.moves[-1].stacks[stack].items, []
        for part in task.parts:
            numbers = items if len(items) == 1 else [items[k] for low, high in part.region[0] for k in range(low, high)]
            for item in numbers:
                known = self.plan.items[item].part
                tensor = item if known is None else known.destination
                found.append(Digested(item, tensor, part.region[len(items) > 1 :], others))
        return found

    def only(self, selection: Selection) -> Self:
        """Those of some of the tensors; the others count as nothing, on both sides."""
        names = {one.name for one in selection.ends.destinations}
        tensors = {number for number, one in enumerate(self.plan.ends.destinations) if one.name in names}
        kept = [
            number
            for number, item in enumerate(self.plan.items)
            if (number if item.part is None else item.part.destination) in tensors
        ]
        held = RankHoldings.of(selection, self.rank)
        made = copy(self)
        made._places = [
            {kept[item]: at for at, item in enumerate(one)} for one in (held.source_items, held.destination_items)
        ]
        made._sent, made._come = ([one for one in all_ if one.tensor in tensors] for all_ in (self._sent, self._come))
        return made

    def sent(self, items: Tensors) -> torch.Tensor:
        """(1, receivers, tensors) digests of what this rank holds first, by who receives it.

        Args:
            items: the plan's items that the rank holds.
        """
        return self._added(self._sent, items, 0, len(self.receivers)).unsqueeze(0)

    def come(self, items: Tensors) -> torch.Tensor:
        """(holders, 1, tensors) digests of what has come to this rank, by who holds it first.

        Args:
            items: the plan's items that the rank needs.
        """
        return self._added(self._come, items, 1, len(self.holders)).unsqueeze(1)

    def _added(self, regions: Sequence[Digested], items: Tensors, end: int, others: int) -> torch.Tensor:
        device = items[0].device if len(items) else torch.device("cpu")
        result = torch.zeros(others, len(self.plan.ends.destinations), dtype=torch.int64, device=device)
        for one in regions:
            item = self.plan.items[one.item]
            spec = item.destination if end else item.source
            tensor = items[self._places[end][one.item]]
            found = digest(tensor, spec, self.rank, one.region, torch_dtype(item.destination.element_type), one.item)
            for other in one.others:
                result[other, one.tensor] += found
        return result


def digest(
    tensor: torch.Tensor, spec: ShardingSpec, rank: int, region: Region, dtype: torch.dtype, salt: int
) -> torch.Tensor:
    """Add up the bits of the elements of a region, each times a number that its coordinates give: int64, as it wraps.

    Args:
        tensor: the rank's shard.
        spec: its layout.
        rank: whose shard; what it holds several times counts once.
        region: global coordinates.
        dtype: in which the bits are taken.
        salt: tells tensors apart.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> rows = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (4, 2), "int32")
        >>> whole = ShardingSpec(Mesh([2], ("x",)), (Shard(0),), (4, 2), "int32")
        >>> full, region = torch.arange(8, dtype=torch.int32).reshape(4, 2), (((2, 4),), ((0, 2),))
        >>> bool(digest(full[2:], rows, 1, region, full.dtype, 0) == digest(full, whole, 2, region, full.dtype, 0))
        True
    """
    # Interval by interval, as a run may go on in both concatenations where coordinates do not.
    per_dim = [
        [
            (low + run.inner_start, run.outer_start, run.length)
            for low, high in inner
            for run in first_runs(((low, high),), outer)
        ]
        for inner, outer in zip(region, spec.holding(rank), strict=True)
    ]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for box in product(*per_dim):
        place = tensor
        for dim, (_, start, length) in enumerate(box):
            place = place.narrow(dim, start, length)
        total += _weighted(place, [start for start, _, _ in box], spec.global_shape, dtype, salt)
    return total


def _weighted(
    box: torch.Tensor, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype, salt: int
) -> torch.Tensor:
    """The weighted bits of a box of a tensor of that shape, added up."""
    if box.numel() > MAX_NUMEL:
        dim = max(range(box.dim()), key=lambda one: box.shape[one])
        half = box.shape[dim] // 2
        first, second = box.narrow(dim, 0, half), box.narrow(dim, half, box.shape[dim] - half)
        further = [at + half * (one == dim) for one, at in enumerate(start)]
        return _weighted(first, start, shape, dtype, salt) + _weighted(second, further, shape, dtype, salt)
    index = torch.full((), salt << ITEM_SHIFT, dtype=torch.int64, device=box.device)
    step = 1
    for dim in reversed(range(box.dim())):
        along = torch.arange(start[dim], start[dim] + box.shape[dim], device=box.device) * step
        index = index + along.reshape([-1] + [1] * (box.dim() - 1 - dim))
        step *= shape[dim]
    bits = box.to(dtype).contiguous().reshape(-1).view(WORDS[dtype.itemsize]).to(torch.int64)
    weights = index.expand(box.shape).reshape(-1) * FIRST_FACTOR
    weights = (weights ^ (weights >> 31)) * SECOND_FACTOR | 1
    if dtype.itemsize == 16:
        weights = torch.stack([weights, weights ^ FIRST_FACTOR], dim=-1).reshape(-1)
    return (bits * weights).sum()
