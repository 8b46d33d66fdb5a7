"""Who holds what, against torch.chunk applied to the coordinates themselves; and the intervals underneath."""

import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import tricomm
from tests.cases import EXTENTS, Case, cases, meshes, placements
from tests.oracle import coded, pick, require_equal
from tests.test_house import ROOT
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, Topology, local_shard, make_plan
from tricomm.layout.intervals import (
    Intervals,
    Run,
    chunk,
    clip,
    joint_runs,
    length,
    merged,
    runs,
    take,
)
from tricomm.layout.part_table import part_table

quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def cut(coordinates: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    """Part ``index`` of torch.chunk, which leaves out the parts that hold nothing."""
    pieces = coordinates.chunk(parts)
    return pieces[index] if index < len(pieces) else coordinates[:0]


def defined(mesh: Mesh, places: Any, shape: tuple[int, ...], order: Any, rank: int) -> list[list[int]]:
    """THE DEFINITION: the coordinates that a rank holds along every dim, in local order."""
    held = [torch.arange(extent) for extent in shape]
    for axis in order or range(mesh.ndim):
        if not isinstance(places[axis], Shard):
            continue
        dim = places[axis].dim % len(shape)
        start, parts = 0, []
        for size in places[axis].segments or (shape[dim],):
            segment = held[dim][(held[dim] >= start) & (held[dim] < start + size)]
            parts.append(cut(segment, mesh.shape[axis], mesh.coordinate(rank)[axis]))
            start += size
        held[dim] = torch.cat(parts)
    return [coordinates.tolist() for coordinates in held]


def expand(intervals: Intervals) -> list[int]:
    return [coordinate for start, stop in intervals for coordinate in range(start, stop)]


def require_defined(mesh: Mesh, places: Any, shape: tuple[int, ...], order: Any = None) -> None:
    spec = ShardingSpec(mesh, places, shape, "int32", order)
    for rank in mesh.ranks:
        expected = defined(mesh, places, shape, order, rank)
        holding = spec.holding(rank)
        assert [expand(intervals) for intervals in holding] == expected
        assert holding == tuple(merged(intervals) for intervals in holding)
        assert spec.local_shape(rank) == tuple(len(coordinates) for coordinates in expected)
        table = part_table(spec)
        parts = zip(table.parts, table.part_of[mesh.position(rank)], strict=True)
        assert tuple(options[part] for options, part in parts) == holding


LINE = Mesh([0, 1, 2], ("x",))
GRID = Mesh([[0, 1, 2], [3, 4, 5]], ("a", "b"))
CUBE = Mesh([[[7, 6], [5, 4]], [[3, 2], [1, 0]]], ("a", "b", "c"))


@pytest.mark.parametrize("extent", [9, 10, 11, 2, 1, 0])
def test_shard_is_torch_chunk(extent: int) -> None:
    require_defined(LINE, (Shard(0),), (extent,))
    require_defined(LINE, (Shard(-2),), (extent, 5))


@pytest.mark.parametrize("extent", [24, 25, 26, 7, 5, 1, 0])
@pytest.mark.parametrize("order", [None, (0, 1), (1, 0)])
def test_several_axes_on_one_dim_are_nested_chunks(extent: int, order: Any) -> None:
    require_defined(GRID, (Shard(1), Shard(1)), (2, extent), order)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_axes_on_one_dim_cut_in_the_given_order(order: tuple[int, ...]) -> None:
    require_defined(CUBE, (Shard(0), Shard(0), Shard(0)), (17,), order)
    require_defined(CUBE, (Shard(0), Shard(1), Shard(0)), (17, 3), order)


@pytest.mark.parametrize("segments", [(8, 4, 4), (1, 15), (0, 16), (16,), (5, 0, 2, 9), (3, 13)])
@pytest.mark.parametrize("order", [None, (1, 0)])
def test_each_segment_is_chunked_on_its_own(segments: tuple[int, ...], order: Any) -> None:
    shape = (16, 3)
    require_defined(LINE, (Shard(0, segments),), shape)
    for second in (Replicate(), Shard(1), Shard(0), Shard(0, segments), Shard(0, (6, 10))):
        require_defined(GRID, (Shard(0, segments), second), shape, order)
        require_defined(GRID, (second, Shard(0, segments)), shape, order)


def test_replicate_and_partial_cut_nothing() -> None:
    require_defined(GRID, (Replicate(), Partial()), (4, 5))
    require_defined(GRID, (Partial("max"), Replicate()), ())
    require_defined(GRID, (Shard(0), Replicate()), (5, 4))


@quick
@given(data=st.data())
def test_holdings_follow_the_definition(data: st.DataObject) -> None:
    mesh = data.draw(meshes())
    shape = tuple(data.draw(st.lists(EXTENTS, max_size=4)))
    order = data.draw(st.none() | st.permutations(range(mesh.ndim)).map(tuple))
    require_defined(mesh, placements(data.draw, mesh, shape, "sum"), shape, order)


def torch_placement(placement: Shard | Replicate) -> Any:
    return TorchShard(placement.dim) if isinstance(placement, Shard) else TorchReplicate()


def require_like_torch(spec: ShardingSpec, theirs: list[Any]) -> None:
    """The local shape and the first coordinate that torch computes."""
    for rank in spec.mesh.ranks:
        coordinate = list(spec.mesh.coordinate(rank))
        shape, offset = _compute_local_shape_and_global_offset(spec.global_shape, spec.mesh.shape, coordinate, theirs)
        assert spec.local_shape(rank) == shape
        if 0 not in shape:
            assert tuple(intervals[0][0] for intervals in spec.holding(rank)) == offset


@pytest.mark.parametrize("shape", [(12, 8), (13, 7), (2, 1), (5, 0)])
def test_placements_mean_what_they_mean_in_torch(shape: tuple[int, ...]) -> None:
    for mesh in (GRID, CUBE):
        for places in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=mesh.ndim):
            require_like_torch(ShardingSpec(mesh, places, shape), [torch_placement(place) for place in places])


