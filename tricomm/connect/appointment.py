"""Where a rank meets the ranks of other jobs, and as whom."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from tricomm.connect.facts import join_of
from tricomm.connect.meeting.client import Client
from tricomm.connect.meeting.join import MAX_NAME_BYTES, MAX_SIDE_RANKS, MAX_SIDES, Join, Missing, Paired
from tricomm.errors import ArgumentError, SpecError, check_text

OnWaiting = Callable[[Missing], object]


class Appointment(NamedTuple):
    """Where a rank meets others, and as whom: what stays the same from epoch to epoch.

    Attributes:
        address, secret: of the meeting.
        side, side_rank: who it is.
        side_sizes: of each side, in order; None is what that side says.
        device: of the tensors.
        host: what this machine is called.
        name: tells meetings of the same sides apart.
        timeout_seconds: for all to come, where a call does not say another.
        on_waiting: called with whom it waits for.
    """

    address: str
    secret: bytes
    side: str
    side_rank: int
    side_sizes: Mapping[str, int | None]
    device: torch.device
    host: str | None
    name: str
    timeout_seconds: float
    on_waiting: OnWaiting | None

    def join(self) -> Join:
        """Return what this rank says when it comes."""
        sides = tuple((name, size or 0) for name, size in self.side_sizes.items())
        return join_of(sides, self.side, self.side_rank, self.device, self.host, self.name)

    def keep(self, client: Client | None, deadline: float) -> tuple[Client, Paired]:
        """Return (client, epoch) when all are there; a client that is at the meeting already goes on.

        Raises:
            TransportError: they are not until the deadline, or say what contradicts this rank.
        """
        if client is None or client.connection.broken:
            client = Client(self.address, self.secret, deadline)
        return client, client.join(self.join(), deadline, self.on_waiting)


def default_device() -> torch.device:
    """Where tensors live if nobody says it."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be told whole.

    Raises:
        SpecError: it is too long, or holds what cannot be written.
    """
    check_text(what, name)
    count = len(name.encode())
    if count > MAX_NAME_BYTES:
        start = name[:60] + "..."
        raise SpecError(f"{what}={start!r} has {count} bytes, and the most are {MAX_NAME_BYTES}; shorten it")


def checked_sizes(sizes: Mapping[str, int | None], side: str) -> dict[str, int | None]:
    """How many ranks each side has; this side's is known.

    Raises:
        SpecError: no such number or name of a side; an ArgumentError where this side's is left out.
    """
    example = '{"trainer": 4, "server": 3}'
    if not 0 < len(sizes) <= MAX_SIDES:
        raise SpecError(f"side_sizes={sizes!r} has {len(sizes)} sides, and needs 1 to {MAX_SIDES}; write {example}")
    for name, size in sizes.items():
        if not name:
            raise SpecError(f"side {name!r} needs a name of 1 to {MAX_NAME_BYTES} bytes; write {example}")
        check_name("side", name)
        if size is not None and not 0 < size <= MAX_SIDE_RANKS:
            raise SpecError(f"side_sizes={dict(sizes)!r}: {size} is no number of ranks; write {example}")
    if side not in sizes:
        raise SpecError(f"side={side!r} is none of side_sizes={dict(sizes)!r}; name this job's side in both")
    if sizes[side] is None:
        raise ArgumentError(f"side_sizes={dict(sizes)!r} leaves out the size of this side, {side!r}; only others may")
    return dict(sizes)
