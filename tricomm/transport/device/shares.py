"""Shares: tensors that stay where they are, in segments that each peer opens once, whatever lies in them.

The sender of a pair tells where its tensors are, in a file over the local socket; the receiver opens the segments, and
says whether it could. Whose tensors are shared keeps their memory until every reader has closed it, or is gone.
"""

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomm.kernels.device import span_nbytes
from tricomm.transport.base import Asked, ConnectionLostError, Place, Shared
from tricomm.transport.coordination.background import in_background, wait_until
from tricomm.transport.device.alive import when_idle
from tricomm.transport.device.link import DeviceLink
from tricomm.transport.device.memory import DeviceMemory, DeviceMemoryError, Segment
from tricomm.transport.memory.arena import new_file
from tricomm.transport.memory.protocol import Closed, Opened, Sources
from tricomm.transport.memory.signals import LinkClosedError

HANDLE_INTS = 8
SEGMENT_INTS = HANDLE_INTS + 2

Key = bytes
"""What a segment is known by: its handle, and the number of the allocation, as addresses recur."""


class Kept(NamedTuple):
    """What belongs to one Shared.

    Attributes:
        storages: of this rank's tensors.
        readers: the ranks that read them.
        opened: (rank, key) of segments of others.
        numbers: by rank whose tensors are read, its number for that.
    """

    storages: tuple[torch.UntypedStorage, ...]
    readers: tuple[int, ...]
    opened: list[tuple[int, Key]]
    numbers: dict[int, int]


