"""Layouts of pieces: what placements say of a box is what each rank holds of it, and formulas can plan it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rules.test_algebra import quick
from tricomm import Mesh, Replicate, Shard, ShardingSpec, make_plan
from tricomm.layout.placement import Placement
from tricomm.rules import Rules, cat, source
from tricomm.rules.models import LLAMA_3_8B, QWEN3_30B_A3B, megatron, torchtitan, torchtitan_layouts, vllm, vllm_layouts
from tricomm.rules.models.layouts import megatron_layouts
from tricomm.rules.views.laid import laid
from tricomm.rules.views.settle import settled
from tricomm.rules.views.view import View


def held(view: View, spec: ShardingSpec, rank: int) -> Any:
    """Sets of places: intervals that touch may be written apart."""
    region = view.region(spec.holding(rank))
    return None if region is None else as_lists(region)


def as_lists(region: Any) -> list[list[int]]:
    return [[at for low, high in intervals for at in range(low, high)] for intervals in region]


def require_alike(view: View, spec: ShardingSpec) -> None:
    """Each rank of the box's layout holds what its part of the tensor has of the box, and no other rank holds any."""
    found = laid(view, spec)
    for rank in spec.mesh.ranks:
        expected = held(view, spec, rank)
        if found is None or rank not in found.mesh:
            assert expected is None
        else:
            region = as_lists(found.holding(rank))
            assert region == expected or (expected is None and [] in region), (view, str(spec), rank)


@st.composite
def layouts(draw: Any, extent: int, other: int, segments: tuple[int, ...] | None) -> ShardingSpec:
    extents = draw(st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=3).filter(lambda one: len(one) < 4))
    ranks = 1
    for one in extents:
        ranks *= one
    nested: Any = list(range(ranks))
    for size in reversed(extents[1:]):
        nested = [nested[at : at + size] for at in range(0, len(nested), size)]
    names = tuple(f"axis{at}" for at in range(len(extents)))
    cuts: list[Placement] = [draw(st.sampled_from((Shard(0, segments=segments), Replicate()))) for _ in extents]
    if draw(st.booleans()):
        cuts = [Shard(1) if isinstance(one, Replicate) and draw(st.booleans()) else one for one in cuts]
    return ShardingSpec(Mesh(nested, names), tuple(cuts), (extent, other), "int32", draw(st.permutations(names)))


@quick
@given(st.data())
def test_placements_say_what_is_held(data: Any) -> None:
    """Heads whose halves are exchanged, grouped heads, segments of several: cut by any axes in any order."""
    heads, groups, size = data.draw(st.sampled_from(((4, 2, 4), (8, 4, 2), (2, 2, 8), (6, 3, 4))))
    q, k, v = (source(name, (rows * size, 4)) for name, rows in (("q", heads), ("k", groups), ("v", groups)))
    pairs = q.unflatten(0, (heads, 2, size // 2)).permute(0, 2, 1, 3).flatten(0, 2)
    repeated = [one.unflatten(0, (groups, 1, size)).expand(-1, 2, -1, -1).flatten(0, 2) for one in (k, v)]
    grouped = cat([one.unflatten(0, (groups, -1)) for one in (q, k, v)], dim=1).flatten(0, 1)
    made = {"pairs": (pairs, None), "grouped": (grouped, None)}
    made["fused"] = (cat([q, k, v]), (heads * size, groups * size, groups * size))
    made["repeated"] = (cat([q, *repeated]), (heads * size, 2 * groups * size, 2 * groups * size))
    first = data.draw(st.sampled_from(("pairs", "grouped", "fused")), label="source")
    second = data.draw(st.sampled_from(sorted(made) if first != "pairs" else ("pairs",)), label="destination")
    here, there = (Rules({name: made[which][0]}, drop=["*"]) for name, which in (("here", first), ("there", second)))
    bound = there.bind() if first == second == "pairs" else here.bind().reverse().then(there.bind())
    tensor = next(one for one in bound.tensors if one.name == "there")
    shapes = bound.source_shapes
    segments = {"here": made[first][1]}
    written = data.draw(layouts(*tensor.shape, made[second][1]))
    for piece in tensor.pieces:
        assert piece.tensor is not None
        name = tensor.sources[piece.tensor]
        read = data.draw(layouts(*shapes[name], segments.get(name)))
        for part in settled(piece, read, written):
            require_alike(View.of(part, True), read)
            require_alike(View.of(part, False), written)


@pytest.mark.parametrize("ranks", [16, 64, 256])
def test_no_weight_of_the_large_models_needs_holdings(ranks: int) -> None:
    """But for vocabularies that are trimmed."""
    count = ranks // 2
    servers = range(ranks, ranks + count)
    llama, qwen = LLAMA_3_8B, QWEN3_30B_A3B
    trained, served = torchtitan(llama).bind(), vllm(llama, tp=4).bind()
    pairs = [
        (
            trained,
            served,
            torchtitan_layouts(trained.shapes, range(ranks)),
            vllm_layouts(llama, served.shapes, servers, tp=4),
        )
    ]
    trained, served = megatron(qwen).bind(), vllm(qwen, tp=8).bind()
    grid = megatron_layouts(qwen, trained.shapes, range(ranks), pp=2, ep=8)
    pairs.append((trained, served, grid, vllm_layouts(qwen, served.shapes, servers, tp=8, expert_parallel=True)))
    for before, after, here, there in pairs:
        for tensor in before.reverse().then(after).tensors:
            if ".layers.0." in tensor.name:
                for piece in tensor.pieces:
                    source_spec = here[tensor.sources[piece.tensor]]
                    for part in settled(piece, source_spec, there[tensor.name]):
                        for view, spec in (
                            (View.of(part, True), source_spec),
                            (View.of(part, False), there[tensor.name]),
                        ):
                            found = laid(view, spec)
                            assert found is not None
                            assert found.holdings is None, tensor.name


def test_chunks_of_pieces_that_differ_in_their_dims() -> None:
    """Large messages of one group, one of a piece of three dims and one of a piece of one."""
    rules = Rules({"a": source("a").unflatten(0, (8, 8)).permute(1, 0, 2).flatten(0, 1), "b": source("b")})
    rows, columns = Mesh(range(20), ("x",)), Mesh(range(20, 40), ("y",))
    back = Mesh(range(39, 19, -1), ("y",))
    here = {
        "a": ShardingSpec(rows, (Shard(1),), (64, 5 << 20), "float32"),
        "b": ShardingSpec(rows, (Shard(0),), (5 << 24,), "float32"),
    }
    there = {"a": ShardingSpec(columns, (Shard(1),)), "b": ShardingSpec(back, (Shard(0),))}
    plan = make_plan(here, there, rules=rules)
    plan.verify()
    assert sum(len(message.chunks) > 1 for message in plan.moves[0].messages) == 40
    programs = plan.for_rank(0)
    assert sum(transfer.nbytes for step in programs[0].rounds for transfer in step.sends) == plan.wire_nbytes // 20
