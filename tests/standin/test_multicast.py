"""A message to several ranks in one call, on the stand-in for NCCL: by a broadcast among its sender and receivers."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.oracle import pick, require_equal, source_and_result
from tests.standin.device import Limits
from tests.standin.ranks import Threads
from tests.standin.test_moves import move
from tricomm import Broadcast, Mesh, Replicate, Resharder, Shard, ShardingSpec, Topology, TransportError
from tricomm.plan.routes.one_call import MAX_GROUPS
from tricomm.transport import nccl

SIZE = 5
TIMEOUT_SECONDS = 3.0
SHAPE = (12, 10)
WHOLE, ONE_CALL = (Replicate(),), Broadcast(one_call=True)


def spec(ranks: list[int], placements: Any = WHOLE) -> ShardingSpec:
    return ShardingSpec(Mesh(ranks, ("x",)), placements, SHAPE, "float32")


CASES = {
    "among all": (spec([0]), spec([1, 2, 3, 4]), Broadcast(one_call=True)),
    "among some": (spec([4, 0], (Shard(0),)), spec([1, 2, 3]), Broadcast(128, one_call=True)),
    "packed": (spec([0, 3], (Shard(1),)), spec([1, 2, 4]), Broadcast(one_call=True)),
    "overlapping": (spec([0, 1], (Shard(0),)), spec([1, 2, 3]), Broadcast(one_call=True)),
    "with messages": (spec([2, 3], (Shard(0),)), spec([0, 2, 4]), Broadcast(100, one_call=True)),
}


@pytest.fixture
def five() -> Iterator[Threads]:
    """Five ranks."""
    with Threads(SIZE) as threads:
        yield threads


def calls_of(threads: Threads) -> list[int]:
    """How many broadcasts each rank queued."""
    return [sum(backend.broadcasts for backend in standin.backends) for standin in threads.standins]


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_move_is_right(five: Threads, name: str, confirm: bool) -> None:
    source, destination, _ = CASES[name]
    _, full = source_and_result(source, destination)
    for rank, results in enumerate(five.run(move, five, name, confirm, CASES)):
        for found in results:
            if rank in destination.mesh:
                require_equal(found, pick(full, destination, rank), f"rank {rank}")
            else:
                assert found is None
    assert any(calls_of(five))


@pytest.mark.parametrize("name", CASES)
def test_where_ranks_read_each_others_memory_each_is_sent_to(name: str) -> None:
    """What is packed once is there for all of them."""
    source, destination, _ = CASES[name]
    _, full = source_and_result(source, destination)
    with Threads(SIZE, transport="memory") as threads:
        for rank, results in enumerate(threads.run(move, threads, name, True, CASES)):
            for found in results if rank in destination.mesh else ():
                require_equal(found, pick(full, destination, rank), f"rank {rank}")
        assert not any(calls_of(threads))


def backends_of(threads: Threads) -> list[int]:
    return [len(standin.backends) for standin in threads.standins]


def test_all_ranks_use_the_communicator_that_they_have(five: Threads) -> None:
    five.run(move, five, "among all", False, CASES)
    assert backends_of(five) == [1] * SIZE
    assert calls_of(five) == [3] * SIZE, "one launch a call on every rank"


def test_a_group_has_one_of_its_own_which_is_made_once(five: Threads) -> None:
    five.run(move, five, "packed", False, CASES)
    assert backends_of(five) == [2, 3, 3, 2, 3]


def move_some(rank: int, threads: Threads) -> list[bool]:
    """Tensors of unlike layouts, and then some of them: what is left of a call goes among the same ranks."""
    sources = {"a": spec([0]), "b": spec([4, 0], (Shard(0),)), "c": spec([0]), "d": spec([1], (Shard(0),))}
    targets = {"a": spec([1, 2, 3]), "b": spec([1, 2, 3]), "c": spec([1, 2, 3]), "d": spec([2], (Shard(1),))}
    full = torch.arange(float(SHAPE[0] * SHAPE[1])).reshape(SHAPE)
    options: dict[str, Any] = {"strategy": ONE_CALL, "timeout_seconds": 10, **threads.options(rank)}
    mover = Resharder(sources, targets, **options)
    given = {name: pick(full, one, rank) for name, one in sources.items() if rank in one.mesh}
    right = []
    for names in (sources, ["a", "b"], ["c"], ["a", "b"]):
        some = mover if names is sources else mover.only(names)
        found = some({name: shard for name, shard in given.items() if name in names})
        threads.finish(rank)
        wanted = {name: targets[name] for name in names if rank in targets[name].mesh}
        assert found.keys() == wanted.keys()
        right += [
            torch.equal(found[name], pick(full, one.resolved(sources[name]), rank)) for name, one in wanted.items()
        ]
    return right


def test_many_tensors_and_some_of_them(five: Threads) -> None:
    assert all(all(right) for right in five.run(move_some, five))
    assert all(calls_of(five))


# ---- what the cost model takes


def planned(rank: int, threads: Threads, size: int, topology: Topology | None, transport: Any) -> list[str]:
    source = ShardingSpec(Mesh([0], ("x",)), WHOLE, (size,), "uint8")
    target = ShardingSpec(Mesh([1, 2, 3, 4], ("x",)), WHOLE)
    options: dict[str, Any] = {**threads.options(rank), "transport": transport}
    mover = Resharder(source, target, timeout_seconds=10, topology=topology, **options)
    if transport == "network":
        values = torch.arange(size).to(torch.uint8)
        out = mover(values if rank == 0 else None)
        threads.finish(rank)
        assert out is None or torch.equal(out, values)
    return [str(strategy) for strategy in mover.plan.moves[0].strategies]


def test_auto_takes_one_call_where_a_resharder_that_is_kept_has_nccl(five: Threads) -> None:
    """Where no rank reads another's memory: it is told to go by the network, or no two ranks are on one host."""
    for topology, transport in ((None, "network"), (Topology(tuple("abcde")), "auto")):
        for strategies in five.run(planned, five, 1 << 19, topology, transport):
            assert strategies == ["Broadcast(chunk_bytes=None, one_call=True)"]
    assert calls_of(five) == [1] * SIZE


