"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch

from tricomm.arithmetic import Reducer
from tricomm.kernels import reference
from tricomm.packing import StagedTransfer, Tables, copy_locally, make_tables, torch_dtype
from tricomm.plan import Plan
from tricomm.transport.base import Operation, Transport, Work

Arena = Callable[[int], torch.Tensor]
"""Gives a uint8 tensor of at least so many bytes, valid until the next call."""


class MoveExecution:
    """One run of one move's tables over one rank's tensors.

    Args:
        tables: bound to the strides of both tensors.
        source: the rank's shard, or None.
        destination: where its new shard goes, or None.
        arena: uint8, at least ``tables.arena_nbytes``; read and written until the run ends.
        transport: the rank's end of the network.
    """

    def __init__(
        self,
        tables: Tables,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: torch.Tensor,
        transport: Transport,
    ) -> None:
        wire = tables.wire_dtype
        self.tables = tables
        self.transport = transport
        self.arena = arena
        self.typed_source, self.typed_destination = source, destination
        # Bits move as integers; a side that casts packs and unpacks the typed tensor.
        self.casts_on_send = source is not None and source.dtype != wire
        self.casts_on_receive = destination is not None and destination.dtype != wire
        self.source = _packable(source, self.casts_on_send)
        self.destination = _packable(destination, self.casts_on_receive)
        self.received: dict[int, list[Work]] = {}
        self.sent: dict[int, list[Work]] = {}
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        self.arrivals: dict[tuple[int, int], Work] = {}

    def steps(self) -> Iterator[Work]:
        """Run; each yielded work must be done before the generator is resumed."""
        count = len(self.tables.sends)
        posted = retired = 0
        for index in range(count):
            for transfer in self.tables.sends[index]:
                if transfer.relay:
                    yield self.arrivals[transfer.key]
            posted = self._post(index, posted)
            if index == 0:
                self._copy_locally()
            while retired <= index - self.tables.rounds_open:
                yield from self._retire(retired)
                retired += 1
        if count == 0:
            self._copy_locally()
        for index in range(retired, count):
            yield from self._retire(index)

    def _post(self, index: int, posted: int) -> int:
        """Start the sends of a round and, before them, all receives from round ``posted`` to as many rounds
        ahead as the transport likes, in one group. Returns the first round whose receives are not posted.
        """
        until = min(index + self.tables.receives_ahead + 1, len(self.tables.receives))
        early = range(posted, until)
        operations = chain(*(self._receives(step) for step in early), self._sends(index))
        works = iter(self.transport.post(operations))
        for step in early:
            self.received[step] = [next(works) for _ in self.tables.receives[step]]
            for transfer, work in zip(self.tables.receives[step], self.received[step], strict=True):
                self.arrivals[transfer.key] = work
        self.sent[index] = list(works)
        return until

    def _receives(self, index: int) -> Iterator[Operation]:
        for transfer in self.tables.receives[index]:
            buffer = self._buffer(transfer, self.destination)
            self.buffers[transfer.key] = buffer
            yield Operation(False, transfer.peer, buffer)

    def _sends(self, index: int) -> Iterator[Operation]:
        for transfer in self.tables.sends[index]:
            if transfer.relay:
                yield Operation(True, transfer.peer, self.buffers[transfer.key])
                continue
            buffer = self._buffer(transfer, self.source)
            if transfer.boxes:
                assert self.source is not None
                reference.pack(self.source, transfer.boxes, self._elements(buffer, self.casts_on_send))
            yield Operation(True, transfer.peer, buffer)

    def _retire(self, index: int) -> Iterator[Work]:
        """Wait for a round and unpack it; its places in the arena are free from here on."""
        works = self.received.pop(index)
        for transfer, work in zip(self.tables.receives[index], works, strict=True):
            yield work
            if transfer.boxes:
                assert self.destination is not None
                packed = self._elements(self.buffers[transfer.key], self.casts_on_receive)
                reference.unpack(packed, transfer.boxes, self.destination)
        yield from self.sent.pop(index)

    def _buffer(self, transfer: StagedTransfer, tensor: torch.Tensor | None) -> torch.Tensor:
        """The bytes of a chunk: a run of the tensor itself, or its place in the arena."""
        if transfer.direct_offset is not None:
            assert tensor is not None
            run: torch.Tensor = reference.view(tensor, (transfer.numel,), transfer.direct_offset, (1,))
            return run.view(torch.uint8)
        assert transfer.arena_offset is not None
        nbytes = transfer.numel * self.tables.wire_dtype.itemsize
        return self.arena.narrow(0, transfer.arena_offset, nbytes)

    def _elements(self, buffer: torch.Tensor, casts: bool) -> torch.Tensor:
        """A staged chunk as elements of the wire dtype, or as words where only bits move."""
        return _packable_not_none(buffer.view(self.tables.wire_dtype), casts)

    def _copy_locally(self) -> None:
        source, destination = self.typed_source, self.typed_destination
        if source is None or destination is None:
            return
        casts = source.dtype != destination.dtype
        copy_locally(
            self.tables,
            _packable_not_none(source, casts),
            _packable_not_none(destination, casts),
        )


def _packable_not_none(tensor: torch.Tensor, casts: bool) -> torch.Tensor:
    return tensor if casts else reference.words(tensor)


def _packable(tensor: torch.Tensor | None, casts: bool) -> torch.Tensor | None:
    return None if tensor is None else _packable_not_none(tensor, casts)


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
        self._tables: dict[object, Tables] = {}
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
        if self._reducer is not None:
            stacked = None if source is None else source.unsqueeze(0)
            yield from self._move(0, stacked, self._reducer.contributions, arena, transport)
            source = self._reducer.reduce()
        yield from self._move(len(self.programs) - 1, source, destination, arena, transport)

    def tables(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        depth: tuple[int, int],
    ) -> Tables:
        """The tables of move ``index`` for tensors like these, from the cache if there were such before."""
        strides = (
            () if source is None else source.stride(),
            () if destination is None else destination.stride(),
        )
        key = (index, strides, depth)
        if key not in self._tables:
            move = self.plan.moves[index]
            dtypes = (move.source.element_type, move.wire_dtype, move.destination.element_type)
            if len(self._tables) >= 16:
                self._tables.clear()
            self._tables[key] = make_tables(self.programs[index], dtypes, strides, depth, self.plan.staging_nbytes)
        return self._tables[key]

    def _move(
        self,
        index: int,
        source: torch.Tensor | None,
        destination: torch.Tensor | None,
        arena: Arena,
        transport: Transport,
    ) -> Iterator[Work]:
        tables = self.tables(index, source, destination, transport.depth)
        staging = arena(tables.arena_nbytes)
        yield from MoveExecution(tables, source, destination, staging, transport).steps()
