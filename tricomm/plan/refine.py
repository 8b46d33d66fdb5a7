"""Refine the cuts of two specs along one dim, and find which ranks hold an intersection of dims.

Between two neighbouring cuts of either spec nothing changes: the same parts of the source hold what is there, the
same parts of the destination need it. Where the parts of a spec do not overlap, which is so in every spec but
explicit ones, a sorted search finds the part; otherwise a sweep finds the set of parts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tricomm.layout.columns import IntervalLists, by_first, counts_of, distinct, numbered, offsets_of, positions
from tricomm.layout.part_table import PartTable
from tricomm.layout.spec import ShardingSpec

NOBODY = -1
"""The number of the class without parts and of the set without ranks."""


@dataclass(frozen=True, slots=True, eq=False)
class Covering:
    """Which parts of a spec cover each cell of a dim.

    Attributes:
        classes: per cell the number of a class of parts, or NOBODY.
        parts: per class the parts in it; None where each part is a class of its own, numbered alike.
    """

    classes: np.ndarray
    parts: tuple[tuple[int, ...], ...] | None

    def including(self, part: int) -> np.ndarray:
        """Mark the cells that a part covers, (cells,) bool."""
        if self.parts is None:
            covered: np.ndarray = self.classes == part
            return covered
        return np.isin(self.classes, [number for number, parts in enumerate(self.parts) if part in parts])


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Cells of one dim: coordinates that the same parts hold and the same parts need, in the order of their first.

    Attributes:
        intervals: per cell.
        held, needed: by which parts.
    """

    intervals: IntervalLists
    held: Covering
    needed: Covering


@lru_cache(maxsize=64)
def cells(source: IntervalLists, destination: IntervalLists) -> Cells:
    """Refine the parts of two specs along one dim to cells, and keep those that somebody needs.

    Cached: the same objects give the same cells.
    """
    cuts = distinct(np.concatenate([source.starts, source.stops, destination.starts, destination.stops]))
    held, needed = _covering(source, cuts), _covering(destination, cuts)
    kept = (needed.classes != NOBODY).nonzero()[0]
    starts, stops = cuts[:-1][kept], cuts[1:][kept]
    holders, receivers = held.classes[kept], needed.classes[kept]
    # Cells that the same parts hold and need are one, by the first of them.
    width = int(receivers.max(initial=0)) + 1
    first, cell = by_first(holders * width + receivers)
    if len(first) == len(cell):
        intervals = IntervalLists(starts, stops, np.arange(len(cell) + 1))
        return Cells(intervals, Covering(holders, held.parts), Covering(receivers, needed.parts))
    order = cell.argsort(kind="stable")
    starts, stops, cell = starts[order], stops[order], cell[order]
    # Neighbours within a cell join.
    joins = np.zeros(len(cell), bool)
    joins[1:] = (cell[1:] == cell[:-1]) & (starts[1:] == stops[:-1])
    begins = np.flatnonzero(~joins)
    ends = np.append(begins[1:], len(cell)) - 1 if len(cell) else begins
    counts = np.bincount(cell[begins], minlength=len(first))
    return Cells(
        IntervalLists(starts[begins], stops[ends], offsets_of(counts)),
        Covering(holders[first], held.parts),
        Covering(receivers[first], needed.parts),
    )


def _covering(lists: IntervalLists, cuts: np.ndarray) -> Covering:
    """Find the parts that cover what lies between neighbouring cuts."""
    part = np.arange(len(lists)) if lists.single else np.arange(len(lists)).repeat(counts_of(lists.offsets))
    order = lists.starts.argsort(kind="stable")
    starts, stops = lists.starts[order], lists.stops[order]
    if not len(starts):
        return Covering(np.full(max(len(cuts) - 1, 0), NOBODY), None)
    if (starts[1:] >= stops[:-1]).all():
        at = starts.searchsorted(cuts[:-1], side="right") - 1
        return Covering(np.where((at >= 0) & (cuts[:-1] < stops[at]), part[order][at], NOBODY), None)
    return _sweep(zip(part.tolist(), lists.starts.tolist(), lists.stops.tolist(), strict=True), cuts)


