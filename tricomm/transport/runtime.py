"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tricomm.kernels.reference import alignment_nbytes
from tricomm.packing.arithmetic import Reducer
from tricomm.packing.binding import Binding, bind
from tricomm.packing.tables import Tables, make_tables, torch_dtype
from tricomm.plan import Plan
from tricomm.transport.base import Operation, Transport, Work

MAX_TABLES = 16
"""Combinations of strides and alignments that one Resharder keeps tables for."""

Arena = Callable[[int], torch.Tensor]
"""Gives a uint8 tensor of at least so many bytes, valid until the next call."""


def run_move(binding: Binding, transport: Transport) -> Iterator[Work]:
    """Run one move of one rank; each yielded work must be done before the generator is resumed.

    Round ``index`` is started once what it forwards has come, and round ``index - rounds_open`` is waited for and
    unpacked, whereupon its places in the arena are free. Receives are posted with the rounds before theirs, as far
    ahead as the transport likes.

    Args:
        binding: the rank's tables, bound to its tensors and an arena; read and written until the run ends.
        transport: the rank's end of the network.
    """
    tables, count = binding.tables, len(binding.sends)
    received: list[list[Work]] = []
    sent: list[list[Work]] = []
    arrivals: dict[tuple[int, int], Work] = {}
    for index in range(max(count + tables.rounds_open, 1)):
        if index < count:
            if tables.relays:
                for transfer in tables.sends[index]:
                    if transfer.relay:
                        yield arrivals[transfer.key]
            early = range(len(received), min(index + tables.receives_ahead + 1, count))
            works = transport.post(_operations(binding, index, early))
            first = 0
            for step in early:
                end = first + len(tables.receives[step])
                received.append(works[first:end])
                if tables.relays:
                    arrivals.update(
                        (transfer.key, work)
                        for transfer, work in zip(tables.receives[step], received[step], strict=True)
                    )
                first = end
            sent.append(works[first:])
        if index == 0:
            binding.local.run()
        done = index - tables.rounds_open
        if 0 <= done < count:
            for work, slot in zip(received[done], binding.receives[done], strict=True):
                yield work
                slot.copies.run()
            yield from sent[done]


def _operations(binding: Binding, index: int, early: range) -> Iterator[Operation]:
    """The receives of the rounds ``early``, then the sends of round ``index``, packed as they are asked for."""
    for step in early:
        for slot in binding.receives[step]:
            yield Operation(False, slot.peer, slot.buffer)
    for slot in binding.sends[index]:
        slot.copies.run()
        yield Operation(True, slot.peer, slot.buffer)


class PlanExecution:
    """One rank's side of a plan: its tables, made once per combination of strides, and its runs.

    Args:
        plan: global, or built for this rank.
        rank: which side.
        device: where the tensors live.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self.plan = plan
        self.programs = plan.for_rank(rank)
        self._tables: dict[object, Tables] = {}
        self._memories: dict[int, Memory] = {}
        self._reducer: Reducer | None = None
        if plan.reduction is not None:
            self._reducer = Reducer(
                plan.reduction.op,
                torch_dtype(plan.source.element_type),
                self.programs[0].destination_shape,
                device,
            )

    def steps(
        self,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        transport: Transport,
    ) -> Iterator[Work]:
        """Run the whole plan; each yielded work must be done before the generator is resumed.

        Args:
            source: the rank's shard, or None off the source mesh; not written.
            destination: its new shard to fill, or None off the destination mesh.
            arena: gives the staging.
            transport: the rank's end of the network.
        """
        if self._reducer is None:
            return self._move(0, source, destination, arena, transport)
        return self._reduce_and_move(self._reducer, source, destination, arena, transport)

    def _reduce_and_move(
        self,
        reducer: Reducer,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        transport: Transport,
    ) -> Iterator[Work]:
        stacked = None if source is None else source.unsqueeze(0)
        yield from self._move(0, stacked, reducer.contributions, arena, transport)
        yield from self._move(1, reducer.reduce(), destination, arena, transport)

    def _move(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        transport: Transport,
    ) -> Iterator[Work]:
        """The steps of move ``index``."""
        memory = self._memories.get(index)
        if memory is None or not memory.is_of(source, destination, arena, transport.depth):
            memory = self._bind(index, source, destination, arena, transport.depth)
        return run_move(memory.binding, transport)

    def _bind(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        depth: tuple[int, int],
    ) -> "Memory":
        """Bind the tables to these tensors, and keep that until one of the tensors goes."""
        tables = self._tables_for(index, source, destination, depth)
        staging = arena(tables.arena_nbytes)
        binding = bind(tables, _alias(source), _alias(destination), staging)
        memories = self._memories

        def forget(_: object) -> None:
            memories.pop(index, None)

        memory = Memory(
            None if source is None else weakref.ref(source, forget),
            None if destination is None else weakref.ref(destination, forget),
            (_address(source), _address(destination)),
            staging,
            depth,
            binding,
        )
        memories[index] = memory
        return memory

    def _tables_for(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        depth: tuple[int, int],
    ) -> Tables:
        """The tables for tensors with these strides and alignments, from the cache if there were such before."""
        strides = (
            () if source is None else source.stride(),
            () if destination is None else destination.stride(),
        )
        alignments = (_alignment(source), _alignment(destination))
        key = (index, strides, alignments, depth)
        if key not in self._tables:
            move = self.plan.moves[index]
            dtypes = (move.source.element_type, move.wire_dtype, move.destination.element_type)
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[key] = make_tables(
                self.programs[index], dtypes, strides, alignments, depth, self.plan.staging_nbytes
            )
        return self._tables[key]


@dataclass(frozen=True, slots=True)
class Memory:
    """The binding of the last call, good for the same tensors in the same place. It does not keep them alive."""

    source: "weakref.ref[torch.Tensor] | None"
    destination: "weakref.ref[torch.Tensor] | None"
    addresses: tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]
    staging: torch.Tensor
    depth: tuple[int, int]
    binding: Binding

    def is_of(
        self,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        depth: tuple[int, int],
    ) -> bool:
        """Whether a call with these may use the binding."""
        return (
            (None if self.source is None else self.source()) is source
            and (None if self.destination is None else self.destination()) is destination
            and self.addresses == (_address(source), _address(destination))
            and self.depth == depth
            and arena(self.binding.tables.arena_nbytes) is self.staging
        )


def _alignment(tensor: torch.Tensor | None) -> int:
    nbytes: int = alignment_nbytes() if tensor is None else alignment_nbytes(tensor)
    return nbytes


def _alias(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Another tensor of the same memory. The one given may go while this stands (a view would keep its base alive)."""
    return None if tensor is None else tensor.detach()


def _address(tensor: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Where a tensor's elements are, which may change under the same object (set_, data)."""
    return (0, ()) if tensor is None else (tensor.data_ptr(), tensor.stride())
