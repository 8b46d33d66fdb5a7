"""Plans as columns: sequences of values that exist as arrays of integers, and as objects only when looked at.

A rank of a large mesh exchanges with thousands of others. What makes its plan slow is not the arithmetic, which is
the same for every pair, but one object for each task, assignment, message and hop on the way to the program. Here
a plan's sequences are arrays; an item is made when somebody asks for it, and is then the same value as ever.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar, overload

import numpy as np

from tricomm.layout.intervals import Intervals, Region

T_co = TypeVar("T_co", covariant=True)


class Rows(Sequence[T_co]):
    """An immutable sequence of which an item is made when it is looked at."""

    __slots__ = ()

    @abstractmethod
    def _items(self, rows: np.ndarray) -> Iterator[T_co]:
        """The items of some rows."""

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, index: int | slice) -> T_co | tuple[T_co, ...]:
        if isinstance(index, slice):
            return tuple(self._items(np.arange(len(self))[index]))
        row = range(len(self))[index]
        return next(self._items(np.array([row])))

    def __iter__(self) -> Iterator[T_co]:
        return self._items(np.arange(len(self)))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Lazy(Rows[T_co]):
    """Rows that equal the tuple of their items."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | Lazy):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True)))

    def __hash__(self) -> int:
        return hash(tuple(self))


def numbers(values: Iterable[int], count: int = -1) -> np.ndarray:
    """Integers as an array."""
    return np.fromiter(values, np.int64, count)


def power_of_two(counts: np.ndarray) -> np.ndarray:
    """The least power of two that is not below each of some counts.

    Example:
        >>> power_of_two(np.array([1, 4, 5])).tolist()
        [1, 4, 8]
    """
    _, doublings = np.frexp((counts - 1).astype(np.float64))
    powers: np.ndarray = 1 << doublings.astype(np.int64)
    return powers


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where each of some groups of so many rows begins, and where the last one ends."""
    result = np.zeros(len(counts) + 1, np.int64)
    np.add.accumulate(counts, out=result[1:])
    return result


def counts_of(offsets: np.ndarray) -> np.ndarray:
    """How many rows each group has."""
    counts: np.ndarray = offsets[1:] - offsets[:-1]
    return counts


def distinct(values: np.ndarray) -> np.ndarray:
    """The values, each once, ascending: numpy.unique, which takes several times as long for few."""
    values = np.sort(values)
    values = values[starts_run(values)]
    return values


def starts_run(values: np.ndarray) -> np.ndarray:
    """Which values differ from the one before them; the first one does."""
    differs = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


def numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values, each once, ascending; and where each value stands among them."""
    order = values.argsort(kind="stable")
    ascending = values[order]
    is_new = starts_run(ascending)
    place = np.empty(len(values), np.int64)
    place[order] = np.add.accumulate(is_new, dtype=np.int64) - 1
    return ascending[is_new], place


