"""DirectedLink: one direction of an edge, with its order of microbatches, its receive buffers and its handles."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.packing.copy_program import torch_dtype
from tricomm.resharder import Resharder
from tricomm.transport.group import device_of, resolve_group
from tricomm.transport.handle import Handle

Tensors = torch.Tensor | tuple[torch.Tensor, ...]
"""What crosses an edge: a tensor, or a tuple in the order of declaration if there are several."""

Sizes = tuple[tuple[str, int], ...]
"""The sizes that have a name, sorted by it; () if none has."""

MAX_SIZES = 16
"""Combinations of sizes whose plans are kept, if no step needs more."""


class StepResharder(Resharder):
    """A Resharder that stays broken once it failed: in the middle of a step there is nobody to connect with again."""

    _is_counted = False
    _stays_broken = True


class PerDirectionFifo:
    """Make the Links of a rank take turns: what it sends goes one after the other, and so does what it receives.

    For Links that share a NIC: each transfer has all of it, and a planned order decides which comes first, where
    otherwise all of them would be slowed down together. All ranks of these Links have one, with orders that fit
    together: ``check`` proves it of a schedule for ``Queues.PER_DIRECTION``. A turn ends when the bytes are there. In
    host memory a send by itself ends as soon as the kernel has taken them, which may be long before; so there the ranks
    of a transfer confirm it to each other, unless ``confirm=False`` is asked for.

    >>> fifo = PerDirectionFifo()  # give it to all Links of this rank: Link(..., fifo=fifo)
    >>> fifo.before(["send"])  # nothing has been started yet
    []
    """

    def __init__(self) -> None:
        self._last: dict[str, Handle] = {}

    def before(self, directions: Sequence[str]) -> list[Handle]:
        """Return what must have ended before the next transfer of these directions begins.

        ::

            handles = fifo.before(["send"])
            handle = mover.start(tensor, depends_on=handles)
            fifo.append(["send"], handle)
        """
        return [self._last[direction] for direction in directions if direction in self._last]

    def append(self, directions: Sequence[str], handle: Handle) -> None:
        """Record a transfer that was started.

        ::

            fifo.append(["receive"], handle)
            fifo.before(["receive"])  # [handle]
        """
        self._last.update(dict.fromkeys(directions, handle))


class SendHandle:
    """A send that was started: one transfer for each tensor of the edge. It keeps what it sends alive."""

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

    def join(self) -> None:
        """Return when the tensors were sent, on a GPU too.

        Raises:
            TransportError: a rank failed.
        """
        for handle in self._handles:
            handle.join()


class ReceiveHandle:
    """A receive that was posted: one transfer for each tensor of the edge.

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
        """Return the tensors, always as a tuple. See wait."""
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

    def join(self) -> None:
        """Return when the tensors are there, on a GPU too; ``wait`` still gives them.

        Raises:
            TransportError: a rank failed, or none sent it within the timeout.
        """
        for handle in self.handles or ():
            handle.join()

    def wait(self) -> Tensors:
        """Return this rank's shard of the tensor, or a tuple of shards if the edge has several tensors.

        Raises:
            TransportError: a rank failed, or none sent it within the timeout.
        """
        tensors = self.wait_all()
        return tensors[0] if len(tensors) == 1 else tensors

    def release(self) -> None:
        """Give the memory back for a later receive. Nothing may read the tensors any more."""
        if self._slot is not None:
            self._directed_link.free(self._slot)
            self._slot = None


