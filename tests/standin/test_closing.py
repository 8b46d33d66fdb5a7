"""To give a communicator back holds up nothing, though it waits for all that the device has to do."""

import gc
import threading
import time

import torch

from tests.standin.device import Limits
from tests.standin.ranks import PATIENT_SECONDS, Threads
from tests.standin.test_promise import SIZE, lose_one
from tricomm import Mesh, Replicate, Resharder, ShardingSpec

SOURCE, TARGET = (ShardingSpec(Mesh([rank], ("x",)), (Replicate(),), (64,), "float32") for rank in range(2))


TIMEOUT_SECONDS = 3.0
HEARTBEAT_SECONDS = TIMEOUT_SECONDS / 10


def moved(rank: int, threads: Threads, mover: Resharder) -> torch.Tensor | None:
    """A call, to its end on the device."""
    out = mover(torch.ones(64) if rank == 0 else None)
    threads.finish(rank)
    return out


def close_beside_a_receive(rank: int, threads: Threads) -> bool:
    """While rank 1 waits for a message, it closes another Resharder, and goes on: only then the message is sent."""
    options = {"timeout_seconds": TIMEOUT_SECONDS, **threads.options(rank)}
    waiting, other = (Resharder(SOURCE, TARGET, channel=name, **options) for name in ("waiting", "other"))
    moved(rank, threads, waiting)
    moved(rank, threads, other)
    threads.barrier.wait()
    handle = waiting.start(None) if rank == 1 else None
    while handle is not None and not handle.done():
        time.sleep(0.001)
    other.close()
    del other
    time.sleep(2 * HEARTBEAT_SECONDS)  # the monitor lets go of its calls
    gc.collect()
    threads.standins[rank].device.current.record_event()  # the host goes on
    threads.barrier.wait()
    out = handle.join() if handle is not None else waiting.start(torch.ones(64)).join()
    return out is None or bool((out == 1).all())


def test_closing_holds_up_neither_the_host_nor_what_is_under_way() -> None:
    with Threads(2, Limits(error_seconds=None, loads=True)) as threads:
        assert threads.run(close_beside_a_receive, threads) == [True, True]


def giving_back() -> set[threading.Thread]:
    names = ("tricomm-give-back", "tricomm-let-go", "tricomm-close")
    return {one for one in threading.enumerate() if one.name in names}


def test_a_stand_in_that_is_closed_leaves_nothing_that_waits_for_its_devices() -> None:
    """Or every later test of the process would be slower: whoever gives back waits for all devices, again and again."""
    before = giving_back()  # of connections in one process whose peers do not close, in tests of those
    for transport, is_staying in (("network", False), ("memory", False), ("memory", True)):
        with Threads(SIZE, Limits(loads=True), transport=transport, stays_in_place=is_staying) as threads:
            threads.run(lose_one, threads, 3, "dies", False)
    deadline = time.monotonic() + PATIENT_SECONDS
    while giving_back() - before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not giving_back() - before
