"""Ranks of one host that die, stop, are cancelled or fork, at each point of the protocol; and what they leave."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.oracle import require_equal
from tests.transport.memory.rungs import forced
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.transport.memory.link import Link
from tricomm.transport.memory.reading import UnreadableError

pytestmark = pytest.mark.processes
TIMEOUT_SECONDS = 6.0
SHAPE = (64, 4096)
SOURCE = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "float32")
DESTINATION = ShardingSpec(Mesh([1], ("x",)), (Shard(0),), SHAPE, "float32")
SENDER, RECEIVER = 0, 1
POINTS = {
    "before READY": (SENDER, "offer", "before"),
    "after READY": (SENDER, "offer", "after"),
    "before the read": (RECEIVER, "read", "before"),
    "after the read": (RECEIVER, "read", "after"),
    "before DONE": (RECEIVER, "done", "before"),
}


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    """Two ranks of which one will not survive."""
    with Ranks(2, timeout_seconds=30) as started:
        yield started


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks that survive everything."""
    with Ranks(2, timeout_seconds=120) as started:
        yield started


def full(salt: int) -> torch.Tensor:
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE) + salt


def at_point(point: str, rank: int, deed: Callable[[], None], patch: pytest.MonkeyPatch) -> bool:
    """Let this rank do something once, when it comes to a point of the protocol; false if it never comes there."""
    victim, name, when = POINTS[point]
    if rank != victim:
        return False
    method = getattr(Link, name)

    def wrapped(*arguments: Any) -> Any:
        patch.setattr(Link, name, method)
        if when == "before":
            deed()
        found = method(*arguments)
        if when == "after":
            deed()
        return found

    patch.setattr(Link, name, wrapped)
    return True


def attempt(call: Callable[[], Any]) -> tuple[str, str, float]:
    began = time.monotonic()
    try:
        call()
    except (tricomm.TricommError, KeyboardInterrupt) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "returned", "", time.monotonic() - began


def fork_and_die() -> None:
    """A child holds this rank's sockets when it is killed."""
    if os.fork() == 0:
        time.sleep(TIMEOUT_SECONDS)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


DEEDS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed, with a child": fork_and_die,
}


def end_at(rank: int, point: str, deed: str, rung: str) -> tuple[str, str, float]:
    """A call that works, then one in which a rank comes to its end."""
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, confirm=True, transport="memory")
    tensor = full(0) if rank == SENDER else None
    with forced(rung, rank, 1 << 17), pytest.MonkeyPatch.context() as patch:
        mover(tensor)
        at_point(point, rank, DEEDS[deed], patch)
        outcome = attempt(lambda: mover(tensor))
    if tensor is not None:
        require_equal(tensor, full(0), "the source")
    return outcome


CASES = [(point, "killed", rung) for rung in ("process_vm_readv", "pieces") for point in POINTS]
CASES += [("after READY", "stopped", "process_vm_readv"), ("before DONE", "stopped", "process_vm_readv")]
CASES += [(point, "killed, with a child", "process_vm_readv") for point in ("after READY", "before the read")]


@pytest.mark.parametrize(("point", "deed", "rung"), CASES, ids=str)
def test_a_rank_that_ends_is_named_in_time(doomed: Ranks, point: str, deed: str, rung: str) -> None:
    victim = POINTS[point][0]
    doomed.start(end_at, point, deed, rung)
    ((kind, text, seconds),) = doomed.collect([1 - victim])
    assert kind == "TransportError", text
    assert f"rank {victim} " in text.split(";")[0]
    assert seconds <= TIMEOUT_SECONDS
    assert deed == "stopped" or seconds < TIMEOUT_SECONDS / 2, "a death is known at once"


def read_of_a_dead_sender(rank: int) -> tuple[str, str, float]:
    """The receiver finds no process where the sender's memory was: it was killed after READY, a moment before."""
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, transport="memory")
    mover(full(0) if rank == SENDER else None)
    with pytest.MonkeyPatch.context() as patch:
        read = Link.read

        def late(link: Link, *arguments: Any) -> None:
            os.kill(link.pid, signal.SIGKILL)
            while Path(f"/proc/{link.pid}/statm").read_text().split()[0] != "0":
                time.sleep(0.001)
            read(link, *arguments)

        patch.setattr(Link, "read", late)
        return attempt(lambda: mover(full(1) if rank == SENDER else None))


