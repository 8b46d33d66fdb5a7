"""Unit tasks: refine two specs to what has to move, dim by dim and never from all pairs of ranks.

The paper's unit communication task is one data slice, the ranks that hold it and the ranks that need it.
Here each dim falls into cells that the same parts hold and need; the product of the dims' cells, with the ranks
intersected, gives the tasks. All of it is columns: a Task is made when somebody looks at it.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.columns import Groups, Lazy, Regions, by_first, offsets_of
from tricomm.layout.dtype import ITEMSIZE
from tricomm.layout.mesh import Mesh
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.parts import Part, PartGroups, nbytes_of
from tricomm.plan.refine import NOBODY, Cells, RankSetBuilder, RankSets, cells


@dataclass(frozen=True, slots=True)
class Task:
    """Elements with the same holders and the same receivers.

    Attributes:
        parts: disjoint, in row-major order of discovery, stack after stack.
        holders: source ranks that hold all of it, in mesh order.
        receivers: destination ranks that need all of it, in mesh order.

    Example:
        Rank 1 holds what it needs; rank 2 does not:

        >>> task = Task((Part(0, 4, (((0, 4),), ((0, 8),))),), holders=(0, 1), receivers=(1, 2))
        >>> task.nbytes, task.remote_receivers
        (128, (2,))
    """

    parts: tuple[Part, ...]
    holders: tuple[int, ...]
    receivers: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the task on the wire, counted once."""
        return nbytes_of(self.parts)

    @property
    def remote_receivers(self) -> tuple[int, ...]:
        """Receivers that do not hold it, so that another rank must send it; the others copy locally."""
        held = set(self.holders)
        return tuple(rank for rank in self.receivers if rank not in held)


class Tasks(Lazy[Task]):
    """Tasks of one stack, as columns.

    Attributes:
        parts: of each task.
        holders, receivers: (tasks,), the number of each task's set of ranks.
        holder_sets, receiver_sets: those sets.
    """

    __slots__ = ("holder_sets", "holders", "parts", "receiver_sets", "receivers")

    def __init__(
        self,
        parts: PartGroups,
        holders: np.ndarray,
        receivers: np.ndarray,
        holder_sets: RankSets,
        receiver_sets: RankSets,
    ) -> None:
        self.parts, self.holders, self.receivers = parts, holders, receivers
        self.holder_sets, self.receiver_sets = holder_sets, receiver_sets

    @property
    def one_receiver(self) -> bool:
        """True if every task has one receiver."""
        return bool((self.receiver_sets.sizes[self.receivers] == 1).all())

    @property
    def one_holder(self) -> bool:
        """True if every task has one holder."""
        return bool((self.holder_sets.sizes[self.holders] == 1).all())

    def kept_by(self, rank: int) -> PartGroups:
        """List the parts that a rank holds and needs, task by task."""
        held = self.holder_sets.including(rank)[self.holders]
        return self.parts.take(np.flatnonzero(held & self.receiver_sets.including(rank)[self.receivers]))

    def __len__(self) -> int:
        return len(self.holders)

    def _items(self, rows: np.ndarray) -> Iterator[Task]:
        holders, receivers = self.holders[rows].tolist(), self.receivers[rows].tolist()
        held = {number: self.holder_sets.ranks(number) for number in dict.fromkeys(holders)}
        needed = {number: self.receiver_sets.ranks(number) for number in dict.fromkeys(receivers)}
        for parts, holder_set, receiver_set in zip(self.parts._items(rows), holders, receivers, strict=True):
            yield Task(parts, held[holder_set], needed[receiver_set])


def joined(refined: Sequence[Sequence[Task]]) -> Sequence[Task]:
    """The tasks of several stacks: those with the same holders and receivers are one."""
    if len(refined) == 1:
        return refined[0]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Part]] = {}
    for tasks in refined:
        for task in tasks:
            found.setdefault((task.holders, task.receivers), []).extend(task.parts)
    return tuple(Task(tuple(parts), *ranks) for ranks, parts in found.items())


