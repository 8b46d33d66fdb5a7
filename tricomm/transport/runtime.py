"""The one loop that executes a rank's program, whatever the transport.

It is a generator that yields the work it must wait for: the process that owns one rank waits there, the
in-process transport goes on with another rank. ``moving.steps`` is the order.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from time import perf_counter

import torch

from tricomm.kernels.reference import alignment_nbytes
from tricomm.options import ProgressCallback
from tricomm.packing.arithmetic import Reducer
from tricomm.packing.binding import NO_ARENAS as NOTHING_RESERVED
from tricomm.packing.binding import NOTHING, bind
from tricomm.packing.copy_program import CopyProgram, LocalTensor, make_copy_program, side_of, torch_dtype
from tricomm.packing.holdings import RankHoldings, Tensors, tensors_of_rank
from tricomm.packing.selection import Planned, groups_of
from tricomm.packing.views import ItemViews
from tricomm.transport.base import NOWHERE, Directions, Operation, Transport, Work
from tricomm.transport.memory.rungs import PairTransports
from tricomm.transport.moving.direct import Direct, Straight
from tricomm.transport.moving.kept import CachedBinding, Kept, StagingProvider
from tricomm.transport.moving.steps import NOTHING_PULLED, Bound, Send, schedule
from tricomm.transport.tally import Steps, Tally

MAX_COPY_PROGRAMS = 16
"""Combinations of strides and alignments that one Resharder keeps copy programs for."""


def run_move(
    bound: Bound, transport: Transport[Work], tally: Tally, report: Callable[[int], None] | None = None
) -> Iterator[Work]:
    """Run one move of one rank; each yielded work must be done before the generator is resumed.

    Args:
        bound: the rank's copy program, bound to tensors and a staging buffer; read and written until the run ends.
        transport: the rank's end of the network.
        tally: to which is added what the run costs.
        report: called with the number of each round that is done; with -1 after the local copies.
    """
    works: list[Work] = []
    for relayed, receives, sends, rounds in bound.steps:
        began = perf_counter()
        if relayed:
            for number in relayed:
                yield works[number]
            began = tally.waited_since(began)
        if sends:
            packed = tally.pack_seconds
            works += transport.post(_packed(receives, sends, transport.launch, tally))
            began += tally.pack_seconds - packed
        elif receives:
            works += transport.post(receives)
        posted = perf_counter()
        tally.post_seconds += posted - began
        for index, completions in rounds:
            for awaited, unpack in completions:
                if awaited is not None:
                    yield works[awaited]
                if unpack is not None:
                    came = perf_counter()
                    transport.launch(unpack)
                    unpacked = perf_counter() - came
                    tally.unpack_seconds += unpacked
                    posted += unpacked
            if report is not None:
                report(index)
        tally.wait_seconds += perf_counter() - posted
    tally.add(bound)


def _packed(
    receives: Sequence[Operation],
    sends: Sequence[Send],
    launch: Callable[[Callable[[], object]], None],
    tally: Tally,
) -> Iterator[Operation]:
    """Receives, then sends, packed as they are asked for."""
    yield from receives
    for operation, pack in sends:
        if pack is not None:
            began = perf_counter()
            launch(pack)
            tally.pack_seconds += perf_counter() - began
        yield operation


class PlanExecution:
    """One rank's side of a plan: its copy programs, made once per combination of strides, and its runs.

    Args:
        plan: global, or built for this rank.
        rank: which side.
        device: where the tensors live.
        progress: called as a run goes on; what it raises ends the run.
        stays_in_place: whether each run has the sources of the first one, where they were.
    """

    def __init__(
        self,
        plan: Planned,
        rank: int,
        device: torch.device,
        progress: ProgressCallback | None = None,
        stays_in_place: bool = False,
    ) -> None:
        self.plan = plan
        self._rank = rank
        self.programs = plan.for_rank(rank)
        self.groups = groups_of(plan)
        self.tally = Tally()
        self._progress = progress
        self._holdings = RankHoldings.of(plan, rank)
        self._views = None if plan.ends.bound is None else ItemViews(plan, rank)
        self._is_one_move, self._is_in_order = len(plan.stacks) == 1, self._holdings.is_in_order
        self._copy_programs: dict[object, CopyProgram] = {}
        self.kept = Kept()
        self._device = device
        self._reducers: dict[int, Reducer] = {}
        self._direct: Direct | None = None
        if stays_in_place:
            self._direct = Direct(self.programs[0], plan.stacks[0], not self._is_one_move, device)

    def steps(
        self, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport[Work]
    ) -> Iterator[Work]:
        """Run the whole plan; each yielded work must be done before the generator is resumed.

        Args:
            sources: the rank's shards, in the order of the plan's sources, of those that it holds; not written.
            destinations: its new shards to fill, likewise of the plan's destinations.
            staging: gives the staging buffer.
            transport: the rank's end of the network.
        """
        if self._direct is not None:
            sources = self._direct.kept(sources)
        if self._views is not None:
            sources, destinations, fills = self._views.of(sources, destinations)
            if fills is not NOTHING:
                transport.launch(fills.run)
        if not self._is_one_move:
            return self._reduce_and_move(sources, destinations, staging, transport)
        if not self._is_in_order:
            sources, destinations = self._holdings.sources(sources), self._holdings.destinations(destinations)
        return self._move(0, sources, destinations, staging, transport)

    def steps_again(
        self, binding: CachedBinding, staging: StagingProvider, transport: Transport[Work]
    ) -> Iterator[Work] | None:
        """The steps of a call with the tensors of a binding; None if that stands no more."""
        if not binding.stands(staging, (transport.depth, transport.in_place, transport.arenas)):
            return None
        return run_move(binding.bound, transport, self.tally)

    def items_of(self, sources: Tensors, destinations: Tensors) -> tuple[Tensors, Tensors]:
        """The plan's items that are the rank's shards, or parts of them."""
        return (sources, destinations) if self._views is None else self._views.of(sources, destinations)[:2]

    def unfilled(self, destinations: Tensors) -> list[str]:
        """Names of the rank's new shards that have something else where rules fill them."""
        if self._views is None or not self.plan.ends.fills:
            return []
        names = [self.plan.ends.destinations[number].name for number in tensors_of_rank(self.plan, self._rank)[1]]
        return [names[at] for at in self._views.unfilled(destinations)]

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(sender, receiver) of all that this rank sends and receives."""
        rounds = [step for program in self.programs for step in program.rounds]
        sends = {(self._rank, transfer.peer) for step in rounds for transfer in step.sends}
        return sends | {(transfer.peer, self._rank) for step in rounds for transfer in step.receives}

    @property
    def transports(self) -> PairTransports:
        """How pairs go of which more is known than of their connection."""
        return {} if self._direct is None else self._direct.transports

    def close(self) -> None:
        """Nothing is run any more."""
        self.kept.clear()
        if self._direct is not None:
            self._direct.close()

    def release(self) -> None:
        """Free the buffers of the reductions; the next run makes them again."""
        if self._reducers:
            self._reducers = {}
            self.kept.clear()

    def _reduce_and_move(
        self, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport[Work]
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
        self, index: int, sources: Tensors, destinations: Tensors, staging: StagingProvider, transport: Transport[Work]
    ) -> Iterator[Work]:
        """The steps of move ``index``."""
        cached = self.kept.bindings.get(index)
        way = transport.depth, transport.in_place, transport.arenas
        self.kept.is_bound_again = cached is not None and cached.is_of(sources, destinations, staging, way)
        if cached is None or not self.kept.is_bound_again:
            began = perf_counter()
            cached = self._bind(index, sources, destinations, staging, transport)
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
        transport: Transport[Work],
    ) -> "CachedBinding":
        """Bind the copy program to these tensors, and keep that until one of the tensors goes."""
        depth, in_place = transport.depth, transport.in_place
        straight = None if self._direct is None else self._direct.agreed(sources, transport)
        program = self._copy_program_for(index, sources, destinations, depth, transport.arenas.directions, straight)
        arenas = transport.reserve(program.arenas) if program.arenas else NOTHING_RESERVED
        buffer = staging(program.staging_nbytes)
        self.tally.staging_nbytes = max(self.tally.staging_nbytes, program.staging_nbytes)
        read, written = ([*map(_alias, tensors)] for tensors in (sources, destinations))
        binding = bind(program, read, written, buffer, in_place, arenas)
        pulled = NOTHING_PULLED if straight is None else straight.pulled(program.destination, written)
        self.kept.forget(index)
        forget = self.kept.forgetting(index)
        every = (*sources, *destinations)
        cached = CachedBinding(
            [(weakref.ref(tensor, forget), tensor.data_ptr(), tensor.stride()) for tensor in every],
            buffer,
            program.staging_nbytes,
            (depth, in_place, transport.arenas),
            schedule(binding, index + 1 == len(self.plan.stacks), pulled),
        )
        self.kept.bindings[index] = cached
        return cached

    def _copy_program_for(
        self,
        index: int,
        sources: Tensors,
        destinations: Tensors,
        depth: tuple[int, int],
        arenas: Directions = NOWHERE,
        straight: Straight | None = None,
    ) -> CopyProgram:
        """The copy program for tensors with these strides and alignments, from the cache if there were such before."""
        of_sources, of_destinations = (tuple(map(_described, tensors)) for tensors in (sources, destinations))
        key = (index, of_sources, of_destinations, depth, arenas, None if straight is None else straight.ways)
        if key not in self._copy_programs:
            stacks, program = self.plan.stacks[index], self.programs[index]
            if straight is not None:
                program = straight.pulls.rest
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
                arenas,
            )
        return self._copy_programs[key]


def _described(tensor: torch.Tensor) -> LocalTensor:
    return LocalTensor(tensor.dtype, tensor.stride(), alignment_nbytes(tensor))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory. The one given may go while this stands (a view would keep its base alive)."""
    return tensor.detach()