def test_a_sender_whose_memory_is_gone_has_died(doomed: Ranks) -> None:
    doomed.start(read_of_a_dead_sender)
    ((kind, text, seconds),) = doomed.collect([RECEIVER])
    assert (kind, text.split(":")[0]) == ("TransportError", "rank 0 died or ended"), text
    assert text.endswith("see that rank's log, and whether it makes as many calls as this one")
    assert seconds < TIMEOUT_SECONDS / 2


def cancel() -> None:
    raise KeyboardInterrupt("enough")


def cancelled_at(rank: int, point: str, rung: str) -> list[tuple[str, str, float]]:
    """Again and again: a call in which a rank is cancelled and writes over its tensor, then one that works."""
    outcomes = []
    with forced(rung, rank, 1 << 17):
        mover = Resharder(
            SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, confirm=True, transport="memory", channel=rung
        )
        for salt in range(5):
            tensor = full(salt) if rank == SENDER else None
            with pytest.MonkeyPatch.context() as patch:
                at_point(point, rank, cancel, patch)
                outcomes.append(attempt(lambda given=tensor: mover(given)))
            if tensor is not None:
                tensor.fill_(-1.0)
            output = mover(full(salt + 100) if rank == SENDER else None)
            if output is not None:
                require_equal(output, full(salt + 100), f"call {salt} after the one that was cancelled")
    return outcomes


@pytest.mark.parametrize("rung", ["process_vm_readv", "arena", "pieces"])
@pytest.mark.parametrize("point", POINTS)
def test_a_rank_that_is_cancelled_tells_and_the_next_call_works(two: Ranks, point: str, rung: str) -> None:
    victim = POINTS[point][0]
    of_ranks = two.run(cancelled_at, point, rung)
    assert [kind for kind, _, _ in of_ranks[victim]] == ["KeyboardInterrupt"] * 5
    for kind, text, seconds in of_ranks[1 - victim]:
        assert kind == "TransportError"
        assert text.startswith(f"rank {victim} failed in call ")
        assert "KeyboardInterrupt: enough" in text
        assert seconds < TIMEOUT_SECONDS / 2


