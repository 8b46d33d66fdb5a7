"""Threads in the background, and the end of their process."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tricomm.transport.coordination import background
from tricomm.transport.coordination.background import in_background, wait_at_end, wait_until

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
        began = time.monotonic()
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")
        assert time.monotonic() - began < 20.0


def test_what_waits_goes_on_when_it_may_and_ends_when_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found, may = [], threading.Event()

    def work() -> None:
        wait_until(may.is_set)
        found.append("done")

    first = in_background("first", work)
    assert first is not None
    may.set()
    first.join(5.0)
    assert found == ["done"]
    may.clear()
    second = in_background("second", work)
    assert second is not None
    second.join(0.1)
    assert second.is_alive()
    monkeypatch.setattr(background, "process_ends", lambda: True)
    wait_at_end(second)
    assert not second.is_alive()
    assert found == ["done"]


def test_a_thread_does_not_wait_for_itself_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor ends its own, where it drops the last run of a group."""
    monkeypatch.setattr(background, "process_ends", lambda: True)
    wait_at_end(threading.current_thread())
