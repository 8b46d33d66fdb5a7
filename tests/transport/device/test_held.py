"""What is given back, though a driver refuses some of it."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.standin.device import Limits, World
from tests.standin.memory import Exports, StandInMemory
from tricomm.transport.device.flags import Flags
from tricomm.transport.device.held import Held
from tricomm.transport.device.memory import DeviceMemoryError
from tricomm.transport.device.shares import Shares
from tricomm.transport.memory.arena import SharedSlab, new_slab

REFUSED = DeviceMemoryError("CUDA_ERROR_INVALID_CONTEXT (201)")


@pytest.fixture
def memory() -> StandInMemory:
    return StandInMemory(World(1, Limits()).devices[0], 0, Exports())


def page() -> SharedSlab:
    slab, file = new_slab(1, 16)
    os.close(file)
    return slab


def refuse(*_: object) -> None:
    raise REFUSED


def test_what_is_refused_holds_up_nothing_else(memory: StandInMemory, caplog: pytest.LogCaptureFixture) -> None:
    links = [
        SimpleNamespace(
            unmap=refuse if peer == 1 else lambda: None,
            signals=SimpleNamespace(close=lambda: None),
            is_unmapped=lambda: True,
            flags=Flags(memory, page(), peer > 0),
        )
        for peer in (1, 2)
    ]
    runs: Any = SimpleNamespace(are_over=True)
    given: Any = tuple(links)
    held = Held(memory, torch.device("cpu"), runs, given, [memory.allocate(8)], Shares(memory, {}))
    held.give_back(lambda: True)
    assert not memory.registered
    assert not memory.exports.memory
    assert "CUDA_ERROR_INVALID_CONTEXT" in caplog.text


def test_a_page_that_the_driver_keeps_stays_mapped(memory: StandInMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the system maps the next page in its place, which the driver refuses to register: seen on an H200."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "unregister", refuse)
        for _ in range(20):
            flags = Flags(memory, page(), True)
            with pytest.raises(DeviceMemoryError):
                flags.close()
            del flags
    for _ in range(20):
        Flags(memory, page(), True)  # forgotten, and never closed
    flags = Flags(memory, page(), True)
    flags.close()
    assert len(memory.registered) == 40