def test_the_inner_axis_first_is_torch_strided_shard() -> None:
    spec = ShardingSpec(GRID, (Shard(0), Shard(0)), (24, 5), axis_order=("b", "a"))
    require_like_torch(spec, [_StridedShard(0, split_factor=3), TorchShard(0)])


@quick
@given(case=cases())
def test_local_shard_takes_the_holding_out_of_the_full_tensor(case: Case) -> None:
    spec = replace(case.destination, dtype="int32")
    full = coded(spec.global_shape, "int32")
    for rank in spec.mesh.ranks:
        require_equal(local_shard(full, spec, rank), pick(full, spec, rank), f"rank {rank}")


# ---- the ways to write a spec


@pytest.mark.parametrize(
    ("dims", "places", "order"),
    [
        (("S01", "R", "S2"), (Shard(0), Shard(0), Shard(2)), (0, 1, 2)),
        (("S10", "R"), (Shard(0), Shard(0), Replicate()), (1, 0, 2)),
        (("R", "S2"), (Replicate(), Replicate(), Shard(1)), None),
        (("S201",), (Shard(0), Shard(0), Shard(0)), ("c", "a", "b")),
        (("S1", "S20"), (Shard(1), Shard(0), Shard(1)), (2, 1, 0)),
        (("R", "R"), (Replicate(), Replicate(), Replicate()), None),
        ((), (Replicate(), Replicate(), Replicate()), None),
    ],
)
def test_the_papers_letters_mean_the_placements(dims: tuple[str, ...], places: Any, order: Any) -> None:
    shape = tuple(range(16, 16 + len(dims)))
    spec = ShardingSpec.from_dims(CUBE, dims, shape, "int8")
    assert spec == ShardingSpec(CUBE, places, shape, "int8", order)
    assert spec.notation == (" ".join(dims) or "scalar")
    for rank in CUBE.ranks:
        assert [expand(intervals) for intervals in spec.holding(rank)] == defined(
            CUBE, places, shape, spec.axis_order, rank
        )


