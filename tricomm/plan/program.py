"""RankProgram: what one rank does in a move, in local coordinates and elements. No tensors, no addresses."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from tricomm.intervals import Region, joint_runs, region_numel, region_shape, runs
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
        for task in move.tasks:
            if rank in task.holders and rank in task.needers:
                for region in task.regions:
                    copies.extend(_copies(region, held, needed))
    rounds: dict[int, tuple[list[Transfer], list[Transfer]]] = {}
    for hop in move.hops:
        if rank not in (hop.source, hop.destination):
            continue
        message = move.messages[hop.message]
        chunk = message.chunks[hop.chunk]
        sends, receives = rounds.setdefault(hop.round, ([], []))
        key = (hop.message, hop.chunk)
        numel = message.chunk_numel(hop.chunk)
        if rank == hop.source:
            packed = _packed(chunk, held) if rank == message.chain[0] and held is not None else ()
            sends.append(Transfer(hop.destination, key, numel, packed))
        else:
            assert needed is not None
            receives.append(Transfer(hop.source, key, numel, _packed(chunk, needed)))
    return RankProgram(
        rank,
        None if held is None else region_shape(held),
        None if needed is None else region_shape(needed),
        tuple(copies),
        tuple(Round(number, tuple(sends), tuple(receives)) for number, (sends, receives) in sorted(rounds.items())),
    )


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