def unit_tasks(source: ShardingSpec, destination: ShardingSpec, rank: int | None = None, stack: int = 0) -> Tasks:
    """Find the tasks that bring every rank of ``destination`` what it holds there.

    Args:
        source: where the elements are; no Partial axes (they are reduced before).
        destination: where they go; same shape.
        rank: find only the tasks that this rank holds or needs.
        stack: the number of the stack whose layouts these are.

    Raises:
        PlanError: an element that somebody needs and nobody holds.

    Example:
        >>> from tricomm import Mesh, ShardingSpec
        >>> halves = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["S0"], (6,), "float32")
        >>> whole = ShardingSpec.from_dims(Mesh([1, 2], ("y",)), ["R"], (6,), "float32")
        >>> for task in unit_tasks(halves, whole):
        ...     print(task.parts, task.holders, task.receivers)
        (Part(stack=0, itemsize=4, region=(((0, 3),),)),) (0,) (1, 2)
        (Part(stack=0, itemsize=4, region=(((3, 6),),)),) (1,) (1, 2)
    """
    per_dim = _refinement(source, destination)
    holders = RankSetBuilder(source, part_table(source), [dim.held for dim in per_dim])
    receivers = RankSetBuilder(destination, part_table(destination), [dim.needed for dim in per_dim])
    rows, held, needed = _product(_starts(source, destination, rank, per_dim), per_dim, holders, receivers)
    regions = Regions(tuple(dim.intervals for dim in per_dim), rows)
    holder_sets, receiver_sets = holders.result(), receivers.result()
    if (held == NOBODY).any():
        first = int(np.argmax(held == NOBODY))
        receiver = receiver_sets.first(needed[first : first + 1])[0]
        raise PlanError(
            f"the elements {regions[first]} that rank {receiver} needs are held by no rank of the source "
            f"{source}; add them to a source holding or take them out of the destination"
        )
    # Products with the same holders and receivers are one task, by the first of them.
    keys = held * max(len(receiver_sets.sizes), 1) + needed
    firsts, task = by_first(keys)
    if len(firsts) < len(keys):
        regions = regions.take(task.argsort(kind="stable"))
        offsets = offsets_of(np.bincount(task))
        held, needed = held[firsts], needed[firsts]
    else:
        offsets = np.arange(len(keys) + 1)
    parts = PartGroups(stack, wire_itemsize(source, destination), Groups(regions, offsets))
    return Tasks(parts, held, needed, holder_sets, receiver_sets)


def wire_dtype(source: ShardingSpec, destination: ShardingSpec) -> str:
    """The dtype between ranks: the smaller of the two, so that a cast happens where fewer bytes travel."""
    first, second = source.element_type, destination.dtype or source.element_type
    return first if ITEMSIZE[first] < ITEMSIZE[second] else second


def wire_itemsize(source: ShardingSpec, destination: ShardingSpec) -> int:
    """Bytes of an element between ranks."""
    return ITEMSIZE[wire_dtype(source, destination)]


def most_peers(moved: Sequence[tuple[ShardingSpec, ShardingSpec]]) -> int:
    """Bound how many messages one rank sends, or receives, of all that is moved between some layouts, if what goes from
    one rank to another is one message; at least 1.

    Tensors of other ranks do not count: each of hundreds of experts may have ranks of its own.
    """
    bounds: dict[tuple[Mesh, Mesh], tuple[int, int]] = {}
    for source, destination in moved:
        meshes = source.mesh, destination.mesh
        sends, receives = bounds.get(meshes, (0, 0))
        more_sends, more_receives = _peer_bounds(source, destination)
        bounds[meshes] = sends + more_sends, receives + more_receives
    sent, received = Counter[int](), Counter[int]()
    for (here, there), (sends, receives) in bounds.items():
        most = _most_peers(here.ranks, there.ranks)
        sent.update(dict.fromkeys(here.ranks, min(sends, most)))
        received.update(dict.fromkeys(there.ranks, min(receives, most)))
    return min(max(*sent.values(), *received.values()), _most_peers(sent, received)) if bounds else 1


