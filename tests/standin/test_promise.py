"""The promise on CUDA, on the stand-in: whoever dies, stops or stays away is named in time, and nothing healthy is."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from tests.oracle import pick, require_equal
from tests.standin.device import Limits
from tests.standin.ranks import Threads
from tricomm import Mesh, Resharder, SendRecv, Shard, ShardingSpec, TransportError
from tricomm.transport import nccl

SIZE = 4
TIMEOUT_SECONDS = 3.0
FINISH_SECONDS = 2 * TIMEOUT_SECONDS
SHAPE = (32, 24)
SOURCE = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), SHAPE, "float32")
DESTINATION = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(1),), SHAPE, "float32")
FULL = torch.arange(float(SHAPE[0] * SHAPE[1])).reshape(SHAPE)
NEVER = Limits(error_seconds=None)


@pytest.fixture
def four() -> Iterator[Threads]:
    """Ranks whose NCCL never notices anything."""
    with Threads(SIZE, NEVER) as started:
        yield started


@cache  # where tensors stay in place, each call has the same ones
def shard_of(rank: int) -> torch.Tensor | None:
    return pick(FULL, SOURCE, rank) if rank in SOURCE.mesh else None


def mover_of(rank: int, threads: Threads, **options: Any) -> Resharder:
    options = {"timeout_seconds": TIMEOUT_SECONDS, "strategy": SendRecv(512), **options}
    return Resharder(SOURCE, DESTINATION, **options, **threads.options(rank))


def check(rank: int, output: torch.Tensor | None) -> None:
    if rank in DESTINATION.mesh:
        assert output is not None
        require_equal(output, pick(FULL, DESTINATION, rank), f"rank {rank}")


def attempt(call: Callable[[], Any]) -> tuple[str, float]:
    """(the error or "", seconds) of a call."""
    began = time.monotonic()
    try:
        call()
    except TransportError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def lose_one(rank: int, threads: Threads, victim: int, how: str, confirm: bool) -> tuple[str, str, float]:
    """A call that works, then one that the victim does not come to; what that one and the next one say."""
    mover = mover_of(rank, threads, confirm=confirm)
    output = mover(shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    check(rank, output)
    threads.barrier.wait()
    began = time.monotonic()
    if rank == victim:
        {"dies": threads.kill, "stops": threads.stop, "stays away": lambda _: None}[how](rank)
        if how == "stops":
            threads.kept.append(mover)  # to let it go is something that a stopped rank does not do
        return "", "", 0.0
    text, _ = attempt(lambda: mover(shard_of(rank)))
    threads.finish(rank, FINISH_SECONDS)
    seconds = time.monotonic() - began
    return text, "" if confirm else attempt(lambda: mover(shard_of(rank)))[0], seconds


@pytest.mark.parametrize(
    ("how", "limits", "victim", "confirm"),
    [
        ("dies", Limits(), 1, False),
        ("dies", Limits(), 3, True),
        ("dies", NEVER, 3, False),
        ("stops", NEVER, 1, True),
        ("stays away", NEVER, 3, False),
        ("stays away", NEVER, 1, True),
    ],
)
def test_a_rank_that_does_not_come_is_named_by_every_other(
    how: str, limits: Limits, victim: int, confirm: bool
) -> None:
    """With ``confirm`` in the call itself, else at the next one; no device is left waiting after the timeout. A lost
    connection NCCL notices late or never.
    """
    with Threads(SIZE, limits) as threads, threads.keys_are_ours():
        found = threads.run(lose_one, threads, victim, how, confirm)
    require_named(found, victim, confirm)


def require_named(found: list[tuple[str, str, float]], victim: int, confirm: bool) -> None:
    """Of what ranks found who lost one: that it is named, in time."""
    for rank, (first, second, seconds) in enumerate(found):
        if rank == victim:
            continue
        is_peer = (rank in SOURCE.mesh) != (victim in SOURCE.mesh)
        if confirm or is_peer:
            text = first if confirm else first or second
            assert f"rank {victim} " in text.split(";")[0], f"rank {rank}: {first!r} {second!r}"
        assert seconds <= 1.5 * TIMEOUT_SECONDS, f"the device of rank {rank} waited {seconds} s"


def stay_away_at_first(rank: int, threads: Threads) -> tuple[str, float]:
    """All connect, and the pairs of rank 3 are used by the others only: NCCL blocks their hosts."""
    mover = mover_of(rank, threads)
    mover.connect()
    if rank == 3:
        return "", 0.0
    return attempt(lambda: [mover(shard_of(rank)), threads.finish(rank, FINISH_SECONDS), mover(shard_of(rank))])


def test_a_pair_that_does_not_connect_blocks_the_host_no_longer_than_the_timeout(four: Threads) -> None:
    for rank, (text, seconds) in enumerate(four.run(stay_away_at_first, four)[:2]):
        assert "rank 3 " in text.split(";")[0], f"rank {rank}: {text}"
        assert seconds <= 1.5 * TIMEOUT_SECONDS


def slow_but_healthy(rank: int, threads: Threads, gate: Any) -> None:
    """All compute for longer than the timeout before they come to a move, which was queued at once."""
    mover = mover_of(rank, threads)
    check_first = mover(shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    check(rank, check_first)
    device = threads.standins[rank].device
    threads.barrier.wait()
    device.current.launch(lambda: None, gate)
    output = mover.start(shard_of(rank)).wait()
    again = mover(shard_of(rank))
    threads.barrier.wait()
    if rank == 0:
        gate.open_after(1.5 * TIMEOUT_SECONDS)
    threads.finish(rank, FINISH_SECONDS)
    check(rank, output)
    check(rank, again)


def test_a_slow_but_healthy_step_is_never_killed(four: Threads) -> None:
    with four.keys_are_ours():
        four.run(slow_but_healthy, four, four.gate())


def test_torchs_watchdog_would_kill_it(four: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts from when something was queued, and leaves a key on the user's store."""
    monkeypatch.setattr(nccl, "WITHOUT_WATCHDOG", {})
    four.timeout_seconds = 2.0 * TIMEOUT_SECONDS
    with pytest.raises(AssertionError, match=r"did not come to its end|hangs"):
        four.run(slow_but_healthy, four, four.gate())
    assert "exception_dump" in four.store.list_keys()


