"""Pulls: what a rank copies straight out of the tensors of others, and what is left of its program without that.

Integers alone: which box of a peer's shard a box of the own one is, follows from the layouts of both.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from tricomm.layout.intervals import first_runs, take
from tricomm.plan.program import Copy, RankProgram, Round, Transfer
from tricomm.plan.stacks import Stack


class Pull(NamedTuple):
    """A box of this rank's destination, and of the source of another."""

    peer: int
    copy: Copy


class Pulls(NamedTuple):
    """What goes straight from tensors to tensors.

    Attributes:
        rest: what is left of the program.
        boxes: that this rank pulls.
        nbytes: by (whether this rank sends, the other one), on the wire.
    """

    rest: RankProgram
    boxes: tuple[Pull, ...]
    nbytes: dict[tuple[bool, int], int]


def pulls_of(program: RankProgram, stacks: Sequence[Stack], ways: Collection[tuple[bool, int]]) -> Pulls:
    """Divide a program.

    Args:
        program: of this rank.
        stacks: of its move.
        ways: (whether this rank sends, the other one) of the pairs that go straight.
    """
    nbytes: dict[tuple[bool, int], int] = {}
    boxes: list[Pull] = []
    rounds = []
    for number, *both in program.rounds:
        left: list[Sequence[Transfer]] = []
        for transfers, is_send in zip(both, (True, False), strict=True):
            others = []
            for one in transfers:
                way = is_send, one.peer
                if way not in ways:
                    others.append(one)
                    continue
                nbytes[way] = nbytes.get(way, 0) + one.nbytes
                if not is_send:
                    boxes += (Pull(one.peer, copy) for copy in _copies(one, stacks, program.rank))
            left.append(tuple(others))
        rounds.append(Round(number, *left))
    return Pulls(replace(program, rounds=tuple(rounds)), tuple(boxes), nbytes)


def _copies(transfer: Transfer, stacks: Sequence[Stack], rank: int) -> Iterator[Copy]:
    """The boxes that a received chunk is, in what its sender holds and in what this rank needs."""
    for region in transfer.regions:
        stack = stacks[region.stack]
        held, needed = stack.source.holding(transfer.peer), stack.destination.holding(rank)
        for box in region.boxes:
            per_dim = [
                [(run.outer_start, start + run.inner_start, run.length) for run in first_runs(where, outer)]
                for start, where, outer in (
                    (start, take(inner, start, start + extent), outer)
                    for start, extent, inner, outer in zip(box.local_start, box.shape, needed, held, strict=True)
                )
            ]
            for runs in product(*per_dim):
                yield Copy(region.stack, *(tuple(run[at] for run in runs) for at in range(3)))
