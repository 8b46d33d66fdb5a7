"""NCCL between several ranks on one GPU.

NCCL refuses two ranks on one device of one host; with a host name of its own for each it takes them for hosts and goes
over sockets. So this shows that the transport is right, and nothing about the speed of a network.
"""

import faulthandler
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from bench.gpu_check.local import CASES, Case, full_of
from bench.gpu_check.parts import Outcome, Setting, guarded
from tricomm import Mesh, Replicate, Resharder, ShardingSpec, local_shard
from tricomm.launch import Ranks

Check = tuple[str, Callable[[Ranks], Any]]
"""A name, and what is asked of some ranks: see ``guarded``."""

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
LEAVE_SECONDS = 4.0
"""Before a part's own end: the ranks' calls end by then, so that their errors are told."""


def prepare_rank(rank: int, dump_seconds: float, debug: str, environment: Mapping[str, str]) -> None:
    """In a new process, before torch looks at anything."""
    os.environ.update({**SHARED_GPU, "NCCL_HOSTID": f"tricomm-{rank}", "NCCL_DEBUG": debug, **environment})
    faulthandler.enable()
    faulthandler.dump_traceback_later(dump_seconds)


def finish(setting: Setting) -> None:
    """Return when the device has done all that it was given."""
    if not setting.is_rehearsal:
        torch.cuda.synchronize(setting.device)


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
        yield guarded("one move of 4 KiB", partial(told, ranks, one_moved, source, destination, setting))


def one_moved(rank: int, source: ShardingSpec, destination: ShardingSpec, setting: Setting) -> bool:
    """Whether 1024 numbers come from rank 0 to rank 1; runs on both."""
    values = torch.arange(1024.0)
    tensor = values.to(setting.device) if rank == 0 else None
    options: Any = {"device": setting.device, "timeout_seconds": 0.5 * setting.seconds, "transport": "network"}
    with Resharder(source, destination, **options) as mover:
        out = mover(tensor)
    return out is None or torch.equal(out.cpu(), values)


def moves(setting: Setting) -> Iterator[Outcome]:
    """The part "nccl"."""
    yield from checked(setting, exact_moves(setting, "network"))


def exact_moves(setting: Setting, transport: str) -> list[Check]:
    """A check for each of the CASES."""

    def check_of(case: Case) -> Callable[[Ranks], str]:
        return lambda ranks: told(ranks, moved, case, setting, transport)

    return [(name, check_of(case)) for name, case in CASES.items()]


def checked(setting: Setting, checks: Iterable[Check]) -> Iterator[Outcome]:
    """Check one after the other on the same ranks, and on new ones after a failure, which may have left a rank in the
    middle.
    """
    left = list(checks)
    while left:
        with ranks_of(setting, RANKS) as ranks:
            while left:
                name, check = left.pop(0)
                outcome = guarded(name, partial(check, ranks))
                yield outcome
                if not outcome.passed:
                    break


def told(ranks: Ranks, function: Callable[..., bool], *arguments: object) -> str:
    """Run on all ranks what says whether it was exact, and say so.

    Raises:
        ValueError: it was not.
    """
    wrong = [rank for rank, fine in enumerate(ranks.run(function, *arguments)) if not fine]
    if wrong:
        raise ValueError(f"wrong on ranks {wrong} of {ranks.size}")
    return f"exact on {ranks.size} ranks"


def moved(rank: int, case: Case, setting: Setting, transport: str = "network") -> bool:
    """Whether a call, a second one and one in the background bring what they should; runs on every rank."""
    source, destination, strategy = case
    before, after = full_of(source, destination)
    tensor = local_shard(before, source, rank).to(setting.device) if rank in source.mesh else None
    expected = local_shard(after, destination, rank) if rank in destination.mesh else None
    options: Any = {"device": setting.device, "timeout_seconds": 0.5 * setting.seconds, "transport": transport}
    with Resharder(source, destination, strategy=strategy, **options) as mover:
        results = [mover(tensor), mover(tensor), mover.start(tensor).wait()]
    return all(
        result is None if expected is None else result is not None and torch.equal(result.cpu(), expected)
        for result in results
    )
