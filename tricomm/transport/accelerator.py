"""Accelerator: streams, events and NCCL of a kind of device, as far as they are used: the one way to torch.cuda.

A stand-in that has the same methods, and keeps NCCL's rules without a GPU, runs everything above it in tests.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tricomm.errors import SpecError
from tricomm.transport.device.driver import CudaMemory
from tricomm.transport.device.memory import DeviceMemory

FIRST_PAUSE_SECONDS = 20e-6
LONGEST_PAUSE_SECONDS = 1e-3
PAUSE_GROWTH = 1.5


class Event(Protocol):
    """A place in what a stream has to do."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...


def await_event(event: Event, is_given_up: Callable[[], bool]) -> None:
    """Let the host wait until the device has come past an event.

    Args:
        event: to wait for.
        is_given_up: asked meanwhile; true, or an exception, ends the wait.
    """
    pause = FIRST_PAUSE_SECONDS
    while not event.query() and not is_given_up():
        time.sleep(pause)
        pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)


class Stream(Protocol):
    """What a device does one after the other."""

    def record_event(self) -> Any:
        """An event after all that was queued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """Let what is queued from now on begin after an event; the host goes on."""
        ...


class Awaited(Protocol):
    """Something that a device waits for."""

    def is_completed(self) -> bool:
        """Whether it is done, or has failed."""
        ...

    def wait(self) -> Any:
        """RuntimeError if it has failed; it is called only once it is completed."""
        ...


class DeviceWork(Awaited, Protocol):
    """A group of sends and receives that was queued."""

    def synchronize(self) -> None:
        """Let the current stream go on after it; the host goes on."""
        ...


class DeviceBackend(Protocol):
    """ProcessGroupNCCL, as far as it is used: communicators between some ranks."""

    def eager_connect_single_device(self, device: torch.device) -> None:
        """Return when every rank has come."""
        ...

    def _start_coalescing(self) -> None: ...

    def _end_coalescing(self) -> Any: ...

    def _group_end(self) -> None: ...

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        """Send, within a group."""
        ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        """Receive, within a group."""
        ...

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        """Bring the tensor of the rank that the options name to all others."""
        ...

    def abort(self) -> None:
        """End whatever waits, on this rank; may wait for other kernels of the device to end."""
        ...

    def shutdown(self) -> None:
        """Give everything back."""
        ...


class Accelerator(Protocol):
    """See above."""

    def current_stream(self, device: torch.device) -> Stream:
        """That of this thread."""
        ...

    def new_stream(self, device: torch.device) -> Stream:
        """A stream of high priority, so that its small kernels are not held up behind those of a compute stream."""
        ...

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which the stream is the current one of this thread."""
        ...

    def on_device(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which the device is the current one of this thread."""
        ...

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Do not give the tensor's memory to anybody before the stream has done what is queued on it so far."""
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Queue work on the current stream."""
        ...

    def memory(self, device: torch.device) -> DeviceMemory:
        """What its driver does for memory that processes share."""
        ...

    def new_backend(self, store: Any, rank: int, size: int, timeout: timedelta) -> DeviceBackend:
        """An NCCL backend whose kernels run at high priority; not connected yet."""
        ...


class Cuda:
    """torch.cuda, and NCCL through torch.distributed."""

    @staticmethod
    def current_stream(device: torch.device) -> Any:
        """See Accelerator."""
        return torch.cuda.current_stream(device)

    @staticmethod
    def new_stream(device: torch.device) -> Any:
        """See Accelerator."""
        return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @staticmethod
    def on_stream(stream: Any) -> AbstractContextManager[Any]:
        """See Accelerator."""
        return torch.cuda.stream(stream)

    @staticmethod
    def on_device(device: torch.device) -> AbstractContextManager[Any]:
        """See Accelerator."""
        return torch.cuda.device(device)

    @staticmethod
    def keep(tensor: torch.Tensor, stream: Any) -> None:
        """See Accelerator."""
        tensor.record_stream(stream)

    @staticmethod
    def launch(work: Callable[[], object]) -> None:
        """See Accelerator. Kernels are queued by whoever starts them."""
        work()

    @staticmethod
    def memory(device: torch.device) -> DeviceMemory:
        """See Accelerator."""
        return CudaMemory(device)

    @staticmethod
    def new_backend(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        """See Accelerator. At normal priority a message that is ready would wait for the blocks of a matrix product
        that are queued already. A receive that is posted early keeps a few multiprocessors busy until its message
        comes; the environment's NCCL_MAX_CTAS bounds how many.
        """
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)


CUDA: Accelerator = Cuda()


def prefixed(store: Any, name: str) -> Any:
    """A part of a store."""
    return dist.PrefixStore(name, store)


def broadcast_options(root: int) -> Any:
    """What a backend is told of a broadcast from a rank."""
    options: Any = dist.BroadcastOptions()
    options.rootRank = root
    return options


def accelerator_of(device: torch.device) -> Accelerator | None:
    """The accelerator of a device; None is host memory."""
    return CUDA if device.type == "cuda" else None


def device_here(device: torch.device) -> torch.device:
    """Return a device as its tensors name it ("cuda" is the current one), if it is one where tensors move here.

    Raises:
        SpecError: it is none, or this machine does not have it.
    """
    shown = f"device={str(device)!r}"
    if device.type == "cpu":
        return torch.device("cpu")  # torch's tensors in host memory have no index
    if device.type != "cuda":
        raise SpecError(
            f'{shown} has no memory that tricomm can move; write "cpu" for host memory, or "cuda:0" for a GPU, and '
            "pass tensors that are there"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise SpecError(f'{shown}, and torch finds no CUDA device here; write "cpu", or look at the driver')
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= count:
        raise SpecError(f"{shown}, and torch finds {count} CUDA devices here; write cuda:0 to cuda:{count - 1}")
    return device
