"""Streams: what a GPU packs and sends runs beside its compute, ordered by events and never by the host.

A background run waits, on the device, for what the caller's stream had to do when it was started; the caller's stream
waits, on the device, for the run when ``wait`` is called. The host blocks in neither.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tricomm.transport.accelerator import Accelerator


class StreamContext(Protocol):
    """Where the background runs of a communicator happen, ordered by events against the caller's stream."""

    def record_event(self) -> Any:
        """An event after all that the caller's stream has to do so far."""
        ...

    def after(self, events: Sequence[Any], *tensors: torch.Tensor | None) -> Any:
        """A context: what is queued in it runs after all the events, and may use the tensors until it is done."""
        ...

    def record_end(self) -> Any:
        """An event after all that was queued so far; called in the context."""
        ...

    def wait_event(self, event: Any) -> None:
        """Let the caller's stream go on after the event only."""
        ...


class HostStreamContext:
    """Memory of the host: the thread that runs is order enough."""

    def record_event(self) -> None:
        """See StreamContext."""

    @contextmanager
    def after(self, events: Sequence[None], *tensors: torch.Tensor | None) -> Iterator[None]:
        """See StreamContext."""
        yield

    def record_end(self) -> None:
        """See StreamContext."""

    def wait_event(self, event: None) -> None:
        """See StreamContext."""


class DeviceStreamContext:
    """A stream of high priority beside the compute stream.

    Args:
        accelerator: of the device.
        device: with its index.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator = accelerator
        self.device = device
        self.stream = accelerator.new_stream(device)

    def record_event(self) -> Any:
        """See StreamContext."""
        return self.accelerator.current_stream(self.device).record_event()

    @contextmanager
    def after(self, events: Sequence[Any], *tensors: torch.Tensor | None) -> Iterator[None]:
        """See StreamContext."""
        with self.accelerator.on_stream(self.stream):
            for event in events:
                self.stream.wait_event(event)
            for tensor in tensors:
                if tensor is not None:
                    # It was allocated for another stream, where its memory must not be used again before this one ends.
                    self.accelerator.keep(tensor, self.stream)
            yield

    def record_end(self) -> Any:
        """See StreamContext."""
        return self.stream.record_event()

    def wait_event(self, event: Any) -> None:
        """See StreamContext."""
        self.accelerator.current_stream(self.device).wait_event(event)


def stream_context_of(accelerator: Accelerator | None, device: torch.device) -> StreamContext:
    """The stream context of a new communicator."""
    return HostStreamContext() if accelerator is None else DeviceStreamContext(accelerator, device)
