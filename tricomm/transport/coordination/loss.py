"""What is said of a connection that was lost."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from tricomm.errors import TransportError
from tricomm.transport.coordination.background import process_ends
from tricomm.transport.coordination.status import Fault, StatusStore
from tricomm.transport.coordination.store import describe_lost_store

SEE_LOG = "see that rank's log, and whether it makes as many calls as this one"


class Loss(NamedTuple):
    """Why a connection was lost.

    Attributes:
        text: in words.
        rank: who is at fault; None if that was said before, or is not known.
        fault: what it did.
    """

    text: str
    rank: int | None = None
    fault: Fault = "left"


def describe_loss(
    status: StatusStore, place: tuple[str, Sequence[int]], call: str, peer: int | None, error: RuntimeError
) -> Loss:
    """Find out why a connection was lost in a call.

    Args:
        status: of this rank.
        place: of the communicator, and its ranks.
        call: in words.
        peer: to which; None if to no single one.
        error: what the backend says.
    """
    name, participants = place
    try:
        reason = status.abort_of(name)
        if reason is not None:
            return Loss(reason.text)
        if peer is None:
            ranks = f"to and from ranks {list(participants)}"
            return Loss(f"rank {status.rank} could not queue its messages {ranks} in {call}: {error}")
        is_end = status.closed_by(name, peer)
        if is_end is not None:
            what = "left: its process ended" if is_end else "closed its Resharder, or dropped it,"
            return Loss(f"rank {peer} {what} while rank {status.rank} was in {call}; {SEE_LOG}", peer)
        text = f"rank {peer} died or ended: its connection to rank {status.rank} closed in {call}; {SEE_LOG}"
        return Loss(text, peer, "died")
    except TransportError as missing:
        return Loss(describe_lost_store(missing, status.rank, call, peer))


def post_closed(status: StatusStore, place: str, process: int) -> None:
    """Say that connections close on purpose, or because the process ends by itself; nothing to do if nobody can be told
    any more, or a forked child drops what is its parent's.
    """
    if os.getpid() != process:
        return
    try:
        status.post_closed(place, is_end=process_ends())
    except (TransportError, RuntimeError):
        return
