"""RankProgram: what one rank does in a move, in coordinates of its own shards. No tensors, no addresses."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Lazy, Rows, counts_of, offsets_of, spread, starts_run
from tricomm.layout.intervals import first_runs, joint_runs, region_shape, runs
from tricomm.layout.spec import Holding
from tricomm.plan.move import Move
from tricomm.plan.parts import Part, PartGroups
from tricomm.plan.routes.boxes import chunk_boxes
from tricomm.plan.routes.chunks import Message, MessageTable
from tricomm.plan.routes.joined import JoinedMessages
from tricomm.plan.routes.rounds import Hop, hops_of_rank
from tricomm.plan.tasks import Task, Tasks


class Box(NamedTuple):
    """A box of a local tensor and where it stands in its packed region; all tuples have one entry per dim."""

    local_start: tuple[int, ...]
    packed_start: tuple[int, ...]
    shape: tuple[int, ...]


class PackedRegion(NamedTuple):
    """A region inside a packed chunk: ``shape`` elements of a stack, row-major, from byte ``offset_nbytes`` on."""

    stack: int
    offset_nbytes: int
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class Copy(NamedTuple):
    """A box that the rank holds and needs: from its source tensors to its destination tensors of a stack."""

    stack: int
    source_start: tuple[int, ...]
    destination_start: tuple[int, ...]
    shape: tuple[int, ...]


class Transfer(NamedTuple):
    """One chunk that goes to or comes from ``peer``.

    Attributes:
        peer: the other rank.
        key: (message, chunk): a relay sends the chunk that it received under the same key.
        nbytes: of the chunk.
        regions: how the chunk lies in the local tensors; empty for a relayed send.
        group: if the chunk goes to several ranks in one call, its sender and those; see ``plan.routes.one_call``.
    """

    peer: int
    key: tuple[int, int]
    nbytes: int
    regions: tuple[PackedRegion, ...]
    group: tuple[int, ...] = ()


class TransferColumns(NamedTuple):
    """Transfers as columns, each of a chunk that is some boxes of a local stack, or that is relayed.

    Attributes:
        stack: of all boxes.
        peers, messages, chunks, nbytes: (transfers,), of each.
        relayed: (transfers,), which of them send what was received and lies in no tensor.
        firsts: (transfers + 1,), the first box of each.
        starts, shapes: (boxes, dims).
        offsets: (boxes,), the byte of its chunk at which each begins.
    """

    stack: int
    peers: np.ndarray
    messages: np.ndarray
    chunks: np.ndarray
    nbytes: np.ndarray
    relayed: np.ndarray
    firsts: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray
    offsets: np.ndarray

    def between(self, start: int, stop: int) -> "TransferColumns":
        """Take those from ``start`` to ``stop``."""
        at, firsts = slice(start, stop), self.firsts[start : stop + 1]
        boxes = slice(firsts[0], firsts[-1])
        return TransferColumns(
            self.stack,
            *(self.peers[at], self.messages[at], self.chunks[at], self.nbytes[at], self.relayed[at]),
            firsts - firsts[0],
            *(self.starts[boxes], self.shapes[boxes], self.offsets[boxes]),
        )


class BoxTransfers(Lazy[Transfer]):
    """Some transfers of columns that stand one behind the other there. The rounds of a program share their columns: to
    cut those up for each of hundreds of rounds takes as long as the rest of the plan.

    Attributes:
        all: the columns.
        start, stop: which of them.
    """

    __slots__ = ("all", "start", "stop")

    def __init__(self, columns: TransferColumns, start: int, stop: int) -> None:
        self.all, self.start, self.stop = columns, start, stop

    @classmethod
    def of(
        cls,
        stack: int,
        itemsize: int,
        transfers: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        boxes: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> "BoxTransfers":
        """Count the bytes.

        Args:
            stack, itemsize: of all.
            transfers: (peers, messages, chunks, relayed).
            boxes: (firsts, starts, shapes).
        """
        peers, messages, chunks, relayed = transfers
        firsts, starts, shapes = boxes
        ends = offsets_of(np.prod(shapes, axis=1) * itemsize)
        of_chunk = ends[firsts]
        offsets = ends[:-1] - of_chunk[:-1].repeat(counts_of(firsts))
        nbytes = counts_of(of_chunk)
        columns = TransferColumns(stack, peers, messages, chunks, nbytes, relayed, firsts, starts, shapes, offsets)
        return cls(columns, 0, len(peers))

    @property
    def columns(self) -> TransferColumns:
        """Those of these transfers alone."""
        return self.all.between(self.start, self.stop)

    def cut(self, edges: Sequence[int]) -> "list[BoxTransfers]":
        """Those from each edge to the next."""
        first = self.start
        return [BoxTransfers(self.all, first + start, first + stop) for start, stop in pairwise(edges)]

    def __len__(self) -> int:
        return self.stop - self.start

    def _items(self, rows: np.ndarray) -> Iterator[Transfer]:
        every, rows = self.all, rows + self.start
        columns = (every.peers, every.messages, every.chunks, every.nbytes, every.relayed)
        origin = (0,) * every.starts.shape[1]
        at = spread(every.firsts, rows)
        starts, shapes = (map(tuple, column[at].tolist()) for column in (every.starts, every.shapes))
        boxes = zip(every.offsets[at].tolist(), starts, shapes, strict=True)
        counts = (every.firsts[rows + 1] - every.firsts[rows]).tolist()
        for peer, message, chunk, nbytes, is_relayed, count in zip(
            *(column[rows].tolist() for column in columns), counts, strict=True
        ):
            regions = tuple(
                [
                    PackedRegion(every.stack, offset, shape, (Box(start, origin, shape),))
                    for offset, start, shape in islice(boxes, count)
                ]
            )
            yield Transfer(peer, (message, chunk), nbytes, () if is_relayed else regions)


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
        source_shapes: by number, the shapes of what it holds before of each stack of which it holds something.
        destination_shapes: the same after the move.
        copies: what it copies to itself.
        rounds: its rounds, in order; rounds without it are left out.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> (program,) = make_plan(rows, columns).for_rank(0)
        >>> program.source_shapes, program.destination_shapes
        ({0: (4, 4)}, {})
        >>> (only,) = program.rounds
        >>> [(send.peer, send.regions[0].boxes[0].local_start, send.regions[0].shape) for send in only.sends]
        [(2, (0, 0), (4, 2)), (3, (0, 2), (4, 2))]
    """

    rank: int
    source_shapes: Mapping[int, tuple[int, ...]]
    destination_shapes: Mapping[int, tuple[int, ...]]
    copies: tuple[Copy, ...]
    rounds: tuple[Round, ...]


