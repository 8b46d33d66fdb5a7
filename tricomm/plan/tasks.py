"""Unit tasks: the common refinement of two layouts, made dim by dim and never from all pairs of ranks.

The paper's unit communication task is one data slice, the ranks that hold it and the ranks that need it.
Here a sweep over each dim finds the intervals with the same holders and needers (sets of ranks as bit
masks); the product of the dims, with the masks intersected, gives the tasks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from tricomm.errors import PlanError
from tricomm.intervals import Intervals, Region, merged, region_numel
from tricomm.sharding import Layout, ShardingSpec, layout


@dataclass(frozen=True, slots=True)
class Task:
    """Elements with the same holders and the same needers.

    Attributes:
        regions: disjoint products of intervals, in row-major order of discovery.
        holders: source ranks that hold all of it, in mesh order.
        needers: destination ranks that need all of it, in mesh order.
    """

    regions: tuple[Region, ...]
    holders: tuple[int, ...]
    needers: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the task, counted once."""
        return sum(region_numel(region) for region in self.regions)

    @property
    def receivers(self) -> tuple[int, ...]:
        """Needers that do not hold it already; the others copy locally."""
        held = set(self.holders)
        return tuple(rank for rank in self.needers if rank not in held)


class DimGroup(NamedTuple):
    """Coordinates of one dim that the same ranks hold and the same ranks need (as far as this dim goes)."""

    intervals: Intervals
    holders: int
    needers: int


def unit_tasks(source: ShardingSpec, destination: ShardingSpec, rank: int | None = None) -> tuple[Task, ...]:
    """The tasks that bring every rank of ``destination`` what it holds there.

    Args:
        source: where the elements are; no Partial axes (they are reduced before).
        destination: where they go; same shape.
        rank: build only the tasks that this rank holds or needs.

    Raises:
        PlanError: an element that somebody needs and nobody holds.
    """
    groups = [_dim_groups(layout(source), layout(destination), dim) for dim in range(len(source.global_shape))]
    everyone = (1 << source.mesh.size) - 1, (1 << destination.mesh.size) - 1
    by_ranks: dict[tuple[int, int], list[Region]] = {}
    for region, holders, needers in _cells(groups, everyone, source, destination, rank):
        if not holders:
            needer = _ranks_of(needers, destination.mesh.ranks)[0]
            raise PlanError(
                f"the elements {region} that rank {needer} needs are held by no rank of the source {source}; "
                "add them to a source holding or take them out of the destination"
            )
        by_ranks.setdefault((holders, needers), []).append(region)
    return tuple(
        Task(
            tuple(regions),
            _ranks_of(holders, source.mesh.ranks),
            _ranks_of(needers, destination.mesh.ranks),
        )
        for (holders, needers), regions in by_ranks.items()
    )


def peer_bound(source: ShardingSpec, destination: ShardingSpec) -> int:
    """How many messages one rank may send or receive at the most if each task is a message per receiver.

    Computed from the dims alone, so that every rank knows it without building the others' tasks.
    """
    sends, receives = 1, 1
    for dim in range(len(source.global_shape)):
        groups = _dim_groups(layout(source), layout(destination), dim)
        if not groups:
            return 1
        sends *= max(Counter(group.holders for group in groups).values())
        receives *= max(Counter(group.needers for group in groups).values())
    replicas = 1 if destination.exclusive else destination.mesh.size
    limit = max(source.mesh.size, destination.mesh.size)
    return min(max(sends * replicas, receives), limit)


def _cells(
    groups: Sequence[Sequence[DimGroup]],
    everyone: tuple[int, int],
    source: ShardingSpec,
    destination: ShardingSpec,
    rank: int | None,
) -> Iterator[tuple[Region, int, int]]:
    """(region, holders, needers) of every cell that somebody needs, or only of those that ``rank`` touches."""
    if rank is None:
        yield from _product(groups, *everyone)
        return
    need_bit = 1 << destination.mesh.position(rank) if rank in destination.mesh else 0
    hold_bit = 1 << source.mesh.position(rank) if rank in source.mesh else 0
    if need_bit:
        needed = [[g for g in dim if g.needers & need_bit] for dim in groups]
        yield from _product(needed, *everyone)
    if hold_bit:
        held = [[g for g in dim if g.holders & hold_bit] for dim in groups]
        for region, holders, needers in _product(held, *everyone):
            if not needers & need_bit:
                yield region, holders, needers


def _product(groups: Sequence[Sequence[DimGroup]], holders: int, needers: int) -> Iterator[tuple[Region, int, int]]:
    """Every combination of one group per dim that some rank needs in all dims."""
    if not groups:
        yield (), holders, needers
        return
    for group in groups[0]:
        both = needers & group.needers
        if both:
            for rest, held, needed in _product(groups[1:], holders & group.holders, both):
                yield (group.intervals, *rest), held, needed


@lru_cache(maxsize=64)
def _dim_groups(source: Layout, destination: Layout, dim: int) -> list[DimGroup]:
    """Sweep one dim: between two neighbouring cuts nothing changes; equal neighbourhoods join."""
    toggles: dict[int, list[int]] = {}
    for side, table in enumerate((source, destination)):
        masks = _part_masks(table, dim)
        for mask, intervals in zip(masks, table.parts[dim], strict=True):
            for start, stop in intervals:
                for cut in (start, stop):
                    toggles.setdefault(cut, [0, 0])[side] ^= mask
    by_masks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    cuts = sorted(toggles)
    holders = needers = 0
    for start, stop in pairwise(cuts):
        holders ^= toggles[start][0]
        needers ^= toggles[start][1]
        if needers:
            by_masks.setdefault((holders, needers), []).append((start, stop))
    return [DimGroup(merged(intervals), held, needed) for (held, needed), intervals in by_masks.items()]


def _part_masks(table: Layout, dim: int) -> list[int]:
    """For each part of a dim the mask of the ranks (by mesh position) that hold it. Parts share no rank."""
    masks = [0] * len(table.parts[dim])
    for position, part in enumerate(table.part_of[:, dim].tolist()):
        masks[part] |= 1 << position
    return masks


def _ranks_of(mask: int, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks whose positions are set in the mask, in mesh order."""
    if mask == (1 << len(ranks)) - 1:
        return ranks
    result: list[int] = []
    while mask:
        lowest = mask & -mask
        result.append(ranks[lowest.bit_length() - 1])
        mask ^= lowest
    return tuple(result)
