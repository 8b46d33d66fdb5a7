"""Prove that a move does what its specs say, from the value alone and by other means than those that built it.

Everything is columns: a plan of hundreds of ranks has hundreds of thousands of hops, and is to be proved in less than a
second.
"""

from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.columns import counts_of, distinct, numbered, numbers, offsets_of, positions, spread, starts_run
from tricomm.layout.intervals import Intervals, merged, without_repeats
from tricomm.layout.spec import Holding
from tricomm.plan.cost import MessageColumns
from tricomm.plan.move import Move
from tricomm.plan.parts import PartGroups
from tricomm.plan.program import BoxTransfers, Transfer, transfers
from tricomm.plan.routes.boxes import chunk_boxes
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND, MessageTable
from tricomm.plan.routes.joined import JoinedMessages
from tricomm.plan.routes.rounds import Hop, hop_table
from tricomm.plan.stacks import Stack
from tricomm.plan.tasks import Task


def verify_move(move: Move) -> None:
    """Prove a move.

    Every destination element arrives exactly once and nothing else does; every sender holds what it sends and
    every relay has received it in an earlier round; in every round each pair of ranks agrees on what passes.

    Raises:
        PlanError: the first claim that does not hold.
    """
    columns = MessageColumns.of(move.messages)
    firsts = offsets_of(columns.chunk_counts)
    boxes = boxes_of_stacks(move, columns.chunk_counts)
    _verify_chains(move, columns)
    senders, chunks = _verify_hops(columns, move.hops, firsts)
    for stack, of_stack in zip(move.stacks, boxes, strict=True):
        _verify_coverage(stack, move.refined[of_stack.stack], columns, firsts, of_stack)
        _verify_held(stack, senders, chunks, of_stack)
    _verify_rounds_match(move)


def require(condition: bool, claim: str) -> None:
    """Raise PlanError, saying that the planner is to blame, unless the claim holds."""
    if not condition:
        raise PlanError(f"the plan is wrong: {claim}; this is a defect of the planner, please report both specs")


class ChunkBoxes(NamedTuple):
    """The boxes of global coordinates of one stack that chunks consist of, chunk after chunk and message after message.

    Attributes:
        stack: its number.
        offsets: (chunks + 1,), the first box of each chunk.
        starts, stops: (boxes, dims).
    """

    stack: int
    offsets: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def boxes_of_stacks(move: Move, counts: np.ndarray) -> list[ChunkBoxes]:
    """Tabulate the chunks of a move, stack by stack; ``counts`` has the chunks of each message, (messages,)."""
    indices = np.arange(len(counts)).repeat(counts)
    chunks = np.arange(len(indices)) - offsets_of(counts)[:-1].repeat(counts)
    found = _boxes_of_columns(move, indices, chunks)
    if found is not None:
        return found
    dims = [len(stack.source.global_shape) for stack in move.stacks]
    of_chunk: list[list[list[Box]]] = [[[] for _ in range(len(indices))] for _ in move.stacks]
    for number, chunk in enumerate(chunk for message in move.messages for chunk in message.chunks):
        for part in chunk:
            of_chunk[part.stack][number].extend(product(*part.region))
    tabulated = []
    for stack, chunks in enumerate(of_chunk):
        offsets = offsets_of(numbers(map(len, chunks), len(chunks)))
        tabulated.append(ChunkBoxes(stack, offsets, *_edges([*chain.from_iterable(chunks)], dims[stack])))
    return tabulated


def _boxes_of_columns(move: Move, indices: np.ndarray, chunks: np.ndarray) -> list[ChunkBoxes] | None:
    """The same where messages are columns, those of a stack together; None where they are not.

    Args:
        move: with the chunks.
        indices, chunks: (chunks,), the message of each and its number there.
    """
    groups, firsts = [move.messages], np.array([0, len(move.messages)])
    if isinstance(move.messages, JoinedMessages):
        groups, firsts = list(move.messages.groups), move.messages.offsets
    found: dict[int, ChunkBoxes] = {}
    for messages, first, last in zip(groups, firsts[:-1].tolist(), firsts[1:].tolist(), strict=True):
        start, stop = np.searchsorted(indices, [first, last]).tolist()
        boxes = chunk_boxes(messages, indices[start:stop] - first, chunks[start:stop])
        if boxes is None or not isinstance(messages, MessageTable) or not isinstance(messages.parts, PartGroups):
            return None
        if messages.parts.stack in found:
            return None
        counts = np.zeros(len(indices), np.int64)
        counts[start:stop] = counts_of(boxes[0])
        found[messages.parts.stack] = ChunkBoxes(messages.parts.stack, offsets_of(counts), *boxes[1:])
    nothing = [np.zeros((0, len(stack.source.global_shape)), np.int64) for stack in move.stacks]
    offsets = np.zeros(len(indices) + 1, np.int64)
    return [found.get(at, ChunkBoxes(at, offsets, none, none)) for at, none in enumerate(nothing)]


