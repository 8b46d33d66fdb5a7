"""Ranks that take one rung of the ladder, whatever this machine would allow; and what goes over sockets meanwhile."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tricomm.packing import runs
from tricomm.transport.communicator import CONNECTING_TAG
from tricomm.transport.gloo import GlooConnections
from tricomm.transport.memory import meeting
from tricomm.transport.memory.reading import UnreadableError

RUNGS = ("process_vm_readv", "arena", "two hosts", "pieces", "pieces in an arena")


def refuse(*_: object) -> None:
    """What a process without permission gets."""
    raise UnreadableError(errno.EPERM, "not here")


@contextmanager
def forced(rung: str, rank: int, piece_nbytes: int = 64) -> Iterator[None]:
    """While ranks connect: no memory can be read, or odd ranks are on another host; or while they call: few bytes go in
    pieces already.
    """
    with pytest.MonkeyPatch.context() as patch:
        if rung.startswith("pieces"):
            patch.setattr(runs, "PIECE_NBYTES", piece_nbytes)
        if rung.endswith("arena"):
            patch.setattr(meeting, "read_run", refuse)
        elif rung == "two hosts":
            patch.setattr(meeting, "host_key", lambda: f"host {rank % 2}")
        yield


@contextmanager
def network_nbytes() -> Iterator[dict[int, int]]:
    """The bytes that this rank sends over the network in calls, by receiver."""
    sent: dict[int, int] = {}
    post = GlooConnections.post

    def counting(connections, operations, tag):
        operations = list(operations)
        for operation in operations:
            if operation.is_send and tag != CONNECTING_TAG:
                sent[operation.peer] = sent.get(operation.peer, 0) + operation.buffer.numel()
        return post(connections, operations, tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooConnections, "post", counting)
        yield sent
