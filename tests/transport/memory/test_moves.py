"""Any layout to any layout over each rung, with real processes; and that nothing of it goes over sockets."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tricomm
from tests.cases import RANKS, Case, cases, of_random_draws
from tests.oracle import pick, require_equal
from tests.transport.memory.rungs import RUNGS, forced, network_nbytes
from tests.transport.test_gloo import drawable, run_case
from tricomm import Mesh, Partial, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.transport.memory.link import Link


def run_on_rung(rank: int, case: Case, api: str, rung: str) -> dict[int, int]:
    """What this rank sent over the network in a move that is compared with what it must be."""
    with forced(rung, rank), network_nbytes() as sent:
        run_case(rank, case, api, transport="auto", channel=rung)
    return sent


@pytest.mark.parametrize("rung", RUNGS)
@of_random_draws("TRICOMM_FUZZ_MEMORY", 40)
@given(case=cases().filter(drawable), api=st.sampled_from(["reshard", "async", "resharder", "out"]))
def test_any_layout_to_any_layout(ranks: Ranks, rung: str, case: Case, api: str) -> None:
    for rank, sent in enumerate(ranks.run(run_on_rung, case, api, rung)):
        assert all(rung == "two hosts" and rank % 2 != other % 2 for other in sent), f"rank {rank}: {sent}"


TRAIN = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SERVE = Mesh([4, 5, 6, 7], ("tp",))
SHAPE = (64, 8192)
"""Halves and quarters of rows are long enough to be read where they are."""

LARGE = {
    "rows to columns": ((Replicate(), Shard(0)), (Shard(1),), "float32"),
    "columns to rows": ((Shard(1), Shard(1)), (Shard(0),), "float32"),
    "a cast": ((Replicate(), Shard(0)), (Shard(1),), "bfloat16"),
    "a sum": ((Partial(), Shard(0)), (Shard(1),), "float32"),
    "a broadcast": ((Shard(0), Shard(1)), (Replicate(),), "float32"),
}


def move_large(rank: int, kind: str, rung: str) -> tuple[dict[int, int], set[str], int]:
    """(bytes over the network, rungs of this rank, operations that named runs) of calls with one mover."""
    before, after, dtype = LARGE[kind]
    source = ShardingSpec(TRAIN, before, SHAPE, "float32")
    destination = ShardingSpec(SERVE, after, SHAPE, dtype)
    named = 0
    offer, read = Link.offer, Link.read

    def offering(link, operation, tag, common, others_follow):
        nonlocal named
        named += operation.runs is not None
        return offer(link, operation, tag, common, others_follow)

    def reading(link, ready, operation):
        nonlocal named
        named += operation.runs is not None
        return read(link, ready, operation)

    with forced(rung, rank, 1 << 14), network_nbytes() as sent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "offer", offering)
        patch.setattr(Link, "read", reading)
        options: Any = {"timeout_seconds": 20, "transport": "auto", "channel": f"large, {rung}"}
        mover = Resharder(source, destination, strategy=tricomm.Broadcast(1 << 18), **options)
        for step in range(3):
            full = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE) % 4099 + step
            scale = 0.5 if kind == "a sum" else 1.0
            tensor = pick(full, source, rank) * scale if rank in source.mesh else None
            output = mover(tensor)
            if rank in destination.mesh:
                require_equal(output, pick(full.to(output.dtype), destination, rank), f"step {step} rank {rank}")
    return sent, {found.rung.value for found in mover.transports.values()}, named


@pytest.mark.parametrize("rung", [*RUNGS[:2], *RUNGS[3:]])
@pytest.mark.parametrize("kind", LARGE)
def test_nothing_goes_over_sockets_where_memory_is_used(ranks: Ranks, kind: str, rung: str) -> None:
    found = ranks.run(move_large, kind, rung)
    assert [sent for sent, _, _ in found] == [{}] * RANKS
    assert {name for _, names, _ in found for name in names} == {"arena" if "arena" in rung else RUNGS[0]}
    assert any(named for _, _, named in found) == ("pieces" in rung or (rung == RUNGS[0] and kind != "a cast"))


@pytest.mark.parametrize("kind", LARGE)
def test_one_plan_mixes_memory_and_network(ranks: Ranks, kind: str) -> None:
    found = ranks.run(move_large, kind, "two hosts")
    assert any(sent for sent, _, _ in found)
    assert all(other % 2 != rank % 2 for rank, (sent, _, _) in enumerate(found) for other in sent)
    assert {name for _, names, _ in found for name in names} == {"process_vm_readv", "network"}


def insist(rank: int, rung: str) -> tuple[str, str]:
    """What transport="memory" says, and that the next call works."""
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (8,), "float32")
    destination = ShardingSpec(Mesh([1], ("x",)), (Replicate(),))
    if rank > 1:
        return "", ""
    tensor = torch.arange(8.0) if rank == 0 else None
    text = ""
    with forced(rung, rank):
        mover = Resharder(source, destination, timeout_seconds=20, transport="memory", channel=f"insist {rung}")
        try:
            mover(tensor)
        except TransportError as error:
            text = str(error)
    told = str(mover.transports[0, 1])
    with Resharder(source, destination, timeout_seconds=20, channel=f"insist {rung}") as other:
        output = other(tensor)
    if rank == 1:
        require_equal(output, torch.arange(8.0), "rank 1")
    return text, told


def test_memory_raises_where_it_cannot_and_tells_why(ranks: Ranks) -> None:
    for text, told in ranks.run(insist, "two hosts")[:2]:
        assert 'transport="memory", but rank 0 cannot reach rank 1 by memory: the ranks are on different hosts' in text
        assert 'pass transport="auto"' in text
        assert told.startswith("network; the ranks are on different hosts")
    for text, told in ranks.run(insist, "arena")[:2]:
        assert text == ""
        assert told.startswith("arena; this process may not read the memory of the other; run both as one user")
    assert ranks.run(insist, "process_vm_readv")[:2] == [("", "process_vm_readv")] * 2


def disagree(rank: int) -> str:
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (8, 8), "float32")
    destination = ShardingSpec(SERVE, (Shard(1),), (8, 8), "float32")
    mover = Resharder(source, destination, timeout_seconds=20, transport="auto" if rank else "network")
    with pytest.raises(TransportError) as caught:
        mover(torch.zeros(source.local_shape(rank)) if rank in source.mesh else None)
    return str(caught.value)


def test_all_ranks_give_the_same_transport(ranks: Ranks) -> None:
    for text in ranks.run(disagree):
        assert "disagrees with rank 0 about transport: rank 0 says network" in text


def network_after_memory(rank: int) -> None:
    """Movers of one channel, one of which uses memory and the other does not, in turns."""
    source = ShardingSpec(TRAIN, (Replicate(), Shard(0)), (8, 8), "float32")
    destination = ShardingSpec(SERVE, (Shard(1),), (8, 8), "float32")
    full = torch.arange(64.0).reshape(8, 8)
    movers = [
        Resharder(source, destination, timeout_seconds=20, transport=way, channel="in turns")
        for way in ("network", "auto")
    ]
    for step in range(6):
        with network_nbytes() as sent:
            output = movers[step % 2](pick(full + step, source, rank) if rank in source.mesh else None)
        if rank in destination.mesh:
            require_equal(output, pick(full + step, destination, rank), f"step {step}")
        assert not sent or step % 2 == 0


def test_movers_of_one_channel_choose_for_themselves(ranks: Ranks) -> None:
    ranks.run(network_after_memory)


@pytest.mark.parametrize(("value", "kind"), [("nvlink", SpecError), (3, tricomm.ArgumentError)])
def test_another_transport_is_refused(value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="is none of auto, network, memory"):
        tricomm.Options(transport=value)  # type: ignore[arg-type]


def in_another_order(rank: int) -> list[str]:
    """Two movers of a few bytes, which rank 0 calls one after the other and rank 1 the other way round."""
    if rank > 1:
        return []
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (8,), "float32")
    destination = ShardingSpec(Mesh([1], ("x",)), (Replicate(),))
    options: Any = {"timeout_seconds": 3.0, "transport": "memory", "channel": "orders"}
    first, second = (Resharder(source, destination, name=name, **options) for name in ("first", "second"))
    tensor = torch.arange(8.0) if rank == 0 else None
    for mover in (first, second):
        mover(tensor)
    found = []
    for mover in (first, second) if rank == 0 else (second, first):
        try:
            mover(tensor)
            found.append("returned")
        except TransportError as error:
            found.append(str(error))
            break
    again = tricomm.reshard(tensor, source, destination, **options)
    if rank == 1:
        require_equal(again, torch.arange(8.0), "the next call of both")
    return found


def test_calls_in_another_order_never_take_each_others_bytes(ranks: Ranks) -> None:
    """Who sends few bytes does not wait for them, but its next call does: else each came where the other is due."""
    ours, theirs = ranks.run(in_another_order)[:2]
    assert ours[0] == "returned"
    for text in (ours[1], theirs[0]):
        assert "in call 2 of Resharder 'first'" in text
        assert "in call 2 of Resharder 'second'" in text
        assert "every rank must make the same calls in the same order" in text


def long_limits(rank: int) -> None:
    """Two ranks; any limit that an option may be."""
    if rank > 1:
        return
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (8,), "float32")
    destination = ShardingSpec(Mesh([1], ("x",)), (Replicate(),))
    for seconds in (1e6, 1e8, 1e9):
        tensor = torch.arange(8.0) + seconds if rank == 0 else None
        mover = Resharder(source, destination, timeout_seconds=seconds, transport="memory", name=f"{seconds} s")
        for _ in range(2):
            output = mover(tensor)
            if rank == 1:
                require_equal(output, torch.arange(8.0) + seconds, "rank 1")


def test_a_limit_may_be_longer_than_the_system_waits_at_once(ranks: Ranks) -> None:
    ranks.run(long_limits)
