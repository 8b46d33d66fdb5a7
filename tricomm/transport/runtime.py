"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tricomm.kernels.reference import alignment_nbytes
from tricomm.packing.arithmetic import Reducer
from tricomm.packing.binding import NOTHING, Binding, BoundTransfer, Copies, bind
from tricomm.packing.copy_program import CopyProgram, make_copy_program, torch_dtype
from tricomm.plan import Plan
from tricomm.transport.base import Operation, Transport, Work

MAX_COPY_PROGRAMS = 16
"""Combinations of strides and alignments that one Resharder keeps copy programs for."""

Address = tuple[int, tuple[int, ...]]
"""Where a tensor's elements are, and its strides; both may change under the same object (set_, data)."""

StagingProvider = Callable[[int], torch.Tensor]
"""Gives the staging buffer: a uint8 tensor of at least so many bytes, valid until the next call."""


Step = tuple[Operation, Copies]
"""A transfer of a round: the operation, and what is to be packed before it or unpacked after it."""


class Bound(NamedTuple):
    """A binding as operations, made once.

    Attributes:
        sends, receives: per round.
    """

    binding: Binding
    sends: tuple[tuple[Step, ...], ...]
    receives: tuple[tuple[Step, ...], ...]


def as_operations(binding: Binding) -> Bound:
    """Return what a run of a binding posts and copies."""

    def steps(rounds: Sequence[Sequence[BoundTransfer]], is_send: bool) -> tuple[tuple[Step, ...], ...]:
        return tuple(tuple((Operation(is_send, t.peer, t.buffer), t.copies) for t in one) for one in rounds)

    return Bound(binding, steps(binding.sends, True), steps(binding.receives, False))


def run_move(bound: Bound, transport: Transport) -> Iterator[Work]:
    """Run one move of one rank; each yielded work must be done before the generator is resumed.

    Round ``index`` is started once what it forwards has come, and round ``index - rounds_open`` is waited for and
    unpacked, whereupon its places in the staging buffer are free. Receives are posted with the rounds before theirs, as
    far ahead as the transport likes.

    Args:
        bound: the rank's copy program, bound to tensors and a staging buffer; read and written until the run ends.
        transport: the rank's end of the network.
    """
    binding, sends, receives = bound
    program, count, launch = binding.program, len(sends), transport.launch
    received: list[list[Work]] = []
    sent: list[list[Work]] = []
    arrivals: dict[tuple[int, int], Work] = {}
    for index in range(max(count + program.rounds_open, 1)):
        if index < count:
            if program.relays:
                for transfer in program.sends[index]:
                    if transfer.relay:
                        yield arrivals[transfer.key]
            early = range(len(received), min(index + program.receives_ahead + 1, count))
            works = transport.post(_operations(sends[index], receives, early, launch))
            first = 0
            for step in early:
                end = first + len(program.receives[step])
                received.append(works[first:end])
                if program.relays:
                    arrivals.update(
                        (transfer.key, work)
                        for transfer, work in zip(program.receives[step], received[step], strict=True)
                    )
                first = end
            sent.append(works[first:])
        if index == 0 and binding.local is not NOTHING:
            launch(binding.local.run)
        done = index - program.rounds_open
        if 0 <= done < count:
            for work, (_, copies) in zip(received[done], receives[done], strict=True):
                yield work
                if copies is not NOTHING:
                    launch(copies.run)
            yield from sent[done]


def _operations(
    sends: Sequence[Step],
    receives: Sequence[Sequence[Step]],
    early: range,
    launch: Callable[[Callable[[], None]], None],
) -> Iterator[Operation]:
    """The receives of the rounds ``early``, then the sends of one round, packed as they are asked for."""
    for step in early:
        for operation, _ in receives[step]:
            yield operation
    for operation, copies in sends:
        launch(copies.run)
        yield operation