def test_it_does_not_where_ranks_may_read_each_others_memory(five: Threads) -> None:
    for topology in (None, Topology(tuple("abcdd"))):
        for strategies in five.run(planned, five, 1 << 19, topology, "auto"):
            assert "one_call" not in strategies[0]
    assert not any(calls_of(five))


def test_it_does_not_where_a_topology_says_that_it_is_slow(five: Threads) -> None:
    slow = Topology(tuple("abcde"), multicast_hop_seconds=1.0)
    for strategies in five.run(planned, five, 1 << 19, slow, "network"):
        assert "one_call" not in strategies[0]
    assert not any(calls_of(five))


# ---- bounded


def use_many(rank: int, threads: Threads, rounds: int) -> int:
    """Resharders among more groups than are kept, in turns, on one channel; how many communicators were made."""
    senders = [(0, [1, 2]), (0, [1, 3]), (0, [1, 4]), (0, [2, 3]), (0, [2, 4]), (0, [3, 4])]
    senders += [(1, [2, 3]), (1, [2, 4]), (1, [3, 4]), (2, [3, 4])]
    assert len(senders) > MAX_GROUPS
    full = torch.arange(6.0)
    movers = []
    for at, (sender, receivers) in enumerate(senders):
        others = [one for one in range(SIZE) if one not in (sender, *receivers)]
        source = {"a": ShardingSpec(Mesh([sender], ("x",)), WHOLE, (6,), "float32")}
        target = {"a": ShardingSpec(Mesh(receivers, ("x",)), WHOLE)}
        # All ranks take part, so that all use one channel.
        source["b"] = ShardingSpec(Mesh([others[0]], ("x",)), WHOLE, (1,), "float32")
        target["b"] = ShardingSpec(Mesh([others[1]], ("x",)), WHOLE)
        movers.append((source, target, f"{at}"))
    options: dict[str, Any] = {"strategy": ONE_CALL, "timeout_seconds": 20, **threads.options(rank)}
    made = [Resharder(source, target, name=name, **options) for source, target, name in movers]
    for _ in range(rounds):
        for (source, target, _), mover in zip(movers, made, strict=True):
            given = {name: full[: one.shape[0]] for name, one in source.items() if rank in one.mesh}
            moved = mover(given)
            threads.finish(rank)
            for name, out in moved.items():
                assert torch.equal(out, full[: target[name].resolved(source[name]).shape[0]])
    return len(threads.standins[rank].backends)


def test_those_used_last_are_kept_and_all_ranks_agree(five: Threads) -> None:
    made = five.run(use_many, five, 2)
    of_each = [6, 7, 7, 8, 8]  # of ten groups, in how many each rank is
    assert all(count <= 1 + 2 * one for count, one in zip(made, of_each, strict=True))
    assert sum(made) > SIZE + sum(of_each), "some were made anew"


