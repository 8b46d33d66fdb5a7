"""Where the rules of streams and NCCL are kept: one of two ranks, and what a rule does there."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from tricomm.transport.accelerator import Accelerator, DeviceBackend, DeviceWork
from tricomm.transport.base import Operation
from tricomm.transport.nccl import connect, post_broadcast, post_group

SECONDS = 8.0
"""For which a rule waits for what must happen."""
MEANWHILE_SECONDS = 0.3
"""For which it looks whether something happens that must not."""
NBYTES = 4096


class Laxer(Exception):  # noqa: N818 - no error
    """This device is laxer than the rule."""


class Bed(Protocol):
    """One of two ranks and its device."""

    rank: int
    accelerator: Accelerator
    device: torch.device
    name: str
    """Of the rule, or how else its stores are told apart."""

    def store(self, name: str) -> Any:
        """A store that both ranks share, of this name alone."""
        ...

    def barrier(self) -> None:
        """Return when the other rank's host is here, too."""
        ...

    def compute(self, seconds: float) -> None:
        """Queue a kernel on the current stream that takes about so long, and is loaded already."""
        ...

    def compute_anew(self) -> None:
        """Queue a kernel on the current stream that was never loaded before."""
        ...


@dataclass(slots=True)
class Communicator:
    """A communicator of both ranks."""

    bed: Bed
    backend: DeviceBackend

    def post(self, *messages: tuple[bool, torch.Tensor]) -> DeviceWork:
        """Queue a group of (whether to send, tensor) with the other rank."""
        bed = self.bed
        operations = [Operation(is_send, 1 - bed.rank, tensor) for is_send, tensor in messages]
        return post_group(bed.accelerator, self.backend, bed.device, {0: 0, 1: 1}, operations)

    def send(self, value: int) -> DeviceWork:
        """Send bytes of this value."""
        return self.post((True, filled(self.bed, value)))

    def broadcast(self, root: int, tensor: torch.Tensor) -> DeviceWork:
        """Queue a broadcast from a rank."""
        return post_broadcast(self.bed.accelerator, self.backend, self.bed.device, root, tensor)

    def wait_on_rank_1(self) -> DeviceWork | None:
        """Rank 1 queues a receive, which nobody sends yet."""
        return self.post((False, filled(self.bed, 0))) if self.bed.rank == 1 else None

    def release(self, work: DeviceWork | None) -> None:
        """Once both hosts are here, rank 0 sends what rank 1 waits for, and both go on to the end."""
        require(work is None or not work.is_completed(), "a receive ended without its message")
        self.bed.barrier()
        work = self.send(4) if work is None else work
        work.synchronize()
        finish(self.bed)

    def exchange(self) -> None:
        """Both ranks send and receive, to the end."""
        found = filled(self.bed, 0)
        self.post((True, filled(self.bed, 7)), (False, found)).synchronize()
        finish(self.bed)
        require(value_of(found) == 7, f"7 was sent, {value_of(found)} came")


@dataclass(slots=True)
class Abortion:
    """A backend that is aborted on a thread of its own."""

    communicator: Communicator
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.communicator.backend.abort, daemon=True)
        self.thread.start()

    def join(self) -> None:
        """Return when it is over."""
        self.thread.join(SECONDS)
        require(not self.thread.is_alive(), f"an abort did not come to its end in {SECONDS} s")


def require(fine: bool, text: str) -> None:
    """Raise unless the rule was kept."""
    if not fine:
        raise ValueError(text)


def filled(bed: Bed, value: int, nbytes: int = NBYTES) -> torch.Tensor:
    """Some bytes on the device."""
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=bed.device)
    bed.accelerator.launch(lambda: tensor.fill_(value))
    return tensor


def value_of(tensor: torch.Tensor) -> int:
    """The value of bytes, all alike, once the device has done with them."""
    here = tensor.cpu()
    return int(here[0]) if bool((here == here[0]).all()) else -1


def here(bed: Bed) -> Any:
    """An event on the current stream."""
    return bed.accelerator.current_stream(bed.device).record_event()


def happens(check: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether something is the case within some seconds; None is those of all rules."""
    deadline = time.monotonic() + (SECONDS if seconds is None else seconds)
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def finish(bed: Bed) -> None:
    """Wait for what the current stream has to do."""
    require(happens(here(bed).query), "the current stream does not come to its end")


def communicator_of(bed: Bed, name: str, seconds: float = 60.0, is_used: bool = True) -> Communicator:
    """A new communicator; ``is_used`` has the pair connected, too."""
    backend = connect(
        bed.accelerator, bed.store(f"{bed.name}/{name}"), bed.rank, 2, bed.device, timedelta(seconds=seconds)
    )
    communicator = Communicator(bed, backend)
    if is_used:
        communicator.exchange()
    return communicator
