"""What a plan says of itself."""

import pytest

from tests.plan.test_plan import CHAIN, EACH, OVERLAP, PARTIAL, ROWS, UNICAST, spec
from tricomm import Mesh, Plan, Replicate, Shard, ShardingSpec, Topology, make_plan
from tricomm.plan.describe import ASSUMED


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (UNICAST, ["SendRecv(chunk_bytes=32)", "384 B (minimum 384 B)", "4 messages", "12 hops in 3 rounds"]),
        (CHAIN, ["Broadcast(chunk_bytes=96)", "1.2 kB (minimum 1.2 kB)", "2 messages", "0 -> 2 -> 3 -> 4"]),
        (PARTIAL, ["2 contributions", "take their sum", "then move the reduced tensor", "Split()"]),
        (OVERLAP, ["192 B (minimum 192 B)", "1 local copy", "NIC bound", "expected"]),
        (make_plan(ROWS, spec([2], Shard(0), dtype="int8")), ["cast to int8 on the sender", "96 B"]),
        (make_plan(ROWS, spec([2], Shard(0)), rank=1), ["only what rank 1 touches", "1 message,", "1 -> 2"]),
        (make_plan(spec([0], Shard(0), shape=(30,)), EACH), ["30 messages", "... and 18 more messages"]),
    ],
    ids=["unicast", "chain", "partial", "overlap", "cast", "rank", "long"],
)
def test_a_plan_prints_both_specs_and_how_it_moves(plan: Plan, words: list[str]) -> None:
    text = str(plan)
    for word in [str(plan.source), str(plan.destination), *words]:
        assert word in text, text


def test_a_plan_of_many_says_what_is_alike_once() -> None:
    names = [f"layers.{layer}.weight" for layer in range(40)]
    kinds = {
        f"norm{index}": ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (12, 9 + index), "float32")
        for index in range(20)
    }
    text = str(
        make_plan(dict.fromkeys(names, ROWS) | kinds, dict.fromkeys([*names, *kinds], spec([2], Shard(0), shape=None)))
    )
    for words in ("60 tensors", "layers.0.weight and 39 like it", "norm0\n", "... and 9 more kinds of tensors"):
        assert words in text, text


def test_a_network_that_nobody_has_named_is_said_to_be_assumed() -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8,), "float32")
    destination = ShardingSpec(Mesh([2], ("x",)), (Replicate(),))
    assert f"latency 20 us {ASSUMED}\n" in str(make_plan(source, destination))
    assert "assumed" not in str(make_plan(source, destination, topology=Topology(("a", "a", "b"))))
