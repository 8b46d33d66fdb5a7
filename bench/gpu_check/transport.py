"""NCCL between several ranks on one GPU.

NCCL refuses two ranks on one device of one host; with a host name of its own for each it takes them for hosts and goes
over sockets. So this shows that the transport is right, and nothing about the speed of a network.
"""

import faulthandler
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_check.local import CASES, Case, full_of
from bench.gpu_check.parts import Outcome, Setting, guarded
from tricomm import Broadcast, Mesh, Replicate, Resharder, SendRecv, ShardingSpec, local_shard
from tricomm.launch import Ranks
from tricomm.transport.accelerator import CUDA
from tricomm.transport.nccl import connect

RANKS = 4
SHARED_GPU = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_NET": "Socket",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_RAS_ENABLE": "0",
}
"""Ranks that NCCL takes for hosts must not look for each other's memory. (NCCL before 2.29 has no setting that allows
two ranks on a device; NCCL_HOSTID, different for each, keeps it from noticing.)
"""
PRELOADED = ("torch", "tricomm")
"""What is imported once for the ranks of a part; it touches no GPU, so that they may be forked from there."""
MULTICAST_NBYTES = (1 << 12, 1 << 20, 1 << 24)
REPEATS = 10
"""Of a multicast, queued one after the other."""
LEAVE_SECONDS = 4.0
"""Before a part's own end: the ranks' calls end by then, so that their errors are told."""


def prepare_rank(rank: int, dump_seconds: float, debug: str, environment: Mapping[str, str]) -> None:
    """In a new process, before torch looks at anything."""
    os.environ.update({**SHARED_GPU, "NCCL_HOSTID": f"tricomm-{rank}", "NCCL_DEBUG": debug, **environment})
    faulthandler.enable()
    faulthandler.dump_traceback_later(dump_seconds)


def ranks_of(
    setting: Setting, size: int, debug: str = "WARN", environment: Mapping[str, str] = MappingProxyType({})
) -> Ranks:
    """Ranks that share the GPU, with a group of gloo beside it, and more in their environment."""
    seconds = max(setting.seconds - LEAVE_SECONDS, 0.7 * setting.seconds)
    return Ranks(
        size,
        timeout_seconds=seconds,
        wrap=partial(prepare_rank, dump_seconds=0.5 * seconds, debug=debug, environment=dict(environment)),
        preload=PRELOADED,
    )


def one_move(setting: Setting) -> Iterator[Outcome]:
    """The part "pair": two ranks, one communicator, one move of 4 KiB, with all that NCCL says in the log."""
    mesh = Mesh([0], ("x",)), Mesh([1], ("x",))
    source, destination = (ShardingSpec(one, (Replicate(),), (1024,), "float32") for one in mesh)
    with ranks_of(setting, 2, debug="INFO") as ranks:
        yield guarded("one move of 4 KiB", partial(_told, ranks, one_moved, source, destination, setting))


def one_moved(rank: int, source: ShardingSpec, destination: ShardingSpec, setting: Setting) -> bool:
    """Whether 1024 numbers come from rank 0 to rank 1; runs on both."""
    values = torch.arange(1024.0)
    tensor = values.to(setting.device) if rank == 0 else None
    with Resharder(source, destination, device=setting.device, timeout_seconds=0.5 * setting.seconds) as mover:
        out = mover(tensor)
    return out is None or torch.equal(out.cpu(), values)


def moves(setting: Setting) -> Iterator[Outcome]:
    """The part "nccl"."""
    left = list(CASES.items())
    while left:
        with ranks_of(setting, RANKS) as ranks:
            while left:
                name, case = left.pop(0)
                outcome = guarded(name, partial(_told, ranks, moved, case, setting))
                yield outcome
                if not outcome.passed:
                    break  # a rank may have been left in the middle: the other cases get new ones


def _told(ranks: Ranks, function: Callable[..., bool], *arguments: object) -> str:
    wrong = [rank for rank, fine in enumerate(ranks.run(function, *arguments)) if not fine]
    if wrong:
        raise ValueError(f"wrong on ranks {wrong} of {ranks.size}")
    return f"exact on {ranks.size} ranks"