class DirectedLink:
    """Carry the tensors of one direction of an edge.

    Args:
        name: of the direction; also of its channel.
        ranks: those that send and those that receive.
        order: the microbatches of a step in the order in which they are sent; every step repeats it.
        slots: receive buffers, used in turn; None makes new tensors for every receive. Ranks on both meshes always
            get new tensors.
        scales: one for each tensor, which is multiplied by it when it was received.
        fifo: of this rank, if its transfers take turns.
        options: of :class:`tricomm.Resharder`.
    """

    def __init__(
        self,
        name: str,
        ranks: tuple[Sequence[int], Sequence[int]],
        order: Sequence[int],
        slots: int | None,
        scales: Sequence[float],
        fifo: PerDirectionFifo | None,
        options: LinkOptions,
    ) -> None:
        self.name = name
        self.ranks = ranks
        self.fifo = fifo
        self.order = tuple(order)
        self.scales = tuple(scales)
        self.rank = -1
        """Of this process, known from the first ``bind`` on."""
        self.is_sender = self.is_receiver = False
        self.slots = slots
        self._options = options
        self._bindings: OrderedDict[Sizes, list[StepResharder]] = OrderedDict()
        self._connected: set[Sizes] = set()
        self._sizes_of: Sequence[Sizes] = ()
        self._holders: list[int | None] = [None] * (slots or 0)
        self._freed: list[Any] = [None] * (slots or 0)
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self._counts = {"send": 0, "recv": 0}
        self._sent: deque[SendHandle] = deque()
        self._last_ended: SendHandle | None = None
        self._own: dict[int, tuple[ReceiveHandle | None, Sequence[Handle] | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds."""
        return sum(memory.nbytes for memory in self._memory.values())

    @property
    def resharders(self) -> list[StepResharder]:
        """Those of the sizes that were bound last."""
        return next(reversed(self._bindings.values()))

    def resharders_of(self, microbatch: int) -> list[StepResharder]:
        """Those of the sizes of a microbatch."""
        return self._bindings[self._sizes_of[microbatch]]

    @property
    def is_connected(self) -> bool:
        """Whether it was connected for some sizes."""
        return bool(self._connected)

    def connect(self) -> None:
        """Meet the other ranks for sizes that were bound since."""
        for sizes, resharders in self._bindings.items():
            if sizes not in self._connected:
                for resharder in resharders:
                    resharder.connect()
                self._connected.add(sizes)

    def bind(self, sizes: Sizes, specs: Sequence[tuple[ShardingSpec, ShardingSpec]]) -> None:
        """Make what moves tensors of some sizes; ``connect`` is still to come.

        Args:
            sizes: for which.
            specs: (source, destination) of each tensor.
        """
        options = self._options
        if self.fifo is not None and options.get("confirm") is None:
            device = device_of(options.get("device"), resolve_group(options.get("group")))
            options = {**options, "confirm": device.type == "cpu"}
        resharders = [StepResharder(*pair, channel=self.name, **options) for pair in specs]
        self.rank = resharders[0].rank
        self.is_sender, self.is_receiver = (self.rank in ranks for ranks in self.ranks)
        if self.is_sender and self.is_receiver:
            self.slots = None
        self._bindings[sizes] = resharders

    def has(self, sizes: Sizes) -> bool:
        """Whether these sizes are bound."""
        return sizes in self._bindings

    def use(self, sizes: Sequence[Sizes]) -> None:
        """Set the sizes of each microbatch from now on, all of them bound, and forget those used longest ago."""
        self._sizes_of = tuple(sizes)
        for one in dict.fromkeys(sizes):
            self._bindings.move_to_end(one)
        while len(self._bindings) > max(MAX_SIZES, len(set(sizes))):
            forgotten, resharders = self._bindings.popitem(last=False)
            self._connected.discard(forgotten)
            for resharder in resharders:
                resharder.close()

    def send(self, tensors: Sequence[torch.Tensor], microbatch: int) -> SendHandle:
        """See Link.send."""
        number = self._next_call("send", microbatch)
        resharders = self.resharders_of(microbatch)
        if len(tensors) != len(resharders):
            raise SpecError(f"{self.name} carries {len(resharders)} tensors and got {len(tensors)}; pass each")
        self._drop_ended()
        # What autograd knows of the tensor stays here: its gradient comes back by the other direction.
        tensors = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        try:
            handles = self._start(resharders, [{"tensor": tensor} for tensor in tensors])
        except SpecError as error:
            raise SpecError(f"{self.name}, microbatch {microbatch}: {error}") from error
        handle = SendHandle(handles, tensors)
        self._sent.append(handle)
        if self.is_receiver:
            posted, _ = self._own.pop(number, (None, None))
            if posted is None:
                self._own[number] = (None, handles)
            else:
                posted.handles = handles
        return handle

    def recv(self, microbatch: int) -> ReceiveHandle:
        """See Link.recv."""
        number = self._next_call("recv", microbatch)
        if self.is_sender:
            handle = ReceiveHandle(self, microbatch, None)
            _, handle.handles = self._own.pop(number, (None, None))
            if handle.handles is None:
                self._own[number] = (handle, None)
            return handle
        resharders = self.resharders_of(microbatch)
        slot = None if self.slots is None else number % self.slots
        handle = ReceiveHandle(self, microbatch, slot)
        if slot is None:
            handle.handles = self._start(resharders, [{}] * len(resharders))
            return handle
        holder = self._holders[slot]
        if holder is not None:
            raise SpecError(
                f"{self.name} has {self.slots} receive buffers, and microbatch {microbatch} needs the one that "
                f"microbatch {holder} still holds; release it first, or ask for more buffers"
            )
        self._holders[slot] = microbatch
        buffers = [self._buffer(slot, index, resharder) for index, resharder in enumerate(resharders)]
        handle.handles = self._start(resharders, [{"out": out, "after": self._freed[slot]} for out in buffers])
        return handle

    def free(self, slot: int) -> None:
        """Let a later receive use a slot, after all that is queued on the current stream so far."""
        self._holders[slot] = None
        self._freed[slot] = self.resharders[0].record_event()

    def flush(self) -> None:
        """Wait for all sends."""
        if self._last_ended is not None:
            self._last_ended.wait()  # on a GPU those before it run on the same stream
            self._last_ended = None
        while self._sent:
            self._sent.popleft().wait()

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on: whoever waits for it gets a TransportError."""
        if self._bindings:
            self.resharders[0].abort(reason)  # all use one communicator

    def close(self) -> None:
        """Give back connections and buffers."""
        for resharders in self._bindings.values():
            for resharder in resharders:
                resharder.close()
        self._memory.clear()

    def _drop_ended(self) -> None:
        """Forget sends that have ended; raise if one failed. Nothing waits for them: a send never holds up compute."""
        while self._sent and self._sent[0].done():
            ended = self._sent.popleft()
            ended.check()
            self._last_ended = ended

    def _start(self, resharders: Sequence[StepResharder], arguments: Sequence[dict[str, Any]]) -> list[Handle]:
        """Start all resharders, after what else this rank moves in the same direction if there is a FIFO."""
        directions = [name for name, has_part in (("send", self.is_sender), ("recv", self.is_receiver)) if has_part]
        depends_on = self.fifo.before(directions) if self.fifo is not None else ()
        handles = [
            resharder.start(**some, depends_on=depends_on)
            for resharder, some in zip(resharders, arguments, strict=True)
        ]
        if self.fifo is not None:
            self.fifo.append(directions, handles[-1])  # all use one communicator, and end in order
        return handles

    def _next_call(self, call: str, microbatch: int) -> int:
        """Count a call, which must be of the microbatch that the order has next; the number of the call."""
        if not (self.is_sender if call == "send" else self.is_receiver):
            side = "source" if call == "send" else "destination"
            raise SpecError(
                f"rank {self.rank} is not on the {side} mesh of {self.name} and cannot {call}; only its ranks may"
            )
        number = self._counts[call]
        expected = self.order[number % len(self.order)]
        if type(microbatch) is not int or microbatch != expected:
            raise SpecError(
                f"{call} of microbatch {microbatch} on {self.name}, where it is the turn of microbatch {expected}; "
                f"microbatches cross in the order {_short(self.order)} at both ends: call in this order, or make the "
                "Link with another"
            )
        self._counts[call] = number + 1
        return number

    def _buffer(self, slot: int, index: int, resharder: StepResharder) -> torch.Tensor:
        """Return memory of a slot for a tensor, grown where it is too small."""
        destination = resharder.plan.destination
        shape = destination.local_shape(self.rank)
        numel = torch.Size(shape).numel()
        memory = self._memory.get((slot, index))
        if memory is None or memory.numel() < numel:
            dtype = torch_dtype(destination.element_type)
            with torch.inference_mode(False):  # a later step may train with the same memory
                memory = self._memory[slot, index] = torch.empty(numel, dtype=dtype, device=resharder.device)
            self._freed[slot] = None  # nobody has read this memory yet; its last user has queued what it does
        return memory[:numel].view(shape)


def _short(order: tuple[int, ...], limit: int = 12) -> str:
    shown = ", ".join(map(str, order[:limit]))
    return shown if len(order) <= limit else f"{shown}, ..."