def by_first(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value stands first, in this order; and for each value, which of those it equals."""
    order = values.argsort(kind="stable")
    ascending = values[order]
    is_new = starts_run(ascending)
    firsts = order[is_new]
    turn = firsts.argsort()
    number = np.empty(len(firsts), np.int64)
    number[turn] = np.arange(len(firsts))
    place = np.empty(len(values), np.int64)
    place[order] = number[np.add.accumulate(is_new, dtype=np.int64) - 1]
    return firsts[turn], place


def spread(offsets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rows of some groups, one group after the other; group g has the rows offsets[g] to offsets[g + 1]."""
    counts = offsets[groups + 1] - offsets[groups]
    ends = np.cumsum(counts)
    rows: np.ndarray = np.arange(counts.sum()) + np.repeat(offsets[groups] - ends + counts, counts)
    return rows


def positions(sorted_values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands among distinct ascending ones; -1 if it does not."""
    if not len(sorted_values):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return np.where(sorted_values[at] == wanted, at, -1)


class IntervalLists(Rows[Intervals]):
    """Lists of intervals: list i has the intervals offsets[i] to offsets[i + 1].

    Attributes:
        starts, stops: of all intervals, list after list.
        offsets: one more than lists.
        lengths: coordinates of each list.
        simple: whether no list has more than one interval.
        single: whether every list has one.
    """

    __slots__ = ("lengths", "offsets", "simple", "single", "starts", "stops")

    def __init__(self, starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray) -> None:
        self.starts, self.stops, self.offsets = starts, stops, offsets
        self.lengths = stops - starts
        self.simple = bool((counts_of(offsets) <= 1).all())
        self.single = self.simple and len(starts) == len(self)
        if not self.single:
            total = offsets_of(self.lengths)
            self.lengths = total[offsets[1:]] - total[offsets[:-1]]

    @classmethod
    def of(cls, lists: Sequence[Intervals]) -> "IntervalLists":
        """From tuples."""
        counts = numbers(map(len, lists), len(lists))
        edges = numbers(chain.from_iterable(chain.from_iterable(lists)), 2 * int(counts.sum()))
        return cls(edges[0::2], edges[1::2], offsets_of(counts))

    def chunks(self, parts: int) -> "IntervalLists":
        """Every list in as many parts as torch.chunk cuts: ceil(n / parts) coordinates each, the last ones less or
        none. No list may have more than one interval.
        """
        start, stop = np.zeros((2, len(self), 1), np.int64)
        some = counts_of(self.offsets) == 1
        start[some, 0], stop[some, 0] = self.starts, self.stops
        edges = np.minimum(start + -(-(stop - start) // parts) * np.arange(parts + 1), stop)
        starts, stops = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1)
        some = starts < stops
        return IntervalLists(starts[some], stops[some], offsets_of(some))

    @classmethod
    def joined(cls, parts: "Sequence[IntervalLists]") -> "IntervalLists":
        """The lists of some, one after the other."""
        counts = np.concatenate([counts_of(part.offsets) for part in parts])
        starts, stops = (np.concatenate([getattr(part, end) for part in parts]) for end in ("starts", "stops"))
        return cls(starts, stops, offsets_of(counts))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _items(self, rows: np.ndarray) -> Iterator[Intervals]:
        starts, stops = self.starts, self.stops
        if self.single:
            return (((start, stop),) for start, stop in zip(starts[rows].tolist(), stops[rows].tolist(), strict=True))
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return (tuple(zip(starts[a:b].tolist(), stops[a:b].tolist(), strict=True)) for a, b in spans)


class Regions(Rows[Region]):
    """Products of interval lists.

    Attributes:
        dims: per dim, the lists.
        rows: int array (regions, dims): which list of each dim.
    """

    __slots__ = ("dims", "rows")

    def __init__(self, dims: tuple[IntervalLists, ...], rows: np.ndarray) -> None:
        self.dims, self.rows = dims, rows

    @property
    def numel(self) -> np.ndarray:
        """Elements of each region."""
        result = np.ones(len(self.rows), np.int64)
        for dim, lists in enumerate(self.dims):
            result *= lists.lengths[self.rows[:, dim]]
        return result

    @classmethod
    def joined(cls, parts: "Sequence[Regions]") -> "Regions":
        """The regions of some with equally many dims, one after the other."""
        dims, columns = [], []
        for dim in range(parts[0].rows.shape[1]):
            lists = list(dict.fromkeys(part.dims[dim] for part in parts))  # parts share lists
            first = dict(zip(lists, offsets_of(numbers(map(len, lists), len(lists))).tolist(), strict=False))
            dims.append(lists[0] if len(lists) == 1 else IntervalLists.joined(lists))
            columns.append(np.concatenate([part.rows[:, dim] + first[part.dims[dim]] for part in parts]))
        return cls(tuple(dims), np.column_stack(columns))

    def take(self, rows: np.ndarray) -> "Regions":
        """Some of them."""
        return Regions(self.dims, self.rows[rows])

    def __len__(self) -> int:
        return len(self.rows)

    def _items(self, rows: np.ndarray) -> Iterator[Region]:
        if not self.dims:
            return iter([()] * len(rows))
        return zip(*(lists._items(self.rows[rows, dim]) for dim, lists in enumerate(self.dims)), strict=True)


class Groups(Rows[tuple[Region, ...]]):
    """Several regions each.

    Attributes:
        regions: of all groups, group after group.
        offsets: group i has the regions offsets[i] to offsets[i + 1].
        single: whether every group is one region.
    """

    __slots__ = ("offsets", "regions", "single")

    def __init__(self, regions: Regions, offsets: np.ndarray) -> None:
        self.regions, self.offsets = regions, offsets
        self.single = bool((counts_of(offsets) == 1).all())

    @classmethod
    def joined(cls, parts: "Sequence[Groups]") -> "Groups":
        """The groups of some, one after the other."""
        counts = np.concatenate([counts_of(part.offsets) for part in parts])
        return cls(Regions.joined([part.regions for part in parts]), offsets_of(counts))

    @property
    def numel(self) -> np.ndarray:
        """Elements of each group."""
        if self.single:
            return self.regions.numel
        total = offsets_of(self.regions.numel)
        numel: np.ndarray = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return numel

    def take(self, groups: np.ndarray) -> "Groups":
        """Some of them."""
        if self.single:
            return Groups(self.regions.take(groups), np.arange(len(groups) + 1))
        counts = self.offsets[groups + 1] - self.offsets[groups]
        return Groups(self.regions.take(spread(self.offsets, groups)), offsets_of(counts))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _items(self, rows: np.ndarray) -> Iterator[tuple[Region, ...]]:
        if self.single:
            return ((region,) for region in self.regions._items(rows))
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return (self.regions[start:stop] for start, stop in spans)