def plain(spec: ShardingSpec) -> bool:
    """Whether the paper's letters can say it: no explicit intervals, no segments, no contributions."""
    shards = [placement for placement in spec.placements if not isinstance(placement, Replicate)]
    return spec.holdings is None and all(isinstance(shard, Shard) and not shard.segments for shard in shards)


@quick
@given(case=cases())
def test_the_notation_reads_back(case: Case) -> None:
    for spec in (case.source, case.destination):
        if plain(spec) and spec.shape:
            assert ShardingSpec.from_dims(spec.mesh, spec.notation.split(), spec.shape, spec.dtype) == spec


def as_explicit(spec: ShardingSpec) -> ShardingSpec:
    holdings = {rank: spec.holding(rank) for rank in spec.mesh.ranks}
    return ShardingSpec.explicit(holdings, spec.global_shape, spec.dtype)


@quick
@given(case=cases())
def test_every_layout_reduces_to_an_explicit_one(case: Case) -> None:
    for spec in (case.source, case.destination):
        explicit = as_explicit(spec)
        assert all(explicit.local_shape(rank) == spec.local_shape(rank) for rank in spec.mesh.ranks)
        assert all(explicit.holding(rank) == spec.holding(rank) for rank in spec.mesh.ranks)
    if not case.source.partial_axes:
        plan = make_plan(case.source, case.destination)
        explicit_plan = make_plan(as_explicit(case.source), as_explicit(case.destination))
        explicit_plan.verify()
        assert explicit_plan.wire_nbytes == plan.wire_nbytes


def require_repr_evaluates(value: object) -> None:
    again = eval(repr(value), vars(tricomm))
    assert again == value
    assert hash(again) == hash(value)
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        Mesh([3], ("only",)),
        GRID,
        CUBE,
        Shard(-1),
        Shard(1, (4, 0, 2)),
        Shard(0, [3]),  # type: ignore[arg-type]
        Replicate(),
        Partial(),
        Partial("avg"),
        ShardingSpec(GRID, (Shard(0), Shard(0)), (7, 8), "bfloat16", ("b", "a")),
        ShardingSpec(GRID, (Partial("max"), Shard(-1))),
        ShardingSpec(LINE, (Shard(0, (2, 3)),), (5,)),
        ShardingSpec(LINE, (Replicate(),), (), torch.float32),  # type: ignore[arg-type]
        ShardingSpec.explicit({4: (((8, 12), (0, 4)), ((0, 16),)), 1: ((), ((0, 0),))}, (12, 16), "int8"),
        Topology(("a", "b"), nics_per_host=2, latency_seconds=0.0),
    ],
    ids=repr,
)
def test_repr_evaluates_to_an_equal_value(value: object) -> None:
    require_repr_evaluates(value)


@quick
@given(case=cases())
def test_repr_of_any_spec_evaluates_to_an_equal_spec(case: Case) -> None:
    require_repr_evaluates(case.source)
    require_repr_evaluates(case.destination)


def test_the_order_of_axes_that_share_no_dim_does_not_matter() -> None:
    def ordered(*order: Any) -> ShardingSpec:
        return ShardingSpec(CUBE, (Shard(0), Replicate(), Shard(0)), (8, 8), "int8", order or None)

    outer_first = {ordered(), ordered(0, 1, 2), ordered(1, 0, 2), ordered(0, 2, 1), ordered("a", "c", "b")}
    inner_first = {ordered(2, 0, 1), ordered(2, 1, 0), ordered(1, 2, 0), ordered("c", "b", "a")}
    assert len(outer_first) == len(inner_first) == 1
    assert outer_first.isdisjoint(inner_first)


