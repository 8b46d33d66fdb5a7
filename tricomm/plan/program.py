"""RankProgram: what one rank does in a move, in local coordinates and elements. No tensors, no addresses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tricomm.intervals import Region, joint_runs, region_numel, region_shape, runs
from tricomm.plan.chunks import Message, Unicasts
from tricomm.plan.columns import Groups
from tricomm.plan.rounds import Hop, Hops
from tricomm.plan.tasks import Tasks
from tricomm.sharding import Holding

if TYPE_CHECKING:
    from tricomm.plan.plan import Move


class Box(NamedTuple):
    """A box of a local tensor and where it stands in its packed region; all tuples have one entry per dim."""

    local_start: tuple[int, ...]
    packed_start: tuple[int, ...]
    shape: tuple[int, ...]


class PackedRegion(NamedTuple):
    """A region inside a packed chunk: ``shape`` elements, row-major, from element ``offset`` on."""

    offset: int
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class Copy(NamedTuple):
    """A box that the rank holds and needs: from its source tensor to its destination tensor."""

    source_start: tuple[int, ...]
    destination_start: tuple[int, ...]
    shape: tuple[int, ...]


class Transfer(NamedTuple):
    """One chunk that goes to or comes from ``peer``.

    Attributes:
        peer: the other rank.
        key: (message, chunk): a relay sends the chunk that it received under the same key.
        numel: elements of the chunk.
        regions: how the chunk lies in the local tensor; empty for a relayed send.
    """

    peer: int
    key: tuple[int, int]
    numel: int
    regions: tuple[PackedRegion, ...]


class Round(NamedTuple):
    """What one rank sends and receives in one round. ``number`` is the same on all ranks."""

    number: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class RankProgram:
    """Everything one rank does in one move.

    Attributes:
        rank: who.
        source_shape: shape of the shard that it holds before, or None.
        destination_shape: shape of the shard that it holds after, or None.
        copies: what it copies to itself.
        rounds: its rounds, in order; rounds without it are left out.
    """

    rank: int
    source_shape: tuple[int, ...] | None
    destination_shape: tuple[int, ...] | None
    copies: tuple[Copy, ...]
    rounds: tuple[Round, ...]


def rank_program(move: "Move", rank: int) -> RankProgram:
    """Lower a move to the program of one rank."""
    source, destination = move.source, move.destination
    held = source.holding(rank) if rank in source.mesh else None
    needed = destination.holding(rank) if rank in destination.mesh else None
    copies: list[Copy] = []
    if held is not None and needed is not None:
        for region in _kept(move, rank):
            copies.extend(_copies(region, held, needed))
    sends = _by_round(move, rank, _SENDS, held)
    receives = _by_round(move, rank, _RECEIVES, needed)
    return RankProgram(
        rank,
        None if held is None else region_shape(held),
        None if needed is None else region_shape(needed),
        tuple(copies),
        tuple(Round(number, sends.get(number, ()), receives.get(number, ())) for number in sorted({*sends, *receives})),
    )


_SENDS, _RECEIVES = Hop._fields.index("source"), Hop._fields.index("destination")


def _kept(move: "Move", rank: int) -> Iterator[Region]:
    """The regions that a rank holds and needs."""
    if isinstance(move.tasks, Tasks):
        return chain.from_iterable(move.tasks.kept_by(rank))
    return (region for task in move.tasks if rank in task.holders and rank in task.needers for region in task.regions)


def _by_round(move: "Move", rank: int, side: int, holding: Holding | None) -> dict[int, tuple[Transfer, ...]]:
    """What a rank sends or receives in each round.

    Args:
        move: all of it.
        rank: who.
        side: the field of a hop in which the rank stands: the source if it sends.
        holding: what it holds on this side, or None.
    """
    if isinstance(move.hops, Hops):
        hops = move.hops.table[move.hops.table[:, side] == rank]
    else:
        hops = np.array([hop for hop in move.hops if hop[side] == rank], np.int64).reshape(-1, len(Hop._fields))
    numbers, peers = hops[:, 0].tolist(), hops[:, _SENDS + _RECEIVES - side].tolist()
    keys = [*zip(hops[:, 3].tolist(), hops[:, 4].tolist(), strict=True)]
    whole = _whole_messages(move.messages, hops[:, 3], holding)
    numel, regions = whole or _chunks(move.messages, keys, holding, rank if side == _SENDS else None)
    transfers = [*map(Transfer._make, zip(peers, keys, numel, regions, strict=True))]
    edges = [0, *(np.flatnonzero(np.diff(hops[:, 0])) + 1).tolist(), len(hops)]
    return {numbers[start]: tuple(transfers[start:stop]) for start, stop in pairwise(edges) if start < stop}


Packed = tuple[Sequence[int], Sequence[tuple[PackedRegion, ...]]]
"""Of some chunks, how many elements each has and how it lies in the local tensor."""


def _chunks(
    messages: Sequence[Message], keys: Sequence[tuple[int, int]], holding: Holding | None, sender: int | None
) -> Packed:
    """Chunks one by one. What a sender only forwards lies in no tensor of its own."""
    used = {index: messages[index] for index in dict.fromkeys(index for index, _ in keys)}
    numel: list[int] = []
    regions: list[tuple[PackedRegion, ...]] = []
    for index, chunk in keys:
        message = used[index]
        numel.append(message.chunk_numel(chunk))
        if sender in (None, message.chain[0]):
            assert holding is not None
            regions.append(_packed(message.chunks[chunk], holding))
        else:
            regions.append(())
    return numel, regions


def _whole_messages(messages: Sequence[Message], indices: np.ndarray, holding: Holding | None) -> Packed | None:
    """Messages that are one chunk, which is one box, all at once; None if one of them is more."""
    if holding is None or not isinstance(messages, Unicasts) or any(len(intervals) != 1 for intervals in holding):
        return None
    groups = messages.pairs.regions
    if not isinstance(groups, Groups) or not groups.single or (messages.chunk_counts[indices] != 1).any():
        return None
    rows = groups.regions.rows[indices]
    starts: list[list[int]] = []
    extents: list[list[int]] = []
    for dim, lists in enumerate(groups.regions.dims):
        at = lists.offsets[rows[:, dim]]
        if (lists.offsets[rows[:, dim] + 1] - at != 1).any():
            return None
        starts.append((lists.starts[at] - holding[dim][0][0]).tolist())
        extents.append((lists.stops[at] - lists.starts[at]).tolist())
    if not starts:
        return None
    origin = (0,) * len(starts)
    shapes = [*zip(*extents, strict=True)]
    boxes = map(Box._make, zip(zip(*starts, strict=True), repeat(origin), shapes, strict=False))
    regions = [(PackedRegion(0, shape, (box,)),) for shape, box in zip(shapes, boxes, strict=True)]
    return messages.pairs.numel[indices].tolist(), regions


def _packed(chunk: Sequence[Region], holding: Holding) -> tuple[PackedRegion, ...]:
    """How the regions of a chunk lie in the shard of a rank that holds them all."""
    result: list[PackedRegion] = []
    offset = 0
    for region in chunk:
        per_dim = [runs(inner, outer) for inner, outer in zip(region, holding, strict=True)]
        boxes = tuple(
            Box(
                tuple(run.outer_start for run in combination),
                tuple(run.inner_start for run in combination),
                tuple(run.length for run in combination),
            )
            for combination in product(*per_dim)
        )
        result.append(PackedRegion(offset, region_shape(region), boxes))
        offset += region_numel(region)
    return tuple(result)


def _copies(region: Region, held: Holding, needed: Holding) -> list[Copy]:
    per_dim = [
        joint_runs(inner, source, destination) for inner, source, destination in zip(region, held, needed, strict=True)
    ]
    return [
        Copy(
            tuple(run[0] for run in combination),
            tuple(run[1] for run in combination),
            tuple(run[2] for run in combination),
        )
        for combination in product(*per_dim)
    ]