def rank_program(move: Move, rank: int) -> RankProgram:
    """Find what one rank does in a move."""
    held = {at: one.source.holding(rank) for at, one in enumerate(move.stacks) if rank in one.source.mesh}
    needed = {at: one.destination.holding(rank) for at, one in enumerate(move.stacks) if rank in one.destination.mesh}
    copies: list[Copy] = []
    for stack in held.keys() & needed.keys():
        for part in _kept(move.refined[stack], rank):
            copies.extend(_copies(part, held[stack], needed[stack]))
    sends = _by_round(move, rank, _SENDS, held)
    receives = _by_round(move, rank, _RECEIVES, needed)
    return RankProgram(
        rank,
        {stack: region_shape(holding) for stack, holding in held.items()},
        {stack: region_shape(holding) for stack, holding in needed.items()},
        tuple(copies),
        tuple(Round(number, sends.get(number, ()), receives.get(number, ())) for number in sorted({*sends, *receives})),
    )


_SENDS, _RECEIVES = Hop._fields.index("source"), Hop._fields.index("destination")


def _kept(tasks: Sequence[Task], rank: int) -> Iterator[Part]:
    """List the parts that a rank holds and needs."""
    if isinstance(tasks, Tasks):
        return chain.from_iterable(tasks.kept_by(rank))
    return (part for task in tasks if rank in task.holders and rank in task.receivers for part in task.parts)


Holdings = Mapping[int, Holding]
"""What a rank holds of each stack, at one end of a move."""


def _by_round(move: Move, rank: int, end: int, holdings: Holdings) -> dict[int, Sequence[Transfer]]:
    """Find what a rank sends or receives in each round; see :func:`_groups`."""
    found: dict[int, Sequence[Transfer]] = {}
    # The rounds of a group stand behind those of the one before.
    for numbers, passed in _groups(move, rank, end, holdings, are_placed=True):
        firsts = np.flatnonzero(starts_run(numbers))
        edges = [*firsts.tolist(), len(numbers)]
        slices = passed.cut(edges) if isinstance(passed, BoxTransfers) else [passed[a:b] for a, b in pairwise(edges)]
        found.update(zip(numbers[firsts].tolist(), slices, strict=True))
    return found


def transfers(move: Move, rank: int, is_send: bool) -> Iterator[tuple[np.ndarray, Sequence[Transfer]]]:
    """List what a rank sends or receives in a move, group by group of messages: the round of each transfer, and the
    transfers. That is what its program divides into rounds, but for where chunks that are no boxes lie in its tensors.
    """
    sides = [one.source if is_send else one.destination for one in move.stacks]
    holdings = {at: spec.holding(rank) for at, spec in enumerate(sides) if rank in spec.mesh}
    return _groups(move, rank, _SENDS if is_send else _RECEIVES, holdings, are_placed=False)


def _groups(
    move: Move, rank: int, end: int, holdings: Holdings, are_placed: bool
) -> Iterator[tuple[np.ndarray, BoxTransfers | tuple[Transfer, ...]]]:
    """List what a rank sends or receives; see :func:`transfers`.

    Args:
        move: all of it.
        rank: who.
        end: the field of a hop in which the rank stands: the source if it sends.
        holdings: what it holds at that end.
        are_placed: whether transfers say where their chunks lie in what the rank holds; if they are boxes, all do.
    """
    hops = hops_of_rank(move.hops, rank, end)
    if not isinstance(move.messages, JoinedMessages):
        yield hops[:, 0], _of_group(move.messages, 0, hops, rank, end, holdings, are_placed)
        return
    groups = np.searchsorted(move.messages.offsets, hops[:, 3], side="right") - 1
    edges = np.searchsorted(groups, np.arange(len(move.messages.groups) + 1))
    for group in np.flatnonzero(np.diff(edges)).tolist():
        messages, first = move.messages.groups[group], int(move.messages.offsets[group])
        of_group = hops[edges[group] : edges[group + 1]]
        yield of_group[:, 0], _of_group(messages, first, of_group, rank, end, holdings, are_placed)


