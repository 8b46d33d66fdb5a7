"""Tensors moved by random rules between random layouts, against numpy's own reshape, transpose and concatenate."""

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import tricomm
from tests.cases import RANKS, specs
from tests.oracle import as_written_by, pick, require_equal
from tests.packing.test_many import quick
from tests.rules.test_algebra import Pair, grown, sources
from tests.transport.test_properties import TRANSPORTS, restrided
from tricomm import (
    LocalTransport,
    Mesh,
    Partial,
    Replicate,
    Resharder,
    Shard,
    ShardingSpec,
    SpecError,
    TransportError,
    make_plan,
)
from tricomm.launch import Ranks
from tricomm.packing.views import ItemViews
from tricomm.rules import Rules, cat, fill, source

DTYPES = ["int64", "int32", "float32", "float64"]


class Mapped(NamedTuple):
    """Rules, the whole tensors of both sides, their layouts, and how local tensors lie in memory."""

    rules: Rules
    sources: dict[str, np.ndarray]
    made: dict[str, np.ndarray]
    before: dict[str, ShardingSpec]
    after: dict[str, ShardingSpec]
    strides: str


@st.composite
def maps(draw: Any) -> Mapped:
    """One or two rules over up to three sources, each tensor with a layout of its own."""
    leaves = draw(sources())
    pairs: list[Pair] = [draw(grown(leaves)) for _ in range(draw(st.integers(1, 2)))]
    whole = {f"s{number}": array for number, (_, array) in enumerate(leaves)}
    made = {f"out{number}": array for number, (_, array) in enumerate(pairs)}
    rules = Rules({name: pair[0] for name, pair in zip(made, pairs, strict=True)}, drop=["*"])
    dtype = draw(st.sampled_from(DTYPES))
    before = {name: draw(specs(array.shape, dtype, whole=True)) for name, array in whole.items()}
    after = {name: draw(specs(array.shape, draw(st.sampled_from([dtype, "int64"])))) for name, array in made.items()}
    strides = draw(st.sampled_from(["contiguous", "transposed", "padded"]))
    return Mapped(rules, whole, made, before, after, strides)


def shards(wholes: dict[str, np.ndarray], layouts: dict[str, ShardingSpec], rank: int) -> dict[str, torch.Tensor]:
    """What a rank holds, by the definition."""
    return {
        name: pick(torch.from_numpy(array.copy()).to(getattr(torch, layouts[name].dtype)), layouts[name], rank)
        for name, array in wholes.items()
        if rank in layouts[name].mesh
    }


def given_shards(drawn: Mapped, rank: int) -> dict[str, torch.Tensor]:
    return {name: restrided(one, drawn.strides) for name, one in shards(drawn.sources, drawn.before, rank).items()}


def check(drawn: Mapped, rank: int, output: dict[str, torch.Tensor]) -> None:
    wanted = shards(drawn.made, drawn.after, rank)
    assert sorted(output) == sorted(wanted)
    for name, tensor in wanted.items():
        require_equal(output[name], tensor, f"{name} on rank {rank} by\n{drawn.rules}")


def is_expressible(drawn: Mapped) -> bool:
    """Whether a plan can be made: a rank that is to hold an element twice may be refused."""
    try:
        make_plan(drawn.before, drawn.after, rules=drawn.rules)
    except SpecError as error:
        if "several" not in str(error):
            raise
        return False
    return True


@settings(quick, max_examples=2 * quick.max_examples)
@given(drawn=maps(), transport=st.sampled_from(TRANSPORTS))
def test_any_rules_between_any_layouts(drawn: Mapped, transport: LocalTransport) -> None:
    if not is_expressible(drawn):
        reject()
    plan = make_plan(drawn.before, drawn.after, rules=drawn.rules)
    plan.verify()
    tensors = {rank: given_shards(drawn, rank) for rank in plan.participants}
    outputs, sent = transport.run_counted(plan, tensors)
    for rank in range(RANKS):
        check(drawn, rank, outputs.get(rank, {}))
        for name, tensor in given_shards(drawn, rank).items():
            require_equal(tensors[rank][name], tensor, f"source {name} of rank {rank}")
    assert sum(sent.values()) == plan.wire_nbytes == plan.minimum_nbytes
    str(plan)


