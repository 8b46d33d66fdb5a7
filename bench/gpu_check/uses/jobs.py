"""A trainer of two ranks and a server of two, separate jobs whose four processes share the GPU."""

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.transport import ranks_of
from tricomm import (
    Meeting,
    Mesh,
    Publisher,
    Replicate,
    Shard,
    ShardingSpec,
    Subscriber,
    TransportError,
    connect,
    local_shard,
)
from tricomm.launch import Ranks
from tricomm.options import TransportName

TRAINER, SERVER = "trainer", "server"
SIDE_SIZE = 2
SHAPES = {"rows": (1023, 517), "bias": (33,)}
SPECS = {
    TRAINER: {
        name: ShardingSpec(Mesh([0, 1], ("fsdp",)), (Shard(0),), shape, "float32") for name, shape in SHAPES.items()
    },
    SERVER: {
        "rows": ShardingSpec(Mesh([0, 1], ("tp",)), (Shard(1),), dtype="bfloat16"),
        "bias": ShardingSpec(Mesh([0, 1], ("tp",)), (Replicate(),)),
    },
}
VERSIONS = 3
"""Pushed in each epoch."""


def two_jobs(setting: Setting) -> Iterator[Outcome]:
    """The part "jobs"."""
    secret = secrets.token_hex(16)
    with Meeting("tcp://127.0.0.1:0", secret=secret) as meeting, ranks_of(setting, 2 * SIDE_SIZE) as ranks:
        where = meeting.address, secret
        yield _refusal(ranks, where, setting)
        ways: dict[str, TransportName] = {
            "versions over NCCL": "network",
            "both sides come anew, and share memory": "auto",
        }
        for number, (name, transport) in enumerate(ways.items()):
            versions = range(1 + number * VERSIONS, 1 + (number + 1) * VERSIONS)
            outcome = guarded(name, partial(_all_taken, ranks, where, versions, transport, setting))
            yield outcome
            if not outcome.passed:
                return  # a rank may have been left in the middle
        yield guarded("a rank that dies", partial(_named, ranks, where, setting))


def _refusal(ranks: Ranks, where: tuple[str, str], setting: Setting) -> Outcome:
    name = "one GPU of one host"
    if setting.is_rehearsal:
        return Outcome(name, None, "there is no GPU that two ranks could share")
    return guarded(name, lambda: _agreed(ranks.run(refusal_of, where, setting), "are both on GPU"))


def _agreed(texts: list[str], words: str) -> str:
    if any(words not in text for text in texts):
        raise ValueError(f"{words!r} is not said by all: {texts}")
    return texts[0]


def refusal_of(rank: int, where: tuple[str, str], setting: Setting) -> str:
    """What is said to a rank that shares its GPU with another one of its host; runs on every rank."""
    address, secret = where
    side, side_rank = _place(rank)
    sizes: dict[str, int | None] = {TRAINER: SIDE_SIZE, SERVER: SIDE_SIZE}
    try:
        connect(
            address, side=side, side_rank=side_rank, side_sizes=sizes, secret=secret, device=setting.device,
            name="refused", timeout_seconds=0.2 * setting.seconds,
        ).close()  # fmt: skip
    except TransportError as error:
        return str(error)
    return "nothing"


