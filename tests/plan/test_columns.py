"""Plans as columns: the values that objects would be, the tasks of the definition, the choice that trying all makes."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.cases import EXTENTS, Case, cases, specs
from tests.plan.test_plan import planned_afresh, without_indices
from tricomm import (
    Auto,
    Broadcast,
    LocalTransport,
    Mesh,
    Naive,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Split,
    make_plan,
)
from tricomm.layout.columns import IntervalLists, by_first, distinct, numbered, positions, spread
from tricomm.layout.intervals import Region, chunk
from tricomm.plan.choice import ROUNDING, WORTH_IT, assigned_seconds
from tricomm.plan.cost import MessageColumns, busiest_seconds
from tricomm.plan.parts import Part
from tricomm.plan.program import BoxTransfers, transfers
from tricomm.plan.routes.boxes import chunk_boxes
from tricomm.plan.routes.rounds import Hop, Hops
from tricomm.plan.tasks import Task, Tasks, unit_tasks

quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_a_sequence_of_columns_is_the_tuple_of_its_items() -> None:
    items = (Hop(7, 0, 1, 0, 0), Hop(7, 2, 3, 1, 0), Hop(9, 2, 4, 2, 0))
    hops = Hops(np.array(items))
    assert hops == items
    assert items == hops
    assert hops == Hops(np.array(items))
    assert hash(hops) == hash(items)
    assert repr(hops) == repr(items)
    assert (len(hops), hops[0], hops[-1], hops[1:], hops[::-1]) == (3, items[0], items[2], items[1:], items[::-1])
    assert type(hops[0]) is Hop
    assert all(type(value) is int for value in hops[1])
    assert items[1] in hops
    assert hops not in (items[:2], (*items, items[0]), (items[0], items[1], items[0]), 3)
    with pytest.raises(IndexError):
        hops[3]


small = st.lists(st.integers(-3, 5), max_size=12).map(lambda values: np.array(values, np.int64))


@quick
@given(values=small, wanted=small)
def test_the_helpers_do_what_numpy_unique_does(values: np.ndarray, wanted: np.ndarray) -> None:
    known, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    assert distinct(values).tolist() == known.tolist() == numbered(values)[0].tolist()
    assert numbered(values)[1].tolist() == inverse.reshape(-1).tolist()
    firsts, place = by_first(values)
    assert firsts.tolist() == sorted(first.tolist())
    assert values[firsts][place].tolist() == values.tolist()
    table = known.tolist()
    assert positions(known, wanted).tolist() == [table.index(value) if value in table else -1 for value in wanted]


def test_spread_lists_the_rows_of_groups() -> None:
    offsets = np.array([0, 2, 2, 5])
    assert spread(offsets, np.array([2, 1, 0, 2])).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]


@quick
@given(lists=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), parts=st.integers(1, 5))
def test_many_lists_are_cut_as_each_alone(lists: list[tuple[int, int]], parts: int) -> None:
    held = [((start, start + size),) if size else () for start, size in lists]
    assert list(IntervalLists.of(held).chunks(parts)) == [chunk(one, parts, i) for one in held for i in range(parts)]


def elements(regions: tuple[Region, ...]) -> list[tuple[int, ...]]:
    return [
        element
        for region in regions
        for element in product(*([i for start, stop in intervals for i in range(start, stop)] for intervals in region))
    ]


@st.composite
def spec_pairs(draw: Any) -> tuple[ShardingSpec, ShardingSpec]:
    """Also explicit ones, whose parts overlap."""
    shape = tuple(draw(st.lists(EXTENTS, max_size=3)))
    return draw(specs(shape, "float32", whole=True)), draw(specs(shape, "float32"))


@quick
@given(pair=spec_pairs())
def test_tasks_are_what_the_holdings_say(pair: tuple[ShardingSpec, ShardingSpec]) -> None:
    source, destination = pair
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    receivers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for spec, ranks_of in ((source, holders), (destination, receivers)):
        for rank in spec.mesh.ranks:
            for element in dict.fromkeys(elements((spec.holding(rank),))):  # one in two slots is needed once
                ranks_of[element].append(rank)
    tasks = unit_tasks(source, destination)
    found = {
        element: (task.holders, task.receivers)
        for task in tasks
        for element in elements(tuple(part.region for part in task.parts))
    }
    assert found == {element: (tuple(holders[element]), tuple(ranks)) for element, ranks in receivers.items()}
    assert sum(task.nbytes for task in tasks) == 4 * len(found)
    assert len({(task.holders, task.receivers) for task in tasks}) == len(tasks)
    for rank in {*source.mesh.ranks, *destination.mesh.ranks}:
        alone = unit_tasks(source, destination, rank)
        assert sorted(alone, key=repr) == sorted((t for t in tasks if rank in t.holders + t.receivers), key=repr)
        kept = [part for parts in tasks.kept_by(rank) for part in parts]
        assert kept == [
            part for task in tasks if rank in task.holders and rank in task.receivers for part in task.parts
        ]


@st.composite
def lonely(draw: Any) -> Case:
    """Cases in which a rank can plan alone."""
    case: Case = draw(cases())
    assume(not case.source.partial_axes)
    strategy, balance = SendRecv(draw(st.sampled_from([None, 64]))), Naive()
    if case.destination.exclusive and draw(st.booleans()):
        strategy = Auto()
    if case.source.exclusive and draw(st.booleans()):
        balance = Split()
    return Case(case.source, case.destination, strategy, balance, case.topology, case.staging_bytes)


@quick
@given(case=lonely())
def test_every_rank_alone_finds_its_program_of_the_plan_of_all(case: Case) -> None:
    everyone = planned_afresh(case)
    for rank in everyone.participants:
        alone = make_plan(case.source, case.destination, **case.plan_arguments(), rank=rank)
        assert alone.rank == rank
        assert [*map(without_indices, alone.for_rank(rank))] == [*map(without_indices, everyone.for_rank(rank))]


def test_one_rank_of_many_makes_no_objects_and_finds_its_boxes() -> None:
    ranks, rank = 500, 7
    source = ShardingSpec(Mesh(range(ranks), ("x",)), (Shard(0),), (2 * ranks, 3 * ranks), "float32")
    plan = make_plan(source, ShardingSpec(Mesh(range(ranks, 2 * ranks), ("x",)), (Shard(1),)), rank=rank)
    (program,) = plan.for_rank(rank)
    assert all(isinstance(step.sends, BoxTransfers) for step in program.rounds if step.sends)
    sends = sorted(transfer for step in program.rounds for transfer in step.sends)
    assert [transfer.peer for transfer in sends] == list(range(ranks, 2 * ranks))
    for index, transfer in enumerate(sends):
        ((_, offset, shape, ((start, packed_start, extent),)),) = transfer.regions
        assert (offset, shape, start, packed_start, extent) == (0, (2, 3), (0, 3 * index), (0, 0), (2, 3))
        assert transfer.nbytes == 24


@pytest.mark.parametrize("replicas", [1, 5])
def test_chunks_of_stacks_are_the_boxes_of_their_parts(replicas: int) -> None:
    """Layers as one stack: a chunk may end within a layer, and then it is several boxes."""
    source = ShardingSpec(Mesh(range(40), ("x",)), (Shard(0),), (90, 1000), "float32")
    mesh = Mesh(np.arange(40, 40 + 4 * replicas).reshape(replicas, 4).tolist(), ("dp", "tp"))
    names = [f"layer {number}" for number in range(7)]
    there = dict.fromkeys(names, ShardingSpec(mesh, (Replicate(), Shard(1)), (90, 1000), "float32"))
    plan = make_plan(dict.fromkeys(names, source), there, staging_bytes=100_000)
    plan.verify()
    (move,) = plan.moves
    keys = [(row, chunk) for row, message in enumerate(move.messages) for chunk in range(len(message.chunks))]
    found = chunk_boxes(move.messages, *np.array(keys).T)
    assert found is not None
    firsts, starts, stops = found
    assert np.diff(firsts).max() > 1
    for at, (row, number) in enumerate(keys):
        boxes = [tuple(interval for (interval,) in part.region) for part in move.messages[row].chunks[number]]
        rows = slice(firsts[at], firsts[at + 1])
        assert [
            tuple(zip(*edges, strict=True)) for edges in zip(starts[rows].tolist(), stops[rows].tolist(), strict=True)
        ] == boxes
    for rank in (0, 39, 40, plan.participants[-1]):
        for is_send in (True, False):
            for _, columns in transfers(move, rank, is_send):
                assert isinstance(columns, BoxTransfers)
                for one in columns:
                    assert one.nbytes == move.messages[one.key[0]].chunk_nbytes(one.key[1])
                    offset = 0
                    for region in one.regions:
                        assert region.offset_nbytes == offset
                        offset += 4 * int(np.prod(region.shape))
                    assert offset in ((one.nbytes,) if one.regions else (0,))


def test_a_program_is_made_once_for_equal_tensors() -> None:
    specs_of = [
        (
            ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (12, 8), "float32"),
            ShardingSpec(Mesh([2], ("x",)), (Replicate(),)),
        )
        for _ in range(2)
    ]
    first, second = (make_plan(*pair, rank=0).for_rank(0) for pair in specs_of)
    assert first is second


@quick
@given(case=cases())
def test_bounds_hold_and_auto_takes_what_trying_all_would_take(case: Case) -> None:
    arguments = {**case.plan_arguments(), "strategy": Auto()}
    chosen = make_plan(case.source, case.destination, **arguments)
    tried = [
        make_plan(case.source, case.destination, **{**arguments, "strategy": strategy})
        for strategy in Auto().candidates
    ]
    for index, move in enumerate(chosen.moves):
        best: Any = None
        for plan in tried:
            other = plan.moves[index]
            seconds = plan_seconds(plan, index)
            assigned = case.balance.assign(other.tasks, plan.topology, other.strategies[0].fan_out)
            bounds = (
                assigned_seconds(assigned, plan.topology, other.strategies[0].fan_out),
                busiest_seconds(MessageColumns.of(other.messages), plan.topology),
            )
            if other.messages:
                assert max(bounds) * (1 - ROUNDING) <= seconds
            if best is None or seconds < best[0] * (1 - WORTH_IT):
                best = (seconds, other)
        several = any(len(task.remote_receivers) > 1 for task in move.tasks)
        assert move == (best[1] if several else tried[0].moves[index])


def plan_seconds(plan: Any, index: int) -> float:
    return replace(plan, moves=(plan.moves[index],)).simulated_seconds()


def test_tasks_compare_with_tuples_of_tasks() -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (4,), "float32")
    tasks = unit_tasks(source, ShardingSpec(Mesh([2], ("x",)), (Replicate(),), (4,), "float32"))
    assert isinstance(tasks, Tasks)
    assert tasks == (Task((Part(0, 4, (((0, 2),),)),), (0,), (2,)), Task((Part(0, 4, (((2, 4),),)),), (1,), (2,)))


@pytest.mark.parametrize("strategy", [SendRecv(1), Broadcast(1), Auto()])
def test_a_tensor_without_dims_is_one_chunk_however_small_chunks_are(strategy: Any) -> None:
    source = ShardingSpec(Mesh([1], ("x",)), (Replicate(),), (), "float64")
    plan = make_plan(source, ShardingSpec.explicit({0: ()}, (), "float64"), strategy=strategy)
    plan.verify()
    value = torch.tensor(3.0, dtype=torch.float64)
    assert torch.equal(LocalTransport().run(plan, {1: value})[0], value)


def test_a_rank_may_be_an_integer_of_any_kind() -> None:
    plan = make_plan(*(ShardingSpec(Mesh([rank], ("x",)), (Shard(0),), (4,), "float32") for rank in range(2)))
    for one in (np.int64(1), np.array(1), torch.tensor(1)):
        assert plan.for_rank(one) is plan.for_rank(1)
