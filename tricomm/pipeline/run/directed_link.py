"""Way: one direction of an edge, with its order of microbatches, its ring of receive buffers and its handles."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from tricomm.errors import SpecError, TransportError
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.packing.copy_program import torch_dtype
from tricomm.reshard import Resharder
from tricomm.transport.handle import Handle

Tensors = torch.Tensor | tuple[torch.Tensor, ...]
"""What crosses an edge: a tensor, or a tuple in the order of declaration if there are several."""


class StepResharder(Resharder):
    """A Resharder that stays broken once it failed: in the middle of a step there is nobody to meet again."""

    def connect(self) -> None:
        """See Resharder.connect."""
        if self._communicator is not None and self._communicator.abort_reason is not None:
            raise TransportError(self._communicator.abort_reason)
        super().connect()

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on."""
        if self._communicator is None:
            self.context.rendezvous.abort(self.participants, reason, self.channel)
        elif self._communicator.abort_reason is None:
            self._communicator.abort(reason)


class PerDirectionFifo:
    """What one rank sends over several Links goes one after the other, and so does what it receives.

    For Links that share a NIC: each transfer has all of it, and a planned order decides which comes first, where
    otherwise all of them would be slowed down together. All ranks of these Links take turns, in orders that fit
    together: ``check`` proves it of a schedule for ``Queues.PER_DIRECTION``.
    """

    def __init__(self) -> None:
        self._last: dict[str, Handle] = {}

    def before(self, directions: Sequence[str]) -> list[Handle]:
        """What must have ended before the next transfer of these directions begins."""
        return [self._last[direction] for direction in directions if direction in self._last]

    def take(self, directions: Sequence[str], handle: Handle) -> None:
        """Note a transfer that was started."""
        self._last.update(dict.fromkeys(directions, handle))


class SendHandle:
    """A send that was started; it keeps what it sends alive."""

    def __init__(self, handles: Sequence[Handle], tensors: Sequence[torch.Tensor]) -> None:
        self._handles = handles
        self._tensors: Sequence[torch.Tensor] = tensors

    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""
        return all(handle.done() for handle in self._handles)

    def check(self) -> None:
        """Raise if a rank failed, once the send is done. On a GPU it has only been queued then, and what the current
        stream has to do goes on beside it; the tensors' memory stays theirs until they are sent.
        """
        for handle in self._handles:
            handle.check()
        self._tensors = ()

    def wait(self) -> None:
        """Return when the tensors may be changed.

        Raises:
            TransportError: a rank failed.
        """
        for handle in self._handles:
            handle.wait()
        self._tensors = ()


class ReceiveHandle:
    """A receive that was posted.

    Its tensors belong to the receiver until ``release``, after which a later receive of the same direction writes
    into their memory.
    """

    def __init__(self, directed_link: "DirectedLink", microbatch: int, slot: int | None) -> None:
        self._directed_link = directed_link
        self._microbatch = microbatch
        self._slot = slot
        self._scaled = False
        self.handles: Sequence[Handle] | None = None

    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""
        return self.handles is not None and all(handle.done() for handle in self.handles)

    def wait_all(self) -> tuple[torch.Tensor, ...]:
        """The tensors, always as a tuple. See wait."""
        directed_link = self._directed_link
        if self.handles is None:
            raise SpecError(
                f"{directed_link.name}: rank {directed_link.rank} is on both meshes and waits for microbatch "
                f"{self._microbatch}, which it has not sent; send it before you wait for it"
            )
        received = [handle.wait() for handle in self.handles]
        tensors = tuple(tensor for tensor in received if tensor is not None)
        if not self._scaled:
            for tensor, scale in zip(tensors, directed_link.scales, strict=True):
                if scale != 1.0:
                    tensor.mul_(scale)
            self._scaled = True
        return tensors

    def wait(self) -> Tensors:
        """This rank's shard of the tensor, or a tuple of shards if the edge has several tensors.

        Raises:
            TransportError: a rank failed, or none sent it within the timeout.
        """
        tensors = self.wait_all()
        return tensors[0] if len(tensors) == 1 else tensors

    def release(self) -> None:
        """Give the memory back for a later receive. Nothing may read the tensors any more."""
        if self._slot is not None:
            directed_link = self._directed_link
            directed_link.holders[self._slot] = None
            # What reads the tensors may still be queued on the current stream.
            directed_link.freed[self._slot] = directed_link.resharders[0].record_event()
            self._slot = None


