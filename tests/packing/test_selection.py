"""Some tensors of a set, moved by the plan of all; and what calls say of themselves while they go on and afterwards."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.cases import RANKS
from tests.oracle import require_equal
from tests.packing.test_many import Set, arguments, check, quick, sets, shards_of, sides
from tests.packing.test_rules import Mapped, given_shards, is_expressible, maps, shards
from tests.transport.test_properties import TRANSPORTS
from tricomm import (
    ArgumentError,
    LocalTransport,
    Mesh,
    Progress,
    Replicate,
    Resharder,
    Shard,
    ShardingSpec,
    SpecError,
    Stats,
    Topology,
    TransportError,
    make_plan,
)
from tricomm.launch import Ranks
from tricomm.packing.selection import Selection


@st.composite
def sets_and_some(draw: Any) -> tuple[Set, list[list[str]]]:
    """A set, and up to three selections of it."""
    chosen: Set = draw(sets())
    some = st.lists(st.sampled_from(sorted(chosen)), min_size=1, unique=True)
    return chosen, draw(st.lists(some, min_size=1, max_size=3))


@quick
@given(drawn=sets_and_some(), transport=st.sampled_from(TRANSPORTS))
def test_any_selection_of_any_set(drawn: tuple[Set, list[list[str]]], transport: LocalTransport) -> None:
    chosen, selections = drawn
    plan = make_plan(*sides(chosen), **arguments(chosen))
    given_shards, wholes = shards_of(chosen)
    for names in selections:
        some = {name: chosen[name] for name in chosen if name in names}
        selection = Selection.of(plan, names)
        held = {rank: {n: t for n, t in of.items() if n in names} for rank, of in given_shards.items()}
        held = {rank: of for rank, of in held.items() if of}
        outputs, sent = transport.run_counted(selection, held)
        for rank in range(RANKS):
            check(rank, some, wholes, outputs.get(rank, {}))
        assert sum(sent.values()) == make_plan(*sides(some), **arguments(some)).minimum_nbytes
        missing = [
            stack.missing_nbytes(rank) for stacks in selection.stacks for stack in stacks for rank in range(RANKS)
        ]
        assert sum(missing) == sum(sent.values())


def fleet() -> tuple[dict[str, ShardingSpec], dict[str, ShardingSpec], Topology]:
    """48 ranks, by formulas: stacks of several, of one, and of a dim that nobody cuts."""
    first, second = Mesh(range(24), ("fsdp",)), Mesh(np.arange(24, 48).reshape(3, 8).tolist(), ("dp", "tp"))
    source, destination = {}, {}
    shapes = {"wq": (96, 64), "wo": (50, 48), "norm": (77,)}
    for kind, shape in shapes.items():
        for layer in range(1 if kind == "norm" else 7):
            source[f"{layer}.{kind}"] = ShardingSpec(first, (Shard(0),), shape, "float32")
            cut = Shard(1) if len(shape) == 2 else Replicate()
            destination[f"{layer}.{kind}"] = ShardingSpec(second, (Replicate(), cut))
    return source, destination, Topology(tuple(f"host{rank // 8}" for rank in range(48)), nics_per_host=8)


@pytest.mark.parametrize("names", [["3.wq"], ["0.wq", "6.wq", "2.wo"], ["0.norm"], ["5.wo", "0.norm"]])
def test_a_selection_at_the_size_of_a_fleet(names: list[str]) -> None:
    source, destination, topology = fleet()
    plan = make_plan(source, destination, topology=topology)
    wholes = {
        name: torch.arange(int(np.prod(spec.shape)), dtype=torch.float32).reshape(spec.shape) + index * 1e5
        for index, (name, spec) in enumerate(source.items())
    }
    alone = {rank: make_plan(source, destination, topology=topology, rank=rank) for rank in (0, 23, 24, 47)}
    for rank, part in alone.items():
        whole, own = Selection.of(plan, names).for_rank(rank), Selection.of(part, names).for_rank(rank)
        assert [(t.peer, t.nbytes, t.regions) for p in own for r in p.rounds for t in (*r.sends, *r.receives)] == [
            (t.peer, t.nbytes, t.regions) for p in whole for r in p.rounds for t in (*r.sends, *r.receives)
        ]
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for rank in range(24):
        starts = {name: source[name].holding(rank)[0] for name in names}
        shards[rank] = {name: torch.cat([wholes[name][a:b] for a, b in held]) for name, held in starts.items() if held}
        shards[rank] |= {name: wholes[name][:0] for name, held in starts.items() if not held}
    outputs = LocalTransport().run(Selection.of(plan, names), shards)
    for rank in range(24, 48):
        assert sorted(outputs[rank]) == sorted(names)
        for name, tensor in outputs[rank].items():
            expected = wholes[name]
            if expected.ndim == 2:
                ((start, stop),) = plan.items[[i.name for i in plan.items].index(name)].destination.holding(rank)[1]
                expected = expected[:, start:stop]
            assert torch.equal(tensor, expected)


def run_selections(rank: int, chosen: Set, selections: list[list[str]]) -> tuple[Stats, int]:
    """All, then some, directly and in the background, then all again; the stats, and what they should have counted."""
    given_shards, wholes = shards_of(chosen)
    seen: list[Progress] = []
    mover = Resharder(*sides(chosen), **arguments(chosen), timeout_seconds=30.0, progress=seen.append)
    expected = make_plan(*sides(chosen), **arguments(chosen)).minimum_nbytes

    def moved(call: Any, names: list[str] | None) -> None:
        seen.clear()
        some = chosen if names is None else {name: chosen[name] for name in chosen if name in names}
        options = {} if names is None else {"only": names}
        output = call(given_shards[rank], **options)
        check(rank, some, wholes, output.wait() if hasattr(output, "wait") else output)
        held = sum(rank in case.source.mesh or rank in case.destination.mesh for case in some.values())
        assert all(a.tensors_done <= b.tensors_done and a.nbytes_done <= b.nbytes_done for a, b in pairwise(seen))
        if rank in mover.participants:
            assert seen[-1].tensors_done == seen[-1].tensors == held
            assert seen[-1].nbytes_done == seen[-1].nbytes

    moved(mover, None)
    for names in selections:
        some = {name: chosen[name] for name in chosen if name in names}
        moved(mover, names)
        moved(mover.start, names)
        expected += 2 * make_plan(*sides(some), **arguments(some)).minimum_nbytes
    moved(mover, None)
    expected += make_plan(*sides(chosen), **arguments(chosen)).minimum_nbytes
    assert mover.stats.calls == (2 + 2 * len(selections) if rank in mover.participants else 0)
    mover.close()
    return mover.stats, expected


@settings(quick, max_examples=max(quick.max_examples // 5, 1))
@given(drawn=sets_and_some())
def test_any_selection_over_gloo_is_counted(ranks: Ranks, drawn: tuple[Set, list[list[str]]]) -> None:
    results = ranks.run(run_selections, *drawn)
    total = sum((stats for stats, _ in results), Stats())
    assert total.nbytes == total.received_nbytes == total.minimum_nbytes == results[0][1]
    assert total.messages == total.received_messages
    assert total.nbytes == sum(one.nbytes for one in total.transports)
    assert all(stats.staging_nbytes <= total.staging_nbytes for stats, _ in results)


# ---- refusals

ROWS = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8, 4), "float32")
COLUMNS = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(1),))
NAMES = ("wq", "wk", "wv")


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["wx"], SpecError, r"only has 'wx', which is none of the 3 tensors that were planned; take it out"),
        ("wq", ArgumentError, r"only='wq' must be a list or set of names; write only=\['wq'\]"),
        (3, ArgumentError, r"only=3 must be a list or set of names"),
        ([1], ArgumentError, r"only has 1, which is not a text"),
        ([], SpecError, r"only has no names"),
    ],
)
def test_names_that_mean_nothing_are_refused(names: Any, error: type[Exception], text: str) -> None:
    plan = make_plan(dict.fromkeys(NAMES, ROWS), dict.fromkeys(NAMES, COLUMNS))
    with pytest.raises(error, match=text):
        Selection.of(plan, names)
    with pytest.raises(SpecError, match="this plan is of one tensor"):
        Selection.of(make_plan(ROWS, COLUMNS), names)


def unequal(rank: int) -> list[str]:
    """Rank 3 chooses others, then a name that nobody has, then all do well."""
    if rank > 3:
        return []
    mover = Resharder(dict.fromkeys(NAMES, ROWS), dict.fromkeys(NAMES, COLUMNS), timeout_seconds=20)
    tensors = {name: torch.full((4, 4), float(rank)) for name in NAMES} if rank < 2 else None
    said = []
    for names in (["wq", "wk"] if rank == 3 else ["wq"], ["wx"] if rank == 3 else ["wk"]):
        try:
            mover(tensors, only=names)
        except (SpecError, TransportError) as error:
            said.append(str(error))
    moved = mover(tensors, only={"wv"})
    assert list(moved) == (["wv"] if rank > 1 else [])
    assert all(tensor.shape == (8, 2) for tensor in moved.values())
    return said


def test_ranks_that_choose_differently_are_told(ranks: Ranks) -> None:
    results = ranks.run(unequal)
    for said in results[:4]:
        assert "only" in said[0]
        assert "'wx'" in said[1]


def stopped(rank: int) -> str:
    """The callback of rank 2 raises in the first call; the second is whole."""
    if rank > 3:
        return ""
    count = 0

    def progress(_: Progress) -> None:
        nonlocal count
        count += 1
        if rank == 2 and count == 1:
            raise ValueError("rank 2 has seen enough")

    mover = Resharder(ROWS, COLUMNS, timeout_seconds=20, progress=progress, confirm=True)
    tensor = torch.full((4, 4), float(rank)) if rank < 2 else None
    said = ""
    try:
        mover(tensor)
    except (ValueError, TransportError) as error:
        said = str(error)
    out = mover(tensor)
    assert out is None or out[:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    # Who had all that it needs when rank 2 raised has carried the first call out too.
    assert mover.stats.calls == 1 if rank == 2 else 1 <= mover.stats.calls <= 2
    return said


def test_what_progress_raises_ends_the_call_on_all_ranks(ranks: Ranks) -> None:
    assert all("rank 2 has seen enough" in said for said in ranks.run(stopped)[:4])


# ---- by rules


@quick
@given(drawn=maps(), number=st.integers(0, 1), transport=st.sampled_from(TRANSPORTS))
def test_any_selection_of_what_rules_make(drawn: Mapped, number: int, transport: LocalTransport) -> None:
    if not is_expressible(drawn):
        reject()
    name = f"out{number % len(drawn.made)}"
    plan = make_plan(drawn.before, drawn.after, rules=drawn.rules)
    selection = Selection.of(plan, [name])
    read = {one.name for one in selection.ends.sources}
    assert read <= drawn.sources.keys()
    held = {rank: {n: t for n, t in given_shards(drawn, rank).items() if n in read} for rank in range(RANKS)}
    outputs = transport.run(selection, {rank: of for rank, of in held.items() if of})
    for rank in range(RANKS):
        wanted = shards(drawn.made, drawn.after, rank)
        output = outputs.get(rank, {})
        assert sorted(output) == [one for one in sorted(wanted) if one == name]
        for tensor in output.values():
            require_equal(tensor, wanted[name], f"{name} of rank {rank}")