def moved(rank: int, case: Case, setting: Setting) -> bool:
    """Whether a call, a second one and one in the background bring what they should; runs on every rank."""
    source, destination, strategy = case
    before, after = full_of(source, destination)
    tensor = local_shard(before, source, rank).to(setting.device) if rank in source.mesh else None
    expected = local_shard(after, destination, rank) if rank in destination.mesh else None
    timeout_seconds = 0.5 * setting.seconds
    with Resharder(
        source, destination, strategy=strategy, device=setting.device, timeout_seconds=timeout_seconds
    ) as mover:
        results = [mover(tensor), mover(tensor), mover.start(tensor).wait()]
    return all(
        result is None if expected is None else result is not None and torch.equal(result.cpu(), expected)
        for result in results
    )


# ---- one rank's tensor to three others: a chain of hops, one launch a round, against one broadcast of a subgroup


def multicasts(setting: Setting) -> Iterator[Outcome]:
    """The part "multicast"."""
    with ranks_of(setting, RANKS) as ranks:
        for nbytes in MULTICAST_NBYTES:
            outcome = guarded(f"{nbytes} bytes", partial(timed, ranks, nbytes, setting))
            yield outcome
            if not outcome.passed:
                return  # a rank may have been left in the middle


def timed(ranks: Ranks, nbytes: int, setting: Setting) -> tuple[str, dict[str, Any]]:
    """Seconds of each way, as the slowest rank saw them."""
    found = [one for one in ranks.run(seconds_of, nbytes, setting) if one is not None]
    slowest = {way: max(one[way] for one in found) for way in found[0]}
    text = ", ".join(f"{way} {seconds * 1e6:.0f} us" for way, seconds in slowest.items())
    return f"{text}, to {RANKS - 1} ranks", {f"{way}_seconds": seconds for way, seconds in slowest.items()}


def seconds_of(rank: int, nbytes: int, setting: Setting) -> dict[str, float] | None:
    """Seconds of each way; runs on every rank, and gives None on those that take no part."""
    if rank >= RANKS:
        return None
    nbytes = min(nbytes, setting.scaled(nbytes, 1 << 14))
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (nbytes,), "uint8")
    target = ShardingSpec(Mesh(range(1, RANKS), ("x",)), (Replicate(),))
    values = (torch.arange(nbytes) % 251).to(torch.uint8).to(setting.device)
    options: dict[str, Any] = {"device": setting.device, "timeout_seconds": 0.5 * setting.seconds}
    found: dict[str, float] = {}
    for way, strategy in (("a chain", Broadcast()), ("each by itself", SendRecv())):
        out = None if rank == 0 else torch.zeros_like(values)
        with Resharder(source, target, strategy=strategy, **options) as mover:
            found[way] = _seconds(partial(mover, values if rank == 0 else None, out=out), setting)
        _require(out, values, way)
    out = values.clone() if rank == 0 else torch.zeros_like(values)
    found["one broadcast"] = _seconds(_broadcaster(rank, out, nbytes, setting), setting)
    _require(out, values, "one broadcast")
    return found


def _seconds(move: Callable[[], object], setting: Setting) -> float:
    """Of one move, of some that are queued one after the other."""
    for _ in range(2):
        move()
    _finish(setting)
    begin = time.perf_counter()
    for _ in range(REPEATS):
        move()
    _finish(setting)
    return (time.perf_counter() - begin) / REPEATS


def _finish(setting: Setting) -> None:
    if not setting.is_rehearsal:
        torch.cuda.synchronize(setting.device)


def _require(out: torch.Tensor | None, values: torch.Tensor, way: str) -> None:
    if out is not None and not torch.equal(out, values):
        raise ValueError(f"what came by {way} is wrong")


def _broadcaster(rank: int, tensor: torch.Tensor, nbytes: int, setting: Setting) -> Callable[[], object]:
    """What broadcasts from rank 0 in a group of these ranks alone."""
    world: Any = dist.group.WORLD
    store = dist.PrefixStore(f"multicast {nbytes}", world.get_group_store())
    timeout = timedelta(seconds=0.5 * setting.seconds)
    options: Any = dist.BroadcastOptions()
    options.rootRank = 0
    if setting.is_rehearsal:
        gloo: Any = dist.ProcessGroupGloo(store, rank, RANKS, timeout)
        return lambda: gloo.broadcast([tensor], options).wait()
    backend: Any = connect(CUDA, store, rank, RANKS, torch.device(setting.device), timeout)
    return lambda: backend.broadcast([tensor], options).synchronize()
