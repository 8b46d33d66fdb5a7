"""Layouts of unusual kinds: an element in two slots of a rank, mixed reductions, very many axes, lists for tuples."""

import numpy as np
import pytest
import torch

from tests.oracle import coded, pick, require_equal
from tricomm import (
    Auto,
    Broadcast,
    LocalTransport,
    Mesh,
    Partial,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Topology,
    make_plan,
)
from tricomm.layout.intervals import first_runs, joint_runs, without_repeats

PAIR = Mesh([0, 1], ("x",))
EXPERTS = (8, 3)


def slots(holdings: dict[int, list[int]]) -> ShardingSpec:
    """Rank by rank, which of 8 experts stand in its slots."""
    return ShardingSpec.explicit({r: [[(e, e + 1) for e in found], [(0, 3)]] for r, found in holdings.items()}, EXPERTS)


@pytest.mark.parametrize("strategy", [Auto(), SendRecv(), Broadcast(2)], ids=repr)
@pytest.mark.parametrize(
    "holdings",
    [
        {2: [7, 3, 3], 3: [0, 1, 2], 4: [6, 5, 3], 5: [4, 3, 0]},
        {0: [3, 3, 3, 3], 1: [7, 7]},  # kept, and from the other rank
        {1: [0, 1, 0, 1, 2], 2: [2, 1, 0, 2, 1, 0]},
    ],
)
def test_an_element_in_two_slots_comes_once_and_stands_in_both(holdings: dict[int, list[int]], strategy) -> None:
    source = ShardingSpec(PAIR, (Shard(0),), EXPERTS, "bfloat16")
    full = coded(EXPERTS, "bfloat16")
    plan = make_plan(source, slots(holdings), strategy=strategy)
    plan.verify()
    needed = sum(
        3 * 2 * len(set(found) - set(range(4 * r, 4 * r + 4) if r < 2 else ())) for r, found in holdings.items()
    )
    assert plan.minimum_nbytes == plan.wire_nbytes == needed
    result = LocalTransport().run(plan, {rank: pick(full, source, rank) for rank in PAIR.ranks})
    for rank, found in holdings.items():
        require_equal(result[rank], torch.stack([full[expert] for expert in found]), f"rank {rank}")


def test_of_an_element_in_two_slots_the_first_is_read() -> None:
    source = ShardingSpec.explicit({0: [[(0, 4), (2, 6)]]}, (6,), "int64")
    held = torch.tensor([0, 1, 2, 3, -2, -3, 4, 5])
    for destination in (
        ShardingSpec(Mesh([1], ("x",)), (Replicate(),)),
        ShardingSpec(Mesh([0], ("x",)), (Replicate(),)),
    ):
        result = LocalTransport().run(make_plan(source, destination), {0: held})
        assert result[destination.mesh.ranks[0]].tolist() == [0, 1, 2, 3, 4, 5]


def test_intervals_with_repeats() -> None:
    assert without_repeats(((2, 6), (0, 8))) == ((2, 6), (0, 2), (6, 8))
    assert without_repeats(((0, 2), (0, 2))) == ((0, 2),)
    assert [tuple(run) for run in first_runs(((0, 4),), ((0, 3), (1, 4)))] == [(0, 0, 3), (3, 5, 1)]
    assert sorted(joint_runs(((0, 2),), ((0, 2), (0, 2)), ((1, 2), (0, 2)))) == [(0, 1, 2), (1, 0, 1)]


def test_sums_and_averages_commute_and_nothing_else_does() -> None:
    mesh = Mesh([[0, 1, 2], [3, 4, 5]], ("dp", "tp"))
    parts = {rank: torch.full((4,), float(rank * rank)) for rank in mesh.ranks}
    total = sum(rank * rank for rank in mesh.ranks)
    for ops, expected in ((("avg", "sum"), total / 2), (("sum", "avg"), total / 3), (("avg", "avg"), total / 6)):
        source = ShardingSpec(mesh, [Partial(op) for op in ops], (4,), "float32")
        plan = make_plan(source, ShardingSpec(mesh, (Replicate(), Shard(0))))
        plan.verify()
        result = LocalTransport().run(plan, parts)
        assert result[0].tolist() == pytest.approx([expected] * 2)
    assert "sum, divided by 2" in str(
        make_plan(
            ShardingSpec(mesh, (Partial("avg"), Partial()), (4,), "float32"), ShardingSpec(mesh, (Replicate(),) * 2)
        )
    )


def test_an_axis_of_one_rank_reduces_nothing() -> None:
    mesh = Mesh([[0], [1]], ("dp", "tp"))
    source = ShardingSpec(mesh, (Partial("sum"), Partial("max")), (2,), "float32")
    result = LocalTransport().run(
        make_plan(source, ShardingSpec(PAIR, (Shard(0),))), {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([4.0, 8.0])}
    )
    assert [result[0].item(), result[1].item()] == [5.0, 10.0]


def test_a_mesh_has_as_many_axes_as_it_likes() -> None:
    nested = [0, 1]
    for _ in range(64):
        nested = [nested]
    many = Mesh(nested, [f"a{i}" for i in range(65)])
    source = ShardingSpec(many, [*[Replicate()] * 64, Shard(0)], (6,), "int64")
    plan = make_plan(source, ShardingSpec(Mesh([2], ("x",)), (Replicate(),)))
    plan.verify()
    result = LocalTransport().run(plan, {0: torch.arange(3), 1: torch.arange(3, 6)})
    assert result[2].tolist() == list(range(6))


def test_lists_arrays_and_dtypes_are_taken_for_what_they_are() -> None:
    one = ShardingSpec(
        Mesh(np.arange(4).reshape(2, 2), ["a", "b"]), [Shard(0), Shard(0, [2, 2])], [4], torch.bfloat16, [1, 0]
    )
    other = ShardingSpec(Mesh(((0, 1), (2, 3)), ("a", "b")), (Shard(0), Shard(0, (2, 2))), (4,), "bfloat16", ("b", "a"))
    assert one == other
    assert hash(one) == hash(other)
    assert Mesh(torch.arange(4).reshape(2, 2), ["a", "b"]) == one.mesh
    assert Topology(["a", "b"]) == Topology(("a", "b"))
    assert ShardingSpec.explicit({0: [[[0, 4]]]}, [4]) == ShardingSpec.explicit({0: (((0, 4),),)}, (4,))