def move(rank: int, drawn: Mapped, api: str, transport: str) -> None:
    """Move on this rank and compare."""
    tensors = given_shards(drawn, rank)
    before, after = (as_written_by(rank, side) for side in (drawn.before, drawn.after))
    options: Any = {"rules": drawn.rules, "timeout_seconds": 30.0, "transport": transport}
    wanted = shards(drawn.made, drawn.after, rank)
    out = {name: restrided(torch.zeros_like(tensor), drawn.strides) for name, tensor in wanted.items()}
    if api == "reshard":
        check(drawn, rank, tricomm.reshard(tensors, before, after, **options))
    elif api == "async":
        check(drawn, rank, tricomm.reshard_async(tensors, before, after, out=out, **options).wait())
    else:
        mover = Resharder(before, after, **options)
        for _ in range(2):
            for tensor in out.values():
                tensor.zero_()
            moved = mover(tensors, out=out)
            check(drawn, rank, moved)
            assert all(moved[name].data_ptr() == tensor.data_ptr() for name, tensor in out.items())
        mover.close()


@settings(quick, max_examples=max(quick.max_examples // 5, 1))
@given(drawn=maps(), api=st.sampled_from(["reshard", "async", "kept"]), transport=st.sampled_from(["network", "auto"]))
def test_any_rules_over_gloo(ranks: Ranks, drawn: Mapped, api: str, transport: str) -> None:
    if not is_expressible(drawn):
        reject()
    ranks.run(move, drawn, api, transport)


# ---- what a plan by rules is

ONE, TWO = Mesh([0], ("x",)), Mesh([0, 1], ("x",))
THERE = Mesh([2, 3], ("tp",))


def kept(shape: tuple[int, ...], mesh: Mesh = TWO, **fields: Any) -> ShardingSpec:
    return ShardingSpec(mesh, (Shard(0),), shape, "float32", **fields)


def test_copies_of_an_element_cross_the_wire_once() -> None:
    """Key and value heads that are repeated for more ranks than there are heads, and a scalar over a dim."""
    rules = Rules(
        {
            "k": source("k").unflatten(0, (2, 1, 4)).expand(2, 3, 4, 8).flatten(0, 2),
            "gate": source("gate").expand(128, 6),
        }
    )
    before = {"k": kept((8, 8)), "gate": ShardingSpec(ONE, (Replicate(),), (1, 6), "float32")}
    server = Mesh(range(2, 8), ("tp",))
    after = {"k": ShardingSpec(server, (Shard(0),)), "gate": ShardingSpec(Mesh([2], ("tp",)), (Replicate(),))}
    plan = make_plan(before, after, rules=rules)
    assert plan.wire_nbytes == plan.minimum_nbytes == (3 * 8 * 8 + 6) * 4
    whole = {"k": torch.arange(64.0).reshape(8, 8), "gate": torch.arange(6.0).reshape(1, 6)}
    tensors = {rank: {"k": whole["k"].chunk(2)[rank]} for rank in range(2)}
    tensors[0]["gate"] = whole["gate"]
    outputs = LocalTransport().run(plan, tensors)
    wanted = rules.evaluate(whole)
    assert torch.equal(torch.cat([outputs[rank]["k"] for rank in range(2, 8)]), wanted["k"])
    assert torch.equal(outputs[2]["gate"], wanted["gate"])


def test_a_cut_inside_of_a_head_needs_few_pieces() -> None:
    """Rows in RoPE's order of pairs, kept by heads on one side and by parts of heads on the other."""
    heads, dim = 64, 128
    rules = Rules({"wq": source("q").unflatten(0, (heads, 2, dim // 2)).permute(0, 2, 1, 3).flatten(0, 2)})
    for ranks in (8, 64, 512):
        mesh = Mesh(range(ranks), ("dp",))
        before = {"q": ShardingSpec(mesh, (Shard(0),), (heads * dim, 4), "bfloat16")}
        after = {"wq": ShardingSpec(Mesh([ranks, ranks + 1], ("tp",)), (Shard(0),))}
        assert len(make_plan(before, after, rules=rules).items) == 1


def test_placements_stay_placements() -> None:
    """So that formulas plan them at any size: whole tensors, segments, heads, and experts of one rank each."""
    mesh = Mesh([[0, 1], [2, 3]], ("ep", "tp"))
    rules = Rules(
        {
            "qkv": cat([source("q"), source("k")]),
            "w13": cat([source("up"), source("down")]).unflatten(0, (1, 4)).expand(1, 4, 6),
        }
    )
    before = {name: kept((8 if name == "q" else 2, 6)) for name in ("q", "k", "up", "down")}
    after = {
        "qkv": ShardingSpec(mesh, (Replicate(), Shard(0, segments=(8, 2)))),
        "w13": ShardingSpec(mesh, (Shard(0), Shard(2))),
    }
    plan = make_plan(before, after, rules=rules)
    assert all(item.source.holdings is None and item.destination.holdings is None for item in plan.items)
    assert [item.destination.mesh.ranks for item in plan.items] == [(0, 1, 2, 3)] * 2 + [(0, 1)] * 2


def test_contributions_are_added_before_they_are_renamed() -> None:
    partial = ShardingSpec(TWO, (Partial(),), (4, 6), "float32")
    there = ShardingSpec(THERE, (Shard(0),))
    rules = Rules({"w": cat([source("a"), source("b")], dim=1)})
    plan = make_plan({"a": partial, "b": partial}, {"w": there}, rules=rules)
    plan.verify()
    tensors = {rank: {name: torch.full((4, 6), 1.0 + rank) for name in "ab"} for rank in range(2)}
    outputs = LocalTransport().run(plan, tensors)
    assert all(torch.equal(outputs[rank]["w"], torch.full((2, 12), 3.0)) for rank in (2, 3))


# ---- what ranks compare, and what is left alone

NAMES = Rules({"wq": source("q"), "wk": cat([source("k"), fill(0, (4, 4))])})
BEFORE = {"q": kept((8, 4)), "k": kept((4, 4))}
AFTER = {name: ShardingSpec(THERE, (Shard(0),)) for name in ("wq", "wk")}


def other_rules(rank: int) -> str:
    """Rank 1 maps k and q the other way round."""
    if rank > 3:
        return ""
    names = ("q", "k") if rank == 1 else ("k", "q")
    rules = Rules({"w": cat([source(name) for name in names])})
    before = {name: kept((4, 4)) for name in "qk"}
    try:
        tensors = {name: torch.zeros(2, 4) for name in "qk"} if rank < 2 else None
        tricomm.reshard(tensors, before, {"w": AFTER["wq"]}, rules=rules, timeout_seconds=20)
    except TransportError as error:
        return str(error)
    return "nothing was said"


def test_rules_are_compared_between_ranks(ranks: Ranks) -> None:
    for text in ranks.run(other_rules)[:4]:
        assert "rule of tensor 'w'" in text, text


def test_what_no_rule_reads_may_be_given_and_is_not_touched() -> None:
    rules = Rules({"w": source("q")}, drop=["mtp.*"])
    before = {"q": kept((4, 4)), "mtp.0": kept((4, 4))}
    plan = make_plan(before, {"w": AFTER["wq"]}, rules=rules)
    shard = torch.ones(2, 4)
    for more in ({}, {"mtp.0": shard}):
        outputs = LocalTransport().run(plan, {rank: {"q": shard, **more} for rank in range(2)})
        assert [float(outputs[rank]["w"].sum()) for rank in (2, 3)] == [8, 8]


def test_kept_views_do_not_keep_tensors() -> None:
    """The views of a call's tensors go with them."""
    plan = make_plan(BEFORE, AFTER, rules=NAMES)
    views = ItemViews(plan, 0)
    tensors = [torch.zeros(4, 4), torch.zeros(2, 4)]
    first = views.of(tensors, [])
    assert views.of(tensors, [])[0] is first[0]
    gone = weakref.ref(tensors[0])
    del tensors, first
    assert gone() is None
    assert views._last is None


# ---- and back


def there_and_back(rank: int) -> None:
    """Two ranks to two others with a fusion, a padding, a drop and a cast; then back to what was given, cast twice."""
    here, there = Mesh([0, 1], ("tp",)), Mesh([2, 3], ("tp",))
    rows = {"q": (4, 3), "k": (2, 3), "unused": (2, 3)}
    trained = {name: ShardingSpec(here, (Shard(0),), shape, "float32") for name, shape in rows.items()}
    padded = cat([source("q"), source("k"), fill(0, (2, 3))])
    served = {"qk": ShardingSpec(there, (Shard(1),), dtype="bfloat16")}
    wholes = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in rows.items()}
    given = {name: whole.chunk(2)[rank] for name, whole in wholes.items()} if rank < 2 else None
    with tricomm.Resharder(trained, served, rules=Rules({"qk": padded}, drop=["unused"])) as mover:
        fused = mover(given)
        with mover.reverse() as back:
            found = back(fused if rank in (2, 3) else None)
            assert found.keys() == ({"q", "k"} if rank < 2 else set())
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, wholes[name].bfloat16().float().chunk(2)[rank], rtol=0, atol=0)
    one = ShardingSpec(here, (Shard(0),), (4, 3), "float32")
    with tricomm.Resharder(one, ShardingSpec(there, (Shard(1),))) as single, single.reverse() as again:
        moved = again(single(wholes["q"].chunk(2)[rank] if rank < 2 else None))
        assert moved is None if rank >= 2 else torch.equal(moved, wholes["q"].chunk(2)[rank])


def test_a_mover_is_reversed(ranks: Ranks) -> None:
    ranks.run(there_and_back)