# ---- failures


def lose_one(
    rank: int, threads: Threads, victim: int, how: str, is_first: bool, kept: list[Resharder]
) -> tuple[str, float]:
    """A call that the victim does not come to; what it or the next one says."""
    source, destination, strategy = CASES["packed"]
    shards, _ = source_and_result(source, destination)
    options: dict[str, Any] = {"strategy": strategy, "timeout_seconds": TIMEOUT_SECONDS, **threads.options(rank)}
    mover = Resharder(source, destination, **options)
    kept.append(mover)  # who is stopped drops nothing
    mover.connect()
    if not is_first:
        mover(shards.get(rank))
        threads.finish(rank)
    threads.barrier.wait()
    began = time.monotonic()
    if rank == victim:
        {"dies": threads.kill, "stops": threads.stop, "stays away": lambda _: None}[how](rank)
        return "", 0.0
    text = ""
    for _ in range(2):
        try:
            mover(shards.get(rank))
            threads.finish(rank, 2 * TIMEOUT_SECONDS)
        except TransportError as error:
            text = text or str(error)
    return text, time.monotonic() - began


@pytest.mark.parametrize("is_first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize(("how", "victim"), [("dies", 1), ("stops", 0), ("stays away", 4)])
def test_a_rank_that_does_not_come_is_named_by_every_other(how: str, victim: int, is_first: bool) -> None:
    """Also where its group was never connected, for which all wait on the host."""
    with Threads(SIZE, Limits(error_seconds=None)) as threads, threads.keys_are_ours():
        found = threads.run(lose_one, threads, victim, how, is_first, [])
    for rank, (text, seconds) in enumerate(found):
        if rank != victim:
            assert f"rank {victim} " in text.split(";")[0], f"rank {rank}: {text!r}"
            assert seconds <= 3 * TIMEOUT_SECONDS


def break_one(rank: int, threads: Threads) -> list[bool]:
    """Rank 3 misses a call, in which the others wait in broadcasts; then all make the same ones."""
    source, destination, strategy = CASES["packed"]
    shards, full = source_and_result(source, destination)
    options: dict[str, Any] = {"strategy": strategy, "timeout_seconds": TIMEOUT_SECONDS, **threads.options(rank)}
    mover = Resharder(source, destination, confirm=True, **options)
    mover(shards.get(rank))
    backends = [*threads.standins[rank].backends]
    if rank != 3:
        with pytest.raises(TransportError, match="rank 3 "):
            mover(shards.get(rank))
    threads.barrier.wait()
    mover.connect()
    out = mover(shards.get(rank))
    if out is not None:
        require_equal(out, pick(full, destination, rank), f"rank {rank}")
    return [backend.is_aborted for backend in backends]


def test_to_abort_aborts_all_communicators_and_the_next_call_works(five: Threads) -> None:
    for rank, aborted in enumerate(five.run(break_one, five)):
        assert len(aborted) > 1
        assert all(aborted) or rank == 3, f"rank {rank}: {aborted}"


def abort_while_it_connects(rank: int, threads: Threads) -> list[bool]:
    """Somebody aborts when all have come, and before the group connects."""
    source, destination, strategy = CASES["packed"]
    shards, _ = source_and_result(source, destination)
    options: dict[str, Any] = {"strategy": strategy, "timeout_seconds": TIMEOUT_SECONDS, **threads.options(rank)}
    mover = Resharder(source, destination, **options)
    mover.connect()
    threads.barrier.wait()
    threads.movers[rank] = mover
    with pytest.raises(TransportError, match="somebody failed"):
        mover(shards.get(rank))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    backends = threads.standins[rank].backends
    while not all(backend.is_aborted for backend in backends) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [backend.is_aborted for backend in backends]


def test_a_group_that_connects_while_somebody_aborts_is_aborted_too(
    five: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = nccl.connect
    five.movers = {}  # type: ignore[attr-defined]

    def connect_and_abort(accelerator: Any, *arguments: Any) -> Any:
        mover = five.movers.get(accelerator.rank)  # type: ignore[attr-defined]
        if mover is not None:
            mover._session.communicator.abort("somebody failed")
        return made(accelerator, *arguments)

    monkeypatch.setattr(nccl, "connect", connect_and_abort)
    found = five.run(abort_while_it_connects, five)
    assert sum(map(len, found)) > SIZE, "some group had connected"
    assert all(all(aborted) for aborted in found)
