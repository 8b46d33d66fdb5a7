"""What goes wrong on one rank reaches the others at once, and the next call of all works."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.oracle import require_equal
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.resharder import Resharder as ResharderClass
from tricomm.transport.gloo import PatientStore

TIMEOUT_SECONDS = 6.0
SHAPE = (6, 4)
FULL = torch.arange(24.0).reshape(SHAPE)
PAIR = Mesh([0, 1], ("x",))
ROWS, COLUMNS = ShardingSpec(PAIR, (Shard(0),), SHAPE, "float32"), ShardingSpec(PAIR, (Shard(1),))
SOURCE = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), SHAPE, "float32")
TARGET = ShardingSpec(Mesh([1, 2], ("x",)), (Replicate(),))


def attempt(call: Any) -> tuple[str, float]:
    """("right" or the error, seconds) of a call on the pair."""
    began = time.monotonic()
    try:
        output = call()
        text = "right" if output is None or torch.equal(output, FULL.chunk(2, 1)[dist.get_rank()]) else "WRONG"
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    return text, time.monotonic() - began


class Exhausted:
    """A method that has no memory left, once."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.before = owner, name, getattr(owner, name)

    def __enter__(self) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise MemoryError("none left")

        setattr(self.owner, self.name, fail)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.before)


def failing_once(rank: int, where: str, api: str) -> list[tuple[str, float]]:
    """Rank 1 has no memory in one call, at some place; then all call twice."""
    if rank not in PAIR:
        return []
    mine, name = FULL.chunk(2, 0)[rank], f"{where} {api}"
    kept: list[Resharder] = []

    def call() -> torch.Tensor | None:
        if api == "reshard":
            return tricomm.reshard(mine, ROWS, COLUMNS, name=name, timeout_seconds=TIMEOUT_SECONDS)
        if api == "made anew" or not kept:
            kept[:] = [Resharder(ROWS, COLUMNS, name=name, timeout_seconds=TIMEOUT_SECONDS)]
        return kept[0](mine)

    if where == "arguments":
        assert attempt(call)[0] == "right"
        owner, method = tricomm.packing.tensor_checker.TensorChecker, "check"
    else:
        owner, method = ResharderClass, "_plan"
    results = []
    if rank == 1:
        with Exhausted(owner, method):
            results.append(attempt(call))
    else:
        results.append(attempt(call))
    return [*results, attempt(call), attempt(call)]


@pytest.mark.parametrize("api", ["reshard", "kept", "made anew"])
@pytest.mark.parametrize("where", ["arguments", "constructor"])
def test_an_exception_before_anything_is_sent_reaches_the_others(ranks: Ranks, where: str, api: str) -> None:
    ours, theirs = ranks.run(failing_once, where, api)[:2]
    assert theirs[0][0] == "MemoryError: none left"
    assert "rank 1 failed in " in ours[0][0], ours
    assert "MemoryError: none left" in ours[0][0]
    assert f"{where} {api}" in ours[0][0], "name= stands in every error"
    assert ours[0][1] < TIMEOUT_SECONDS / 2, "at once"
    assert [text for text, _ in ours[1:] + theirs[1:]] == ["right"] * 4


def failing_block(rank: int) -> tuple[str, float]:
    if rank not in PAIR:
        return "", 0.0
    mine = FULL.chunk(2, 0)[rank]
    try:
        with Resharder(ROWS, COLUMNS, name="block", timeout_seconds=TIMEOUT_SECONDS) as mover:
            mover(mine)
            if rank == 1:
                raise ValueError("a bug in user code")
            return attempt(lambda: mover(mine))
    except ValueError as error:
        return str(error), 0.0


def test_an_exception_in_the_block_of_a_resharder_reaches_the_others(ranks: Ranks) -> None:
    text, seconds = ranks.run(failing_block)[0]
    assert "rank 1 failed in the block of Resharder 'block'" in text
    assert "ValueError: a bug in user code" in text
    assert seconds < TIMEOUT_SECONDS / 2


def left_block(rank: int) -> tuple[str, float]:
    """Rank 1 leaves the block between two calls; rank 0, which only sends, hears of it before its next one."""
    if rank not in PAIR:
        return "", 0.0
    here, there = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (4, 4), "float32") for one in PAIR.ranks)
    try:
        with Resharder(here, there, name="left", timeout_seconds=TIMEOUT_SECONDS) as mover:
            mover(torch.ones(4, 4) if rank == 0 else None)
            if rank == 1:
                raise ValueError("a bug in user code")
            time.sleep(0.5)
            attempt(lambda: mover(torch.ones(4, 4)))  # may be on its way before the word of the other comes
            return attempt(lambda: mover(torch.ones(4, 4)))
    except ValueError as error:
        return str(error), 0.0


def test_nobody_waits_for_a_rank_that_left_the_block(ranks: Ranks) -> None:
    text, seconds = ranks.run(left_block)[0]
    assert "rank 1 failed in the block of Resharder 'left'" in text
    assert seconds < TIMEOUT_SECONDS / 2