Box = tuple[tuple[int, int], ...]
"""Where it starts and stops, dim by dim."""


def _edges(boxes: Sequence[Box], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, stops) of boxes, (boxes, dims) each."""
    edges = np.array(boxes, np.int64).reshape(len(boxes), dims, 2)
    return edges[:, :, 0], edges[:, :, 1]


def _verify_chains(move: Move, columns: MessageColumns) -> None:
    meshes = [np.array(stack.destination.mesh.ranks) for stack in move.stacks]
    receivers = np.unique(np.concatenate([np.zeros(0, np.int64), *meshes]))
    strangers = ~np.isin(columns.links.destinations, receivers)
    require(
        not strangers.any(),
        f"ranks {columns.links.destinations[strangers][:4]} receive and are not in the destination mesh",
    )


def _verify_coverage(
    stack: Stack, tasks: Sequence[Task], columns: MessageColumns, firsts: np.ndarray, boxes: ChunkBoxes
) -> None:
    links, receivers = columns.links, np.sort(np.array(stack.destination.mesh.ranks, np.int64))
    kept = _kept(stack, tasks)
    by_rank = np.argsort(links.destinations, kind="stable")
    begins, ends = (np.searchsorted(links.destinations[by_rank], receivers, side=side) for side in ("left", "right"))
    for rank, start, stop in zip(receivers.tolist(), begins.tolist(), ends.tolist(), strict=True):
        rows = spread(boxes.offsets, spread(firsts, links.chain[by_rank[start:stop]]))
        starts, stops = boxes.starts[rows], boxes.stops[rows]
        if rank in kept:
            starts, stops = np.concatenate([starts, kept[rank][0]]), np.concatenate([stops, kept[rank][1]])
        # What a rank holds several times comes once.
        holding = tuple(map(without_repeats, stack.destination.holding(rank)))
        require(_arrives_once(holding, starts, stops), f"rank {rank} needs {holding} once and receives something else")


def _kept(stack: Stack, tasks: Sequence[Task]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the boxes that each rank holds and needs, which nobody sends it."""
    both = {*stack.source.mesh.ranks} & {*stack.destination.mesh.ranks}
    if not both:
        return {}
    found: dict[int, list[Box]] = {}
    for task in tasks:
        for rank in both & {*task.receivers} & {*task.holders}:
            found.setdefault(rank, []).extend(box for part in task.parts for box in product(*part.region))
    kept = {}
    for rank, boxes in found.items():
        starts, stops = _edges(boxes, len(stack.source.global_shape))
        inside = _are_held(stack.source.holding(rank), starts, stops)
        require(bool(inside.all()), f"rank {rank} keeps {boxes[int(inside.argmin())]} and does not hold all of it")
        kept[rank] = starts, stops
    return kept


def _arrives_once(holding: Holding, starts: np.ndarray, stops: np.ndarray) -> bool:
    """Count how often each cell between neighbouring edges should arrive, and how often it does."""
    if not holding:
        return len(starts) == 1
    wanted_starts, wanted_stops = _edges([*product(*holding)], len(holding))
    columns = [starts, stops, wanted_starts, wanted_stops]
    edges = [distinct(np.concatenate([column[:, dim] for column in columns])) for dim in range(len(holding))]
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


