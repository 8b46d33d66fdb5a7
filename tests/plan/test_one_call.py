"""Messages that go to all their receivers in one call: planned, proved, costed, carried out by the specification."""

from dataclasses import replace

import pytest
import torch

from tricomm import (
    ArgumentError,
    Auto,
    Broadcast,
    LocalTransport,
    Mesh,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Topology,
    make_plan,
)
from tricomm.plan import Plan
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.one_call import MAX_GROUPS, groups_of_moves, members
from tricomm.plan.routes.stored import read, written
from tricomm.plan.routes.strategies import candidates_on

ONE_CALL = Broadcast(one_call=True)


def one_to(receivers: int, nbytes: int) -> tuple[ShardingSpec, ShardingSpec]:
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (nbytes,), "uint8")
    return source, ShardingSpec(Mesh(range(1, receivers + 1), ("y",)), (Replicate(),))


def with_calls(ranks: int, hop_seconds: float | None = 14e-6) -> Topology:
    return replace(Topology.flat(ranks), multicast_hop_seconds=hop_seconds)


def groups_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    return groups_of_moves(move.messages for move in plan.moves)


def test_all_hops_of_a_chunk_are_in_one_round_from_the_sender() -> None:
    plan = make_plan(*one_to(3, 4096), strategy=Broadcast(2048, one_call=True))
    plan.verify()
    assert [(hop.source, hop.destination, hop.chunk) for hop in plan.moves[0].hops] == [
        (0, rank, chunk) for chunk in range(2) for rank in (1, 2, 3)
    ]
    assert len({hop.round for hop in plan.moves[0].hops}) == 2
    assert plan.wire_nbytes == plan.minimum_nbytes == 3 * 4096
    assert "0 => 1-3   4096 elements in 2 chunks" in str(plan)


def test_a_chunk_is_packed_once_and_all_ends_know_their_group() -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(1),), (4, 4), "float32")
    target = ShardingSpec(Mesh([2, 3], ("y",)), (Replicate(),))
    plan = make_plan(source, target, strategy=ONE_CALL)
    (only,) = plan.for_rank(0)[0].rounds
    assert [(send.peer, send.group) for send in only.sends] == [(2, (0, 2, 3)), (3, (0, 2, 3))]
    (only,) = plan.for_rank(3)[0].rounds
    assert [(receive.peer, receive.group) for receive in only.receives] == [(0, (0, 2, 3)), (1, (1, 2, 3))]
    assert groups_of(plan) == ((0, 2, 3), (1, 2, 3))


def test_one_receiver_is_sent_a_message() -> None:
    plan = make_plan(*one_to(1, 64), strategy=ONE_CALL)
    assert not groups_of(plan)
    assert not make_plan(*one_to(3, 64), strategy=Broadcast()).moves[0].messages[0].in_one_call


@pytest.mark.parametrize("transport", [LocalTransport(), LocalTransport(grouped=False, receives_ahead=2)])
def test_the_specification_carries_it_out(transport: LocalTransport) -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(1),), (6, 4), "float32")
    target = ShardingSpec(Mesh([1, 2, 3], ("y",)), (Replicate(),))
    full = torch.arange(24.0).reshape(6, 4)
    found = transport.run(
        make_plan(source, target, strategy=Broadcast(16, one_call=True)), {0: full[:, :2], 1: full[:, 2:]}
    )
    assert all(torch.equal(found[rank], full) for rank in (1, 2, 3))


# ---- what it costs


def test_it_costs_a_ring_where_there_are_such_calls_and_messages_elsewhere() -> None:
    """Of 1.25 MB at 12.5 GB/s each copy takes 100 us; a message has 20 us of overhead and 20 us of latency."""
    layouts = one_to(4, 1_250_000)
    ring = make_plan(*layouts, strategy=ONE_CALL, topology=with_calls(5, 10e-6))
    assert ring.simulated_seconds() == pytest.approx(100e-6 + 40e-6 + 4 * 10e-6)
    sending, receiving = ring.nic_seconds()
    assert [*(sending * 1e6).round()] == [100, 100, 100, 100, 0]
    assert [*(receiving * 1e6).round()] == [0, 100, 100, 100, 100]
    star = make_plan(*layouts, strategy=ONE_CALL)
    assert star.simulated_seconds() == pytest.approx(4 * 100e-6 + 40e-6)
    assert [*(star.nic_seconds()[0] * 1e6).round()] == [400, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("receivers", "nbytes", "is_taken"),
    [(2, 1 << 10, False), (3, 1 << 10, False), (7, 1 << 10, True), (3, 1 << 20, True), (15, 1 << 20, True)],
)
def test_auto_takes_it_where_it_should_be_faster_by_a_tenth(receivers: int, nbytes: int, is_taken: bool) -> None:
    layouts = one_to(receivers, nbytes)
    topology = with_calls(receivers + 1)
    chosen = make_plan(*layouts, topology=topology)
    assert bool(groups_of(chosen)) == is_taken
    seconds = {
        one: make_plan(*layouts, topology=topology, strategy=one).simulated_seconds()
        for one in candidates_on(Auto(), topology)
    }
    others = min(taken for one, taken in seconds.items() if one != ONE_CALL)
    assert (seconds[ONE_CALL] < 0.9 * others) == is_taken


def test_auto_leaves_it_where_nobody_says_that_there_are_such_calls() -> None:
    assert not groups_of(make_plan(*one_to(15, 1 << 20)))
    assert not groups_of(make_plan(*one_to(15, 1 << 20), topology=with_calls(16, 1.0)))


def many_groups(senders: int) -> tuple[ShardingSpec, ShardingSpec]:
    """Each sender's part goes to all receivers."""
    source = ShardingSpec(Mesh(range(senders), ("x",)), (Shard(0),), (senders * 1024,), "uint8")
    return source, ShardingSpec(Mesh(range(senders, senders + 7), ("y",)), (Replicate(),))


def test_more_groups_than_are_kept_are_sent_by_themselves_and_never_chosen() -> None:
    layouts = many_groups(MAX_GROUPS + 2)
    plan = make_plan(*layouts, strategy=ONE_CALL)
    assert len(plan.moves[0].messages) == MAX_GROUPS + 2
    assert len({*map(members, groups_of(plan))}) == MAX_GROUPS
    assert not groups_of(make_plan(*layouts, topology=with_calls(MAX_GROUPS + 9, 1e-9)))


# ---- how it is said


def test_it_is_part_of_what_ranks_compare() -> None:
    plans = [make_plan(*one_to(3, 64), strategy=one) for one in (Broadcast(), ONE_CALL)]
    assert plans[0].digest() != plans[1].digest()
    assert repr(Broadcast()) == "Broadcast(chunk_bytes=None)"
    with pytest.raises(ArgumentError, match="one_call=1 must be True or False"):
        Broadcast(one_call=1)  # type: ignore[arg-type]


def test_a_rank_alone_does_not_plan_it() -> None:
    """All must know all groups, in whose order communicators are made."""
    source, target = one_to(40, 64)
    assert make_plan(source, target, strategy=ONE_CALL, rank=3).rank is None


def test_it_is_kept_in_files() -> None:
    move = make_plan(*one_to(3, 64), strategy=ONE_CALL).moves[0]
    routes = Routes(ONE_CALL, move.messages, move.hops)
    found = read(written(routes, "key", (SendRecv(), ONE_CALL)), "key", (SendRecv(), ONE_CALL))
    assert found.messages[0].in_one_call
    assert found.messages[0].chain == (0, 1, 2, 3)