class PlanExecution:
    """One rank's side of a plan: its copy programs, made once per combination of strides, and its runs.

    Args:
        plan: global, or built for this rank.
        rank: which side.
        device: where the tensors live.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self.plan = plan
        self.programs = plan.for_rank(rank)
        self._copy_programs: dict[object, CopyProgram] = {}
        self._bindings: dict[int, CachedBinding] = {}
        self._device = device
        self._reducer: Reducer | None = None

    def steps(
        self,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        staging: StagingProvider,
        transport: Transport,
    ) -> Iterator[Work]:
        """Run the whole plan; each yielded work must be done before the generator is resumed.

        Args:
            source: the rank's shard, or None off the source mesh; not written.
            destination: its new shard to fill, or None off the destination mesh.
            staging: gives the staging buffer.
            transport: the rank's end of the network.
        """
        reduction = self.plan.reduction
        if reduction is None:
            return self._move(0, source, destination, staging, transport)
        if self._reducer is None:
            dtype = torch_dtype(self.plan.source.element_type)
            shape = self.programs[0].destination_shape
            self._reducer = Reducer(reduction.op, reduction.divisor, dtype, shape, self._device)
        return self._reduce_and_move(self._reducer, source, destination, staging, transport)

    def release(self) -> None:
        """Free the buffers of the reduction; the next run makes them again."""
        if self._reducer is not None:
            self._reducer = None
            self._bindings.clear()

    def _reduce_and_move(
        self,
        reducer: Reducer,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        staging: StagingProvider,
        transport: Transport,
    ) -> Iterator[Work]:
        stacked = None if source is None else source.unsqueeze(0)
        yield from self._move(0, stacked, reducer.contributions, staging, transport)
        transport.launch(reducer.reduce)
        yield from self._move(1, reducer.result, destination, staging, transport)

    def _move(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        staging: StagingProvider,
        transport: Transport,
    ) -> Iterator[Work]:
        """The steps of move ``index``."""
        cached = self._bindings.get(index)
        if cached is None or not cached.is_of(source, destination, staging, transport.depth):
            cached = self._bind(index, source, destination, staging, transport.depth)
        return run_move(cached.bound, transport)

    def _bind(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        staging: StagingProvider,
        depth: tuple[int, int],
    ) -> "CachedBinding":
        """Bind the copy program to these tensors, and keep that until one of the tensors goes."""
        program = self._copy_program_for(index, source, destination, depth)
        buffer = staging(program.staging_nbytes)
        binding = bind(program, _alias(source), _alias(destination), buffer)
        bindings = self._bindings

        def forget(_: object) -> None:
            bindings.pop(index, None)

        cached = CachedBinding(
            None if source is None else weakref.ref(source, forget),
            None if destination is None else weakref.ref(destination, forget),
            None if source is None else (source.data_ptr(), source.stride()),
            None if destination is None else (destination.data_ptr(), destination.stride()),
            buffer,
            program.staging_nbytes,
            depth,
            as_operations(binding),
        )
        bindings[index] = cached
        return cached

    def _copy_program_for(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        depth: tuple[int, int],
    ) -> CopyProgram:
        """The copy program for tensors with these strides and alignments, from the cache if there were such before."""
        strides = (
            () if source is None else source.stride(),
            () if destination is None else destination.stride(),
        )
        alignments = (_alignment(source), _alignment(destination))
        key = (index, strides, alignments, depth)
        if key not in self._copy_programs:
            move = self.plan.moves[index]
            dtypes = (move.source.element_type, move.wire_dtype, move.destination.element_type)
            if len(self._copy_programs) >= MAX_COPY_PROGRAMS:
                self._copy_programs.clear()
            self._copy_programs[key] = make_copy_program(
                self.programs[index], dtypes, strides, alignments, depth, self.plan.staging_nbytes
            )
        return self._copy_programs[key]


@dataclass(frozen=True, slots=True)
class CachedBinding:
    """The binding of the last call, good for the same tensors in the same place. It does not keep them alive."""

    source: "weakref.ref[torch.Tensor] | None"
    destination: "weakref.ref[torch.Tensor] | None"
    from_address: Address | None
    to_address: Address | None
    staging: torch.Tensor
    staging_nbytes: int
    depth: tuple[int, int]
    bound: Bound

    def is_of(
        self,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        staging: StagingProvider,
        depth: tuple[int, int],
    ) -> bool:
        """Whether a call with these may use the binding."""
        return (
            (None if self.source is None else self.source()) is source
            and (None if self.destination is None else self.destination()) is destination
            and (source is None or self.from_address == (source.data_ptr(), source.stride()))
            and (destination is None or self.to_address == (destination.data_ptr(), destination.stride()))
            and self.depth == depth
            and staging(self.staging_nbytes) is self.staging
        )


def _alignment(tensor: torch.Tensor | None) -> int:
    nbytes: int = alignment_nbytes() if tensor is None else alignment_nbytes(tensor)
    return nbytes


def _alias(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Another tensor of the same memory. The one given may go while this stands (a view would keep its base alive)."""
    return None if tensor is None else tensor.detach()