def half_of_a_call(rank: int, transport: Any) -> list[str]:
    """Rank 2 fails in a call that is over for rank 1: for rank 1 the next call is made again, and is right.

    By memory it is over for rank 0 too, which sends a few bytes.
    """
    if rank > 2:
        return []
    mover = Resharder(SOURCE, TARGET, name="half", timeout_seconds=TIMEOUT_SECONDS, transport=transport)
    results = []
    for step in range(5):
        tensor = FULL + step if rank == 0 else None
        try:
            if rank == 2 and step == 2:
                time.sleep(0.3)
                mover(torch.zeros(1))
            output = mover(tensor)
            right = output is None or torch.equal(output, FULL + step)
            results.append("right" if right else "WRONG")
        except (TransportError, SpecError):
            results.append("refused")
    return results


def test_ranks_for_which_the_failed_call_was_over_go_on_with_the_others(ranks: Ranks) -> None:
    for transport in ("network", "memory"):
        results = ranks.run(half_of_a_call, transport)
        assert results[2] == ["right", "right", "refused", "right", "right"]
        if transport == "network":
            assert results[0] == results[2]
        for others in results[:2]:
            assert others in (["right"] * 5, results[2]), "their part of the third call may have been done"


def two_threads(rank: int) -> list[str]:
    """Two threads call on one channel: each call works or is refused, and soon."""
    if rank not in PAIR:
        return []
    mine, found = FULL.chunk(2, 0)[rank], []
    gate = threading.Barrier(2)

    def work() -> None:
        gate.wait()
        for _ in range(10):
            found.append(attempt(lambda: tricomm.reshard(mine, ROWS, COLUMNS, channel="threads", timeout_seconds=2.0)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seconds for _, seconds in found) < 3.0
    return [text for text, _ in found]


def test_two_threads_on_one_channel_are_refused_or_right(ranks: Ranks) -> None:
    texts = [text for found in ranks.run(two_threads)[:2] for text in found]
    assert len(texts) == 40
    assert any("two threads of rank" in text and "channel=" in text for text in texts)
    assert all(text == "right" or text.startswith(("SpecError", "TransportError")) for text in texts), texts


def channels_in_another_order(rank: int) -> None:
    """First calls, started in another order on two ranks."""
    if rank not in PAIR:
        return
    mine = FULL.chunk(2, 0)[rank]
    movers = [Resharder(ROWS, COLUMNS, channel=f"order {k}", timeout_seconds=TIMEOUT_SECONDS) for k in range(3)]
    order = movers if rank == 0 else movers[::-1]
    for handle in [mover.start(mine) for mover in order]:
        require_equal(handle.wait(), FULL.chunk(2, 1)[rank], f"rank {rank}")


def test_channels_may_be_started_first_in_any_order(ranks: Ranks) -> None:
    ranks.run(channels_in_another_order)


def written_in_place(rank: int) -> tuple[int, int]:
    if rank not in PAIR:
        return 0, 1
    mover = Resharder(ROWS, COLUMNS, name="in place", timeout_seconds=TIMEOUT_SECONDS)
    out = torch.zeros(6, 2)
    before = out._version
    mover(FULL.chunk(2, 0)[rank], out=out)
    return before, out._version


def test_out_has_a_new_version(ranks: Ranks) -> None:
    """So that autograd sees that what it saved was overwritten."""
    assert all(after > before for before, after in ranks.run(written_in_place))


def interrupted_in_a_warm_wait(rank: int) -> list[str]:
    if rank not in PAIR:
        return []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mine = FULL.chunk(2, 0)[rank]
    # The wait for a socket does not end with the signal.
    mover = Resharder(ROWS, COLUMNS, name="interrupt", timeout_seconds=3.0, transport="network")
    results = [attempt(lambda: mover(mine))[0]]
    if rank == 0:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        results.append(attempt(lambda: mover(mine))[0])
    else:
        time.sleep(4.0)
        results.append(attempt(lambda: mover(mine))[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return [*results, attempt(lambda: mover(mine))[0]]


def test_after_an_interrupt_in_a_warm_wait_the_next_call_works(ranks: Ranks) -> None:
    ours, theirs = ranks.run(interrupted_in_a_warm_wait)[:2]
    assert ours[1].startswith(("KeyboardInterrupt", "TransportError")), ours
    assert theirs[1].startswith("TransportError"), theirs
    assert [ours[0], ours[2], theirs[0], theirs[2]] == ["right"] * 4, (ours, theirs)


def almost_late(rank: int) -> tuple[str, float]:
    """The peer comes at nine tenths of the timeout."""
    if rank not in PAIR:
        return "right", 0.0
    mine = FULL.chunk(2, 0)[rank]
    mover = Resharder(ROWS, COLUMNS, name="late", timeout_seconds=5.0)
    mover(mine)
    if rank == 1:
        time.sleep(4.4)
    return attempt(lambda: mover(mine))


def test_a_wait_lasts_until_the_timeout(ranks: Ranks) -> None:
    """Not until three and a half heartbeats before it."""
    assert [text for text, _ in ranks.run(almost_late)] == ["right"] * 8


def killed(rank: int, when: str) -> list[tuple[str, float]]:
    """Rank 2 is killed while it connects, or in a warm call; the others call twice.

    Over the network, where who sends hears of it in the same call: by memory few bytes are given away at once.
    """
    options: Any = {"name": "doomed", "timeout_seconds": TIMEOUT_SECONDS, "transport": "network"}
    mover = Resharder(SOURCE, TARGET, **options)
    tensor = FULL if rank == 0 else None
    if when == "warm":
        mover(tensor)
    if rank == 2:
        if when == "warm":
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "shaking hands":
            wait = PatientStore.wait
            PatientStore.wait = lambda *given: (wait(*given), os.kill(os.getpid(), signal.SIGKILL))
        else:
            tricomm.transport.channel.GlooConnections = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def again_and_again() -> None:
        for _ in range(3):
            mover(tensor)

    def once() -> None:
        tricomm.reshard(tensor, SOURCE, TARGET, **options)

    results = []
    for call in (again_and_again, once):
        began = time.monotonic()
        try:
            call()
            text = "returned"
        except TransportError as error:
            text = str(error)
        results.append((text, time.monotonic() - began))
    return results


@pytest.mark.processes
@pytest.mark.parametrize("when", ["connecting", "shaking hands", "warm"])
def test_a_rank_that_was_killed_is_named_and_not_waited_for_again(when: str) -> None:
    with Ranks(3, timeout_seconds=40) as doomed:
        doomed.start(killed, when)
        for (first, seconds), (second, again) in doomed.collect([0, 1]):
            assert first.split(";")[0].startswith("rank 2 "), first
            assert seconds <= TIMEOUT_SECONDS
            assert "rank 2" in second, second
            assert again <= TIMEOUT_SECONDS
            if when == "warm":
                assert again < TIMEOUT_SECONDS / 2, f"{second}: its death is known"
            assert "doomed" in first, "name= stands in every error"
            assert "gloo" not in first.lower(), "gloo's words go to the log"


SCRIPT = """
import gc, os, sys, torch, torch.distributed as dist
from tricomm import Mesh, Replicate, Resharder, ShardingSpec, TransportError
rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
mover = Resharder(ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (8,), "float32"),
                  ShardingSpec(Mesh([1], ("x",)), (Replicate(),)), timeout_seconds=60)
mover(torch.ones(8) if rank == 0 else None)
mover.start(torch.ones(8) if rank == 0 else None).wait()
if rank == 0:
    if how == "fork while pending":
        dist.barrier()
        mover(torch.full((8,), 2.0))
    sys.stdin.read()
    os._exit(0)
if how != "fork":
    pending = mover.start(None)
if how != "pending":
    child = os.fork()
    if child == 0:
        if how == "fork while pending":
            del mover
            gc.collect()
        else:
            try:
                mover(None)
            except TransportError as error:
                assert "is a fork of process" in str(error), error
            else:
                sys.exit("a child took what its parent is sent")
        sys.exit(7)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    if how == "fork while pending":
        dist.barrier()
        print(pending.wait().sum().item(), flush=True)
    os._exit(0)
raise ValueError("a bug in user code")
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["pending", "fork", "fork while pending"])
def test_a_process_ends_with_a_run_pending_and_after_a_fork(how: str) -> None:
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    first = subprocess.Popen([*command, "0", str(port), how], stdin=subprocess.PIPE)
    try:
        second = subprocess.run(
            [*command, "1", str(port), how], capture_output=True, text=True, timeout=50, check=False
        )
    finally:
        first.kill()
        first.communicate()
    if how != "pending":
        said = {"fork": ["child 7"], "fork while pending": ["child 7", "16.0"]}[how]
        assert second.stdout.splitlines() == said, second
    else:
        assert second.returncode == 1
        assert "a bug in user code" in second.stderr


ENDS = """
import os, sys, torch, torch.distributed as dist
from tricomm import Mesh, Replicate, Resharder, ShardingSpec, TransportError
rank, port = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
mover = Resharder(ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (8,), "float32"),
                  ShardingSpec(Mesh([1], ("x",)), (Replicate(),)), timeout_seconds=30, transport="network")
for step in range(2 - rank):
    try:
        mover(torch.ones(8) if rank == 0 else None)
    except TransportError as error:
        print(error, flush=True)
        os._exit(0)
"""


@pytest.mark.processes
def test_a_rank_whose_process_ends_by_itself_left_and_did_not_die() -> None:
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    command = [sys.executable, "-c", textwrap.dedent(ENDS)]
    other = subprocess.Popen([*command, "1", str(port)])
    try:
        first = subprocess.run([*command, "0", str(port)], capture_output=True, text=True, timeout=50, check=False)
    finally:
        other.kill()
        other.communicate()
    assert first.stdout.startswith("rank 1 left: its process ended while rank 0 was in call 2 of"), first