def test_an_explicit_spec_is_kept_in_order_of_ranks_and_without_needless_cuts() -> None:
    one = ShardingSpec.explicit({5: (((0, 2), (2, 4), (4, 4)),), 2: (((6, 8), (4, 6)),)}, (8,), "int8")
    other = ShardingSpec.explicit({2: (((6, 8), (4, 6)),), 5: (((0, 4),),)}, [8], torch.int8)  # type: ignore[arg-type]
    assert one == other
    assert hash(one) == hash(other)
    assert one.mesh.ranks == (2, 5)
    assert expand(one.holding(2)[0]) == [6, 7, 4, 5]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            ShardingSpec(GRID, (Replicate(), Shard(0)), (4096, 1024), "float32"),
            "float32[4096/b, 1024] replicated over a on (a=2 b=3: ranks 0-5)",
        ),
        (
            ShardingSpec(GRID, (Shard(1), Shard(1)), (8, 9), None, (1, 0)),
            "any[8, 9/b/a] on (a=2 b=3: ranks 0-5)",
        ),
        (
            ShardingSpec(CUBE, (Partial("avg"), Shard(0, (4, 2)), Replicate()), (6,), "int8"),
            "int8[6/b{4,2}] avg over a replicated over c on (a=2 b=2 c=2: ranks 7,6,5,4,3,2,1,0)",
        ),
        (ShardingSpec(Mesh([9], ("x",)), (Replicate(),), ()), "any[] replicated over x on (x=1: rank 9)"),
        (ShardingSpec.explicit({3: (((0, 2),),)}, (2,), "bool"), "bool[2] explicit on (rank=1: rank 3)"),
        (ShardingSpec(LINE, (Shard(-1),)), "any[...] x: Shard(-1) on (x=3: ranks 0-2)"),
        (ShardingSpec(LINE, (Shard(2),)), "any[?, ?, ?/x, ...] on (x=3: ranks 0-2)"),
    ],
    ids=str,
)
def test_str_names_the_axes_that_cut_each_dim(spec: ShardingSpec, text: str) -> None:
    assert str(spec) == text


def test_a_spec_takes_shape_and_dtype_from_another_where_it_has_none() -> None:
    source = ShardingSpec(GRID, (Shard(0), Replicate()), (7, 8), "float32")
    assert ShardingSpec(LINE, (Shard(-1),)).resolved(source) == ShardingSpec(LINE, (Shard(1),), (7, 8), "float32")
    cast = ShardingSpec(LINE, (Shard(1),), dtype="bfloat16")
    assert cast.resolved(source) == ShardingSpec(LINE, (Shard(1),), (7, 8), "bfloat16")
    assert source.resolved(cast) is source


# ---- intervals, expanded to lists of coordinates


@st.composite
def interval_lists(draw: Any, within: list[int] | None = None) -> Intervals:
    """Disjoint intervals in any order, some empty, some next to each other; or only of some coordinates."""
    edges = sorted(draw(st.lists(st.integers(0, 24), max_size=10)))
    pieces = [(start, stop) for start, stop in itertools.pairwise(edges) if draw(st.booleans())]
    if within is not None:
        chosen = [coordinate for coordinate in expand(tuple(pieces)) if coordinate in within]
        pieces = [(coordinate, coordinate + 1) for coordinate in chosen]
        if draw(st.booleans()):
            pieces = list(merged(pieces))
    return tuple(draw(st.permutations(pieces)))


@quick
@given(intervals=interval_lists(), low=st.integers(0, 24), high=st.integers(0, 24), parts=st.integers(1, 9))
def test_merged_clip_take_and_chunk_are_what_they_are_for_lists(
    intervals: Intervals, low: int, high: int, parts: int
) -> None:
    coordinates = expand(intervals)
    assert length(intervals) == len(coordinates)
    joined = merged(intervals)
    assert expand(joined) == coordinates
    assert all(start < stop for start, stop in joined)
    assert all(first[1] != second[0] for first, second in itertools.pairwise(joined))
    assert expand(clip(intervals, low, high)) == [c for c in coordinates if low <= c < high]
    assert expand(take(intervals, low, high)) == coordinates[low:high]
    for index in range(parts):
        assert expand(chunk(intervals, parts, index)) == cut(torch.tensor(coordinates), parts, index).tolist()