class DirectedLink:
    """One direction of an edge.

    Args:
        name: of the direction; also of its channel.
        specs: (source, destination) of each tensor; all sources on the same ranks, and all destinations.
        order: the microbatches of a step in the order in which they are sent; every step repeats it.
        slots: receive buffers, used in turn; None makes new tensors for every receive. Ranks on both meshes always
            get new tensors.
        scales: what a received tensor is multiplied by.
        turns: of this rank, if its transfers take turns.
        options: of :class:`tricomm.Resharder`.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[tuple[ShardingSpec, ShardingSpec]],
        order: Sequence[int],
        slots: int | None,
        scales: Sequence[float],
        turns: PerDirectionFifo | None,
        options: LinkOptions,
    ) -> None:
        self.name = name
        self.turns = turns
        self.order = tuple(order)
        self.scales = tuple(scales)
        self.resharders = [StepResharder(*pair, channel=name, **options) for pair in specs]
        self.rank = self.resharders[0].rank
        self.gives = self.rank in specs[0][0].mesh
        self.takes = self.rank in specs[0][1].mesh
        self.slots = None if self.gives and self.takes else slots
        self.holders: list[int | None] = [None] * (self.slots or 0)
        self.freed: list[Any] = [None] * (self.slots or 0)
        self._buffers: list[list[torch.Tensor]] = []
        self._counts = {"send": 0, "recv": 0}
        self._sent: deque[SendHandle] = deque()
        self._last_ended: SendHandle | None = None
        self._own: dict[int, tuple[ReceiveHandle | None, Sequence[Handle] | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds."""
        return sum(tensor.nbytes for slot in self._buffers for tensor in slot)

    def connect(self) -> None:
        """Meet the other ranks; see Link.connect."""
        for resharder in self.resharders:
            resharder.connect()

    def drop_buffers(self) -> None:
        """Free the receive buffers; the next receive makes them again."""
        self._buffers.clear()
        self.freed = [None] * len(self.freed)

    def send(self, tensors: Sequence[torch.Tensor], microbatch: int) -> SendHandle:
        """See Link.send."""
        turn = self._next_turn("send", microbatch)
        if len(tensors) != len(self.resharders):
            raise SpecError(f"{self.name} carries {len(self.resharders)} tensors and got {len(tensors)}; pass each")
        self._drop_ended()
        # What autograd knows of the tensor stays here: its gradient comes back by the other direction.
        tensors = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        try:
            handles = self._start([{"tensor": tensor} for tensor in tensors])
        except SpecError as error:
            raise SpecError(f"{self.name}, microbatch {microbatch}: {error}") from error
        handle = SendHandle(handles, tensors)
        self._sent.append(handle)
        if self.takes:
            posted, _ = self._own.pop(turn, (None, None))
            if posted is None:
                self._own[turn] = (None, handles)
            else:
                posted.handles = handles
        return handle

    def recv(self, microbatch: int) -> ReceiveHandle:
        """See Link.recv."""
        turn = self._next_turn("recv", microbatch)
        if self.gives:
            handle = ReceiveHandle(self, microbatch, None)
            _, handle.handles = self._own.pop(turn, (None, None))
            if handle.handles is None:
                self._own[turn] = (handle, None)
            return handle
        slot = None if self.slots is None else turn % self.slots
        handle = ReceiveHandle(self, microbatch, slot)
        if slot is None:
            handle.handles = self._start([{}] * len(self.resharders))
            return handle
        holder = self.holders[slot]
        if holder is not None:
            raise SpecError(
                f"{self.name} has {self.slots} receive buffers, and microbatch {microbatch} needs the one that "
                f"microbatch {holder} still holds; release it first, or ask for more buffers"
            )
        self.holders[slot] = microbatch
        if not self._buffers:
            self._buffers = [self._new_buffers() for _ in self.holders]
        handle.handles = self._start([{"out": out, "after": self.freed[slot]} for out in self._buffers[slot]])
        return handle

    def flush(self) -> None:
        """Wait for all sends."""
        if self._last_ended is not None:
            self._last_ended.wait()  # on a GPU those before it run on the same stream
            self._last_ended = None
        while self._sent:
            self._sent.popleft().wait()

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on: whoever waits for it gets a TransportError."""
        self.resharders[0].abort(reason)  # all use one communicator

    def close(self) -> None:
        """Give back connections and buffers."""
        for resharder in self.resharders:
            resharder.close()
        self._buffers.clear()

    def _drop_ended(self) -> None:
        """Forget sends that have ended; raise if one failed. Nothing waits for them: a send never holds up compute."""
        while self._sent and self._sent[0].done():
            ended = self._sent.popleft()
            ended.check()
            self._last_ended = ended

    def _start(self, arguments: Sequence[dict[str, Any]]) -> list[Handle]:
        """Start all resharders, after what else this rank moves in the same direction if there is a FIFO."""
        directions = [name for name, has_part in (("send", self.gives), ("recv", self.takes)) if has_part]
        depends_on = self.turns.before(directions) if self.turns is not None else ()
        handles = [
            resharder.start(**some, depends_on=depends_on)
            for resharder, some in zip(self.resharders, arguments, strict=True)
        ]
        if self.turns is not None:
            self.turns.take(directions, handles[-1])  # all use one communicator, and end in order
        return handles

    def _next_turn(self, call: str, microbatch: int) -> int:
        """Count a call; it must be that of the microbatch whose turn it is."""
        if not (self.gives if call == "send" else self.takes):
            side = "source" if call == "send" else "destination"
            raise SpecError(
                f"rank {self.rank} is not on the {side} mesh of {self.name} and cannot {call}; only its ranks may"
            )
        turn = self._counts[call]
        expected = self.order[turn % len(self.order)]
        if microbatch != expected:
            raise SpecError(
                f"{call} of microbatch {microbatch} on {self.name}, where it is the turn of microbatch {expected}; "
                f"microbatches cross in the order {_short(self.order)} at both ends: call in this order, or make the "
                "Link with another"
            )
        self._counts[call] = turn + 1
        return turn

    def _new_buffers(self) -> list[torch.Tensor]:
        return [
            torch.empty(
                resharder.plan.destination.local_shape(self.rank),
                dtype=torch_dtype(resharder.plan.destination.element_type),
                device=resharder.device,
            )
            for resharder in self.resharders
        ]


def _short(order: tuple[int, ...], limit: int = 12) -> str:
    shown = ", ".join(map(str, order[:limit]))
    return shown if len(order) <= limit else f"{shown}, ..."
