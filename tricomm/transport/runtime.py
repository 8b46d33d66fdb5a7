"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

from collections.abc import Callable, Iterator

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
        source: the rank's shard, or None; as words where bits move, typed where it is cast before sending.
        destination: where its new shard goes, or None; as words, or typed where it is cast after receiving.
        transport: the rank's end of the network.
    """

    __slots__ = (
        "arrivals",
        "buffers",
        "destination",
        "received",
        "sent",
        "source",
        "staging",
        "tables",
        "transport",
    )

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
        self.received: dict[int, list[Work]] = {}
        self.sent: dict[int, list[Work]] = {}
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        self.arrivals: dict[tuple[int, int], Work] = {}

    def steps(self, copy_locally: Callable[[], None]) -> Iterator[Work]:
        """Run; each yielded work must be done before the generator is resumed.

        Args:
            copy_locally: what to do while the first round is under way.
        """
        count = len(self.tables.sends)
        posted = retired = 0
        for index in range(count):
            for transfer in self.tables.sends[index]:
                if transfer.relay:
                    yield self.arrivals[transfer.key]
            posted = self._post(index, posted)
            if index == 0:
                copy_locally()
            while retired <= index - self.tables.rounds_open:
                yield from self._retire(retired)
                retired += 1
        if count == 0:
            copy_locally()
        for index in range(retired, count):
            yield from self._retire(index)

    def _post(self, index: int, posted: int) -> int:
        """Start the sends of a round and, before them, all receives from round ``posted`` to as many rounds
        ahead as the transport likes, in one group. Returns the first round whose receives are not posted.
        """
        receives = self.tables.receives
        until = min(index + self.tables.receives_ahead + 1, len(receives))
        works = self.transport.post(self._operations(index, range(posted, until)))
        first = 0
        for step in range(posted, until):
            end = first + len(receives[step])
            self.received[step] = works[first:end]
            for transfer, work in zip(receives[step], works[first:end], strict=True):
                self.arrivals[transfer.key] = work
            first = end
        self.sent[index] = works[first:]
        return until

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

    def _retire(self, index: int) -> Iterator[Work]:
        """Wait for a round and unpack it; its places in the arena are free from here on."""
        for work, staged in zip(self.received.pop(index), self.staging.receives[index], strict=True):
            yield work
            if staged is not None:
                assert self.destination is not None
                staged.boxes.unpack(self.destination)
        yield from self.sent.pop(index)


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
        if self._reducer is not None:
            stacked = None if source is None else source.unsqueeze(0)
            yield from self._move(0, stacked, self._reducer.contributions, arena, transport)
            source = self._reducer.reduce()
        yield from self._move(len(self.programs) - 1, source, destination, arena, transport)

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
        casts_on_send, casts_on_receive = move.source.dtype != wire, move.destination.dtype != wire
        tables, staging = self._bind(index, source, destination, arena, transport.depth)
        # Bits move as integers; a side that casts packs or unpacks the typed tensor.
        packable = None if source is None else source if casts_on_send else words(source)
        unpackable = None if destination is None else destination if casts_on_receive else words(destination)

        def copy() -> None:
            if source is None or destination is None or not tables.copies:
                return
            if source.dtype == destination.dtype:
                copy_locally(tables, words(source), words(destination))
            else:
                copy_locally(tables, source, destination)

        return MoveExecution(tables, staging, packable, unpackable, transport).steps(copy)

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
