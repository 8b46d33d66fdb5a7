"""Digests on both sides are equal when all has come to its place, and differ when anything has not."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import tricomm
from tests.cases import RANKS
from tests.packing.test_many import quick
from tests.packing.test_rules import Mapped, given_shards, is_expressible, maps
from tricomm import (
    Hooks,
    LocalTransport,
    Mesh,
    Partial,
    Plan,
    Replicate,
    Resharder,
    Shard,
    ShardingSpec,
    SpecError,
    TransportError,
    make_plan,
)
from tricomm.launch import Ranks
from tricomm.packing.digests import Digests, digest
from tricomm.plan.describe import describe_layouts
from tricomm.rules import Rules, cat, fill, source
from tricomm.transport.runtime import PlanExecution

CPU = torch.device("cpu")


def differences(
    plan: Plan, tensors: dict[int, dict[str, torch.Tensor]], outputs: dict[int, dict[str, torch.Tensor]]
) -> Any:
    """(holder, receiver, tensor) of which digests differ."""
    sent, come = [], []
    for rank in plan.participants:
        digests, execution = Digests(plan, rank), PlanExecution(plan, rank, CPU)
        ends = plan.ends
        read = [tensors[rank][one.name] for one in ends.sources if one.name in tensors.get(rank, {})]
        written = [outputs[rank][one.name] for one in ends.destinations if one.name in outputs.get(rank, {})]
        sources, destinations = execution.items_of(read, written)
        if rank in digests.holders:
            sent.append(digests.sent(sources))
        if rank in digests.receivers:
            come.append(digests.come(destinations))
    return (torch.cat(sent, 0) != torch.cat(come, 1)).nonzero().tolist()


@settings(quick, max_examples=max(quick.max_examples // 3, 1))
@given(drawn=maps(), seed=st.integers(0, 1000))
def test_digests_tell_one_wrong_element(drawn: Mapped, seed: int) -> None:
    if not is_expressible(drawn):
        reject()
    plan = make_plan(drawn.before, drawn.after, rules=drawn.rules)
    read = {item.part.source for item in plan.items if item.part is not None}
    names = {plan.ends.sources[number].name for number in read}
    tensors = {
        rank: {name: shard for name, shard in given_shards(drawn, rank).items() if name in names}
        for rank in range(RANKS)
    }
    outputs = LocalTransport().run(plan, {rank: tensors[rank] for rank in plan.participants})
    assert differences(plan, tensors, outputs) == []
    filled = {fill.tensor for fill in plan.ends.fills}
    filled |= {item.part.destination for item in plan.items if item.part and item.destination.holdings is not None}
    for rank, wrong in outputs.items():
        for number, (name, spec) in enumerate(plan.ends.destinations):
            # What a rank holds several times is digested in the first place; what is filled, nowhere.
            if rank in spec.mesh and wrong[name].numel() and number not in filled and spec.holdings is None:
                wrong[name].view(-1)[seed % wrong[name].numel()] += 1
                assert [found[2] for found in differences(plan, tensors, outputs)] == [number]
                return


ROWS = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8, 6), "bfloat16")
THERE = ShardingSpec(Mesh([2, 3], ("x",)), (Replicate(),))
FULL = torch.arange(48).reshape(8, 6).to(torch.bfloat16)


def moved() -> tuple[Plan, Any, Any]:
    plan = make_plan({"a": ROWS, "b": ROWS}, {"a": THERE, "b": THERE})
    tensors = {rank: {name: FULL[4 * rank : 4 * rank + 4] + (name == "b") for name in "ab"} for rank in range(2)}
    return plan, tensors, LocalTransport().run(plan, tensors)


def test_elements_that_change_places_are_told() -> None:
    """Their plain sum is the same."""
    plan, tensors, outputs = moved()
    assert differences(plan, tensors, outputs) == []
    outputs[3]["b"][6, 1:3] = outputs[3]["b"][6, 1:3].flip(0)
    assert differences(plan, tensors, outputs) == [[1, 1, 1]]


def test_tensors_that_change_places_are_told() -> None:
    plan, tensors, outputs = moved()
    outputs[2] = {"a": outputs[2]["b"], "b": outputs[2]["a"]}
    assert differences(plan, tensors, outputs) == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_a_large_shard_is_digested_in_parts() -> None:
    """The same number, however it is held."""
    shape = (3000, 1001)
    whole = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), shape, "int32")
    halves = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(1),), shape, "int32")
    full = torch.arange(3000 * 1001, dtype=torch.int32).reshape(shape)
    region = tuple(((0, size),) for size in shape)
    parts = [
        digest(shard, halves, rank, halves.holding(rank), torch.int32, 5) for rank, shard in enumerate(full.chunk(2, 1))
    ]
    assert int(sum(parts)) == int(digest(full, whole, 0, region, torch.int32, 5))


# ---- between processes


def checked(rank: int, fault: bool) -> str:
    """Move by rules with digests; in one case rank 3 writes an element of its own."""
    if rank > 3:
        return ""
    rules = Rules({"ab": cat([source("a"), source("b").permute(1, 0)], dim=1)})
    there = {"ab": ShardingSpec(THERE.mesh, (Shard(0),), dtype="float32")}
    before = {"a": ROWS, "b": ShardingSpec(ROWS.mesh, (Shard(1),), (2, 8), "bfloat16")}
    mover = Resharder(before, there, rules=rules, checksum=True, timeout_seconds=60)
    tensors = {"a": FULL[4 * rank : 4 * rank + 4], "b": torch.ones(2, 4, dtype=torch.bfloat16)} if rank < 2 else None
    if fault and rank == 3:
        session: Any = mover._session
        run = session.run

        def wrong(execution: Any, sources: Any, destinations: Any, number: int, *gate: Any) -> None:
            run(execution, sources, destinations, number, *gate)
            destinations[0][1, 2] = 7

        session.run = wrong
    told = []
    for _ in range(2):
        try:
            moved = mover(tensors)
            told.append("" if rank < 2 else str(float(moved["ab"].sum())))
        except TransportError as error:
            told.append(str(error))
    return told[0] if told[0] == told[1] else f"{told} differ"


def test_digests_agree_over_gloo(ranks: Ranks) -> None:
    assert ranks.run(checked, False)[:4] == ["", "", "284.0", "860.0"]


def test_all_ranks_hear_which_tensor_is_wrong_where(ranks: Ranks) -> None:
    for text in ranks.run(checked, True)[:4]:
        assert text.startswith("tensor 'ab' on rank 3 is not what rank 1 has: their digests differ;"), text


PADDED = Rules({"{x}": cat([source("{x}"), fill(3, (2, 6))])}, x=["a", "c"])


def together(rank: int, started: bool, only: str, fault: str) -> list[str]:
    """What calls with digests say, two in a row; in the first, rank 3 writes an element of its own to a tensor."""
    if rank > 3:
        return []
    before = {"a": ROWS, "c": ROWS}
    hooks = Hooks(after={"a": lambda *_: told.append("hook")}) if only != "c" and rank > 1 else None
    there = {"a": ShardingSpec(THERE.mesh, (Shard(0),)), "c": THERE}
    mover = Resharder(before, there, rules=PADDED, checksum=True, timeout_seconds=60, hooks=hooks)
    names = [only] if only else ["a", "c"]
    tensors = {name: FULL[4 * rank : 4 * rank + 4] + (name == "c") for name in names} if rank < 2 else None
    chosen: Any = mover.only(names) if only else mover
    run = chosen._session.run

    def wrong(execution: Any, sources: Any, destinations: Any, number: int, *gate: Any) -> None:
        run(execution, sources, destinations, number, *gate)
        if fault and rank == 3 and number == 1:
            place = names.index(fault[0])
            destinations[place].view(-1)[-1 if fault[1:] == " filled" else 0] = 77

    chosen._session.run = wrong
    told: list[str] = []
    for _ in range(2):
        try:
            if started:
                handles = [mover.start(tensors, only=(only and [only]) or None)]
                moved = handles[0].wait()
            else:
                moved = mover(tensors, only=[only]) if only else mover(tensors)
            told += [f"{name} {float(one.float().sum()):g}" for name, one in sorted(moved.items())]
        except TransportError as error:
            told.append(str(error).split(":")[0].partition(";")[0])
    mover.close()
    return told


SUMS = {"a": ["a 435", "a 729"], "c": ["c 1212", "c 1212"]}


@pytest.mark.parametrize("started", [False, True], ids=["called", "started"])
@pytest.mark.parametrize("only", ["", "a", "c"])
def test_digests_go_with_calls_in_the_background_selections_and_fills(ranks: Ranks, started: bool, only: str) -> None:
    names = [only] if only else ["a", "c"]
    hook = ["hook"] * ("a" in names)
    right = [[], [], *([*hook, *(SUMS[name][rank] for name in names)] * 2 for rank in range(2))]
    assert ranks.run(together, started, only, "")[:4] == right
    for fault in (names[-1], f"{names[-1]} filled"):
        error = f"tensor {names[-1]!r} on rank 3 is not " + (
            "what its rule fills in" if "filled" in fault else f"what rank {1 if only == 'a' else 0} has"
        )
        after = [[error, *one[len(one) // 2 :]] for one in right]
        assert ranks.run(together, started, only, fault)[:4] == after


def unable(rank: int, started: bool) -> str:
    """On rank 3 there is no memory for digests."""
    if rank > 3:
        return ""
    mover = Resharder({"a": ROWS}, {"a": THERE}, checksum=True, timeout_seconds=60)
    checksums: Any = mover._checksums

    def come(_: object) -> None:
        raise MemoryError("no memory for digests")

    if rank == 3:
        checksums._digests.come = come
    tensors = {"a": FULL[4 * rank : 4 * rank + 4]} if rank < 2 else None
    try:
        if started:
            mover.start(tensors).wait()
        else:
            mover(tensors)
    except (MemoryError, TransportError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("started", [False, True], ids=["called", "started"])
def test_a_rank_that_cannot_digest_says_so(ranks: Ranks, started: bool) -> None:
    for text in ranks.run(unable, started)[:4]:
        assert "no memory for digests" in text


def test_what_digests_cannot_compare_is_refused() -> None:
    partial = ShardingSpec(ROWS.mesh, (Partial(),), (8, 6), "float32")
    with pytest.raises(SpecError, match=r"checksum=True compares .* tensor 'a' is Partial: .* leave it out"):
        Digests(make_plan({"a": partial}, {"a": THERE}), 0)


def test_intervals_that_follow_each_other_in_a_shard_keep_their_coordinates() -> None:
    """Segments on the one side, halves on the other."""
    halves = ShardingSpec(ROWS.mesh, (Shard(0, segments=(4, 4)),), (8, 6), "bfloat16")
    there = ShardingSpec(THERE.mesh, (Shard(0, segments=(2, 6)),))
    plan = make_plan({"a": halves}, {"a": there})
    tensors = {rank: {"a": tricomm.local_shard(FULL, halves, rank)} for rank in range(2)}
    outputs = LocalTransport().run(plan, tensors)
    assert differences(plan, tensors, outputs) == []


@pytest.mark.parametrize("name", ["", "layer 3", 'layer\'s "3"'])
def test_an_error_of_digests_says_once_what_they_are_of(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whether it comes from the move or from digests, with a name of the user's or without one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (4, 2), "float32")
        mover = Resharder(rows, rows, checksum=True, name=name)
        assert mover._checksums is not None
        about = repr(name)[1:-1] or describe_layouts(mover.plan)
        said = f"rank 1 waits for rank 0 in call 2 of {mover.label}, and rank 0 for rank 1 in call 1 of another"
        for digests in mover._checksums.movers:
            with monkeypatch.context() as patch:
                patch.setattr(digests._session, "run", failing(said))
                with pytest.raises(TransportError) as caught:
                    mover(torch.zeros(4, 2))
            assert str(caught.value) == said
            with monkeypatch.context() as patch:
                patch.setattr(digests._session, "run", failing("rank 1 did not call within the timeout"))
                with pytest.raises(TransportError, match=r"digests .*: rank 1 did not call") as caught:
                    mover(torch.zeros(4, 2))
            assert str(caught.value).count(name or about) == 1, str(caught.value)
    finally:
        dist.destroy_process_group()


def failing(text: str) -> Any:
    def run(*_: Any) -> None:
        raise TransportError(text)

    return run
