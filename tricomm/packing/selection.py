"""Selection: some tensors of a plan of many, moved as the plan says, without planning anew.

Each chunk loses the tensors that are not chosen, and closes up; a chunk that has none is not sent. All else stands: who
sends, along which chain, in which round. So what a rank does alone follows from its program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import NamedTuple

import numpy as np

from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.columns import counts_of, offsets_of
from tricomm.plan.arguments import participants_of
from tricomm.plan.ends.ends import Ends
from tricomm.plan.plan import Plan
from tricomm.plan.program import BoxTransfers, Copy, PackedRegion, RankProgram, Round, Transfer, TransferColumns
from tricomm.plan.routes.one_call import Group, groups_of_moves
from tricomm.plan.stacks import Alike, Item, Stack, stacks_of_moves
from tricomm.plan.tasks import wire_itemsize

Key = tuple[int, int]
"""(message, chunk)."""


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Some tensors of a plan.

    Attributes:
        plan: of all of them.
        items: those that were chosen, in the plan's order; by rules, the pieces of those.
        ends: the tensors that were chosen, and by rules those that they are made of.
        classes: items of equal layouts together, by their numbers here.
        stacks: of each move that is left; without a Partial source among them that is the last alone.
        chosen: of each stack of the plan in those moves, which of its items are left.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> names = ("wq", "wk", "wv")
        >>> plan = make_plan(dict.fromkeys(names, rows), dict.fromkeys(names, columns))
        >>> chosen = Selection.of(plan, ["wq", "wv"])
        >>> [send.nbytes for program in (plan.for_rank(0), chosen.for_rank(0)) for send in program[0].rounds[0].sends]
        [96, 96, 64, 64]
    """

    plan: Plan
    items: tuple[Item, ...]
    ends: Ends
    classes: tuple[Alike, ...]
    stacks: tuple[tuple[Stack, ...], ...]
    chosen: tuple[tuple[tuple[bool, ...], ...], ...]

    @classmethod
    def of(cls, plan: Plan, names: object) -> "Selection":
        """Choose tensors by name, in any order.

        Raises:
            SpecError: the plan is of one tensor, or has none of that name; an ArgumentError for what is not names.
        """
        wanted = checked_names(plan, names)
        destinations = [at for at, one in enumerate(plan.ends.destinations) if one.name in wanted]
        kept = {number: at for at, number in enumerate(destinations)}
        numbers = [at for at, item in enumerate(plan.items) if _destination_of(at, item) in kept]
        items = tuple(plan.items[number] for number in numbers)
        ends = Ends.of(items)
        if plan.ends.bound is not None:
            items, ends = _by_rules(plan.ends, items, kept)
        here = {number: at for at, number in enumerate(numbers)}
        classes = []
        for one in plan.classes:
            of_class = tuple(here[number] for number in one.items if number in here)
            if of_class:
                classes.append(Alike(of_class, one.source, one.destination, one.reduction))
        stacks = tuple(stacks_of_moves(classes))
        chosen = [tuple(tuple(item in here for item in stack.items) for stack in of_move) for of_move in plan.stacks]
        return cls(plan, items, ends, tuple(classes), stacks, tuple(chosen[-len(stacks) :]))

    @property
    def is_mapping(self) -> bool:
        """See Plan."""
        return True

    @property
    def participants(self) -> tuple[int, ...]:
        """Every rank that holds or needs what was chosen, sorted."""
        return participants_of(self.ends.specs)

    @property
    def staging_nbytes(self) -> int:
        """See Plan."""
        return self.plan.staging_nbytes

    def for_rank(self, rank: int) -> tuple[RankProgram, ...]:
        """List what one rank does, one program per move that is left.

        Raises:
            PlanError: the plan was built for another rank only.
        """
        programs = self.plan.for_rank(rank)[-len(self.stacks) :]
        return tuple(
            _Chosen.of(chosen, stacks).program(program)
            for program, chosen, stacks in zip(programs, self.chosen, self.stacks, strict=True)
        )


def _destination_of(number: int, item: Item) -> int:
    """The number of the tensor that an item is, or is a piece of."""
    return number if item.part is None else item.part.destination


