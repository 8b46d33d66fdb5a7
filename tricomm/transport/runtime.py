"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tricomm.arithmetic import Reducer
from tricomm.kernels.reference import view, words
from tricomm.packing import (
    StagedTransfer,
    Staging,
    Tables,
    bind_staging,
    copy_locally,
    make_tables,
    torch_dtype,
)
from tricomm.plan import Plan
from tricomm.transport.base import Operation, Transport, Work

MAX_BOUND = 16
"""Combinations of strides that one Resharder keeps tables for."""

Arena = Callable[[int], torch.Tensor]
"""Gives a uint8 tensor of at least so many bytes, valid until the next call."""


class MoveExecution:
    """One run of one move's tables over one rank's tensors.

    Args:
        tables: bound to the strides of both tensors.
        staging: the tables bound to an arena; read and written until the run ends.
        source: the rank's shard, or None; as words where it is packed bit by bit.
        destination: where its new shard goes, or None; as words where it is unpacked bit by bit.
        transport: the rank's end of the network.
    """

    __slots__ = ("buffers", "destination", "source", "staging", "tables", "transport")

    def __init__(
        self,
        tables: Tables,
        staging: Staging,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        transport: Transport,
    ) -> None:
        self.tables = tables
        self.staging = staging
        self.source = source
        self.destination = destination
        self.transport = transport
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}

    def steps(self, meanwhile: Callable[[], None] | None) -> Iterator[Work]:
        """Run; each yielded work must be done before the generator is resumed.

        Args:
            meanwhile: what to do while the first round is under way.

        Round ``index`` is started once what it forwards has come, and round ``index - rounds_open`` is waited for
        and unpacked, whereupon its places in the arena are free. Receives are posted with the rounds before theirs,
        as far ahead as the transport likes.
        """
        tables, count = self.tables, len(self.tables.sends)
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
                works = self.transport.post(self._operations(index, early))
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
            if index == 0 and meanwhile is not None:
                meanwhile()
            done = index - tables.rounds_open
            if 0 <= done < count:
                for work, staged in zip(received[done], self.staging.receives[done], strict=True):
                    yield work
                    if staged is not None:
                        assert self.destination is not None
                        staged.boxes.unpack(self.destination)
                yield from sent[done]

    def _operations(self, index: int, early: range) -> Iterator[Operation]:
        """The receives of the rounds ``early``, then the sends of round ``index``, packed as they are asked for."""
        for step in early:
            for transfer, staged in zip(self.tables.receives[step], self.staging.receives[step], strict=True):
                buffer = _run_of(self.destination, transfer) if staged is None else staged.buffer
                self.buffers[transfer.key] = buffer
                yield Operation(False, transfer.peer, buffer)
        for transfer, staged in zip(self.tables.sends[index], self.staging.sends[index], strict=True):
            if transfer.relay:
                yield Operation(True, transfer.peer, self.buffers[transfer.key])
            elif staged is None:
                yield Operation(True, transfer.peer, _run_of(self.source, transfer))
            else:
                assert self.source is not None
                staged.boxes.pack(self.source)
                yield Operation(True, transfer.peer, staged.buffer)


def _run_of(tensor: torch.Tensor | None, transfer: StagedTransfer) -> torch.Tensor:
    """The bytes of a chunk that is one run of the tensor."""
    assert tensor is not None
    assert transfer.direct_offset is not None
    run: torch.Tensor = view(tensor, (transfer.numel,), transfer.direct_offset, (1,))
    return run.view(torch.uint8)


class PlanExecution:
    """One rank's side of a plan: its tables, made once per combination of strides, and its runs.

    Args:
        plan: global, or built for this rank.
        rank: which side.
        device: where the tensors live.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self.plan = plan
        self.rank = rank
        self.device = device
        self.programs = plan.for_rank(rank)
        self._bound: dict[object, tuple[Tables, Staging]] = {}
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
        move = self.plan.moves[index]
        wire = move.wire_dtype
        tables, staging = self._bind(index, source, destination, arena, transport.depth)
        meanwhile = None
        if tables.copies and source is not None and destination is not None:
            pair = source, destination
            if source.dtype == destination.dtype:
                pair = words(source), words(destination)
            meanwhile = partial(copy_locally, tables, *pair)
        # Bits are packed and unpacked as integers; a side that casts sees the typed tensor.
        if source is not None and tables.packs and move.source.dtype == wire:
            source = words(source)
        if destination is not None and tables.unpacks and move.destination.dtype == wire:
            destination = words(destination)
        return MoveExecution(tables, staging, source, destination, transport).steps(meanwhile)

    def _bind(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        depth: tuple[int, int],
    ) -> tuple[Tables, Staging]:
        """Tables and staging for tensors like these, from the cache if there were such before."""
        key = (
            index,
            None if source is None else source.stride(),
            None if destination is None else destination.stride(),
            depth,
        )
        bound = self._bound.get(key)
        if bound is not None and arena(bound[0].arena_nbytes) is bound[1].arena:
            return bound
        move = self.plan.moves[index]
        dtypes = (move.source.element_type, move.wire_dtype, move.destination.element_type)
        tables = make_tables(
            self.programs[index], dtypes, (key[1] or (), key[2] or ()), depth, self.plan.staging_nbytes
        )
        wire = move.wire_dtype
        staging = bind_staging(
            tables, arena(tables.arena_nbytes), move.source.dtype != wire, move.destination.dtype != wire
        )
        if len(self._bound) >= MAX_BOUND:
            self._bound.clear()
        self._bound[key] = (tables, staging)
        return tables, staging
