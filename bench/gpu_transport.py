"""NCCL between several ranks on one GPU, and what of a move stays visible beside compute. For gpu_check.

NCCL refuses two ranks on one device of one host; with a host name of its own for each it takes them for hosts and goes
over sockets. So this shows that the transport is right and that its work runs beside other work, and nothing about the
speed of a network. Two processes take turns on a GPU: that a kernel of one runs beside one of the other is not shown.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench.parts import Outcome
from tricomm import Broadcast, Mesh, Partial, Replicate, Resharder, SendRecv, Shard, ShardingSpec, local_shard
from tricomm.launch import RankError, Ranks
from tricomm.plan import Strategy

RANKS = 4
OVERLAP_NBYTES = 64 << 20
MATRIX = 2048
REPEATS = 5


def _name_host(rank: int) -> None:
    os.environ["NCCL_HOSTID"] = f"tricomm-{rank}"


def _on(ranks: list[int], placement: Shard | Replicate | Partial, dtype: str = "float32") -> ShardingSpec:
    return ShardingSpec(Mesh(ranks, ("x",)), (placement,), (1027, 515), dtype)


CASES: dict[str, tuple[ShardingSpec, ShardingSpec, Strategy]] = {
    "rows to columns": (_on([0, 1, 2, 3], Shard(0)), _on([3, 1, 0, 2], Shard(1)), SendRecv()),
    "cast, disjoint": (_on([0, 1], Shard(0)), _on([2, 3], Shard(1), "bfloat16"), SendRecv()),
    "broadcast, overlapping": (_on([0, 1], Shard(0)), _on([1, 2, 3], Replicate()), Broadcast(chunk_bytes=1 << 16)),
    "reduce": (_on([0, 1, 2], Partial("sum")), _on([1, 2, 3], Shard(0)), SendRecv()),
}


def _moved(rank: int, device: str, source: ShardingSpec, destination: ShardingSpec, strategy: Strategy) -> bool:
    """Whether a call, a second one and one in the background bring what they should."""
    # Small whole numbers, which every dtype here holds exactly, and sums of three of them too.
    full = (torch.arange(1027 * 515) % 61).float().reshape(1027, 515)
    contributions = source.mesh.size if source.partial_axes else 1
    tensor = local_shard(full, source, rank).to(device) if rank in source.mesh else None
    expected = None
    if rank in destination.mesh:
        expected = local_shard((full * contributions).to(getattr(torch, destination.element_type)), destination, rank)
    mover = Resharder(source, destination, strategy=strategy, device=device, timeout_seconds=60)
    results = [mover(tensor), mover(tensor), mover.start(tensor).wait()]
    return all(
        result is None if expected is None else result is not None and torch.equal(result.cpu(), expected)
        for result in results
    )


def _overlap(rank: int, device: str, nbytes: int, matrix: int) -> tuple[float, float, float]:
    """Seconds of (moving, computing, both): rank 0 sends and computes, rank 1 receives."""
    rows = nbytes // 4096
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (rows, 1024), "float32")
    mover = Resharder(source, ShardingSpec(Mesh([1], ("x",)), (Replicate(),)), device=device, timeout_seconds=60)
    tensor = torch.zeros(rows, 1024, device=device) if rank == 0 else None
    out = torch.zeros(rows, 1024, device=device) if rank == 1 else None
    left, product = (torch.zeros(matrix, matrix, device=device) for _ in range(2))

    def move() -> None:
        mover.start(tensor, out=out).wait()

    def compute(count: int) -> None:
        for _ in range(count if rank == 0 else 0):
            torch.mm(left, left, out=product)

    def both(count: int) -> None:
        handle = mover.start(tensor, out=out)
        compute(count)
        handle.wait()

    move()
    moving = _median_seconds(device, move)
    compute(1)
    one = _median_seconds(device, lambda: compute(1))
    count = max(1, round(2 * moving / one)) if rank == 0 else 0
    return moving, _median_seconds(device, lambda: compute(count)), _median_seconds(device, lambda: both(count))


def _median_seconds(device: str, work: Callable[[], None]) -> float:
    samples = []
    for _ in range(REPEATS):
        _finish(device)
        begin = time.perf_counter()
        work()
        _finish(device)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def transport_part(
    device: torch.device, overlap_nbytes: int = OVERLAP_NBYTES, matrix: int = MATRIX
) -> Iterator[Outcome]:
    """Every case bit for bit, then the exposed fraction of a move beside a matrix product twice as long."""
    with Ranks(RANKS, timeout_seconds=120.0, wrap=_name_host) as ranks:
        for name, (source, destination, strategy) in CASES.items():
            try:
                right = ranks.run(_moved, str(device), source, destination, strategy)
            except RankError as error:
                # Ranks that failed may have left the others in the middle: nothing after it would mean anything.
                yield Outcome(f"transport: {name}", False, str(error).strip().splitlines()[-1])
                return
            wrong = [rank for rank, fine in enumerate(right) if not fine]
            text = f"wrong on ranks {wrong}" if wrong else "exact on 4 ranks: called twice, and in the background"
            yield Outcome(f"transport: {name}", not wrong, text)
        moving, computing, together = ranks.run(_overlap_or_none, str(device), overlap_nbytes, matrix)[0]
    exposed = max(0.0, together - computing) / moving
    yield Outcome(
        "transport: overlap",
        True,
        f"{exposed:.0%} of a move of {moving * 1e3:.1f} ms is exposed beside {computing * 1e3:.1f} ms of products",
        {"moving_seconds": moving, "computing_seconds": computing, "together_seconds": together},
    )


def _overlap_or_none(rank: int, device: str, nbytes: int, matrix: int) -> tuple[float, float, float] | None:
    return _overlap(rank, device, nbytes, matrix) if rank < 2 else None
