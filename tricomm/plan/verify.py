"""Prove that a move does what its specs say, from the value alone and by other means than those that built it.

Everything is columns: a plan of hundreds of ranks has hundreds of thousands of hops, and is to be proved in less than a
second.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.columns import numbers, offsets_of, positions, spread, starts_run
from tricomm.layout.intervals import Intervals, merged, without_repeats
from tricomm.layout.spec import Holding
from tricomm.plan.cost import MessageColumns
from tricomm.plan.move import Move
from tricomm.plan.program import BoxTransfers, Transfer, chunk_boxes, rank_program
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND, Message
from tricomm.plan.routes.rounds import Hop, hop_table


def verify_move(move: Move) -> None:
    """Prove a move.

    Every destination element arrives exactly once and nothing else does; every sender holds what it sends and
    every relay has received it in an earlier round; in every round each pair of ranks agrees on what passes.

    Raises:
        PlanError: the first claim that does not hold.
    """
    columns = MessageColumns.of(move.messages)
    boxes = ChunkBoxes.of(move.messages, columns.chunk_counts, len(move.source.global_shape))
    _verify_coverage(move, columns, boxes)
    _verify_hops(move, columns, boxes)
    _verify_rounds_match(move)


def require(condition: bool, claim: str) -> None:
    """Raise PlanError, saying that the planner is to blame, unless the claim holds."""
    if not condition:
        raise PlanError(f"the plan is wrong: {claim}; this is a defect of the planner, please report both specs")


class ChunkBoxes(NamedTuple):
    """The boxes of global coordinates of which chunks consist, chunk after chunk and message after message.

    Attributes:
        firsts: (messages + 1,), the first chunk of each message among all.
        offsets: (chunks + 1,), the first box of each chunk.
        starts, stops: (boxes, dims).
    """

    firsts: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, messages: Sequence[Message], counts: np.ndarray, dims: int) -> "ChunkBoxes":
        """Tabulate the chunks of any messages.

        Args:
            messages: any.
            counts: (messages,), chunks of each.
            dims: of the tensor.
        """
        firsts = offsets_of(counts)
        indices = np.arange(len(counts)).repeat(counts)
        found = chunk_boxes(messages, indices, np.arange(len(indices)) - firsts[indices])
        if found is not None:
            return cls(firsts, np.arange(len(indices) + 1), *found)
        of_chunk = [
            [box for region in chunk for box in product(*region)] for message in messages for chunk in message.chunks
        ]
        counts = numbers(map(len, of_chunk), len(of_chunk))
        return cls(firsts, offsets_of(counts), *_edges([box for boxes in of_chunk for box in boxes], dims))


Box = tuple[tuple[int, int], ...]
"""Where it starts and stops, dim by dim."""


def _edges(boxes: Sequence[Box], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, stops) of boxes, (boxes, dims) each."""
    edges = np.array(boxes, np.int64).reshape(len(boxes), dims, 2)
    return edges[:, :, 0], edges[:, :, 1]