def _peer_bounds(source: ShardingSpec, destination: ShardingSpec) -> tuple[int, int]:
    """Bound how many messages one rank sends, and how many it receives, if each task is a message per receiver.

    Found from the dims alone, so that every rank knows it without building the others' tasks.
    """
    sends, receives = 1, 1
    for dim in _refinement(source, destination):
        if not len(dim.intervals):
            return 1, 1
        sends *= int(np.bincount(dim.held.classes - NOBODY).max())
        receives *= int(np.bincount(dim.needed.classes).max())
    replicas = 1 if destination.exclusive else destination.mesh.size
    limit = max(source.mesh.size, destination.mesh.size)
    return min(sends * replicas, limit), min(receives, limit)


def _most_peers(here: Collection[int], there: Collection[int]) -> int:
    """With how many of some ranks one of others, or of the same, may exchange messages."""
    every = {*here, *there}
    is_apart = len(every) == len(here) + len(there)  # then a rank sends, or it receives
    return max(len(here), len(there)) if is_apart else len(every)


def _refinement(source: ShardingSpec, destination: ShardingSpec) -> list[Cells]:
    return [cells(*parts) for parts in zip(part_table(source).parts, part_table(destination).parts, strict=True)]


Start = tuple[list[np.ndarray], list[np.ndarray] | None]
"""Per dim the cells to combine, and of them those to leave out where all dims say so."""


def _starts(
    source: ShardingSpec, destination: ShardingSpec, rank: int | None, per_dim: Sequence[Cells]
) -> Iterator[Start]:
    """List every cell; or those that ``rank`` needs and then those that it holds and does not need."""
    if rank is None:
        yield [np.arange(len(dim.intervals)) for dim in per_dim], None
        return
    needs: list[np.ndarray] | None = None
    if rank in destination.mesh:
        parts = part_table(destination).part_of[destination.mesh.position(rank)].tolist()
        needs = [dim.needed.including(part) for dim, part in zip(per_dim, parts, strict=True)]
        yield [np.flatnonzero(needed) for needed in needs], None
    if rank in source.mesh:
        parts = part_table(source).part_of[source.mesh.position(rank)].tolist()
        yield [np.flatnonzero(dim.held.including(part)) for dim, part in zip(per_dim, parts, strict=True)], needs


def _product(
    starts: Iterator[Start], per_dim: Sequence[Cells], holders: RankSetBuilder, receivers: RankSetBuilder
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine one cell per dim in every way that some rank needs in all dims: (cells per dim, holders, receivers)."""
    blocks = list(starts)
    rows = np.zeros((len(blocks), 0), np.int64)
    block = np.arange(len(blocks))
    held, needed = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
    left_out = np.array([without is not None for _, without in blocks], bool)
    for dim, these in enumerate(per_dim):
        counts = np.array([len(chosen[dim]) for chosen, _ in blocks], np.int64)
        chosen = np.concatenate([np.zeros(0, np.int64), *(chosen[dim] for chosen, _ in blocks)])
        begins = offsets_of(counts)[:-1]
        sizes = counts[block]
        left = np.repeat(np.arange(len(rows)), sizes)
        ends = np.cumsum(sizes)
        cell = chosen[np.arange(len(left)) - np.repeat(ends - sizes - begins[block], sizes)]
        receivers_here = receivers.narrow(dim, needed[left], these.needed.classes[cell])
        some = receivers_here != NOBODY
        left, cell, needed = left[some], cell[some], receivers_here[some]
        held = holders.narrow(dim, held[left], these.held.classes[cell])
        rows, block, left_out = np.column_stack([rows[left], cell]), block[left], left_out[left]
        for number, (_, without) in enumerate(blocks):
            if without is not None:
                left_out &= (block != number) | without[dim][cell]
    kept = ~left_out
    return rows[kept], held[kept], needed[kept]
