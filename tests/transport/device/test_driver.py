"""CUDA's driver, of which there is none here, by a stand-in for its library."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tricomm.transport.device import driver
from tricomm.transport.device.driver import CudaMemory
from tricomm.transport.device.memory import DeviceMemoryError

INVALID_CONTEXT, CONTEXT = 201, 0xC0


class Library:
    """Refuses whoever has no context: each thread has its own, and none to begin with."""

    def __init__(self) -> None:
        self.of_thread = threading.local()
        self.retained: list[int] = []
        self.freed: list[int] = []

    def function(self, name: str) -> Callable[..., int]:
        found: Callable[..., int] = getattr(self, name)
        return found

    def cuCtxGetCurrent(self, found: Any) -> int:  # noqa: N802
        found._obj.value = getattr(self.of_thread, "context", None)
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:  # noqa: N802
        self.of_thread.context = context.value
        return 0

    def cuDeviceGet(self, found: Any, index: int) -> int:  # noqa: N802
        found._obj.value = 10 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, found: Any, device: ctypes.c_int) -> int:  # noqa: N802
        self.retained.append(device.value)
        found._obj.value = CONTEXT
        return 0

    def cuMemFree_v2(self, address: int) -> int:  # noqa: N802
        if getattr(self.of_thread, "context", None) is None:
            return INVALID_CONTEXT
        self.freed.append(address)
        return 0

    def cuGetErrorName(self, code: int, found: Any) -> None:  # noqa: N802
        found._obj.value = b"CUDA_ERROR_INVALID_CONTEXT" if code == INVALID_CONTEXT else b"another"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    monkeypatch.setattr(driver, "_library", lambda: found)
    monkeypatch.setattr(driver, "_function", found.function)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())  # chosen already: torch asks the driver nothing
    driver._primary_context.cache_clear()
    yield found
    driver._primary_context.cache_clear()


def test_a_thread_that_never_asked_the_driver_gives_memory_back(library: Library) -> None:
    """As on an H200, where what a thread of its own was to give back was refused, and stayed registered for ever."""
    memory, errors = CudaMemory(torch.device("cuda", 1)), list[BaseException]()

    def give_back(address: int) -> None:
        try:
            memory.free(address)
        except DeviceMemoryError as error:
            errors.append(error)

    for address in (1, 2):
        thread = threading.Thread(target=give_back, args=(address,))
        thread.start()
        thread.join()
    assert not errors, errors
    assert library.freed == [1, 2]
    assert library.retained == [11], "the context of the device, once"


def test_what_the_driver_refuses_is_told_in_its_words(library: Library) -> None:
    memory = CudaMemory(torch.device("cuda", 0))
    library.of_thread.context = CONTEXT
    library.cuMemFree_v2 = lambda _: 7  # type: ignore[method-assign]
    with pytest.raises(DeviceMemoryError, match=r"cuMemFree_v2: another \(7\)"):
        memory.free(3)
    assert not library.retained, "it has a context"