def runs_by_definition(inner: list[int], outer: list[int]) -> tuple[Run, ...]:
    """As long as possible, in the order of ``inner``."""
    result: list[Run] = []
    for position, coordinate in enumerate(inner):
        at = outer.index(coordinate)
        if result and at == result[-1].outer_start + result[-1].length:
            result[-1] = result[-1]._replace(length=result[-1].length + 1)
        else:
            result.append(Run(position, at, 1))
    return tuple(result)


@quick
@given(data=st.data())
def test_runs_are_the_longest_stretches_that_both_lists_share(data: st.DataObject) -> None:
    outer = data.draw(interval_lists())
    inner = data.draw(interval_lists(expand(outer)))
    assert runs(inner, outer) == runs_by_definition(expand(inner), expand(outer))


@quick
@given(data=st.data())
def test_joint_runs_pair_the_positions_of_every_coordinate(data: st.DataObject) -> None:
    first = data.draw(interval_lists())
    second = data.draw(interval_lists())
    both = [coordinate for coordinate in expand(first) if coordinate in expand(second)]
    inner = data.draw(interval_lists(both))
    found = [(a + step, b + step) for a, b, count in joint_runs(inner, first, second) for step in range(count)]
    assert found == [(expand(first).index(c), expand(second).index(c)) for c in expand(inner)]


def test_the_order_of_cuts_survives_a_shape_that_comes_later() -> None:
    mesh = Mesh([[0, 1], [2, 3]], ("a", "b"))
    late = ShardingSpec(mesh, (Shard(-1), Shard(0)), axis_order=("b", "a"))
    early = ShardingSpec(mesh, (Shard(-1), Shard(0)), (8,), "int8", ("b", "a"))
    resolved = late.resolved(early)
    assert resolved == early
    assert resolved.holding(1) == (((4, 6),),)
    assert late != ShardingSpec(mesh, (Shard(-1), Shard(0)), axis_order=("a", "b"))
    assert "Shard(-1)" in str(late)


def test_an_empty_interval_overlaps_nothing() -> None:
    spec = ShardingSpec.explicit({0: (((0, 8), (4, 4)),)}, (8,), "int8")
    assert spec.holding(0) == (((0, 8),),)


def test_a_mesh_without_axes_holds_one_rank() -> None:
    one = ShardingSpec(Mesh(3, ()), (), (4,), "int8")
    plan = make_plan(one, ShardingSpec(Mesh([1, 2], ("x",)), (Shard(0),)))
    plan.verify()
    assert plan.wire_nbytes == 4


def test_segments_stand_at_their_axis() -> None:
    mesh = Mesh([[0, 1], [2, 3]], ("a", "b"))
    first = ShardingSpec(mesh, (Shard(0, (2, 6)), Shard(0)), (8,), "int8")
    second = ShardingSpec(mesh, (Shard(0), Shard(0, (2, 6))), (8,), "int8")
    assert (first.notation, second.notation) == ("S0{2,6}1", "S01{2,6}")


SENT = "Mesh([[0, 1], [2, 3]], ('a', 'b')), ShardingSpec(Mesh([0, 1], ('x',)), (Shard(1),), (4, 6), 'float32')"


@pytest.mark.processes
def test_a_layout_from_another_process_is_found_among_equal_ones() -> None:
    """Texts have other hashes there; sets and the caches of plans go by those of layouts."""
    code = f"import pickle, sys; from tricomm import *; sys.stdout.buffer.write(pickle.dumps(({SENT})))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    sent = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=True)
    for there, here in zip(pickle.loads(sent.stdout), eval(SENT), strict=True):
        assert there == here
        assert there in {here}