def _place(rank: int) -> tuple[str, int]:
    return (TRAINER, SERVER)[rank // SIDE_SIZE], rank % SIDE_SIZE


def _full(name: str, version: int) -> torch.Tensor:
    shape = SHAPES[name]
    return (torch.arange(float(math.prod(shape))) % 251 + version).reshape(shape)


def _all_taken(
    ranks: Ranks, where: tuple[str, str], versions: range, transport: TransportName, setting: Setting
) -> str:
    found = ranks.run(exact_versions, where, versions, transport, setting)
    wanted = [list(versions)] * len(found)
    if found != wanted:
        raise ValueError(f"of versions {list(versions)} ranks pushed, or have exactly, {found}")
    return f"{len(versions)} versions pushed by {SIDE_SIZE} ranks, taken exactly by {SIDE_SIZE}"


def exact_versions(
    rank: int, where: tuple[str, str], versions: range, transport: TransportName, setting: Setting
) -> list[int]:
    """The versions that this rank has pushed, or has exactly; runs on every rank."""
    side, side_rank = _place(rank)
    if side == TRAINER:
        with _publisher(rank, where, transport, setting) as publisher:
            return [version for version in versions if _pushed(publisher, side_rank, version, setting)]
    weights = _weights(side_rank, setting)
    found = []
    with _subscriber(rank, where, weights, transport, setting) as subscriber:
        for _ in versions:
            version = subscriber.wait(0.3 * setting.seconds)
            wanted = {name: _shard(name, spec, version, side_rank) for name, spec in _server_specs().items()}
            found += [version] if all(torch.equal(weights[name].cpu(), wanted[name]) for name in wanted) else []
    return found


def _publisher(rank: int, where: tuple[str, str], transport: TransportName, setting: Setting) -> Publisher:
    side, side_rank = _place(rank)
    return Publisher(
        where[0], side=side, side_rank=side_rank, side_size=SIDE_SIZE, fleets=[SERVER], specs=SPECS[TRAINER],
        secret=where[1], host=f"host-{rank}", device=setting.device, timeout_seconds=0.2 * setting.seconds,
        transport=transport,
    )  # fmt: skip


def _subscriber(
    rank: int, where: tuple[str, str], weights: Mapping[str, torch.Tensor], transport: TransportName, setting: Setting
) -> Subscriber:
    side, side_rank = _place(rank)
    return Subscriber(
        where[0], side=side, side_rank=side_rank, side_size=SIDE_SIZE, source=TRAINER, specs=SPECS[SERVER],
        out=weights, secret=where[1], host=f"host-{rank}", device=setting.device,
        timeout_seconds=0.2 * setting.seconds, transport=transport,
    )  # fmt: skip


def _server_specs() -> dict[str, ShardingSpec]:
    return {
        name: ShardingSpec(spec.mesh, spec.placements, SHAPES[name], spec.dtype or "float32")
        for name, spec in SPECS[SERVER].items()
    }


def _weights(side_rank: int, setting: Setting) -> dict[str, torch.Tensor]:
    shards = {name: _shard(name, spec, 0, side_rank) for name, spec in _server_specs().items()}
    return {name: torch.zeros_like(shard, device=setting.device) for name, shard in shards.items()}


def _shard(name: str, spec: ShardingSpec, version: int, side_rank: int) -> torch.Tensor:
    full = _full(name, version)
    return local_shard(full.bfloat16() if spec.dtype == "bfloat16" else full, spec, side_rank)


def _trained(side_rank: int, version: int, setting: Setting) -> dict[str, torch.Tensor]:
    return {name: _shard(name, spec, version, side_rank).to(setting.device) for name, spec in SPECS[TRAINER].items()}


def _pushed(publisher: Publisher, side_rank: int, version: int, setting: Setting) -> bool:
    """Push until the fleet has come and is ready; whether all of it has the version."""
    tensors = {name: _shard(name, spec, version, side_rank).to(setting.device) for name, spec in SPECS[TRAINER].items()}
    while True:
        push = publisher.push(tensors, version, wait_seconds=0.05 * setting.seconds)[SERVER]
        if push.is_started:
            return push.wait()


def _named(ranks: Ranks, where: tuple[str, str], setting: Setting) -> str:
    """What the survivors are told of a rank of the server that dies between two versions."""
    ranks.start(told_of_death, where, setting)
    survivors = range(2 * SIDE_SIZE - 1)
    return _agreed(ranks.collect(survivors), "rank 1 of side 'server'")


def told_of_death(rank: int, where: tuple[str, str], setting: Setting) -> str:
    """What a rank hears when the server's last one dies after the first version; runs on every rank."""
    side, side_rank = _place(rank)
    if side == TRAINER:
        with _publisher(rank, where, "network", setting) as publisher:
            _pushed(publisher, side_rank, 1, setting)
            push = publisher.push(_trained(side_rank, 2, setting), 2, wait_seconds=0.1 * setting.seconds)[SERVER]
            try:
                push.wait()
            except TransportError as error:
                return str(error)
            return push.skipped
    weights = _weights(side_rank, setting)
    with _subscriber(rank, where, weights, "network", setting) as subscriber:
        subscriber.wait(0.3 * setting.seconds)
        if rank == 2 * SIDE_SIZE - 1:
            os._exit(3)
        try:
            subscriber.wait(0.3 * setting.seconds)
        except TransportError as error:
            return str(error)
        return "nothing"