def _by_rules(ends: Ends, items: Sequence[Item], kept: Mapping[int, int]) -> tuple[tuple[Item, ...], Ends]:
    """Number some items, and the tensors that they are pieces of, anew.

    Args:
        ends: of the plan.
        items: those that are left.
        kept: new numbers of destination tensors by the old ones.
    """
    parts = [item.part for item in items if item.part is not None]
    sources = {number: at for at, number in enumerate(sorted({part.source for part in parts}))}
    renumbered = tuple(
        replace(item, part=part._replace(source=sources[part.source], destination=kept[part.destination]))
        for item, part in zip(items, parts, strict=True)
    )
    return renumbered, Ends(
        tuple(ends.sources[number] for number in sources),
        tuple(ends.destinations[number] for number in kept),
        tuple(fill._replace(tensor=kept[fill.tensor]) for fill in ends.fills if fill.tensor in kept),
        ends.bound,
    )


def checked_names(plan: "Planned", names: object) -> frozenset[str]:
    """The names of some tensors of a plan.

    Raises:
        SpecError: there are no such; an ArgumentError for what is not names.
    """
    if not plan.is_mapping:
        raise SpecError(f"only={names!r} chooses among tensors by name, and this plan is of one tensor; leave it out")
    if isinstance(names, str):
        raise ArgumentError(f"only={names!r} must be a list or set of names; write only=[{names!r}]")
    if not isinstance(names, Sequence | set | frozenset | Mapping):
        raise ArgumentError(f'only={names!r} must be a list or set of names, as only=["layers.0.wq"]; give one')
    known = {one.name for one in plan.ends.destinations}
    for name in names:
        if not isinstance(name, str):
            raise ArgumentError(f"only has {name!r}, which is not a text; names are such as 'layers.0.wq'")
        if name not in known:
            near = get_close_matches(name, [*known][:2000], 1)
            hint = f"did you mean {near[0]!r}?" if near else "take it out, or plan it"
            raise SpecError(f"only has {name!r}, which is none of the {len(known)} tensors that were planned; {hint}")
    if not names:
        raise SpecError("only has no names; give those of some tensors, or leave it out for all of them")
    return frozenset(names)