def _verify_coverage(move: Move, columns: MessageColumns, boxes: ChunkBoxes) -> None:
    links, receivers = columns.links, np.array(move.destination.mesh.ranks, np.int64)
    strangers = ~np.isin(links.destinations, receivers)
    require(
        not strangers.any(), f"ranks {links.destinations[strangers][:4]} receive and are not in the destination mesh"
    )
    kept = _kept(move)
    by_rank = np.argsort(links.destinations, kind="stable")
    ends = np.searchsorted(links.destinations[by_rank], np.sort(receivers), side="right")
    for rank, start, stop in zip(np.sort(receivers).tolist(), [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        chunks = spread(boxes.firsts, links.chain[by_rank[start:stop]])
        rows = spread(boxes.offsets, chunks)
        starts, stops = boxes.starts[rows], boxes.stops[rows]
        if rank in kept:
            starts, stops = np.concatenate([starts, kept[rank][0]]), np.concatenate([stops, kept[rank][1]])
        # What a rank holds several times comes once.
        holding = tuple(map(without_repeats, move.destination.holding(rank)))
        require(_arrives_once(holding, starts, stops), f"rank {rank} needs {holding} once and receives something else")


def _kept(move: Move) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the boxes that each rank holds and needs, which nobody sends it."""
    both = {*move.source.mesh.ranks} & {*move.destination.mesh.ranks}
    if not both:
        return {}
    found: dict[int, list[Box]] = {}
    for task in move.tasks:
        for rank in both & {*task.receivers} & {*task.holders}:
            found.setdefault(rank, []).extend(box for region in task.regions for box in product(*region))
    kept = {}
    for rank, boxes in found.items():
        starts, stops = _edges(boxes, len(move.source.global_shape))
        inside = _are_held(move.source.holding(rank), starts, stops)
        require(bool(inside.all()), f"rank {rank} keeps {boxes[int(inside.argmin())]} and does not hold all of it")
        kept[rank] = starts, stops
    return kept


def _arrives_once(holding: Holding, starts: np.ndarray, stops: np.ndarray) -> bool:
    """Count how often each cell between neighbouring edges should arrive, and how often it does."""
    if not holding:
        return len(starts) == 1
    wanted_starts, wanted_stops = _edges([*product(*holding)], len(holding))
    columns = [starts, stops, wanted_starts, wanted_stops]
    edges = [np.unique(np.concatenate([column[:, dim] for column in columns])) for dim in range(len(holding))]
    return bool(np.array_equal(_counted(edges, starts, stops), _counted(edges, wanted_starts, wanted_stops)))


def _counted(edges: Sequence[np.ndarray], starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Count the boxes that cover each cell: one more at every first corner, one less behind every last, summed up."""
    counts = np.zeros([len(of_dim) for of_dim in edges], np.int64)
    corners = [
        [np.searchsorted(of_dim, column[:, dim]) for column in (starts, stops)] for dim, of_dim in enumerate(edges)
    ]
    for ends in product((0, 1), repeat=len(edges)):
        at = tuple(of_dim[end] for of_dim, end in zip(corners, ends, strict=True))
        np.add.at(counts, at, -1 if sum(ends) % 2 else 1)
    for dim in range(len(edges)):
        np.add.accumulate(counts, dim, out=counts)
    return counts


def _are_held(holding: Holding, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Find which boxes lie inside of a holding."""
    inside = np.ones(len(starts), bool)
    for dim, intervals in enumerate(holding):
        inside &= _are_within(intervals, starts[:, dim], stops[:, dim])
    return inside


def _are_within(intervals: Intervals, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    whole = np.array(merged(sorted(without_repeats(intervals))), np.int64).reshape(-1, 2)
    at = np.searchsorted(whole[:, 0], starts, side="right") - 1
    last = np.append(whole[:, 1], 0)  # at -1: nothing begins before
    within: np.ndarray = (stops <= last[at]) | (starts >= stops)
    return within


def _verify_hops(move: Move, columns: MessageColumns, boxes: ChunkBoxes) -> None:
    table = hop_table(move.hops)
    rounds, sources, destinations, messages, chunks = table.T
    links, counts = columns.links, columns.chunk_counts

    def require_all(holds: np.ndarray, claim: str) -> None:
        require(bool(holds.all()), f"{Hop._make(table[int(holds.argmin())].tolist()) if len(table) else None} {claim}")

    exists = (messages >= 0) & (messages < len(counts)) & (chunks >= 0)
    require_all(exists, "carries a chunk that does not exist")
    require_all(chunks < counts[messages], "carries a chunk that does not exist")
    ranks = int(max(links.destinations.max(initial=0), destinations.max(initial=0), sources.max(initial=0))) + 1
    by_end = np.argsort(links.chain * ranks + links.destinations, kind="stable")
    at = positions((links.chain * ranks + links.destinations)[by_end], messages * ranks + destinations)
    require_all(at >= 0, "does not follow the chain of its message")
    link = by_end[at]
    require_all(links.sources[link] == sources, "does not follow the chain of its message")
    arrival = boxes.firsts[messages] + chunks
    keys = arrival * ranks + destinations
    order = np.argsort(keys, kind="stable")
    once = np.ones(len(keys), bool)
    once[order] = starts_run(keys[order])
    require_all(once, "brings a chunk that is already there")
    is_first = links.sources[link] == links.sources[links.firsts][links.chain[link]]
    before = positions(keys[order], arrival * ranks + sources)
    relayed_in_time = (before >= 0) & (rounds[order[before]] < rounds)
    require_all(is_first | relayed_in_time, "forwards what its source does not have by then")
    _verify_held(move, sources[is_first], arrival[is_first], boxes)
    expected = int(counts[links.chain].sum())
    require(len(table) == expected, f"{expected - len(table)} chunks never reach a receiver")
    _verify_rounds(table, require_all)


def _verify_held(move: Move, senders: np.ndarray, chunks: np.ndarray, boxes: ChunkBoxes) -> None:
    """Prove that each sender holds the chunks that it sends first."""
    order = np.argsort(senders, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(senders[order])) + 1):
        if not len(group):
            continue
        rank = int(senders[group[0]])
        require(rank in move.source.mesh, f"rank {rank} sends and is not in the source mesh")
        rows = spread(boxes.offsets, chunks[group])
        inside = _are_held(move.source.holding(rank), boxes.starts[rows], boxes.stops[rows])
        require(bool(inside.all()), f"rank {rank} sends what it does not hold: {move.source.holding(rank)}")


def _verify_rounds(table: np.ndarray, require_all: Callable[[np.ndarray, str], None]) -> None:
    """Prove that no round has two chunks of a message between two ranks, or too many hops of one rank."""
    for columns, most, claim in (
        ([0, 1, 2, 3], 1, "is one of several chunks of its message between its ranks in its round"),
        ([0, 1], MAX_PEERS_PER_ROUND, f"is one of more than {MAX_PEERS_PER_ROUND} that its source sends in its round"),
        ([0, 2], MAX_PEERS_PER_ROUND, f"is one of more than {MAX_PEERS_PER_ROUND} that its end receives in its round"),
    ):
        order = np.lexsort(table[:, columns[::-1]].T)
        rows = table[order][:, columns]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (rows[1:] != rows[:-1]).any(1)
        group = np.cumsum(is_new) - 1
        few = np.ones(len(rows), bool)
        few[order] = np.bincount(group)[group] <= most if len(rows) else few
        require_all(few, claim)


def _verify_rounds_match(move: Move) -> None:
    """Prove that what the programs of all ranks send is what they receive, round by round and pair by pair."""
    sent, received = [np.zeros((0, 6), np.int64)], [np.zeros((0, 6), np.int64)]
    for rank in sorted({*move.source.mesh.ranks, *move.destination.mesh.ranks}):
        for step in rank_program(move, rank).rounds:
            for ends, transfers, is_send in ((sent, step.sends, True), (received, step.receives, False)):
                rows = _transfer_rows(transfers)
                here, number = np.full(len(rows), rank), np.full(len(rows), step.number)
                pair = (here, rows[:, 0]) if is_send else (rows[:, 0], here)
                ends.append(np.column_stack([number, *pair, rows[:, 1:]]))
    left, right = (np.concatenate(rows) for rows in (sent, received))
    left, right = (rows[np.lexsort(rows.T[::-1])] for rows in (left, right))
    require(bool(np.array_equal(left, right)), "what ranks send in a round is not what their peers receive in it")


def _transfer_rows(transfers: Sequence[Transfer]) -> np.ndarray:
    """(transfers, 4): peer, message, chunk, elements."""
    if isinstance(transfers, BoxTransfers):
        return np.column_stack([transfers.peers, transfers.messages, transfers.chunks, transfers.numel])
    return np.array([(one.peer, *one.key, one.numel) for one in transfers], np.int64).reshape(-1, 4)
