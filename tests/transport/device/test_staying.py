"""Tensors that stay in place, read there by other ranks, on the stand-in."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.cases import Case, cases, of_random_draws
from tests.oracle import pick, require_equal, source_and_result
from tests.standin import test_promise as over_nccl
from tests.standin.device import Limits
from tests.standin.ranks import PATIENT_SECONDS, Threads
from tests.standin.test_moves import CASES
from tests.transport.device import test_promise as by_memory
from tests.transport.device.test_moves import started_in_ways
from tests.transport.test_gloo import drawable
from tests.transport.test_properties import restrided
from tricomm import Mesh, Replicate, Resharder, SendRecv, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.transport.device.alive import alive

STRAIGHT = "CUDA IPC, straight from the tensors"


def threads_of(size: int, **more: Any) -> Threads:
    return Threads(size, Limits(loads=True), transport="auto", stays_in_place=True, **more)


@pytest.fixture
def ways() -> Iterator[dict[str, Threads]]:
    """See ``started_in_ways``; the tensors of one nobody can open."""
    with started_in_ways(stays_in_place=True) as made:
        made["one refuses"].exports.private[1] = "CUDA_ERROR_INVALID_VALUE (1)"
        yield made


def move(rank: int, threads: Threads, case: Case) -> tuple[list[torch.Tensor | None], Any]:
    """A call with other values, then three with those that are written into the same memory."""
    shards, _ = source_and_result(case.source, case.destination, rank)
    shard = shards.get(rank)
    tensor = None
    if shard is not None:
        tensor = restrided(shard.clone(), case.strides)
        tensor.untyped_storage().fill_(0)
    options: dict[str, Any] = {**case.plan_arguments(), "timeout_seconds": PATIENT_SECONDS, **threads.options(rank)}
    with Resharder(case.source, case.destination, **options) as mover:
        if rank not in mover.participants:
            threads.barrier.wait()
            return [None] * 3, {}
        mover(tensor)
        threads.finish(rank)
        if tensor is not None and shard is not None:
            tensor.copy_(shard)
        found = [mover(tensor), mover.start(tensor).wait(), mover(tensor)]
        threads.finish(rank)
        threads.barrier.wait()  # nobody closes what another still calls
        return found, mover.transports


@of_random_draws("TRICOMM_FUZZ_STAYING", 30)
@given(case=cases().filter(drawable))
def test_any_layout_to_any_layout(ways: dict[str, Threads], case: Case) -> None:
    for way, threads in ways.items():
        _, full = source_and_result(case.source, case.destination)
        for rank, (results, transports) in enumerate(threads.run(move, threads, case)):
            for found in results if rank in case.destination.mesh else ():
                assert found is not None
                require_equal(found, pick(full, case.destination, rank), f"{way}, rank {rank}")
            for (sender, receiver), told in transports.items():
                if told.rung.value == STRAIGHT:
                    assert way != "one refuses" or sender != 1
                    assert way != "two devices" or (sender + receiver) % 2 == 0


def launches(rank: int, threads: Threads, name: str) -> tuple[int, str, Any]:
    """How many kernels a call launches; how pairs go; and what the calls have cost."""
    source, destination, _ = CASES[name]
    shards, full = source_and_result(source, destination)
    mover = Resharder(source, destination, strategy=SendRecv(256), timeout_seconds=10, **threads.options(rank))
    counted: list[object] = []
    standin = threads.standins[rank]
    launch = standin.launch
    out = torch.zeros_like(pick(full, destination, rank)) if rank in destination.mesh else None
    mover(shards.get(rank), out=out)
    standin.launch = lambda work: (counted.append(work), launch(work))[1]  # type: ignore[method-assign, assignment]
    mover(shards.get(rank), out=out)
    threads.finish(rank)
    standin.launch = launch  # type: ignore[method-assign]
    if out is not None:
        require_equal(out, pick(full, destination, rank), name)
    return len(counted), str(mover.transports), mover.stats


def test_one_launch_pulls_from_all_and_nothing_is_packed() -> None:
    with threads_of(4) as threads:
        for count, told, stats in threads.run(launches, threads, "rows to columns"):
            assert count == 2, "what the rank has itself, and what it pulls from three others"
            assert told.endswith(STRAIGHT)
            assert stats.messages == 2 * 3
            assert stats.staging_nbytes == 0
            assert stats.received_nbytes == stats.minimum_nbytes
        for standin in threads.standins:
            sizes = [len(one) for one in threads.exports.memory.values()]
            assert sum(sizes) <= 4 * (2 << 20), f"no arena of {standin.rank} was made"


def test_what_is_summed_or_passed_on_goes_by_arenas_and_says_why() -> None:
    with threads_of(4) as threads:
        for name, reason in (("a sum", "summed first"), ("a chain", "passed on")):
            source, destination, strategy = CASES[name]
            case_of = {"source": source, "destination": destination, "strategy": strategy}
            for found, told in threads.run(any_move, threads, case_of):
                assert found
                assert reason in told or "rank 3" in told.split("\n")[0] or "rank 0" in told.split("\n")[0]


def any_move(rank: int, threads: Threads, case: dict[str, Any]) -> tuple[bool, str]:
    source, destination = case["source"], case["destination"]
    shards, full = source_and_result(source, destination)
    mover = Resharder(source, destination, strategy=case["strategy"], timeout_seconds=10, **threads.options(rank))
    for _ in range(2):
        output = mover(shards.get(rank))
        threads.finish(rank)
        if output is not None:
            require_equal(output, pick(full, destination, rank), "by arenas")
    threads.barrier.wait()  # nobody closes what another still calls
    return True, str(mover.transports)


BEFORE, AFTER = Mesh([0, 1], ("x",)), Mesh([2, 1], ("y",))
ROWS = (7, 0, 64, 3)
SOURCES = {str(at): ShardingSpec(BEFORE, (Shard(0),), (count, 6), "float32") for at, count in enumerate(ROWS)}
TARGETS = {name: ShardingSpec(AFTER, (Shard(1),), dtype="bfloat16") for name in SOURCES}
WHOLE = {str(at): torch.arange(count * 6.0).reshape(count, 6) + at for at, count in enumerate(ROWS)}


def many_of(rank: int, tail: int = 0) -> dict[str, torch.Tensor]:
    """Parts of one piece of memory, one of them without elements."""
    found, first = {}, 1
    if rank in BEFORE.ranks:
        pool = torch.zeros(1 + 6 * sum(ROWS) + tail)
        for name, one in SOURCES.items():
            shape = one.local_shape(rank)
            found[name] = pool[first : first + shape[0] * 6].view(shape)
            found[name].copy_(pick(WHOLE[name], one, rank))
            first += shape[0] * 6
    return found


def move_many(rank: int, threads: Threads, only: list[str] | None) -> int:
    """How many segments the ranks have open in the end, of all and of some of many tensors."""
    given_ = many_of(rank)
    mover = Resharder(SOURCES, TARGETS, strategy=SendRecv(), timeout_seconds=10, **threads.options(rank))
    for _ in range(3):
        results = mover(given_, only=only)
        threads.finish(rank)
        given_ = {name: tensor.view(tensor.shape) for name, tensor in given_.items()}  # others of the same memory
        for name, found in results.items():
            require_equal(found, pick(WHOLE[name].bfloat16(), TARGETS[name].resolved(SOURCES[name]), rank), name)
    threads.barrier.wait()
    count = len(threads.exports.opened)
    threads.barrier.wait()
    return count


@pytest.mark.parametrize("only", [None, ["0", "3"]])
def test_many_tensors_of_one_segment(only: list[str] | None) -> None:
    with threads_of(3) as threads:
        counts = threads.run(move_many, threads, only)
        # What the ranks showed each other at first, and the segment of each of two senders for two receivers, but not
        # for itself; a piece of memory may lie across two here.
        assert {*counts} <= {6 + 3, 6 + 4, 6 + 5, 6 + 6}


def refuse(rank: int, threads: Threads) -> tuple[str, str, str]:
    """What another tensor, another stride and the right one say."""
    spec, target = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (8, 8), "float32") for one in range(2))
    mover = Resharder(spec, target, timeout_seconds=5, confirm=True, **threads.options(rank))
    pool = torch.arange(128.0)
    tensor = pool[:64].view(8, 8) if rank == 0 else None
    mover(tensor)
    threads.barrier.wait()  # else the refusal may meet the other rank at the end of its first call
    texts = []
    for other in (pool[64:].view(8, 8), pool[:64].view(8, 8).t(), tensor):
        try:
            mover(other if rank == 0 else None)
            texts.append("")
        except (SpecError, TransportError) as error:
            texts.append(str(error))
    threads.finish(rank)
    return texts[0], texts[1], texts[2]


def test_another_tensor_is_refused_before_anything_is_sent() -> None:
    with threads_of(2) as threads:
        (elsewhere, turned, right), others = threads.run(refuse, threads)
    assert "the tensor of rank 0 is at another address than in the first call, and stays_in_place=True" in elsewhere
    assert "write into those (copy_), make another Resharder for others, or leave stays_in_place out" in elsewhere
    assert "has strides (1, 8) than in the first call (8, 1)" in turned
    assert "is at another address" in others[0], "the other rank is told"
    assert (right, others[2]) == ("", "")


def test_what_nobody_can_open_goes_by_the_arena_and_says_why() -> None:
    with threads_of(4) as threads:
        threads.exports.private[1] = "cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE (1)"
        found = threads.run(launches, threads, "rows to columns")
    assert "rank 0 from 1: CUDA IPC; the tensors cannot be exported: cuIpcGetMemHandle" in found[0][1]
    assert "let PYTORCH_CUDA_ALLOC_CONF have neither expandable_segments nor cudaMallocAsync" in found[1][1]
    assert f"rank 0 to and from 2-3: {STRAIGHT}" in found[0][1]


def close_in_turns(rank: int, threads: Threads) -> list[int]:
    """How many tensors the sender keeps: after a call, when it has closed, and when the other has, too."""
    spec, target = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (1 << 10,), "float32") for one in range(2))
    options = {"timeout_seconds": 5, **threads.options(rank)}
    keeps_connections = Resharder(target, spec, **options)
    keeps_connections(torch.zeros(1 << 10) if rank == 1 else None)
    mover = Resharder(spec, target, **options)
    mover(torch.ones(1 << 10) if rank == 0 else None)
    threads.finish(rank)
    assert mover._session is not None
    connections: Any = mover._session.communicator
    shares = connections._by_memory._held.shares
    found = [kept_by(shares)]
    threads.barrier.wait()
    for closer in (0, 1):
        if rank == closer:
            mover.close()
        deadline = time.monotonic() + (0.4 if closer == 0 else 10.0)
        while rank == 0 and kept_by(shares) and time.monotonic() < deadline:
            time.sleep(0.02)
        found.append(kept_by(shares))
        threads.barrier.wait()
    assert keeps_connections.state.name == "CONNECTED"
    return found


def close_early(rank: int, threads: Threads) -> bool:
    """Close while runs are under way, the first of which is the first of all."""
    source, destination, _ = CASES["rows to columns"]
    shards, full = source_and_result(source, destination)
    mover = Resharder(source, destination, strategy=SendRecv(256), timeout_seconds=10, **threads.options(rank))
    handles = [mover.start(shards.get(rank)) for _ in range(3)]
    mover.close()
    for handle in handles:
        output = handle.wait()
        threads.finish(rank)
        require_equal(output, pick(full, destination, rank), "closed early")
    return STRAIGHT in str(mover._execution.transports) if mover._execution is not None else False


def test_what_was_started_before_it_was_closed_is_done() -> None:
    with threads_of(4) as threads:
        assert all(threads.run(close_early, threads))
        assert threads.exports.faults == []


def kept_by(shares: Any) -> int:
    return sum(len(one.storages) for one in shares._kept.values())


def test_memory_is_kept_until_all_have_closed_it() -> None:
    alive.cache_clear()  # devices of tests before this one, which were closed with something under way
    with threads_of(2) as threads:
        assert threads.run(close_in_turns, threads)[0] == [1, 1, 0]
        assert threads.exports.faults == []


def overwrite(rank: int, threads: Threads, gate: Any) -> tuple[str, bool]:
    """The sender gives its call up while the receiver's device is busy, and then writes into what is still to be read;
    what the receiver's next call says, and whether what it has got is wrong.
    """
    spec, target = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (1 << 10,), "float32") for one in range(2))
    mover = Resharder(spec, target, timeout_seconds=5, **threads.options(rank))
    tensor = torch.ones(1 << 10) if rank == 0 else None
    mover(tensor)
    threads.finish(rank)
    threads.barrier.wait()
    if rank == 1:
        threads.standins[rank].device.current.launch(lambda: None, gate)
    output = mover(tensor)
    threads.barrier.wait()
    if tensor is not None:
        mover.abort("rank 0 has something better to do")
        threads.finish(rank)  # its stream goes on
        tensor.zero_()
    threads.barrier.wait()
    if rank == 1:
        gate.open()
        threads.finish(rank)
    threads.barrier.wait()
    text, _ = over_nccl.attempt(lambda: mover(tensor))
    return text, output is not None and not bool((output == 1).all())


def test_what_was_read_after_its_sender_gave_up_does_not_count() -> None:
    with threads_of(2) as threads:
        text, is_wrong = threads.run(overwrite, threads, threads.gate())[1]
    assert is_wrong, "else this shows nothing"
    assert "rank 0 has something better to do" in text


@pytest.fixture
def four() -> Iterator[Threads]:
    """Ranks on one device whose tensors stay in place."""
    with threads_of(over_nccl.SIZE) as started:
        yield started
    assert started.exports.faults == []


@pytest.mark.parametrize(
    ("how", "victim", "confirm"),
    [("dies", 1, False), ("dies", 3, True), ("stops", 3, False), ("stops", 1, True), ("stays away", 1, False)],
)
def test_a_rank_that_does_not_come_is_named_by_every_other(four: Threads, how: str, victim: int, confirm: bool) -> None:
    by_memory.require_named_by_every_other(four, how, victim, confirm)


test_a_slow_but_healthy_step_is_never_killed = by_memory.test_a_slow_but_healthy_step_is_never_killed
test_the_next_call_of_all_works = by_memory.test_the_next_call_of_all_works
test_after_an_error_that_was_found_late_all_go_on = by_memory.test_after_an_error_that_was_found_late_all_go_on


def refuse_in_host_memory(rank: int) -> list[str]:
    """What another tensor says between ranks whose tensors are in host memory; the same one moves."""
    if rank >= 2:
        return []
    source, target = (ShardingSpec(Mesh([0, 1], ("x",)), (Shard(dim),), (4, 6), "float32") for dim in (0, 1))
    whole = torch.arange(24.0).reshape(4, 6)
    tensor, texts = pick(whole, source, rank), []
    with Resharder(source, target, stays_in_place=True, confirm=True, timeout_seconds=20) as mover:
        for given_ in (tensor, tensor.clone(), tensor.view(2, 6)):
            try:
                require_equal(mover(given_), pick(whole, target, rank), "in host memory")
                texts.append("")
            except SpecError as error:
                texts.append(str(error))
    return texts


def test_the_rule_holds_in_host_memory_too(ranks: Ranks) -> None:
    for texts in ranks.run(refuse_in_host_memory)[:2]:
        assert texts[0] == texts[2] == ""
        assert "is at another address than in the first call" in texts[1]