class _Kept(NamedTuple):
    """What is left of a stack.

    Attributes:
        number: of the stack that has it.
        before: (tensors + 1,), how many tensors are left of the first so many.
        itemsize: bytes of an element on the wire.
    """

    number: int
    before: np.ndarray
    itemsize: int

    @property
    def loses_dim(self) -> bool:
        """Whether one tensor is left of several, which needs no dim that counts it."""
        return len(self.before) > 2 and self.before[-1] == 1

    @property
    def is_of_one(self) -> bool:
        """Whether it was one tensor from the beginning."""
        return len(self.before) == 2

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(start, shape) of what is left of a box; None if nothing is."""
        if self.is_of_one:
            return start, shape
        first, last = int(self.before[start[0]]), int(self.before[start[0] + shape[0]])
        if first == last:
            return None
        return self.without_dim((first, *start[1:])), self.without_dim((last - first, *shape[1:]))

    def without_dim(self, of_dims: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out the first, of a stack of which one tensor is left."""
        return of_dims[1:] if self.loses_dim else of_dims

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a rank holds of the stack."""
        return shape if self.is_of_one else self.without_dim((int(self.before[-1]), *shape[1:]))


class _Chosen:
    """What is left of the stacks of a move, by number."""

    def __init__(self, kept: Mapping[int, _Kept]) -> None:
        self._kept = kept

    @classmethod
    def of(cls, chosen: Sequence[Sequence[bool]], now: Sequence[Stack]) -> "_Chosen":
        """The stacks of which something is left, in their order.

        Args:
            chosen: of each tensor of each stack.
            now: what is left.
        """
        left = [number for number, of_stack in enumerate(chosen) if any(of_stack)]
        kept = {}
        for at, (number, stack) in enumerate(zip(left, now, strict=True)):
            before = offsets_of(np.array(chosen[number], np.int64))
            kept[number] = _Kept(at, before, wire_itemsize(stack.source, stack.destination))
        return cls(kept)

    def program(self, program: RankProgram) -> RankProgram:
        """What is left of a rank's program."""
        received: dict[Key, int] = {}
        receives = [self._transfers(one.receives, received) for one in program.rounds]
        for transfers in receives:
            received.update(_sizes(transfers))
        sends = [self._transfers(one.sends, received) for one in program.rounds]
        numbers = [one.number for one in program.rounds]
        rounds = [Round(*one) for one in zip(numbers, sends, receives, strict=True) if len(one[1]) or len(one[2])]
        return RankProgram(
            program.rank,
            self._shapes(program.source_shapes),
            self._shapes(program.destination_shapes),
            tuple(copy for one in program.copies for copy in self._copies(one)),
            tuple(rounds),
        )

    def _shapes(self, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        return {one.number: one.shape(shapes[stack]) for stack, one in self._kept.items() if stack in shapes}

    def _copies(self, copy: Copy) -> list[Copy]:
        one = self._kept.get(copy.stack)
        source = None if one is None else one.box(copy.source_start, copy.shape)
        destination = None if one is None else one.box(copy.destination_start, copy.shape)
        if one is None or source is None or destination is None:
            return []
        return [Copy(one.number, source[0], destination[0], source[1])]

    def _transfers(self, transfers: Sequence[Transfer], received: Mapping[Key, int]) -> Sequence[Transfer]:
        """What is left of some; of a relayed chunk, as much as was received of it."""
        if isinstance(transfers, BoxTransfers):
            one = self._kept.get(transfers.all.stack)
            return () if one is None else _boxes(transfers.columns, one)
        left = []
        for transfer in transfers:
            nbytes, regions = self._regions(transfer.regions)
            if not transfer.regions:
                nbytes = received.get(transfer.key, 0)
            if nbytes:
                left.append(Transfer(transfer.peer, transfer.key, nbytes, regions, transfer.group))
        return tuple(left)

    def _regions(self, regions: Sequence[PackedRegion]) -> tuple[int, tuple[PackedRegion, ...]]:
        """(bytes, regions) of what is left of a chunk."""
        offset, left = 0, []
        for region in regions:
            one = self._kept.get(region.stack)
            boxes = [] if one is None else [(box, one.box(box.local_start, box.shape)) for box in region.boxes]
            # A rank that has one tensor of a stack has all of them, so boxes have the rows of their region.
            if one is None or boxes[0][1] is None:
                continue
            placed = one.box((*region.boxes[0].local_start[:1], *region.shape[1:]), region.shape)
            assert placed is not None
            shape = placed[1]
            fitted = tuple(
                box._replace(local_start=found[0], packed_start=one.without_dim(box.packed_start), shape=found[1])
                for box, found in boxes
                if found is not None
            )
            left.append(PackedRegion(one.number, offset, shape, fitted))
            offset += prod(shape) * one.itemsize
        return offset, tuple(left)


def _sizes(transfers: Sequence[Transfer]) -> dict[Key, int]:
    """Bytes by chunk."""
    if isinstance(transfers, BoxTransfers):
        columns = transfers.columns
        keys = zip(columns.messages.tolist(), columns.chunks.tolist(), strict=True)
        return dict(zip(keys, columns.nbytes.tolist(), strict=True))
    return {one.key: one.nbytes for one in transfers}


def _boxes(transfers: TransferColumns, one: _Kept) -> BoxTransfers:
    """What is left of transfers of boxes."""
    starts, shapes, firsts = transfers.starts, transfers.shapes, transfers.firsts
    rows = np.arange(len(transfers.peers))
    if not one.is_of_one:
        first, last = one.before[starts[:, 0]], one.before[starts[:, 0] + shapes[:, 0]]
        left = last > first
        starts = np.column_stack([first, starts[:, 1:]])[left]
        shapes = np.column_stack([last - first, shapes[:, 1:]])[left]
        if one.loses_dim:
            starts, shapes = starts[:, 1:], shapes[:, 1:]
        counts = counts_of(offsets_of(left)[firsts])
        rows = np.flatnonzero(counts)
        firsts = offsets_of(counts[rows])
    columns = (transfers.peers[rows], transfers.messages[rows], transfers.chunks[rows], transfers.relayed[rows])
    return BoxTransfers.of(one.number, one.itemsize, columns, (firsts, starts, shapes))


Planned = Plan | Selection
"""What a rank can carry out."""


def groups_of(plan: Planned) -> tuple[Group, ...]:
    """Among whom messages go in one call, equal on all ranks of the plan; see ``plan.routes.one_call``."""
    whole, ranks = plan.plan if isinstance(plan, Selection) else plan, {*plan.participants}
    return tuple(group for group in groups_of_moves(move.messages for move in whole.moves) if ranks.issuperset(group))
