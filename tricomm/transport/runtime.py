"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. The order is COSTA's: receives first, then pack and send, local
copies while the network works, and unpack in the order of the rounds.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import torch

from tricomm.kernels.reference import alignment_nbytes
from tricomm.options import ProgressCallback
from tricomm.packing.arithmetic import Reducer
from tricomm.packing.binding import NOTHING, Binding, BoundTransfer, Copies, bind
from tricomm.packing.copy_program import CopyProgram, LocalTensor, make_copy_program, side_of, torch_dtype
from tricomm.packing.holdings import RankHoldings, Tensors
from tricomm.packing.selection import Planned
from tricomm.packing.views import ItemViews
from tricomm.transport.base import NOWHERE, Directions, Operation, Transport, Work
from tricomm.transport.tally import Steps, Tally

MAX_COPY_PROGRAMS = 16
"""Combinations of strides and alignments that one Resharder keeps copy programs for."""

StagingProvider = Callable[[int], torch.Tensor]
"""Gives the staging buffer: a uint8 tensor of at least so many bytes, valid until the next call."""


Way = tuple[tuple[int, int], Directions]
"""The depth of a transport, and where it takes runs of memory in place of buffers."""

Step = tuple[Operation, Copies]
"""A transfer of a round: the operation, and what is to be packed before it or unpacked after it."""


class Bound(NamedTuple):
    """A binding as operations, made once.

    Attributes:
        sends, receives: per round.
        sent, received: (messages, bytes) of a run.
        calls: how many calls end with it.
    """

    binding: Binding
    sends: tuple[tuple[Step, ...], ...]
    receives: tuple[tuple[Step, ...], ...]
    sent: tuple[int, int]
    received: tuple[int, int]
    calls: int


def as_operations(binding: Binding, is_last: bool) -> Bound:
    """Return what a run of a binding posts and copies."""

    def steps(rounds: Sequence[Sequence[BoundTransfer]], is_send: bool) -> tuple[tuple[Step, ...], ...]:
        return tuple(tuple((Operation(is_send, t.peer, t.buffer, t.runs), t.copies) for t in one) for one in rounds)

    def counted(rounds: Sequence[Sequence[BoundTransfer]]) -> tuple[int, int]:
        return sum(map(len, rounds)), sum(t.buffer.numel() for one in rounds for t in one)

    ways = binding.sends, binding.receives
    sent, received = map(counted, ways)
    return Bound(binding, steps(ways[0], True), steps(ways[1], False), sent, received, int(is_last))


def run_move(
    bound: Bound, transport: Transport, tally: Tally, report: Callable[[int], None] | None = None
) -> Iterator[Work]:
    """Run one move of one rank; each yielded work must be done before the generator is resumed.

    Round ``index`` is started once what it forwards has come, and round ``index - rounds_open`` is waited for and
    unpacked, whereupon its places in the staging buffer are free. Receives are posted with the rounds before theirs, as
    far ahead as the transport likes.

    Args:
        bound: the rank's copy program, bound to tensors and a staging buffer; read and written until the run ends.
        transport: the rank's end of the network.
        tally: to which is added what the run costs.
        report: called with the number of each round that is done; with -1 after the local copies.
    """
    binding, sends, receives, sent_counts, received_counts, calls = bound
    program, count, launch = binding.program, len(sends), transport.launch
    received: list[list[Work]] = []
    sent: list[list[Work]] = []
    arrivals: dict[tuple[int, int], Work] = {}
    for index in range(max(count + program.rounds_open, 1)):
        if index < count:
            if program.relays:
                for transfer in program.sends[index]:
                    if transfer.relay:
                        yield from tally.awaited(arrivals[transfer.key])
            early = range(len(received), min(index + program.receives_ahead + 1, count))
            began, packed = perf_counter(), tally.pack_seconds
            works = transport.post(_operations(sends[index], receives, early, launch, tally))
            tally.post_seconds += perf_counter() - began - (tally.pack_seconds - packed)
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
        if index == 0:
            if binding.local is not NOTHING:
                launch(binding.local.run)
            if report is not None:
                report(-1)
        done = index - program.rounds_open
        if 0 <= done < count:
            yield from _retired(received[done], receives[done], sent[done], launch, tally)
            if report is not None:
                report(done)
    tally.calls += calls
    tally.messages += sent_counts[0]
    tally.nbytes += sent_counts[1]
    tally.received_messages += received_counts[0]
    tally.received_nbytes += received_counts[1]
    tally.staging_nbytes = max(tally.staging_nbytes, program.staging_nbytes)


