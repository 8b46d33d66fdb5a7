"""Prove that a move does what its specs say, from the value alone and by other means than those that built it."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.intervals import Intervals, Region, length, runs, without_repeats
from tricomm.layout.spec import Holding
from tricomm.plan.move import Move
from tricomm.plan.program import rank_program
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND


def verify_move(move: Move) -> None:
    """Prove a move.

    Every destination element arrives exactly once and nothing else does; every sender holds what it sends and
    every relay has received it in an earlier round; in every round each pair of ranks agrees on what passes.

    Raises:
        PlanError: the first claim that does not hold.
    """
    _verify_coverage(move)
    _verify_hops(move)
    _verify_rounds_match(move)


def require(condition: bool, claim: str) -> None:
    """Raise PlanError, saying that the planner is to blame, unless the claim holds."""
    if not condition:
        raise PlanError(f"the plan is wrong: {claim}; this is a defect of the planner, please report both specs")


def _verify_coverage(move: Move) -> None:
    arriving: dict[int, list[Region]] = {rank: [] for rank in move.destination.mesh.ranks}
    for task in move.tasks:
        for rank in set(task.receivers) & set(task.holders):
            _require_held(task.regions, move.source.holding(rank), rank)
            arriving[rank].extend(task.regions)
    for message in move.messages:
        for rank in message.chain[1:]:
            require(rank in arriving, f"rank {rank} receives and is not in the destination mesh")
            for chunk in message.chunks:
                arriving[rank].extend(chunk)
    for rank, regions in arriving.items():
        # What a rank holds several times comes once.
        holding = tuple(map(without_repeats, move.destination.holding(rank)))
        expected, counts = _coverage(holding, regions)
        require(
            bool(np.array_equal(expected, counts)),
            f"rank {rank} needs {holding} once and receives {regions}",
        )


def _coverage(holding: Holding, regions: Iterable[Region]) -> tuple[np.ndarray, np.ndarray]:
    """Count how often each cell between neighbouring cuts should arrive, and how often it does."""
    regions = list(regions)
    cuts = [
        np.unique([edge for r in (holding, *regions) for interval in r[dim] for edge in interval])
        for dim in range(len(holding))
    ]
    expected, counts = (np.zeros([len(edges) for edges in cuts], dtype=np.int64) for _ in range(2))
    for grid, counted in ((expected, [holding]), (counts, regions)):
        for region in counted:
            index = [_cells_of(edges, intervals) for edges, intervals in zip(cuts, region, strict=True)]
            np.add.at(grid, np.ix_(*index), 1)
    return expected, counts


def _cells_of(edges: np.ndarray, intervals: Intervals) -> np.ndarray:
    """List the indices of the cells that the intervals cover."""
    cells = [index for start, stop in np.searchsorted(edges, intervals).reshape(-1, 2) for index in range(start, stop)]
    return np.array(cells, dtype=np.int64)


def _require_held(regions: Iterable[Region], holding: Holding, rank: int) -> None:
    for region in regions:
        for inner, outer in zip(region, holding, strict=True):
            found = sum(run.length for run in runs(inner, without_repeats(outer)))
            require(found == length(inner), f"rank {rank} sends {region} and does not hold all of it")


def _verify_hops(move: Move) -> None:
    received: dict[tuple[int, int, int], int] = {}
    for hop in move.hops:
        require(
            0 <= hop.message < len(move.messages) and 0 <= hop.chunk < len(move.messages[hop.message].chunks),
            f"{hop} carries a chunk that does not exist",
        )
        message = move.messages[hop.message]
        at = message.chain.index(hop.destination) if hop.destination in message.chain else 0
        require(
            at > 0 and message.chain[at - 1] == hop.source,
            f"{hop} does not follow the chain {message.chain}",
        )
        key = (hop.message, hop.chunk, hop.destination)
        require(key not in received, f"{hop} brings a chunk that is already there")
        received[key] = hop.round
    for hop in move.hops:
        message = move.messages[hop.message]
        if hop.source == message.chain[0]:
            require(hop.source in move.source.mesh, f"{hop} starts off the source mesh")
            _require_held(message.chunks[hop.chunk], move.source.holding(hop.source), hop.source)
        else:
            before = received.get((hop.message, hop.chunk, hop.source))
            require(
                before is not None and before < hop.round,
                f"{hop} forwards what its source does not have by then",
            )
    expected = sum(len(message.chunks) * (len(message.chain) - 1) for message in move.messages)
    require(len(received) == expected, f"{expected - len(received)} chunks never reach a receiver")
    pairs = Counter((hop.round, hop.source, hop.destination, hop.message) for hop in move.hops)
    for (number, source, destination, message_index), count in pairs.items():
        require(
            count == 1,
            f"{count} chunks of message {message_index} from {source} to {destination} in round {number}",
        )
    for end in ("source", "destination"):
        for (number, rank), count in Counter((hop.round, getattr(hop, end)) for hop in move.hops).items():
            require(
                count <= MAX_PEERS_PER_ROUND,
                f"{count} hops with {end} {rank} in round {number}",
            )


def _verify_rounds_match(move: Move) -> None:
    sent: set[tuple[int, int, int, tuple[int, int], int]] = set()
    received: set[tuple[int, int, int, tuple[int, int], int]] = set()
    for rank in sorted({*move.source.mesh.ranks, *move.destination.mesh.ranks}):
        for step in rank_program(move, rank).rounds:
            sent |= {(step.number, rank, t.peer, t.key, t.numel) for t in step.sends}
            received |= {(step.number, t.peer, rank, t.key, t.numel) for t in step.receives}
    require(sent == received, f"sends and receives differ: {sorted(sent ^ received)[:4]}")
