"""RankProgram: what one rank does in a move, in coordinates of its own shards. No tensors, no addresses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, Lazy, Regions, offsets_of
from tricomm.layout.intervals import Region, first_runs, joint_runs, region_numel, region_shape, runs
from tricomm.layout.spec import Holding
from tricomm.plan.move import Move
from tricomm.plan.routes.chunks import Message, MessageTable
from tricomm.plan.routes.rounds import Hop, hops_of_rank
from tricomm.plan.tasks import Tasks


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


class BoxTransfers(Lazy[Transfer]):
    """Transfers as columns, each of a chunk that is one box of the local tensor, or that is relayed.

    Attributes:
        peers, messages, chunks, numel: (transfers,), of each.
        starts, shapes: (transfers, dims), of each box; None if what is sent was received and lies in no tensor.
    """

    __slots__ = ("chunks", "messages", "numel", "peers", "shapes", "starts")

    def __init__(
        self,
        peers: np.ndarray,
        messages: np.ndarray,
        chunks: np.ndarray,
        numel: np.ndarray,
        starts: np.ndarray | None,
        shapes: np.ndarray | None,
    ) -> None:
        self.peers, self.messages, self.chunks, self.numel = peers, messages, chunks, numel
        self.starts, self.shapes = starts, shapes

    def between(self, start: int, stop: int) -> "BoxTransfers":
        """Take those from ``start`` to ``stop``."""
        at = slice(start, stop)
        boxes = [None if column is None else column[at] for column in (self.starts, self.shapes)]
        return BoxTransfers(self.peers[at], self.messages[at], self.chunks[at], self.numel[at], *boxes)

    def __len__(self) -> int:
        return len(self.peers)

    def _items(self, rows: np.ndarray) -> Iterator[Transfer]:
        columns = (column[rows].tolist() for column in (self.peers, self.messages, self.chunks, self.numel))
        if self.starts is None or self.shapes is None:
            for peer, message, chunk, numel in zip(*columns, strict=True):
                yield Transfer(peer, (message, chunk), numel, ())
            return
        origin = (0,) * self.starts.shape[1]
        boxes = (map(tuple, column[rows].tolist()) for column in (self.starts, self.shapes))
        for peer, message, chunk, numel, start, shape in zip(*columns, *boxes, strict=True):
            box = Box(start, origin, shape)
            yield Transfer(peer, (message, chunk), numel, (PackedRegion(0, shape, (box,)),))


class Round(NamedTuple):
    """What one rank sends and receives in one round. ``number`` is the same on all ranks."""

    number: int
    sends: Sequence[Transfer]
    receives: Sequence[Transfer]


@dataclass(frozen=True, slots=True)
class RankProgram:
    """Everything that one rank does in one move.

    Attributes:
        rank: who.
        source_shape: shape of the shard that it holds before, or None.
        destination_shape: shape of the shard that it holds after, or None.
        copies: what it copies to itself.
        rounds: its rounds, in order; rounds without it are left out.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> (program,) = make_plan(rows, columns).for_rank(0)
        >>> program.source_shape, program.destination_shape
        ((4, 4), None)
        >>> (only,) = program.rounds
        >>> [(send.peer, send.regions[0].boxes[0].local_start, send.regions[0].shape) for send in only.sends]
        [(2, (0, 0), (4, 2)), (3, (0, 2), (4, 2))]
    """

    rank: int
    source_shape: tuple[int, ...] | None
    destination_shape: tuple[int, ...] | None
    copies: tuple[Copy, ...]
    rounds: tuple[Round, ...]


def rank_program(move: Move, rank: int) -> RankProgram:
    """Find what one rank does in a move."""
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


def _kept(move: Move, rank: int) -> Iterator[Region]:
    """List the regions that a rank holds and needs."""
    if isinstance(move.tasks, Tasks):
        return chain.from_iterable(move.tasks.kept_by(rank))
    return (region for task in move.tasks if rank in task.holders and rank in task.receivers for region in task.regions)


def _by_round(move: Move, rank: int, end: int, holding: Holding | None) -> dict[int, Sequence[Transfer]]:
    """Find what a rank sends or receives in each round.

    Args:
        move: all of it.
        rank: who.
        end: the field of a hop in which the rank stands: the source if it sends.
        holding: what it holds at that end, or None.
    """
    hops = hops_of_rank(move.hops, rank, end)
    edges = [0, *(np.flatnonzero(np.diff(hops[:, 0])) + 1).tolist(), len(hops)]
    rounds = [(int(hops[start, 0]), start, stop) for start, stop in pairwise(edges) if start < stop]
    peers = hops[:, _SENDS + _RECEIVES - end]
    sender = rank if end == _SENDS else None
    boxes = _boxes(move.messages, hops[:, 3], hops[:, 4], peers, holding, sender)
    if boxes is not None:
        return {number: boxes.between(start, stop) for number, start, stop in rounds}
    transfers = _chunks(move.messages, [*zip(*hops[:, 3:].T.tolist(), strict=True)], peers.tolist(), holding, sender)
    return {number: tuple(transfers[start:stop]) for number, start, stop in rounds}


def _boxes(
    messages: Sequence[Message],
    indices: np.ndarray,
    chunks: np.ndarray,
    peers: np.ndarray,
    holding: Holding | None,
    sender: int | None,
) -> BoxTransfers | None:
    """Find the transfers of chunks that are one box each, all at once; None if one of them is more, or if some are
    relayed and others not.
    """
    is_relayed = False
    if sender is not None and isinstance(messages, MessageTable):
        relayed = messages.senders[indices] != sender
        is_relayed = bool(relayed.all()) and len(relayed) > 0
        if relayed.any() and not is_relayed:
            return None
    if not is_relayed and (holding is None or any(len(intervals) != 1 for intervals in holding)):
        return None
    boxes = chunk_boxes(messages, indices, chunks)
    if boxes is None:
        return None
    starts, stops = boxes
    shapes = stops - starts
    numel = np.prod(shapes, axis=1)
    if is_relayed:
        return BoxTransfers(peers, indices, chunks, numel, None, None)
    assert holding is not None
    origin = np.array([intervals[0][0] for intervals in holding], np.int64)
    return BoxTransfers(peers, indices, chunks, numel, starts - origin, shapes)


def chunk_boxes(
    messages: Sequence[Message], indices: np.ndarray, chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Find the box of global coordinates that each of some chunks is; None if messages are not columns, or if a chunk
    is more than one box.

    Args:
        messages: of a move.
        indices: (chunks,), the message of each.
        chunks: (chunks,), its number in its message.

    Returns:
        Where the boxes start and where they stop, (chunks, dims) each.
    """
    if not isinstance(messages, MessageTable):
        return None
    groups = messages.regions
    if not isinstance(groups, Groups) or not groups.single:
        return None
    spans = _spans(messages, groups.regions, indices, chunks)
    if spans is None:
        return None
    rows = groups.regions.rows[indices]
    starts = np.empty_like(rows)
    for dim, lists in enumerate(groups.regions.dims):
        at = lists.offsets[rows[:, dim]]
        if (lists.offsets[rows[:, dim] + 1] - at != 1).any():
            return None
        starts[:, dim] = lists.starts[at]
    return starts + spans[0], starts + spans[1]