def wait_for(store: Any, key: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not store.check([key]):
        assert time.monotonic() < deadline, key
        time.sleep(0.001)


def torn(rank: int, attempts: int) -> int:
    """The sender is cancelled in the middle of the read and overwrites; returns how often the receiver saw both."""
    store = dist.distributed_c10d._get_default_store()
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, transport="memory", channel="torn")
    refused = 0
    for number in range(attempts):
        half, over = f"torn/{number}/half", f"torn/{number}/over"
        out = torch.zeros(SHAPE) if rank == RECEIVER else None
        tensor = full(number) if rank == SENDER else None
        read = Link.read

        def reading(link: Link, ready: Any, operation: Any) -> None:
            part = operation._replace(buffer=operation.buffer[: ready.nbytes // 2])
            read(link, ready._replace(nbytes=ready.nbytes // 2), part)  # noqa: B023
            store.set(half, "1")  # noqa: B023
            wait_for(store, over)  # noqa: B023
            read(link, ready, operation)  # noqa: B023

        def cancelled() -> None:
            wait_for(store, half)  # noqa: B023
            cancel()

        with pytest.MonkeyPatch.context() as patch:
            if rank == RECEIVER:
                patch.setattr(Link, "read", reading)
            at_point("after READY", rank, cancelled, patch)
            kind, _, _ = attempt(lambda given=tensor, into=out: mover(given, out=into))
        if tensor is not None:
            assert kind == "KeyboardInterrupt"
            tensor.fill_(-1.0)
            store.set(over, "1")
        else:
            assert kind == "TransportError", "bytes of a source that its owner had back were counted"
            refused += bool((out == -1.0).any())
        output = mover(full(-5) if rank == SENDER else None)
        if output is not None:
            require_equal(output, full(-5), "the next call")
    return refused


def test_bytes_that_change_under_the_reader_do_not_count(two: Ranks) -> None:
    assert two.run(torn, 5)[RECEIVER] == 5, "the reader did see what was written meanwhile"


def unreadable(rank: int, repeats: int) -> list[tuple[str, str]]:
    """What cannot be read costs one call; afterwards the pair takes the next rung, and says why."""
    channel = f"unreadable {repeats}"
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, transport="auto", channel=channel)
    given, out = (full(1), None) if rank == SENDER else (None, torch.zeros(SHAPE) if repeats else None)
    for _ in range(repeats):
        mover(given, out=out)
    assert (mover._execution.kept.repeat is not None) == bool(repeats)
    told = []
    for number in range(3):
        with pytest.MonkeyPatch.context() as patch:
            if rank == RECEIVER and number == 1:
                patch.setattr(Link, "read", lambda *_: mprotected())
            kind, text, _ = attempt(lambda: mover(given, out=out))
        told.append((kind, text or str(mover.transports[SENDER, RECEIVER])))
    return told


def mprotected() -> None:
    raise UnreadableError(14, "process_vm_readv: Bad address")


@pytest.mark.parametrize("repeats", [0, 3])
def test_memory_that_cannot_be_read_is_not_tried_again(two: Ranks, repeats: int) -> None:
    for rank, told in enumerate(two.run(unreadable, repeats)):
        assert told[0] == ("returned", "process_vm_readv")
        assert told[1][0] == "TransportError"
        assert told[1][1].startswith(f"rank 1 could not read the memory of rank 0 in call {repeats + 2} of "), rank
        assert told[2][0] == "returned"
        assert told[2][1].startswith(f"arena; its memory could not be read in call {repeats + 2} of ")


def held() -> dict[str, int]:
    """How many of each kind this process holds that only links are made of."""
    local = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    found = dict.fromkeys(("local sockets", "processes", "files", "mappings"), 0)
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            found["local sockets"] += target.removeprefix("socket:[").removesuffix("]") in local
            found["processes"] += target == "anon_inode:[pidfd]"
            found["files"] += "memfd:tricomm" in target
    found["mappings"] = Path("/proc/self/maps").read_text().count("memfd:tricomm")
    found["threads"] = len(os.listdir("/proc/self/task"))
    return found


def memory_nbytes() -> int:
    """Of this process, as far as it is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_communicators(rank: int, count: int, rung: str) -> tuple[dict[str, int], dict[str, int], int, int]:
    """(held before, held after, keys on the store, bytes of memory) of so many communicators.

    Keys are counted beyond those of the network's communicators, and bytes beyond those of the first tenth.
    """
    few = max(1, count // 10)
    store = dist.distributed_c10d._get_default_store()

    def make(transport: Any) -> None:
        with Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, transport=transport, channel=rung) as one:
            output = one(full(1) if rank == SENDER else None)
        if output is not None:
            require_equal(output, full(1), rung)

    def keys() -> int:
        dist.barrier()
        number = store.num_keys()
        dist.barrier()
        return int(number)

    with forced(rung, rank, 1 << 17):
        for transport in ("memory", "network"):
            make(transport)
        gc.collect()  # what tests before this one left in cycles, which would go meanwhile
        before, first = held(), keys()
        for _ in range(few):
            make("network")
        second = keys()
        for _ in range(few):
            make("memory")
        third, at_first = keys(), memory_nbytes()
        for _ in range(count - few):
            make("memory")
        last, at_last = keys(), memory_nbytes()
        make("network")
    of_memory = (last - third) * few - (second - first) * (count - few)
    return before, held(), max((third - second) - (second - first), of_memory // few), at_last - at_first


@pytest.mark.parametrize("rung", ["process_vm_readv", "arena", "pieces"])
def test_communicators_leave_nothing_behind(two: Ranks, rung: str) -> None:
    """A thousand in all. A slab that stayed behind would be a MiB of each."""
    count = int(os.environ.get("TRICOMM_COMMUNICATORS", "334"))
    for before, after, keys, grown_nbytes in two.run(many_communicators, count, rung):
        assert after == before
        assert keys <= 2  # the first and the last of a row may differ
        assert grown_nbytes < 32 << 20


def in_a_child(rank: int) -> None:
    """A forked child that drops what is its parent's ends no link of the parent."""
    mover = Resharder(SOURCE, DESTINATION, timeout_seconds=TIMEOUT_SECONDS, transport="memory", channel="child")
    for salt in range(3):
        output = mover(full(salt) if rank == SENDER else None)
        if output is not None:
            require_equal(output, full(salt), f"call {salt}")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                mover._session.communicator = mover._session._channel = None
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_ends_nothing(two: Ranks) -> None:
    two.run(in_a_child)
