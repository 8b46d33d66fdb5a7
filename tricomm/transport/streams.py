"""Side streams: what a GPU packs and sends runs beside its compute, ordered by events and never by the host.

A background run waits, on the device, for what the caller's stream had to do when it was started; the caller's stream
waits, on the device, for the run when ``wait`` is called. The host blocks in neither.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Side(Protocol):
    """Where the background runs of a lane happen. A *mark* is a point in the order of a stream."""

    def mark(self) -> Any:
        """What the caller's stream has to do so far."""
        ...

    def after(self, marks: Sequence[Any], *tensors: torch.Tensor | None) -> Any:
        """A context: what is queued in it runs after all the marks, and may use the tensors until it is done."""
        ...

    def reached(self) -> Any:
        """What the side has to do so far; called in the context."""
        ...

    def join(self, mark: Any) -> None:
        """The caller's stream goes on after the mark."""
        ...


class HostSide:
    """Memory of the host: the thread that runs is order enough."""

    def mark(self) -> None:
        """See Side."""

    @contextmanager
    def after(self, marks: Sequence[None], *tensors: torch.Tensor | None) -> Iterator[None]:
        """See Side."""
        yield

    def reached(self) -> None:
        """See Side."""

    def join(self, mark: None) -> None:
        """See Side."""


class CudaSide:
    """A stream of high priority, so that its small kernels are not held up behind those of the compute stream.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        """See Side."""
        return torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def after(self, marks: Sequence[torch.cuda.Event], *tensors: torch.Tensor | None) -> Iterator[None]:
        """See Side."""
        with torch.cuda.stream(self.stream):
            for mark in marks:
                self.stream.wait_event(mark)
            for tensor in tensors:
                if tensor is not None:
                    # It was allocated for another stream, where its memory must not be used again before this one ends.
                    tensor.record_stream(self.stream)
            yield

    def reached(self) -> Any:
        """See Side."""
        return self.stream.record_event()

    def join(self, mark: torch.cuda.Event) -> None:
        """See Side."""
        torch.cuda.current_stream(self.device).wait_event(mark)


def side_of(device: torch.device) -> Side:
    """The side of a new lane."""
    return CudaSide(device) if device.type == "cuda" else HostSide()