def confirm_late(rank: int, threads: Threads, gate: Any) -> float:
    """The device of rank 2 is busy; when a confirmed call returns, with the data there at once."""
    mover = mover_of(rank, threads, confirm=True)
    mover(shard_of(rank))
    threads.barrier.wait()
    if rank == 2:
        threads.standins[rank].device.current.launch(lambda: None, gate)
        gate.open_after(0.5)
    out = torch.zeros(DESTINATION.local_shape(rank)) if rank in DESTINATION.mesh else None
    mover(shard_of(rank), out=out)
    returned = time.monotonic()
    check(rank, out)
    return returned


def test_confirm_means_that_the_data_are_there_on_all_ranks(four: Threads) -> None:
    """Not only queued: no rank comes back before the last one has its data, and each may read its own at once."""
    gate = four.gate()
    for returned in four.run(confirm_late, four, gate):
        assert returned >= gate.opened > 0


def fail_and_go_on(rank: int, threads: Threads) -> list[str]:
    """Rank 3 misses a call; then all make the same ones."""
    mover = mover_of(rank, threads, confirm=True)
    mover(shard_of(rank))
    texts = []
    if rank != 3:
        texts.append(attempt(lambda: mover(shard_of(rank)))[0])
    threads.barrier.wait()
    mover.connect()
    for _ in range(2):
        check(rank, mover(shard_of(rank)))
    return texts


def test_the_next_call_of_all_works(four: Threads) -> None:
    for texts in four.run(fail_and_go_on, four)[:3]:
        assert "rank 3 " in texts[0]


def wait_on_two_channels(rank: int, threads: Threads) -> list[tuple[str, float]]:
    """Two communicators wait on each device when rank 3 dies. To abort one waits for the device to be idle."""
    movers = [mover_of(rank, threads, channel=channel) for channel in ("one", "two")]
    for mover in movers:
        mover(shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    threads.barrier.wait()
    if rank == 3:
        threads.kill(rank)
        threads.barrier.wait()  # what it holds is let go later: else its links close while others begin
        return []
    handles = [mover.start(shard_of(rank)) for mover in movers]
    for handle in handles:
        handle.wait()
    threads.barrier.wait()
    threads.finish(rank, FINISH_SECONDS)
    return [attempt(lambda mover=mover: mover(shard_of(rank))) for mover in movers]


def test_all_communicators_of_a_device_are_aborted_together(four: Threads) -> None:
    for rank, found in enumerate(four.run(wait_on_two_channels, four)[:2]):
        for text, _ in found:
            assert "rank 3 " in text.split(";")[0], f"rank {rank}: {text}"


def test_one_after_the_other_they_would_hang(four: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does the thread that aborts them."""

    def in_this_thread(connections: nccl.NcclConnections) -> None:
        if connections._release.detach() is not None:
            connections.backend.abort()

    monkeypatch.setattr(nccl.NcclConnections, "abort", in_this_thread)
    with pytest.raises(AssertionError, match=r"hangs|did not come"):
        four.run(wait_on_two_channels, four)
    assert any(thread.name == "tricomm-monitor" for thread in threading.enumerate())


def late_by_a_timeout(rank: int, threads: Threads) -> list[str]:
    """All make the same calls without ``confirm``, rank 3 the second one so late that the others have given it up."""
    mover = mover_of(rank, threads)
    output = mover(shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    check(rank, output)
    threads.barrier.wait()
    if rank == 3:
        time.sleep(TIMEOUT_SECONDS + 0.5)
    texts = []
    for _ in range(2):
        texts.append(attempt(lambda: mover(shard_of(rank)))[0])
        threads.finish(rank, FINISH_SECONDS)
        threads.barrier.wait()
    output = mover(shard_of(rank))
    threads.finish(rank, FINISH_SECONDS)
    check(rank, output)
    return texts


def test_after_an_error_that_was_found_late_all_go_on(four: Threads) -> None:
    """Call 2 returns before it fails, so that it is call 3 that raises: on every rank, so that all count alike."""
    for rank, texts in enumerate(four.run(late_by_a_timeout, four)):
        assert any("rank 3 " in text.split(";")[0] for text in texts), f"rank {rank}: {texts}"