def _of_group(
    messages: Sequence[Message],
    first: int,
    hops: np.ndarray,
    rank: int,
    end: int,
    holdings: Holdings,
    are_placed: bool,
) -> BoxTransfers | tuple[Transfer, ...]:
    """What stands in some hops, of a group of messages of which the first has the number ``first``."""
    peers = hops[:, _SENDS + _RECEIVES - end]
    sender = rank if end == _SENDS else None
    boxes = _boxes(messages, first, hops[:, 3], hops[:, 4], peers, holdings, sender)
    if boxes is not None:
        return boxes
    keys = [*zip(*hops[:, 3:].T.tolist(), strict=True)]
    return _chunks(messages, first, keys, peers.tolist(), holdings if are_placed else None, sender)


def _boxes(
    messages: Sequence[Message],
    first: int,
    numbers: np.ndarray,
    chunks: np.ndarray,
    peers: np.ndarray,
    holdings: Holdings,
    sender: int | None,
) -> BoxTransfers | None:
    """Find the transfers of chunks that are boxes of one stack, all at once; None if one of them is not."""
    if not isinstance(messages, MessageTable) or not isinstance(messages.parts, PartGroups):
        return None
    indices = numbers - first
    relayed = np.zeros(len(indices), bool) if sender is None else messages.senders[indices] != sender
    stack = messages.parts.stack
    holding = holdings.get(stack)
    if not relayed.all() and (holding is None or any(len(intervals) != 1 for intervals in holding)):
        return None
    boxes = chunk_boxes(messages, indices, chunks)
    if boxes is None:
        return None
    firsts, starts, stops = boxes
    shapes = stops - starts
    if not relayed.all():
        assert holding is not None
        starts = starts - np.array([intervals[0][0] for intervals in holding], np.int64)
    of_transfers = (peers, numbers, chunks, relayed)
    return BoxTransfers.of(stack, messages.parts.itemsize, of_transfers, (firsts, starts, shapes))


def _chunks(
    messages: Sequence[Message],
    first: int,
    keys: Sequence[tuple[int, int]],
    peers: Sequence[int],
    holdings: Holdings | None,
    sender: int | None,
) -> tuple[Transfer, ...]:
    """Find the transfers of chunks one by one. What a rank only forwards lies in no tensor of its own."""
    wanted = [*dict.fromkeys(number for number, _ in keys)]
    used = dict(zip(wanted, _taken(messages, [number - first for number in wanted]), strict=True))
    transfers: list[Transfer] = []
    for key, peer in zip(keys, peers, strict=True):
        message = used[key[0]]
        packed: tuple[PackedRegion, ...] = ()
        if holdings is not None and sender in (None, message.chain[0]):
            packed = _packed(message.chunks[key[1]], holdings, sender is not None)
        group = message.chain if message.in_one_call else ()
        transfers.append(Transfer(peer, key, message.chunk_nbytes(key[1]), packed, group))
    return tuple(transfers)


def _taken(messages: Sequence[Message], rows: list[int]) -> Iterable[Message]:
    """Some messages; of columns all at once, for each by itself takes many times as long."""
    return messages._items(np.array(rows, np.int64)) if isinstance(messages, Rows) else [messages[row] for row in rows]


def _packed(chunk: Sequence[Part], holdings: Holdings, is_sent: bool) -> tuple[PackedRegion, ...]:
    """Locate the parts of a chunk in what a rank holds, which is all of them.

    An element that the rank holds several times is sent from the first place and received into all.
    """
    places = first_runs if is_sent else runs
    result: list[PackedRegion] = []
    offset = 0
    for part in chunk:
        per_dim = [places(inner, outer) for inner, outer in zip(part.region, holdings[part.stack], strict=True)]
        boxes = tuple(
            Box(
                tuple(run.outer_start for run in combination),
                tuple(run.inner_start for run in combination),
                tuple(run.length for run in combination),
            )
            for combination in product(*per_dim)
        )
        result.append(PackedRegion(part.stack, offset, part.shape, boxes))
        offset += part.nbytes
    return tuple(result)


def _copies(part: Part, held: Holding, needed: Holding) -> list[Copy]:
    per_dim = [
        joint_runs(inner, source, destination)
        for inner, source, destination in zip(part.region, held, needed, strict=True)
    ]
    return [
        Copy(
            part.stack,
            tuple(run[0] for run in combination),
            tuple(run[1] for run in combination),
            tuple(run[2] for run in combination),
        )
        for combination in product(*per_dim)
    ]
