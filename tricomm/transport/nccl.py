"""What torch's NCCL backend is asked for: a communicator among some ranks, and groups of sends and receives."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tricomm.transport.base import ConnectionLostError, Operation

DEPTH = (0, 2)


class NcclConnections:
    """See Connections. Messages have no tags: they match in the order in which they are posted, and what tells calls
    apart is what ``Communicator.confirm`` compares.

    Args:
        store: of these connections alone.
        rank: this rank.
        index: of each rank among those that connect.
        device: where the buffers are.
        timeout_seconds: for connecting.

    Raises:
        RuntimeError: torch's.
    """

    depth = DEPTH
    has_tags = False

    def __init__(
        self, store: Any, rank: int, index: Mapping[int, int], device: torch.device, timeout_seconds: float
    ) -> None:
        self._index = index
        self._device = device
        self.backend = connect(store, index[rank], len(index), device, timedelta(seconds=timeout_seconds))
        weakref.finalize(self, self.backend.shutdown).atexit = False

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections; the plan keeps a round under 256 operations."""
        group = list(operations)
        if not group:
            return []
        try:
            work = post_group(self.backend, self._device, self._index, group)
        except RuntimeError as error:
            raise ConnectionLostError(None, error) from error
        return [(operation.peer, work) for operation in group]

    @staticmethod
    def wait(work: Any, limit: timedelta) -> None:
        """See Connections. It orders the stream; the host goes on."""
        work.wait()

    def connected(self) -> None:
        """See Connections."""

    def abort(self) -> None:
        """See Connections."""
        self.backend.abort()


def connect(store: Any, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    """A backend whose communicator stands; returns when every rank has come.

    Its stream has high priority, as that of the packing has: at normal priority a message that is ready would wait for
    the blocks of a matrix product that are queued already. A receive that is posted early keeps a few multiprocessors
    busy until its message comes; the environment's NCCL_MAX_CTAS bounds how many.

    Args:
        store: of these ranks alone.
        rank, size: among these ranks.
        device: this rank's, with its index.
        timeout: for connecting.

    Raises:
        RuntimeError: torch's; a rank did not come, or NCCL could not connect.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(store, rank, size, options)
    # A first collective would do it too, but does not say when the others are there, and its buffers would stay.
    backend.eager_connect_single_device(device)
    return backend


def post_group(backend: Any, device: torch.device, index: Mapping[int, int], operations: Sequence[Operation]) -> Any:
    """Queue sends and receives as one group on the current stream; torch's work for all of them.

    Args:
        backend: of ``connect``.
        device: where the buffers are.
        index: of each rank in the backend.
        operations: at least one, 256 at most.

    Raises:
        RuntimeError: torch's; the group is closed, what of it was queued may run, and the backend is of no more use.
    """
    with torch.cuda.device(device):
        backend._start_coalescing()
        try:
            for is_send, peer, buffer in operations:
                (backend.send if is_send else backend.recv)([buffer], index[peer], 0)
        except BaseException:
            # NCCL counts open groups in each thread: with one left open, nothing that is called later would start.
            with suppress(RuntimeError):
                backend._end_coalescing()
            raise
        return backend._end_coalescing()
