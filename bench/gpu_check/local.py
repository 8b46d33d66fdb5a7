"""Whole moves on the device without NCCL: every rank in one process, its staging and its kernels on the GPU."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_check.parts import Outcome, Setting, guarded
from tricomm import (
    Broadcast,
    LocalTransport,
    Mesh,
    Partial,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    local_shard,
    make_plan,
)
from tricomm.layout.placement import Placement
from tricomm.plan import Strategy

ROWS, COLUMNS = 1027, 515
Case = tuple[ShardingSpec, ShardingSpec, Strategy]


def spec(
    ranks: list[int] | list[list[int]], placements: Placement | tuple[Placement, ...], dtype: str = "float32"
) -> ShardingSpec:
    """A layout of the (1027, 515) tensor that all moves have, so that no shard is even."""
    axes = ("x", "y") if isinstance(ranks[0], list) else ("x",)
    each = placements if isinstance(placements, tuple) else (placements,)
    return ShardingSpec(Mesh(ranks, axes), each, (ROWS, COLUMNS), dtype)


CASES: dict[str, Case] = {
    "rows to columns": (spec([0, 1, 2, 3], Shard(0)), spec([3, 1, 0, 2], Shard(1)), SendRecv()),
    "cast, disjoint": (spec([0, 1], Shard(0)), spec([2, 3], Shard(1), "bfloat16"), SendRecv()),
    "broadcast, overlapping": (spec([0, 1], Shard(0)), spec([1, 2, 3], Replicate()), Broadcast(chunk_bytes=1 << 16)),
    "one call, among all and some": (
        spec([0, 1], Shard(0)),
        spec([1, 2, 3], Replicate()),
        Broadcast(one_call=True),
    ),
    "reduce": (spec([0, 1, 2], Partial("sum")), spec([1, 2, 3], Shard(0)), SendRecv()),
}
LOCAL_CASES: dict[str, Case] = CASES | {
    "two axes": (
        spec([[0, 1], [2, 3]], (Shard(0), Shard(1)), "bfloat16"),
        spec([[4, 5, 6], [7, 8, 9]], (Shard(1), Shard(0)), "bfloat16"),
        SendRecv(),
    ),
    "float8 from bfloat16": (spec([0, 1], Shard(1), "bfloat16"), spec([1, 2], Shard(0), "float8_e5m2"), SendRecv()),
    "bytes": (spec([0, 1, 2], Shard(1), "uint8"), spec([0, 1], Shard(0), "uint8"), SendRecv()),
}
TRANSPORTS = {
    "in groups, as NCCL": (LocalTransport(), False),
    "freely, from transposed shards": (LocalTransport(grouped=False, receives_ahead=2), True),
}


def full_of(source: ShardingSpec, destination: ShardingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The global tensor before and after, of small whole numbers, which every type here holds exactly (float8_e5m2 up
    to 8), and sums of three of them too.
    """
    values = (torch.arange(ROWS * COLUMNS) % 61 % 9).reshape(ROWS, COLUMNS)
    contributions = source.mesh.size if source.partial_axes else 1
    dtypes = (getattr(torch, source.element_type), getattr(torch, destination.resolved(source).element_type))
    return values.to(dtypes[0]), (values * contributions).to(dtypes[1])


def moves(setting: Setting) -> Iterator[Outcome]:
    """The part "local"."""
    for name, case in LOCAL_CASES.items():
        for how, (transport, turned) in TRANSPORTS.items():
            check = partial(moved, case, transport, turned, setting.device)
            yield guarded(f"{name}, {how}", check)


def moved(case: Case, transport: LocalTransport, turned: bool, device: str) -> str:
    """Move once and compare every shard with the definition.

    Args:
        case: layouts and strategy.
        transport: how ranks take turns.
        turned: whether shards are column-major.
        device: of all shards.
    """
    source, destination, strategy = case
    plan = make_plan(source, destination, strategy=strategy)
    before, after = full_of(source, destination)
    shards = {rank: local_shard(before, source, rank).to(device) for rank in source.mesh.ranks}
    if turned:
        shards = {rank: shard.T.contiguous().T for rank, shard in shards.items()}
    found = transport.run(plan, shards)
    wanted = {rank: local_shard(after, plan.destination, rank) for rank in plan.destination.mesh.ranks}
    wrong = [rank for rank, shard in wanted.items() if not torch.equal(found[rank].cpu(), shard)]
    if wrong:
        raise ValueError(f"wrong on ranks {wrong} of {sorted(wanted)}")
    return f"exact on {len(wanted)} ranks, {plan.wire_nbytes} bytes moved between {len(plan.participants)}"