def _sweep(intervals: Iterable[tuple[int, int, int]], cuts: np.ndarray) -> Covering:
    """Sweep over the cuts, parts beginning and ending on the way; parts may overlap.

    Args:
        intervals: (part, start, stop) of every interval; those of one part do not overlap.
        cuts: every start and stop, ascending.

    Example:
        >>> covering = _sweep([(0, 0, 4), (1, 2, 6)], np.array([0, 2, 4, 6, 8]))
        >>> covering.classes.tolist(), covering.parts
        ([0, 1, 2, -1], ((0,), (0, 1), (1,)))
    """
    begins: dict[int, list[int]] = defaultdict(list)
    ends: dict[int, list[int]] = defaultdict(list)
    for part, start, stop in intervals:
        begins[start].append(part)
        ends[stop].append(part)
    numbers: dict[frozenset[int], int] = {}
    classes = np.empty(len(cuts) - 1, np.int64)
    covering: set[int] = set()
    for index, cut in enumerate(cuts[:-1].tolist()):
        covering.difference_update(ends[cut])  # first, for the next interval of a part may begin where the last ends
        covering.update(begins[cut])
        classes[index] = numbers.setdefault(frozenset(covering), len(numbers)) if covering else NOBODY
    return Covering(classes, tuple(tuple(sorted(parts)) for parts in numbers))


@dataclass(frozen=True, slots=True, eq=False)
class RankSets:
    """Sets of ranks by number; set i is members[offsets[i] : offsets[i + 1]], in mesh order."""

    members: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Count the ranks of each set."""
        return counts_of(self.offsets)

    def first(self, sets: np.ndarray) -> np.ndarray:
        """Find the first rank of some sets, none of which is empty."""
        ranks: np.ndarray = self.members[self.offsets[sets]]
        return ranks

    def ranks(self, number: int) -> tuple[int, ...]:
        """List the ranks of a set; NOBODY has none."""
        if number == NOBODY:
            return ()
        return tuple(self.members[self.offsets[number] : self.offsets[number + 1]].tolist())

    def including(self, rank: int) -> np.ndarray:
        """Mark the sets that a rank is in, (sets,) bool."""
        found = np.zeros(len(self.sizes), bool)
        found[np.repeat(np.arange(len(found)), self.sizes)[self.members == rank]] = True
        return found

    def includes(self, sets: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Mark the sets that the rank beside each is in.

        Args:
            sets: (n,) numbers.
            ranks: (n,).
        """
        width = int(max(self.members.max(initial=0), ranks.max(initial=0))) + 1
        known = np.repeat(np.arange(len(self.sizes)), self.sizes) * width + self.members
        return np.isin(sets * width + ranks, known)


class RankSetBuilder:
    """Finds the ranks of a spec that are in all of some classes, one of each dim, dim by dim.

    Where every class is one part, ranks that share all parts are one set, and sets need no rank to be found. Otherwise
    a set is a bit mask of mesh positions.
    """

    def __init__(self, spec: ShardingSpec, table: PartTable, coverings: Sequence[Covering]) -> None:
        self._ranks = spec.mesh.ranks
        self._part_of = table.part_of
        self._counts = [len(parts) for parts in table.parts]
        self._coverings = coverings
        self._disjoint = all(covering.parts is None for covering in coverings)
        self._set_of = np.zeros(spec.mesh.size, np.int64)
        self._masks: dict[int, int] = {(1 << spec.mesh.size) - 1: 0}

    def narrow(self, dim: int, sets: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Narrow sets (as numbered for the dim before, 0 before dim 0) to classes of this dim.

        To be called for one dim after the other, once each.
        """
        nowhere = (sets == NOBODY) | (classes == NOBODY)
        width = max(self._counts[dim] if self._disjoint else int(classes.max(initial=0)) + 1, 1)
        keys = np.where(nowhere, NOBODY, sets * width + classes)
        if self._disjoint:
            known, self._set_of = numbered(self._set_of * width + self._part_of[:, dim])
            return positions(known, keys)
        wanted, place = numbered(keys)
        masks = [*self._masks]
        class_masks = self._class_masks(dim)
        numbers: dict[int, int] = {0: NOBODY}
        found = [
            NOBODY
            if key == NOBODY
            else numbers.setdefault(masks[key // width] & class_masks[key % width], len(numbers) - 1)
            for key in wanted.tolist()
        ]
        del numbers[0]
        self._masks = numbers
        numbered_sets: np.ndarray = np.array(found, np.int64)[place]
        return numbered_sets

    def _class_masks(self, dim: int) -> list[int]:
        masks = [0] * self._counts[dim]
        for position, part in enumerate(self._part_of[:, dim].tolist()):
            masks[part] |= 1 << position
        parts = self._coverings[dim].parts
        # The masks of parts share no bit.
        return masks if parts is None else [sum(masks[part] for part in members) for members in parts]

    def result(self) -> RankSets:
        """List all sets, by the numbers of the last dim."""
        ranks = np.array(self._ranks, np.int64)
        if self._disjoint:
            order = np.argsort(self._set_of, kind="stable")
            return RankSets(ranks[order], offsets_of(np.bincount(self._set_of)))
        sets = [[at for at in range(mask.bit_length()) if mask >> at & 1] for mask in self._masks]
        order = np.array([at for members in sets for at in members], np.int64)
        return RankSets(ranks[order], offsets_of(np.array([*map(len, sets)], np.int64)))
