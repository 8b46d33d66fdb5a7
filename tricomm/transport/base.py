"""What the runtime asks of a transport: post operations in order, wait for one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from tricomm.packing.runs import InPlace, Pieces, Runs
from tricomm.packing.staging import Direction
from tricomm.transport.memory.rungs import PairTransports


class Operation(NamedTuple):
    """Send a buffer to a rank, or receive one from it.

    Attributes:
        is_send: the direction.
        peer: the other rank.
        buffer: 1-d contiguous uint8, never empty; it belongs to the transport until the work is done.
        runs: the same bytes where they are in the rank's own tensors, or what copies them piece by piece, in place of
            the buffer, which is then neither packed before nor unpacked after; see ``Transport.in_place``.
        group: if the bytes go from one rank to several at once, that one and those: a transport that can may carry out
            all operations of a group in a round by one call of its own.
        place: the byte at which they cross in the arena of the pair, if that has one, see ``arenas``.
        is_direct: whether the receiver pulls them straight out of the sender's tensors, see ``Transport.share``; then
            the buffer is empty.
    """

    is_send: bool
    peer: int
    buffer: torch.Tensor
    runs: Runs | Pieces | None = None
    group: tuple[int, ...] = ()
    place: int = 0
    is_direct: bool = False


Directions = frozenset[Direction]
"""Of some pairs."""

NOWHERE: Directions = frozenset()


class Arenas(NamedTuple):
    """Memory that both ranks of a pair have, in which transfers cross and where they are packed and unpacked.

    Attributes:
        directions: where there is some.
        version: of the memory that ``Transport.reserve`` gives: it is the same as long as this is.
        shares: what ``Transport.share`` gives stands as long as this is the same; None where nothing is shared.
    """

    directions: Directions = NOWHERE
    version: object = None
    shares: object = None


NO_ARENAS = Arenas()


class Asked(NamedTuple):
    """Tensors that stay where they are, for others to read there; and those of others.

    Attributes:
        tensors: of this rank.
        to, of: the ranks that read them, and those whose tensors this rank reads; and why not, or "".
    """

    tensors: Sequence[torch.Tensor]
    to: Mapping[int, str]
    of: Mapping[int, str]


class Place(NamedTuple):
    """Where a tensor of another rank is: the address here of its first element (0 if it has none), and its strides."""

    address: int
    strides: tuple[int, ...]


class Shared:
    """What came of it. It is given back when this is no longer referred to.

    Attributes:
        sent: by rank, why it cannot read the tensors of this one, or "".
        received: by rank whose tensors this one can read, where they are, in its order.
        refused: by rank, why it cannot.
        memory: gives a tensor, uint8, of so many bytes at an address.
    """

    __slots__ = ("__weakref__", "memory", "received", "refused", "sent")

    def __init__(
        self,
        sent: Mapping[int, str],
        received: Mapping[int, Sequence[Place]],
        refused: Mapping[int, str],
        memory: Callable[[int, int], torch.Tensor],
    ) -> None:
        self.sent, self.received, self.refused, self.memory = sent, received, refused, memory


Work = TypeVar("Work")
"""What a transport gives for a posted operation, and whoever owns it can wait for: once."""


class Transport(Protocol[Work]):
    """One rank's end of a network. Operations of a rank pair match in the order in which they are posted."""

    @property
    def depth(self) -> tuple[int, int]:
        """(receives ahead, rounds open): how early receives may be posted, how many rounds may be in flight."""
        ...

    @property
    def in_place(self) -> InPlace:
        """Where operations may name runs of memory, or pieces, in place of a buffer."""
        ...

    @property
    def arenas(self) -> Arenas:
        """Where transfers have places in memory that both ranks have."""
        ...

    def reserve(self, nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """Return arenas, uint8, of at least so many bytes. The other rank of each asks for as many in the same call."""
        ...

    def share(self, asked: Asked) -> Shared:
        """Agree with others who reads whose tensors where they are. They ask in the same call."""
        ...

    def post(self, operations: Iterable[Operation]) -> list[Work]:
        """Start the operations of one round as one group, in their order; one work for each.

        The iterable packs as it is read, so a transport that need not group may send the first while the
        second is packed.
        """
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Carry out work on buffers, after what was posted and waited for before, and before what is posted later."""
        ...


class ConnectionLostError(RuntimeError):
    """An operation with a rank could not be started.

    Attributes:
        peer: the rank; None if the whole group of operations failed.
        error: what the backend says.
    """

    def __init__(self, peer: int | None, error: BaseException) -> None:
        super().__init__(str(error))
        self.peer = peer
        self.error = error


class GroupLostError(RuntimeError):
    """A group of messages failed on a device: the connection to one of these ranks is lost, or to one behind them.

    Attributes:
        peers: with which the group was exchanged.
    """

    def __init__(self, peers: tuple[int, ...], error: BaseException) -> None:
        super().__init__(str(error))
        self.peers = peers


class Pending(Protocol):
    """What a run has queued on a device, which may go on when the call has returned."""

    def is_begun(self) -> bool:
        """Whether the device has come to it; before, it does what was queued earlier."""
        ...

    def awaited(self) -> tuple[int, ...] | None:
        """The ranks whose messages it waits for now; () if for nobody, None if all of it is done.

        Raises:
            GroupLostError: a connection is lost.
        """
        ...

    def close(self) -> None:
        """Nothing more is queued."""
        ...


class Connections(Protocol):
    """What a communicator asks of a backend: connections among some ranks, and nothing of calls or of blame."""

    @property
    def depth(self) -> tuple[int, int]:
        """See Transport."""
        ...

    @property
    def has_tags(self) -> bool:
        """Whether messages of different tags never meet."""
        ...

    @property
    def begin(self) -> Callable[[], Pending] | None:
        """Begins a run, and returns what tells of its end; None if that is the end of the call."""
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """See Transport."""
        ...

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """Return when all that the run has posted is done, or it is aborted."""
        ...

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """Start operations that have an identity; returns (peer, the backend's work) for each.

        Raises:
            ConnectionLostError: one could not be started.
        """
        ...

    def wait(self, work: Any, limit: timedelta) -> None:
        """Wait for a work. RuntimeError if its connection closed, or after the limit."""
        ...

    def connected(self) -> None:
        """All ranks are connected: give back what only connecting needed."""
        ...

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """From now on carry out operations of these groups by one call each, if it has such; of no others.

        Args:
            groups: each with its sender first; the same, in the same order, on all ranks that are connected.

        Raises:
            ConnectionLostError: ranks of a group could not be connected.
        """
        ...

    def abort(self) -> None:
        """Wake whoever waits for this rank, and this rank if it waits. May be called from any thread, again too."""
        ...


Prepare = Callable[[Operation, bool], Callable[[int], Any] | None]
"""See Prepares."""


@runtime_checkable
class Prepares(Protocol):
    """Connections that start each operation by itself, and on which to launch work on buffers is to do it."""

    def prepare(self, operation: Operation, is_confirmed: bool) -> Callable[[int], Any] | None:
        """Return what starts an operation, as often as it is called with a tag, and returns the backend's work, or None
        if there is nothing to wait for: its ``wait`` takes a limit, as a timedelta. RuntimeErrors of either are the
        connection's. None if an operation like that has to be posted with those beside it.

        Args:
            operation: what is started.
            is_confirmed: whether each call with it is confirmed.
        """
        ...


class Near(Protocol):
    """Links of a rank with all others, by which they tell each other what they are about to do. For one thread.

    Attributes:
        have_told: whether all others have told the same; looked at in ``wait``.
        is_in_vain: whether one has told something else, or its link is closed.
        number: of the rendezvous at which this rank has told anything last; 0 if it has not.
        find_failed: says why the call failed that others have begun, as they had met by links at the rendezvous of a
            number; None if it did not.
    """

    have_told: bool
    is_in_vain: bool
    number: int
    find_failed: Callable[[int], str | None]

    def tell(self, number: int, digest: str) -> None:
        """Tell all others that this rank is about to do what a digest is of, at the rendezvous of a number."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait for the others, or sleep if that is in vain; whether they have told the same."""
        ...

    def meet(self, number: int, digest: str, seconds: float) -> bool:
        """Tell all others, and wait for them, unless that is in vain; whether they have told the same."""
        ...


class Linked(Connections, Protocol):
    """Connections of which some pairs go by memory."""

    @property
    def transports(self) -> PairTransports:
        """How the pairs of this rank go that were found on its host."""
        ...

    @property
    def in_place(self) -> InPlace:
        """See Transport."""
        ...

    @property
    def arenas(self) -> Arenas:
        """See Transport."""
        ...

    def reserve(self, nbytes: Mapping[Direction, int]) -> Mapping[Direction, torch.Tensor]:
        """See Transport.

        Raises:
            ConnectionLostError: a rank is gone, or has nothing to give.
        """
        ...

    def share(self, asked: Asked, tag: int) -> Shared:
        """See Transport.

        Raises:
            ConnectionLostError: a rank is gone, or is in the call of another tag.
        """
        ...

    def unread(self) -> list[tuple[int, Any]]:
        """What peers have still to read of calls before this one: works to wait for before anything is posted.

        So nobody is ahead of a rank that fails by more than a call, and calls follow each other on both sides as over
        the network, though who sends few bytes does not wait for them.
        """
        ...

    def nod(self, tag: int) -> list[tuple[int, Any]] | None:
        """Tell all others that this rank has what it needs in its call; works to wait for: that they have, too. Their
        ``wait`` takes a limit.

        None where that takes messages, which is the same on all ranks.

        Raises:
            ConnectionLostError: a rank is gone.
        """
        ...

    def near(self) -> Near | None:
        """What ranks meet by that have connections; None if not all have links, which is the same on all ranks."""
        ...

    def finish(self, limit: timedelta) -> bool:
        """Return when all has been told that is to be told: nobody looks after it once the call is over.

        Returns:
            Whether peers may still have to read something.
        """
        ...


class NoConnections:
    """See Connections: those of a rank alone, and of ranks that do not have theirs yet."""

    depth = (1, 2)
    has_tags = True
    begin = None

    @staticmethod
    def launch(work: Callable[[], object]) -> None:
        """See Transport."""
        work()

    def join(self, is_aborted: Callable[[], bool]) -> None:
        """See Connections."""

    def post(self, operations: Iterable[Operation], tag: int) -> list[tuple[int, Any]]:
        """See Connections."""
        assert not list(operations)
        return []

    def wait(self, work: Any, limit: timedelta) -> None:
        """See Connections."""

    def connected(self) -> None:
        """See Connections."""

    def gather(self, groups: tuple[tuple[int, ...], ...]) -> None:
        """See Connections."""

    def abort(self) -> None:
        """See Connections."""