def _spans(
    messages: MessageTable, regions: Regions, indices: np.ndarray, chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Find where chunks start and stop in their messages' regions, by place; None if one of them is not one box."""
    rows = regions.rows[indices]
    begins, ends = np.zeros_like(rows), np.zeros_like(rows)
    for dim, lists in enumerate(regions.dims):
        ends[:, dim] = lists.lengths[rows[:, dim]]
    of_cut = np.flatnonzero(messages.chunk_counts[indices] > 1)
    used, place = np.unique(indices[of_cut], return_inverse=True)
    if not len(used):
        return begins, ends
    tables = [messages.cut[row].spans for row in used.tolist()]
    if any(table is None for table in tables):
        return None
    firsts = offsets_of(messages.chunk_counts[used])[:-1]
    spans = np.concatenate([table for table in tables if table is not None])[firsts[place] + chunks[of_cut]]
    begins[of_cut], ends[of_cut] = spans[:, :, 0], spans[:, :, 1]
    return begins, ends


def _chunks(
    messages: Sequence[Message],
    keys: Sequence[tuple[int, int]],
    peers: Sequence[int],
    holding: Holding | None,
    sender: int | None,
) -> list[Transfer]:
    """Find the transfers of chunks one by one. What a rank only forwards lies in no tensor of its own."""
    used = {index: messages[index] for index in dict.fromkeys(index for index, _ in keys)}
    transfers: list[Transfer] = []
    for key, peer in zip(keys, peers, strict=True):
        message = used[key[0]]
        packed: tuple[PackedRegion, ...] = ()
        if sender in (None, message.chain[0]):
            assert holding is not None
            packed = _packed(message.chunks[key[1]], holding, sender is not None)
        transfers.append(Transfer(peer, key, message.chunk_numel(key[1]), packed))
    return transfers


def _packed(chunk: Sequence[Region], holding: Holding, is_sent: bool) -> tuple[PackedRegion, ...]:
    """Locate the regions of a chunk in the shard of a rank that holds them all.

    An element that the rank holds several times is sent from the first place and received into all.
    """
    places = first_runs if is_sent else runs
    result: list[PackedRegion] = []
    offset = 0
    for region in chunk:
        per_dim = [places(inner, outer) for inner, outer in zip(region, holding, strict=True)]
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