class Shares:
    """Those of some connections.

    Args:
        memory: of this rank's device.
        links: by rank.
    """

    def __init__(self, memory: DeviceMemory, links: Mapping[int, DeviceLink]) -> None:
        self._memory, self._links = memory, links
        self._count = 0
        self._kept: dict[int, Kept] = {}
        self._opened: dict[tuple[int, Key], list[int]] = {}
        """Address and count of users of each segment."""
        self._lock = threading.Lock()

    def share(self, asked: Asked, tag: int, are_idle: Callable[[], bool], interrupted: Callable[[], None]) -> Shared:
        """See Connections.

        Args:
            asked: of this rank.
            tag: of the Resharder.
            are_idle: whether the device has nothing to do, of any connections.
            interrupted: raises if the waiting is to end.

        Raises:
            ConnectionLostError: a rank is gone, or is in the call of another tag.
        """
        self._count += 1
        number, peer, used = self._count, -1, list[tuple[int, Key]]()
        storages = tuple(tensor.untyped_storage() for tensor in asked.tensors) if asked.to else ()
        kept = self._kept[number] = Kept(storages, tuple(asked.to), used, {})
        received, refused = {}, {}
        try:
            self._tell(asked, number, tag)
            for peer, why in asked.of.items():
                message, table = self._links[peer].receive(Sources, interrupted)
                if message.tag != tag:
                    raise ConnectionLostError(None, LinkClosedError(f"rank {peer} is in a call of another Resharder"))
                kept.numbers[peer], problem = message.number, message.problem or why
                if not problem:
                    try:
                        received[peer] = self._places(peer, table, used)
                    except DeviceMemoryError as error:
                        problem = f"the tensors cannot be opened: {error}"
                if problem:
                    refused[peer] = problem
                self._links[peer].tell(Opened(message.number, problem))
            sent = {peer: self._links[peer].receive(Opened, interrupted)[0].problem for peer in asked.to}
        except LinkClosedError as error:
            raise ConnectionLostError(peer, error) from error
        shared = Shared(sent, received, refused, self._memory.tensor)
        weakref.finalize(shared, self._give_back_later, number, are_idle, os.getpid()).atexit = False
        return shared

    # ---- telling

    def _tell(self, asked: Asked, number: int, tag: int) -> None:
        """Say where this rank's tensors are, or why nobody can read them."""
        table, lacking = b"", ""
        if not all(asked.to.values()):
            try:
                table = self._table(asked.tensors).tobytes()
            except DeviceMemoryError as error:
                lacking = f"the tensors cannot be exported: {error}"
        for peer, why in asked.to.items():
            problem = why or lacking
            file = None if problem else _written(table)
            try:
                self._links[peer].tell(Sources(number, tag, problem), file)
            except LinkClosedError as error:
                raise ConnectionLostError(peer, error) from error

    def _table(self, tensors: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where tensors are: (segments, tensors, dims), each segment, and of each tensor its segment, the byte of that,
        and its strides.
        """
        segments: list[Segment] = []
        dims = max((tensor.dim() for tensor in tensors), default=0)
        rows = np.zeros((len(tensors), 2 + dims), np.int64)
        at = -1
        for row, tensor in zip(rows, tensors, strict=True):
            row[2 : 2 + tensor.dim()] = tensor.stride()
            if not tensor.numel():
                row[0] = -1
                continue
            address, nbytes = tensor.data_ptr(), span_nbytes(tensor)
            if at < 0 or not segments[at].has(address, 1):
                at = next((at for at, one in enumerate(segments) if one.has(address, 1)), -1)
            if at < 0:
                at = len(segments)
                segments.append(self._memory.segment(address))
            if not segments[at].has(address, nbytes):
                raise DeviceMemoryError("a tensor reaches out of its segment")
            row[:2] = at, address - segments[at].address
        ints = [np.frombuffer(one.handle, np.int64) for one in segments]
        heads = [np.array([one.number, one.nbytes], np.int64) for one in segments]
        parts = [part for pair in zip(ints, heads, strict=True) for part in pair]
        return np.concatenate([np.array([len(segments), len(tensors), dims], np.int64), *parts, rows.reshape(-1)])

    # ---- opening

    def _places(self, peer: int, table: bytes, used: list[tuple[int, Key]]) -> list[Place]:
        """Where the tensors of a peer are here; its segments are opened, and added to ``used``."""
        ints = np.frombuffer(table, np.int64)
        count, tensors, dims = ints[:3].tolist()
        segments, rows = ints[3 : 3 + SEGMENT_INTS * count].reshape(count, -1), ints[3 + SEGMENT_INTS * count :]
        bases = []
        for segment in segments:
            key = peer, segment.tobytes()
            with self._lock:
                if key not in self._opened:
                    self._opened[key] = [self._memory.opened(segment[:HANDLE_INTS].tobytes()), 0]
                if key not in used:
                    self._opened[key][1] += 1
                    used.append(key)
                bases.append(self._opened[key][0])
        return [
            Place(bases[at] + offset if at >= 0 else 0, tuple(strides))
            for at, offset, *strides in rows.reshape(tensors, 2 + dims).tolist()
        ]

    # ---- the end

    def _give_back_later(self, number: int, are_idle: Callable[[], bool], owner: int) -> None:
        if os.getpid() == owner:
            in_background("tricomm-close", partial(self._give_back, number, are_idle))

    def _give_back(self, number: int, are_idle: Callable[[], bool]) -> None:
        """Close what only this one read, say so, and keep the own tensors until others have closed them."""
        kept = self._kept.get(number)
        if kept is None:
            return  # all was given back
        when_idle(are_idle, partial(self._drop, kept.opened))
        for peer, theirs in kept.numbers.items():
            with suppress(LinkClosedError):
                self._links[peer].tell(Closed(theirs))
        wait_until(lambda: all(self._is_closed(peer, number) for peer in kept.readers))
        self._kept.pop(number, None)

    def _drop(self, keys: Sequence[tuple[int, Key]]) -> None:
        with self._lock:
            for key in keys:
                if key in self._opened:
                    self._opened[key][1] -= 1
                    if not self._opened[key][1]:
                        self._memory.close(self._opened.pop(key)[0])

    def _is_closed(self, peer: int, number: int) -> bool:
        link = self._links[peer]
        link.look(0)
        return link.has_closed(number) or link.is_unmapped()

    def unmap(self) -> None:
        """Close all that is open."""
        with self._lock:
            while self._opened:
                self._memory.close(self._opened.popitem()[1][0])

    def forget(self) -> None:
        """Let all tensors go: nobody has them open."""
        self._kept.clear()


def _written(table: bytes) -> int:
    """A file without a name that has a table."""
    file = new_file()
    with os.fdopen(os.dup(file), "wb") as stream:
        stream.write(table)
    return file
