"""One rank's tensor to several others: a chain of hops, each by itself, one call of the library, and NCCL's broadcast.

Each way is timed twice: "queued" one after the other, where a chain's next message sets out before the last has
arrived; and "answered", where every receiver sends a few bytes back before the next one, which is how long one takes,
and the answers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.transport import finish, ranks_of
from tricomm import Broadcast, Mesh, Replicate, Resharder, SendRecv, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.plan import Strategy
from tricomm.transport.accelerator import CUDA, broadcast_options
from tricomm.transport.nccl import connect

CASES = ((3, 1 << 12), (3, 1 << 20), (3, 1 << 24), (7, 1 << 12), (7, 1 << 20))
"""(receivers, bytes)."""
RANKS = 8
REPEATS, SERIES = 6, 3
WAYS: dict[str, Strategy] = {
    "a chain": Broadcast(),
    "each by itself": SendRecv(),
    "one call": Broadcast(one_call=True),
}

Move = Callable[[], object]


def multicasts(setting: Setting) -> Iterator[Outcome]:
    """The part "multicast"."""
    with ranks_of(setting, RANKS) as ranks:
        for receivers, nbytes in CASES:
            outcome = guarded(f"{nbytes} bytes to {receivers}", partial(timed, ranks, receivers, nbytes, setting))
            yield outcome
            if not outcome.passed:
                return  # a rank may have been left in the middle


def timed(ranks: Ranks, receivers: int, nbytes: int, setting: Setting) -> tuple[str, dict[str, Any]]:
    """Seconds of each way, as the slowest rank saw them."""
    found = [one for one in ranks.run(seconds_of, receivers, nbytes, setting) if one is not None]
    slowest = {way: [max(one[way][how] for one in found) for how in range(2)] for way in found[0]}
    shown = {way: [f"{seconds * 1e6:.0f}" for seconds in both] for way, both in slowest.items()}
    text = ", ".join(f"{way} {queued}/{answered} us" for way, (queued, answered) in shown.items())
    figures = {
        f"{way}, {how}": seconds
        for way, both in slowest.items()
        for how, seconds in zip(("queued_seconds", "answered_seconds"), both, strict=True)
    }
    return f"{text} (queued/answered)", figures


def seconds_of(rank: int, receivers: int, nbytes: int, setting: Setting) -> dict[str, tuple[float, float]] | None:
    """(queued, answered) seconds of each way; runs on every rank, and gives None on those that take no part."""
    if rank > receivers:
        dist.barrier()
        return None
    nbytes = min(nbytes, setting.scaled(nbytes, 1 << 14))
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (nbytes,), "uint8")
    target = ShardingSpec(Mesh(range(1, receivers + 1), ("x",)), (Replicate(),))
    values = (torch.arange(nbytes) % 251).to(torch.uint8).to(setting.device)
    options: dict[str, Any] = {"device": setting.device, "timeout_seconds": 0.5 * setting.seconds}
    options["transport"] = "network"  # these ranks share a GPU, and would else read each other's memory
    given = values if rank == 0 else None
    found: dict[str, tuple[float, float]] = {}
    with _answers(rank, receivers, options) as answer:
        for way, strategy in WAYS.items():
            out = None if rank == 0 else torch.zeros_like(values)
            with Resharder(source, target, strategy=strategy, **options) as mover:
                found[way] = _both(partial(mover, given, out=out), answer, setting)
            _require(out, values, way)
        out = values.clone() if rank == 0 else torch.zeros_like(values)
        backend = _backend(rank, receivers, nbytes, setting)
        broadcast = _broadcaster(backend, out, setting)
        found["NCCL's broadcast"] = _both(broadcast, answer, setting)
        _require(out, values, "NCCL's broadcast")
    # The sender is done before all have received: what it drops now would end their broadcasts.
    dist.barrier()
    del backend, broadcast
    return found


@contextmanager
def _answers(rank: int, receivers: int, options: dict[str, Any]) -> Iterator[Move]:
    """What sends a byte from every receiver to the sender."""
    back = ShardingSpec(Mesh(range(1, receivers + 1), ("x",)), (Shard(0),), (receivers,), "uint8")
    byte = torch.zeros(1, dtype=torch.uint8, device=options["device"]) if rank else None
    out = None if rank else torch.zeros(receivers, dtype=torch.uint8, device=options["device"])
    with Resharder(back, ShardingSpec(Mesh([0], ("x",)), (Replicate(),)), **options) as mover:
        yield partial(mover, byte, out=out)


def _both(move: Move, answer: Move, setting: Setting) -> tuple[float, float]:
    def answered() -> None:
        move()
        answer()

    return _seconds(move, setting), _seconds(answered, setting)


def _seconds(move: Move, setting: Setting) -> float:
    """Of one move, of some that are queued one after the other: the median of some series."""
    for _ in range(2):
        move()
    finish(setting)
    found = []
    for _ in range(SERIES):
        begin = time.perf_counter()
        for _ in range(REPEATS):
            move()
        finish(setting)
        found.append((time.perf_counter() - begin) / REPEATS)
    return median(found)


def _require(out: torch.Tensor | None, values: torch.Tensor, way: str) -> None:
    if out is not None and not torch.equal(out, values):
        raise ValueError(f"what came by {way} is wrong")


def _backend(rank: int, receivers: int, nbytes: int, setting: Setting) -> Any:
    """A communicator of these ranks alone; of gloo in a rehearsal."""
    world: Any = dist.group.WORLD
    store = dist.PrefixStore(f"multicast {receivers} {nbytes}", world.get_group_store())
    timeout = timedelta(seconds=0.5 * setting.seconds)
    if setting.is_rehearsal:
        gloo: Any = dist.ProcessGroupGloo(store, rank, receivers + 1, timeout)
        return gloo
    return connect(CUDA, store, rank, receivers + 1, torch.device(setting.device), timeout)


def _broadcaster(backend: Any, tensor: torch.Tensor, setting: Setting) -> Move:
    """What broadcasts a tensor from rank 0."""
    options = broadcast_options(0)
    if setting.is_rehearsal:
        return lambda: backend.broadcast([tensor], options).wait()
    return lambda: backend.broadcast([tensor], options).synchronize()
