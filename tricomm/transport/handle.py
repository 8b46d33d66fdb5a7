"""Handle: what a reshard that runs in the background is waited for by."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic

import torch
from typing_extensions import TypeVar  # torch needs it; the one of typing has no default before Python 3.13

from tricomm.errors import ArgumentError, TransportError
from tricomm.transport.accelerator import await_event
from tricomm.transport.coordination.run import Run
from tricomm.transport.streams import StreamContext

Ended = tuple[Any, Any, Run | None]
"""A run that has ended on the host: its result, the event at which that is there, and what tells how the device fares.
"""

NOT_GIVEN_UP: tuple[str, int | None] = ("", None)

Moved_co = TypeVar("Moved_co", covariant=True, default=torch.Tensor | None)
"""What a move gives a rank: a shard or None, or of many tensors a dict by name."""


class SourceGate:
    """Says when the tensors that a run reads may change: once all that this rank sends of them has been sent.

    Args:
        record_event: gives the event, on a GPU, after all that the run has queued so far.
    """

    def __init__(self, record_event: Callable[[], Any]) -> None:
        self._record_event = record_event
        self._condition = threading.Condition()
        self._event: Any = None
        self._is_open = False
        self._was_told = False
        self.given_up = NOT_GIVEN_UP
        """Why the run is not wanted any more, if its ranks have yet to meet; and the rank that does not come again."""

    def open(self) -> None:
        """All has been sent, or was queued on a GPU."""
        event = self._record_event()
        with self._condition:
            self._event, self._is_open = event, True
            self._condition.notify_all()

    def end(self, event: Any = None) -> None:
        """The run has ended, well (with its event) or badly, and reads nothing any more."""
        with self._condition:
            if not self._is_open:
                self._event = event
            self._is_open = True
            self._condition.notify_all()

    def take_back(self) -> bool:
        """Close it again, as the run reads the tensors once more; false if somebody was told that they may change."""
        with self._condition:
            self._is_open, self._event = False, None
            return not self._was_told

    def wait(self) -> Any:
        """Wait until it is open, and return the event; None if there is none."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_open)
            self._was_told = True
            return self._event


class Handle(Generic[Moved_co]):
    """A reshard that was started: one of many tensors is a ``Handle[dict[str, Tensor]]``.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> import tricomm
        >>> from tricomm import Mesh, Shard, ShardingSpec
        >>> rows = ShardingSpec(Mesh([0], ("tp",)), (Shard(0),), (2, 2), "float32")
        >>> handle = tricomm.reshard_async(torch.ones(2, 2), rows, rows)
        >>> handle.wait()
        tensor([[1., 1.],
                [1., 1.]])
        >>> handle.done()
        True
        >>> dist.destroy_process_group()
    """

    def __init__(self, future: "Future[Ended]", stream_context: StreamContext, gate: SourceGate | None = None) -> None:
        self._future = future
        self._stream_context = stream_context
        self._gate = gate

    def __repr__(self) -> str:
        if not self.done():
            return "<Handle: under way>"
        return f"<Handle: {'failed' if self._future.exception() is not None else 'done'}>"

    def done(self) -> bool:
        """Whether wait() would return, or raise, at once.

        ::

            while not handle.done():
                do_something_useful()
        """
        return self._future.done()

    def check(self) -> None:
        """Raise what wait() would raise. It waits until the run has ended, but lets nothing on a GPU wait.

        ::

            handle.check()  # a TransportError, if it failed; on a GPU nothing waits for the bytes
        """
        self._result()

    def wait_done(self) -> None:
        """Return when it has ended, well or badly. On a GPU what is queued afterwards on the current stream runs after
        the move.

        ::

            handle.wait_done()
            tensor.zero_()  # it was sent
        """
        if self._future.exception() is None:
            self._stream_context.wait_event(self._future.result()[1])

    def wait_source(self) -> None:
        """Return when the tensor that was given may change: all that this rank sends of it has been sent, though others
        may still be at their parts, or the run has ended badly.

        A run that failed for an earlier call is made again by itself, but not after this has returned: then it fails.
        On a GPU what is queued afterwards on the current stream runs after the sends.

        ::

            handle = mover.start(weights)
            handle.wait_source()
            optimizer.step()  # the weights are on their way
            handle.wait()
        """
        if self._gate is None:
            self.wait_done()
            return
        event = self._gate.wait()
        if event is not None:
            self._stream_context.wait_event(event)

    def wait(self) -> Moved_co:
        """The rank's new shard, and None off the destination mesh; of many tensors a dict of those that it has.

        On a GPU the host goes on at once, and what it queues afterwards on the current stream runs after the move.

        ::

            handle = mover.start(tensor)
            shard = handle.wait()

        Raises:
            TransportError: a rank failed; nothing was returned, and a tensor given as ``out`` holds garbage. On a GPU
                this may be known later only, and is raised by the next call at the latest.
        """
        result, event = self._result()
        self._stream_context.wait_event(event)
        return result

    def join(self) -> Moved_co:
        """Return what ``wait`` does, but not before a GPU, too, has done the move: the host waits for that.

        ::

            handle.join()
            print("it is there")  # on a GPU too, for other streams and processes

        Raises:
            TransportError: a rank failed.
        """
        _, event = self._result()
        if event is not None:
            await_event(event, self._is_lost)
        return self.wait()

    def _is_lost(self) -> bool:
        """Raise if it failed."""
        self._result()
        return False

    def _result(self) -> tuple[Moved_co, Any]:
        result, event, run = self._future.result()
        if run is not None and run.failure is not None:
            run.is_told = True
            raise TransportError(run.failure)
        return result, event


def order_problem(after: Any, depends_on: Any) -> ArgumentError | None:
    """What is wrong with what a run is to begin after: no event, or no Handles; None if nothing is."""
    if not isinstance(depends_on, list | tuple) or not all(isinstance(one, Handle) for one in depends_on):
        return ArgumentError(f"depends_on={depends_on!r} must be Handles; pass what start() returned, in a tuple")
    if after is not None and not callable(getattr(after, "query", None)):
        return ArgumentError(f"after={after!r} is no event; pass what record_event() returned, or None")
    return None