def _verify_hops(
    columns: MessageColumns, hops: Sequence[Hop], first_chunks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Prove that every chunk follows the chain of its message, and arrives in time.

    Returns:
        the first sender of each chunk, and the chunk's number among all.
    """
    table = hop_table(hops)
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
    arrival = first_chunks[messages] + chunks
    keys = arrival * ranks + destinations
    order = np.argsort(keys, kind="stable")
    once = np.ones(len(keys), bool)
    once[order] = starts_run(keys[order])
    require_all(once, "brings a chunk that is already there")
    is_first = links.sources[link] == links.sources[links.firsts][links.chain[link]]
    before = positions(keys[order], arrival * ranks + sources)
    relayed_in_time = (before >= 0) & (rounds[order[before]] < rounds)
    require_all(is_first | relayed_in_time, "forwards what its source does not have by then")
    expected = int(counts[links.chain].sum())
    require(len(table) == expected, f"{expected - len(table)} chunks never reach a receiver")
    _verify_rounds(table, require_all)
    return sources[is_first], arrival[is_first]


def _verify_held(stack: Stack, senders: np.ndarray, chunks: np.ndarray, boxes: ChunkBoxes) -> None:
    """Prove that each sender holds the chunks that it sends first."""
    order = np.argsort(senders, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(senders[order])) + 1):
        if not len(group):
            continue
        rank, rows = int(senders[group[0]]), spread(boxes.offsets, chunks[group])
        if not len(rows):
            continue
        require(rank in stack.source.mesh, f"rank {rank} sends and is not in the source mesh")
        inside = _are_held(stack.source.holding(rank), boxes.starts[rows], boxes.stops[rows])
        require(bool(inside.all()), f"rank {rank} sends what it does not hold: {stack.source.holding(rank)}")


def _verify_rounds(table: np.ndarray, require_all: Callable[[np.ndarray, str], None]) -> None:
    """Prove that no round has two chunks of a message between two ranks, or too many hops of one rank."""
    rounds, sources, destinations, messages, _ = table.T
    here, there = int(sources.max(initial=0)) + 1, int(destinations.max(initial=0)) + 1
    number = np.cumsum(starts_run(rounds)) if (rounds[1:] >= rounds[:-1]).all() else numbered(rounds)[1]
    of_pair = (number * (int(messages.max(initial=0)) + 1) + messages) * there + destinations  # which have one source
    for keys, most, claim in (
        (of_pair, 1, "is one of several chunks of its message between its ranks in its round"),
        (
            number * here + sources,
            MAX_PEERS_PER_ROUND,
            f"is one of more than {MAX_PEERS_PER_ROUND} that its source sends in its round",
        ),
        (
            number * there + destinations,
            MAX_PEERS_PER_ROUND,
            f"is one of more than {MAX_PEERS_PER_ROUND} that its end receives in its round",
        ),
    ):
        _, place = numbered(keys)
        require_all(np.bincount(place)[place] <= most, claim)


def _verify_rounds_match(move: Move) -> None:
    """Prove that what the programs of all ranks send is what they receive, round by round and pair by pair."""
    sent, received = [np.zeros((0, 6), np.int64)], [np.zeros((0, 6), np.int64)]
    for rank in move.ranks:
        for ends, is_send in ((sent, True), (received, False)):
            for rounds, passed in transfers(move, rank, is_send):
                here = np.full(len(rounds), rank)
                peers, *what = _columns(passed)
                pair = (here, peers) if is_send else (peers, here)
                ends.append(np.column_stack([rounds, *pair, *what]))
    # By receiver, message and chunk: nobody receives a chunk twice, as the hops have shown.
    left, right = (_sorted(np.concatenate(rows), [2, 3, 4]) for rows in (sent, received))
    require(bool(np.array_equal(left, right)), "what ranks send in a round is not what their peers receive in it")


def _sorted(rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Sort rows by some columns as one number, in a fraction of the time of ``numpy.lexsort``."""
    keys = np.zeros(len(rows), np.int64)
    for column in columns:
        keys = keys * (int(rows[:, column].max(initial=0)) + 1) + rows[:, column]
    return rows[np.argsort(keys, kind="stable")]


def _columns(passed: Sequence[Transfer]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(peers, messages, chunks, bytes) of some transfers."""
    if isinstance(passed, BoxTransfers):
        columns = passed.columns
        return columns.peers, columns.messages, columns.chunks, columns.nbytes
    rows = np.array([(one.peer, *one.key, one.nbytes) for one in passed], np.int64).reshape(-1, 4)
    return rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]