def _retired(
    received: Sequence[Work],
    receives: Sequence[Step],
    sent: Sequence[Work],
    launch: Callable[[Callable[[], None]], None],
    tally: Tally,
) -> Iterator[Work]:
    """Wait for a round and unpack it."""
    began = perf_counter()
    for work, (_, copies) in zip(received, receives, strict=True):
        yield work
        if copies is not NOTHING:
            came = perf_counter()
            launch(copies.run)
            unpacked = perf_counter() - came
            tally.unpack_seconds += unpacked
            began += unpacked
    yield from sent
    tally.wait_seconds += perf_counter() - began


def _operations(
    sends: Sequence[Step],
    receives: Sequence[Sequence[Step]],
    early: range,
    launch: Callable[[Callable[[], None]], None],
    tally: Tally,
) -> Iterator[Operation]:
    """The receives of the rounds ``early``, then the sends of one round, packed as they are asked for."""
    for step in early:
        for operation, _ in receives[step]:
            yield operation
    for operation, copies in sends:
        if copies is not NOTHING:
            began = perf_counter()
            launch(copies.run)
            tally.pack_seconds += perf_counter() - began
        yield operation


class PlanExecution:
    """One rank's side of a plan: its copy programs, made once per combination of strides, and its runs.

    Args:
        plan: global, or built for this rank.
        rank: which side.
        device: where the tensors live.
        progress: called as a run goes on; what it raises ends the run.
    """

    def __init__(
        self, plan: Planned, rank: int, device: torch.device, progress: ProgressCallback | None = None
    ) -> None:
        self.plan = plan
        self._rank = rank
        self.programs = plan.for_rank(rank)
        self.tally = Tally()
        self._progress = progress
        self._holdings = RankHoldings.of(plan, rank)
        self._views = None if plan.ends.bound is None else ItemViews(plan, rank)
        self._is_plain = len(plan.stacks) == 1 and self._holdings.is_in_order
        self._copy_programs: dict[object, CopyProgram] = {}
        self._bindings: dict[int, CachedBinding] = {}
        self._device = device
        self._reducers: dict[int, Reducer] = {}

    def steps(
        self, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport
    ) -> Iterator[Work]:
        """Run the whole plan; each yielded work must be done before the generator is resumed.

        Args:
            sources: the rank's shards, in the order of the plan's sources, of those that it holds; not written.
            destinations: its new shards to fill, likewise of the plan's destinations.
            staging: gives the staging buffer.
            transport: the rank's end of the network.
        """
        if self._views is not None:
            sources, destinations, fills = self._views.of(sources, destinations)
            if fills is not NOTHING:
                transport.launch(fills.run)
        if self._is_plain:
            return self._move(0, sources, destinations, staging, transport)
        if len(self.plan.stacks) == 1:
            order = self._holdings
            return self._move(0, order.sources(sources), order.destinations(destinations), staging, transport)
        return self._reduce_and_move(sources, destinations, staging, transport)

    def items_of(self, sources: Tensors, destinations: Tensors) -> tuple[Tensors, Tensors]:
        """The plan's items that are the rank's shards, or parts of them."""
        return (sources, destinations) if self._views is None else self._views.of(sources, destinations)[:2]

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(sender, receiver) of all that this rank sends and receives."""
        rounds = [step for program in self.programs for step in program.rounds]
        sends = {(self._rank, transfer.peer) for step in rounds for transfer in step.sends}
        return sends | {(transfer.peer, self._rank) for step in rounds for transfer in step.receives}

    def release(self) -> None:
        """Free the buffers of the reductions; the next run makes them again."""
        if self._reducers:
            self._reducers = {}
            self._bindings.clear()

    def _reduce_and_move(
        self, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport
    ) -> Iterator[Work]:
        held, (first, last) = self._holdings, self.plan.stacks
        shards = dict(zip(held.source_items, sources, strict=True))
        stacked = [shards[item].unsqueeze(0) for stack in first for item in stack.items if item in shards]
        reducers = self._made_reducers()
        contributions = [part for reducer in reducers.values() for part in reducer.parts]
        yield from self._move(0, stacked, contributions, staging, transport)
        for reducer in reducers.values():
            transport.launch(reducer.reduce)
        second: list[torch.Tensor] = []
        for stack in last:
            if stack.items[0] in held.partial_items:
                second += reducers[stack.items[0]].results if stack.items[0] in reducers else ()
            else:
                second += [shards[item] for item in stack.items if item in shards]
        yield from self._move(1, second, held.destinations(destinations), staging, transport)

    def _made_reducers(self) -> dict[int, Reducer]:
        """The reducers of the stacks of the first move that this rank reduces, by their first item."""
        if not self._reducers:
            reductions = {one.items[0]: one.reduction for one in self.plan.classes if one.reduction is not None}
            shapes = self.programs[0].destination_shapes
            for number, stack in enumerate(self.plan.stacks[0]):
                if number in shapes:
                    reduction, dtype = reductions[stack.items[0]], torch_dtype(stack.source.element_type)
                    count = len(stack.items)
                    shape = shapes[number] if count > 1 else (1, *shapes[number])
                    reducer = Reducer(reduction.op, reduction.divisor, dtype, shape, self._device)
                    self._reducers[stack.items[0]] = reducer
        return self._reducers

    def _move(
        self, index: int, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport
    ) -> Iterator[Work]:
        """The steps of move ``index``."""
        cached = self._bindings.get(index)
        way = transport.depth, transport.in_place
        if cached is None or not cached.is_of(sources, destinations, staging, way):
            began = perf_counter()
            cached = self._bind(index, sources, destinations, staging, *way)
            self.tally.bind_seconds += perf_counter() - began
        callback = self._progress
        return run_move(
            cached.bound, transport, self.tally, None if callback is None else self._steps.report_of(index, callback)
        )

    @cached_property
    def _steps(self) -> Steps:
        """What progress is reported."""
        return Steps(self.programs, self.plan.stacks)

    def _bind(
        self,
        index: int,
        sources: Tensors,
        destinations: Tensors,
        staging: StagingProvider,
        depth: tuple[int, int],
        in_place: Directions = NOWHERE,
    ) -> "CachedBinding":
        """Bind the copy program to these tensors, and keep that until one of the tensors goes."""
        program = self._copy_program_for(index, sources, destinations, depth)
        buffer = staging(program.staging_nbytes)
        binding = bind(program, [*map(_alias, sources)], [*map(_alias, destinations)], buffer, in_place)
        bindings = self._bindings

        def forget(_: object) -> None:
            bindings.pop(index, None)

        every = (*sources, *destinations)
        cached = CachedBinding(
            [(weakref.ref(tensor, forget), tensor.data_ptr(), tensor.stride()) for tensor in every],
            buffer,
            program.staging_nbytes,
            (depth, in_place),
            as_operations(binding, index + 1 == len(self.plan.stacks)),
        )
        bindings[index] = cached
        return cached

    def _copy_program_for(
        self, index: int, sources: Tensors, destinations: Tensors, depth: tuple[int, int]
    ) -> CopyProgram:
        """The copy program for tensors with these strides and alignments, from the cache if there were such before."""
        of_sources, of_destinations = (tuple(map(_described, tensors)) for tensors in (sources, destinations))
        key = (index, of_sources, of_destinations, depth)
        if key not in self._copy_programs:
            stacks, program = self.plan.stacks[index], self.programs[index]
            if len(self._copy_programs) >= MAX_COPY_PROGRAMS:
                self._copy_programs.clear()
            counts = [len(stack.items) for stack in stacks]
            self._copy_programs[key] = make_copy_program(
                program,
                side_of(of_sources, program.source_shapes, counts),
                side_of(of_destinations, program.destination_shapes, counts),
                [torch_dtype(stack.wire_dtype) for stack in stacks],
                depth,
                self.plan.staging_nbytes,
            )
        return self._copy_programs[key]


@dataclass(frozen=True, slots=True)
class CachedBinding:
    """The binding of the last call, good for the same tensors in the same place. It does not keep them alive."""

    tensors: Sequence[tuple["weakref.ref[torch.Tensor]", int, tuple[int, ...]]]
    staging: torch.Tensor
    staging_nbytes: int
    way: Way
    bound: Bound

    def is_of(self, sources: Tensors, destinations: Tensors, staging: StagingProvider, way: Way) -> bool:
        """Whether a call with these may use the binding."""
        if self.way != way or len(self.tensors) != len(sources) + len(destinations):
            return False
        # Where a tensor's elements are, and its strides, may change under the same object (set_, data).
        for tensor, (reference, address, strides) in zip((*sources, *destinations), self.tensors, strict=True):
            if reference() is not tensor or tensor.data_ptr() != address or tensor.stride() != strides:
                return False
        return staging(self.staging_nbytes) is self.staging


def _described(tensor: torch.Tensor) -> LocalTensor:
    return LocalTensor(tensor.dtype, tensor.stride(), alignment_nbytes(tensor))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory. The one given may go while this stands (a view would keep its base alive)."""
    return tensor.detach()
