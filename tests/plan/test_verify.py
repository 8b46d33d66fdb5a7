"""Faults that an earlier proof let through."""

from dataclasses import replace

import pytest

from tricomm import Mesh, Partial, Plan, PlanError, Replicate, SendRecv, Shard, ShardingSpec, make_plan

MESH = Mesh([0, 1], ("x",))
OTHERS = Mesh([2, 3], ("x",))
ROWS = ShardingSpec(MESH, (Shard(0),), (12, 8), "float32")
COLUMNS = ShardingSpec(OTHERS, (Shard(1),), (12, 8), "float32")


def wrong(plan: Plan) -> None:
    with pytest.raises(PlanError, match="the plan is wrong"):
        plan.verify()


def test_elements_that_arrive_twice_in_one_region() -> None:
    plan = make_plan(ROWS, COLUMNS)
    move = plan.moves[0]
    first = move.messages[0]
    part = first.chunks[0][0]
    rows, columns = part.region
    doubled = replace(first, chunks=((part._replace(region=(rows + rows, columns)),), *first.chunks[1:]))
    wrong(replace(plan, moves=(replace(move, messages=(doubled, *move.messages[1:])),)))


def test_moves_that_do_not_lead_from_source_to_destination() -> None:
    plan = make_plan(replace(ROWS, placements=(Partial(),)), COLUMNS)
    for moves in ((), plan.moves[:1], plan.moves[1:], plan.moves[::-1]):
        wrong(replace(plan, moves=moves))
    (item,), (one,) = plan.items, plan.classes
    wrong(replace(plan, items=(replace(item, destination=replace(COLUMNS, placements=(Replicate(),))),)))
    wrong(replace(plan, classes=(replace(one, reduction=None),)))


@pytest.mark.parametrize("chunk", [-1, 9])
def test_a_chunk_that_does_not_exist(chunk: int) -> None:
    plan = make_plan(ROWS, COLUMNS, strategy=SendRecv(64))
    move = plan.moves[0]
    hops = (move.hops[0]._replace(chunk=chunk), *move.hops[1:])
    wrong(replace(plan, moves=(replace(move, hops=hops),)))
