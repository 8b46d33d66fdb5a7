"""The monitor's thread at the end of its process."""

import subprocess
import sys

import pytest

SLOW_STORE = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from tricomm.transport.coordination.monitor import Monitor
from tricomm.transport.coordination.run import Place, Run
from tricomm.transport.coordination.status import StatusStore

store = dist.TCPStore("127.0.0.1", 0, 1, True)

class Slow(StatusStore):
    def post_heartbeat(self, heartbeat):
        print("inside", flush=True)
        store.wait(["nobody sets it"], timedelta(seconds=0.5))

monitor = Monitor(Slow(store, 0))
monitor.watch(Run(1, 1, "a call", Place.of("somewhere", 1.0)))
time.sleep(0.3)
if sys.argv[1] == "forks" and os.fork() == 0:
    sys.exit(0)  # the child has no such thread to wait for
if sys.argv[1] == "forks":
    os.wait()
sys.exit(7)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["ends", "forks"])
def test_a_process_ends_by_itself_while_its_monitor_is_inside_of_the_store(how: str) -> None:
    command = [sys.executable, "-c", SLOW_STORE, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("inside"), "the monitor must be in there when the process ends"
    assert done.returncode == 7, done.stderr
