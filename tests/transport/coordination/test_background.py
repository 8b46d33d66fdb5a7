"""Threads in the background, and the end of their process."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch.distributed as dist

from tricomm.transport.coordination import monitor
from tricomm.transport.coordination.background import BackgroundThread, end_if_asked, in_background, wait_until
from tricomm.transport.coordination.monitor import Watched

BESIDE_THE_END = """
    import time
    import torch
    from tricomm.transport.coordination.background import in_background, wait_until

    tensor, until = torch.zeros(1 << 18), time.monotonic() + {seconds}

    def work():
        while time.monotonic() < until:
            tensor.fill_(1.0)  # gives up the interpreter, and wants it back
        wait_until(lambda: False)

    thread = in_background("in torch", work)
    time.sleep(0.2)
"""


@pytest.mark.processes
def test_a_process_ends_well_beside_a_thread_that_is_inside_of_torch() -> None:
    """It would end by a signal if it did not wait."""
    script = textwrap.dedent(BESIDE_THE_END.format(seconds=0.5))
    for _ in range(5):
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")


FIRST_CALL = """
    import sys
    import torch
    import torch.distributed as dist
    from tricomm import Mesh, Resharder, Shard, ShardingSpec

    rank, port, transport, how = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=2)
    mesh = Mesh([0, 1], ("x",))
    sides = (ShardingSpec(mesh, (Shard(dim),), (4, 6), "float32") for dim in range(2))
    mover = Resharder(*sides, timeout_seconds=20, transport=transport)
    if how != "one stays away" or rank == 0:
        handle = mover.start(torch.ones(2, 6))
    if how == "one fails":
        if rank == 1:
            raise ValueError("the user's own")
        handle.wait()
"""


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["memory", "network"])
@pytest.mark.parametrize("how", ["all end", "one stays away", "one fails"])
def test_processes_end_well_in_a_first_call_in_the_background(how: str, transport: str) -> None:
    """The thread of the channel meets, or connects, when the interpreter goes; the others hear that it ended."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-c", textwrap.dedent(FIRST_CALL)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(store.port), transport, how], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    fails = how == "one fails"
    assert [rank.returncode for rank in ranks] == [int(fails)] * 2, said
    assert fails or said == ["", ""]
    assert not fails or ("TransportError: rank 1" in said[0] and "the user's own" in said[1]), said


def test_what_waits_goes_on_when_it_may_and_ends_when_it_is_asked_to() -> None:
    found, may = [], threading.Event()

    def work() -> None:
        wait_until(may.is_set)
        found.append("done")

    first = in_background("first", work)
    assert isinstance(first, BackgroundThread)
    may.set()
    first.join(5.0)
    may.clear()
    second = in_background("second", work)
    assert isinstance(second, BackgroundThread)
    second.join(0.1)
    assert second.is_alive()
    second.end()
    assert not second.is_alive()
    assert found == ["done"]
    end_if_asked()  # this thread is none in the background


def test_a_monitor_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where its own thread drops the last run of a group."""
    monkeypatch.setattr(monitor, "process_ends", lambda: True)
    watched = Watched()
    watched.thread = threading.current_thread()
    watched.end(os.getpid())
    assert watched.is_ended
