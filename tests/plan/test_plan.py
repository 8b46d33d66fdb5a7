"""Plans as values: a planted fault is caught, equal arguments give equal plans, and costs are those of the hand."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, groupby, permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.cases import Case, cases
from tricomm import Mesh, Partial, PlanError, Replicate, Shard, ShardingSpec, Topology
from tricomm.layout.part_table import part_table
from tricomm.plan import Auto, Broadcast, LeastLoaded, Move, Naive, Plan, RankProgram, SendRecv, make_plan
from tricomm.plan.planner import _make_plan
from tricomm.plan.routes.chunks import MAX_PEERS_PER_ROUND
from tricomm.plan.routes.rounds import Hop

quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def spec(ranks: Any, *placements: Any, shape: Any = (12, 8), dtype: str = "float32") -> ShardingSpec:
    return ShardingSpec(ranks if isinstance(ranks, Mesh) else Mesh(ranks, ("x",)), placements, shape, dtype)


ROWS = spec([0, 1], Shard(0))
UNICAST = make_plan(ROWS, spec([2, 3], Shard(1)), strategy=SendRecv(32))
CHAIN = make_plan(ROWS, spec([2, 3, 4], Replicate()), strategy=Broadcast(96))
PARTIAL = make_plan(spec([0, 1], Partial()), spec([2, 3], Replicate()), strategy=Broadcast(96))
EACH = spec(range(1, 31), Shard(0), shape=(30,))
OVERLAP = make_plan(ROWS, spec([1], Replicate()))
PLANS = {"unicast": UNICAST, "chain": CHAIN, "partial": PARTIAL}
LATE = 1 << 40
Faults = Iterator[dict[str, Any]]  # what to change in a move


def require_wrong(plan: Plan, index: int, **changes: Any) -> None:
    """THE DEFINITION of caught: with one move changed, verify says that the plan is wrong."""
    moves = list(plan.moves)
    moves[index] = replace(moves[index], **changes)
    assert moves[index] != plan.moves[index]
    with pytest.raises(PlanError, match=r"^the plan is wrong: .*please report both specs$"):
        replace(plan, moves=tuple(moves)).verify()


def rehopped(move: Move, changed: dict[Hop, Hop | None]) -> dict[str, Any]:
    """Some hops replaced by others, or left out."""
    return {"hops": tuple(new for hop in move.hops if (new := changed.get(hop, hop)) is not None)}


def remessaged(move: Move, index: int, **changes: Any) -> dict[str, Any]:
    changed = replace(move.messages[index], **changes)
    return {"messages": (*move.messages[:index], changed, *move.messages[index + 1 :])}


def dropped_hop(move: Move) -> Faults:
    yield from (rehopped(move, {hop: None}) for hop in move.hops)


def duplicated_hop(move: Move) -> Faults:
    for hop in move.hops:
        yield {"hops": (*move.hops, hop)}
        yield {"hops": (*move.hops, hop._replace(round=LATE))}


def hops_of_a_pair_in_one_round(move: Move) -> Faults:
    for first, second in combinations(move.hops, 2):
        if first[1:4] == second[1:4]:  # source, destination and message
            yield rehopped(move, {second: second._replace(round=first.round)})


def relay_too_early_or_passed_over(move: Move) -> Faults:
    for before, after in permutations(move.hops, 2):
        if (after.message, after.chunk, after.source) == (before.message, before.chunk, before.destination):
            early = after._replace(round=before.round)
            yield rehopped(move, {after: early})
            yield rehopped(move, {after: after._replace(source=before.source)})
            yield rehopped(move, {after: early, before: before._replace(round=after.round)})


def dropped_message(move: Move) -> Faults:
    last = len(move.messages) - 1
    yield {"messages": move.messages[:-1], **rehopped(move, {hop: None for hop in move.hops if hop.message == last})}


def changed_region(move: Move) -> Faults:
    """In one chunk, for each dim: a neighbour's coordinates, the first one missing, one too many, none."""
    first, *more = move.messages[0].chunks
    part = first[0]
    region = part.region
    for dim, ((start, stop), *_) in enumerate(region):
        for intervals in (((start + 1, stop + 1),), ((start + 1, stop),), ((start, stop + 1),), ()):
            changed = (*region[:dim], intervals, *region[dim + 1 :])
            yield remessaged(move, 0, chunks=((part._replace(region=changed), *first[1:]), *more))
    yield remessaged(move, 0, chunks=((part, *first), *more))


def sender_that_does_not_hold_it(move: Move) -> Faults:
    """Another rank of the source mesh, and one off it."""
    source = move.stacks[0].source
    for index, message in enumerate(move.messages):
        held = {9: None, **{rank: source.holding(rank) for rank in source.mesh.ranks}}
        first = message.chain[0]
        for other in [rank for rank, holding in held.items() if holding != held[first] and rank not in message.chain]:
            mine = [hop for hop in move.hops if (hop.message, hop.source) == (index, first)]
            hops = rehopped(move, {hop: hop._replace(source=other) for hop in mine})
            yield {**remessaged(move, index, chain=(other, *message.chain[1:])), **hops}


def receiver_that_needs_nothing(move: Move) -> Faults:
    chain = (*move.messages[0].chain, 9)
    more = [Hop(LATE + chunk, chain[-2], 9, 0, chunk) for chunk in range(len(move.messages[0].chunks))]
    yield {**remessaged(move, 0, chain=chain), "hops": (*move.hops, *more)}


HOP_FAULTS = [dropped_hop, duplicated_hop, hops_of_a_pair_in_one_round, relay_too_early_or_passed_over]
OTHER_FAULTS = [dropped_message, changed_region, sender_that_does_not_hold_it, receiver_that_needs_nothing]


@pytest.mark.parametrize("fault", HOP_FAULTS + OTHER_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", PLANS)
def test_verify_catches(name: str, fault: Callable[[Move], Faults]) -> None:
    plan = PLANS[name]
    plan.verify()
    planted = [(index, changes) for index, move in enumerate(plan.moves) for changes in fault(move)]
    assert planted or (fault, name) == (relay_too_early_or_passed_over, "unicast"), "nothing was planted"
    for index, changes in planted:
        require_wrong(plan, index, **changes)


def test_verify_catches_a_local_copy_that_is_missing_doubled_or_not_held() -> None:
    OVERLAP.verify()
    (move,) = OVERLAP.moves
    sent, copied = sorted(move.tasks, key=lambda task: task.holders)
    require_wrong(OVERLAP, 0, refined=((sent,),))
    require_wrong(OVERLAP, 0, refined=((sent, copied, copied),))
    (without_message,) = dropped_message(move)
    require_wrong(OVERLAP, 0, **without_message, refined=((replace(sent, holders=(1,)), copied),))


def test_verify_catches_too_many_hops_in_one_round() -> None:
    scatter = make_plan(spec([0], Shard(0), shape=(130,)), spec(range(1, 131), Shard(0), shape=(130,)))
    scatter.verify()
    require_wrong(scatter, 0, hops=tuple(hop._replace(round=0) for hop in scatter.moves[0].hops))


@quick
@given(case=cases(), data=st.data())
def test_verify_catches_any_hop_that_is_missing_or_doubled(case: Case, data: st.DataObject) -> None:
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    index = data.draw(st.integers(0, len(plan.moves) - 1))
    hops = plan.moves[index].hops
    assume(hops)
    chosen = data.draw(st.integers(0, len(hops) - 1))
    require_wrong(plan, index, hops=hops[:chosen] + hops[chosen + 1 :])
    require_wrong(plan, index, hops=(*hops, hops[chosen]))


def planned_afresh(case: Case) -> Plan:
    _make_plan.cache_clear()
    part_table.cache_clear()
    return make_plan(case.source, case.destination, **case.plan_arguments())


@quick
@given(case=cases())
def test_the_same_arguments_give_equal_plans(case: Case) -> None:
    first, second = planned_afresh(case), planned_afresh(case)
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest() == second.digest()
    assert repr(first.moves) == repr(second.moves)


FINGERPRINT = """
import hashlib
from tricomm import *
grid = Mesh([[5, 1, 2], [3, 4, 0]], ("a", "b"))
hosts = Topology(("north", "south", "east", "west") * 3, nics_per_host=2)
for places in ((Replicate(), Shard(0)), (Shard(1), Replicate()), (Partial(), Shard(1))):
    for strategy in (Auto(), SendRecv(64), Broadcast(64)):
        source = ShardingSpec(grid, places, (9, 14), "float32")
        destination = ShardingSpec(Mesh([9, 2, 8, 7], ("x",)), (Replicate(),))
        plan = make_plan(source, destination, topology=hosts, strategy=strategy)
        moves = hashlib.sha256(repr(plan.moves).encode()).hexdigest()
        print(plan.digest(), moves, plan.lower_bound_seconds(), plan.simulated_seconds())
"""


@pytest.mark.processes
def test_plans_do_not_depend_on_the_interpreters_hash_seed() -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", FINGERPRINT], env=environment, stdout=subprocess.PIPE, text=True)
        for environment in ({**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2"))
    ]
    first, second = (process.communicate(timeout=60)[0] for process in started)
    assert len(first.splitlines()) == 9
    assert first == second


TOPOLOGY = Topology(("a", "b", "c", "d", "e"))
SAME_ARGUMENTS = {"source": ROWS, "destination": spec([2, 3], Shard(1)), "topology": TOPOLOGY}
OTHER_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"source": spec([1, 0], Shard(0))},
    {"source": spec(Mesh([0, 1], ("y",)), Shard(0))},
    {"source": spec([0, 1], Shard(1))},
    {"source": spec([0, 1], Shard(0, (4, 8)))},
    {"source": spec([0, 1], Partial())},
    {"source": spec([0, 1], Shard(0), dtype="float64")},
    {"source": spec(Mesh([[0, 1], [2, 3]], ("x", "y")), Shard(0), Shard(0))},
    {"source": ShardingSpec(Mesh([[0, 1], [2, 3]], ("x", "y")), (Shard(0), Shard(0)), (12, 8), "float32", (1, 0))},
    {"source": ShardingSpec.explicit({0: (((0, 12),), ((0, 8),))}, (12, 8), "float32")},
    {"source": ShardingSpec.explicit({0: (((0, 12),), ((4, 8), (0, 4)))}, (12, 8), "float32")},
    {"source": spec([0, 1], Shard(0), shape=(12, 9)), "destination": spec([2, 3], Shard(1), shape=(12, 9))},
    {"destination": spec([2, 4], Shard(1))},
    {"destination": spec([2, 3], Shard(1), dtype="bfloat16")},
    {"strategy": SendRecv()},
    {"strategy": SendRecv(1 << 20)},
    {"strategy": Broadcast()},
    {"balance": Naive()},
    {"staging_bytes": 1 << 20},
    {"topology": Topology(("a", "b", "c", "d", "d"))},
    {"topology": replace(TOPOLOGY, nic_bytes_per_second=1e9)},
    {"topology": replace(TOPOLOGY, nics_per_host=2)},
    {"topology": replace(TOPOLOGY, intra_bytes_per_second=1e9)},
    {"topology": replace(TOPOLOGY, memory_bytes_per_second=1e9)},
    {"topology": replace(TOPOLOGY, latency_seconds=0.5)},
]


def test_the_digest_differs_if_an_argument_or_the_planner_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [make_plan(**{**SAME_ARGUMENTS, **changed}).digest() for changed in OTHER_ARGUMENTS]
    assert len(set(digests)) == len(digests)
    monkeypatch.setattr("tricomm.plan.plan.PLANNER_VERSION", 0)
    assert set(digests).isdisjoint(make_plan(**{**SAME_ARGUMENTS, **changed}).digest() for changed in OTHER_ARGUMENTS)


def without_indices(program: RankProgram) -> tuple[Any, ...]:
    """A program but for the numbering of messages and the order within a round, which are each plan's own."""
    sides = [(step.number, side) for step in program.rounds for side in (step.sends, step.receives)]
    rounds = [(number, sorted((t.peer, t.nbytes, t.regions) for t in transfers)) for number, transfers in sides]
    return program.rank, program.source_shapes, program.destination_shapes, sorted(program.copies), rounds


@quick
@given(case=cases())
def test_a_rank_that_plans_alone_gets_the_program_of_the_plan_of_all(case: Case) -> None:
    everyone = planned_afresh(case)
    assert everyone.rank is None
    for rank in everyone.participants:
        alone = make_plan(case.source, case.destination, **case.plan_arguments(), rank=rank)
        assume(alone.rank is not None)
        assert alone.rank == rank
        assert alone.digest() == everyone.digest()
        assert [*map(without_indices, alone.for_rank(rank))] == [*map(without_indices, everyone.for_rank(rank))]


WHOLE = 12 * 8 * 4  # bytes of a tensor, and the rate of a NIC: costs are in tensors
HOSTS_OF_TWO = ("a", "a", "b", "b", "c", "c", "d", "d")
HOSTS_OF_ONE = tuple("abcdefgh")


def rated(hosts: tuple[str, ...], **options: Any) -> Topology:
    return Topology(hosts, nic_bytes_per_second=WHOLE, latency_seconds=0.0, overhead_seconds=0.0, **options)


@pytest.mark.parametrize(
    ("source", "destination", "hosts", "seconds"),
    [
        pytest.param(spec([0], Shard(0)), spec([2, 3, 4, 5], Replicate()), HOSTS_OF_TWO, 1, id="1 to 2 x 2"),
        pytest.param(spec([0, 1], Replicate()), spec([2, 3, 4], Shard(0)), HOSTS_OF_ONE, 1 / 2, id="2 share"),
        pytest.param(spec([0, 1], Replicate()), spec([2, 3, 4], Shard(0)), HOSTS_OF_TWO, 1, id="2 on a host"),
        pytest.param(ROWS, spec([0, 1], Shard(0)), HOSTS_OF_ONE, 0, id="everything is there"),
        pytest.param(ROWS, spec([1, 0], Shard(0)), HOSTS_OF_TWO, 0, id="within one host"),
        pytest.param(ROWS, spec([0, 1], Shard(1)), HOSTS_OF_ONE, 1 / 4, id="all to all"),
        pytest.param(ROWS, spec([0, 1], Replicate()), HOSTS_OF_ONE, 1 / 2, id="all-gather"),
        pytest.param(ROWS, spec([2], Shard(0)), HOSTS_OF_ONE, 1, id="2 to 1"),
        pytest.param(ROWS, spec([2, 4], Shard(1)), HOSTS_OF_ONE, 1 / 2, id="2 to 2"),
        pytest.param(ROWS, spec([2, 4], Replicate()), HOSTS_OF_ONE, 1, id="2 to 2 whole"),
        pytest.param(ROWS, spec([0, 2, 3], Replicate()), HOSTS_OF_TWO, 1, id="one host has it all"),
        pytest.param(ROWS, spec([2], Shard(0), dtype="float16"), HOSTS_OF_ONE, 1 / 2, id="cast before"),
        pytest.param(ROWS, spec([2], Shard(0), dtype="float64"), HOSTS_OF_ONE, 1, id="cast after"),
        pytest.param(spec([0, 1], Partial()), ROWS, HOSTS_OF_ONE, 1 / 2, id="reduce-scatter"),
        pytest.param(spec([0, 1], Partial()), spec([1, 0], Replicate()), HOSTS_OF_ONE, 1, id="all-reduce"),
    ],
)
def test_the_lower_bound_is_that_of_the_hand(source: Any, destination: Any, hosts: Any, seconds: float) -> None:
    plan = make_plan(source, destination)
    assert plan.lower_bound_seconds(rated(hosts)) == pytest.approx(seconds)
    twice = replace(rated(hosts), nic_bytes_per_second=dict.fromkeys(hosts, 2 * WHOLE))
    assert plan.lower_bound_seconds(twice) == pytest.approx(seconds / 2)


def test_the_simulated_time_is_that_of_the_hand() -> None:
    topology = replace(rated(HOSTS_OF_TWO, intra_bytes_per_second=4 * WHOLE), latency_seconds=0.5)
    whole = spec([0], Replicate())

    def seconds(destination: ShardingSpec, strategy: Any) -> float:
        return make_plan(whole, destination, strategy=strategy, topology=topology).simulated_seconds()

    assert seconds(whole, SendRecv()) == 0
    assert seconds(spec([2], Replicate()), SendRecv()) == 1 + 0.5
    assert seconds(spec([1], Replicate()), SendRecv()) == 1 / 4 + 0.5
    assert seconds(spec([2, 4, 6], Replicate()), SendRecv()) == 3 + 0.5
    # Four chunks over three hops: the last one leaves after one tensor's time and then needs two hops more.
    assert seconds(spec([2, 4, 6], Replicate()), Broadcast(WHOLE // 4)) == 1 + 2 / 4 + 3 * 0.5


@quick
@given(case=cases())
def test_no_plan_is_expected_to_beat_the_bound(case: Case) -> None:
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    assert plan.simulated_seconds() >= plan.lower_bound_seconds() * (1 - 1e-9)


LARGE = (1200, 960)
PAIRS = {
    "1 to 4": (spec([0], Shard(0), shape=LARGE), spec([2, 3, 4, 5], Replicate(), shape=LARGE)),
    "2 to 4": (spec([0, 1], Shard(0), shape=LARGE), spec([2, 3, 4, 5], Replicate(), shape=LARGE)),
    "copies to rows": (spec([0, 1], Replicate(), shape=LARGE), spec([2, 4, 6], Shard(0), shape=LARGE)),
    "rows to columns": (spec([0, 1, 2], Shard(0), shape=LARGE), spec([3, 4, 5], Shard(1), shape=LARGE)),
    "all-gather": (spec([0, 2, 4, 6], Shard(0), shape=LARGE), spec([0, 2, 4, 6], Replicate(), shape=LARGE)),
    "contributions": (spec([0, 2], Partial(), shape=LARGE), spec([3, 4, 5], Replicate(), shape=LARGE)),
}


@pytest.mark.parametrize("hosts", [HOSTS_OF_ONE, HOSTS_OF_TWO], ids=["hosts of 1", "hosts of 2"])
@pytest.mark.parametrize("pair", PAIRS)
def test_auto_is_never_slower_than_a_strategy(pair: str, hosts: tuple[str, ...]) -> None:
    strategies = (Auto(), SendRecv(), Broadcast())
    plans = [make_plan(*PAIRS[pair], strategy=strategy, topology=Topology(hosts)) for strategy in strategies]
    auto, *others = (plan.simulated_seconds() for plan in plans)
    assert auto <= min(others)


def sent_nbytes(plan: Plan) -> Counter[int]:
    """Bytes that each rank puts on the wire as the first sender of a message."""
    sent: Counter[int] = Counter()
    for message in (message for move in plan.moves for message in move.messages):
        sent[message.chain[0]] += message.nbytes
    return sent


@pytest.mark.parametrize("replicas", [2, 3, 4, 6])
def test_least_loaded_spreads_equal_tasks_evenly_and_naive_uses_the_first(replicas: int) -> None:
    source = spec(reversed(range(replicas)), Replicate())
    destination = spec(range(10, 22), Shard(0))
    spread = sent_nbytes(make_plan(source, destination, balance=LeastLoaded()))
    assert spread == dict.fromkeys(range(replicas), WHOLE // replicas)
    assert sent_nbytes(make_plan(source, destination, balance=Naive())) == {replicas - 1: WHOLE}


def test_least_loaded_weighs_hosts_before_ranks() -> None:
    hosts = Topology(("a", "a", "a", "b", *(f"far{index}" for index in range(12))))
    source, destination = spec([0, 1, 2, 3], Replicate()), spec(range(4, 16), Shard(0))
    sent = sent_nbytes(make_plan(source, destination, topology=hosts))
    assert sent[3] == sent[0] + sent[1] + sent[2] == WHOLE // 2
    assert sent[0] == sent[1] == sent[2]


def test_least_loaded_sends_from_the_receivers_own_host() -> None:
    source, destination = spec([0, 2, 4], Replicate()), spec([1, 3, 5], Shard(0))
    plan = make_plan(source, destination, topology=Topology(HOSTS_OF_TWO))
    assert {message.chain for message in plan.moves[0].messages} == {(0, 1), (2, 3), (4, 5)}
    assert plan.lower_bound_seconds() == 0


@quick
@given(case=cases())
def test_send_recv_makes_one_message_per_pair(case: Case) -> None:
    plan = make_plan(case.source, case.destination, **{**case.plan_arguments(), "strategy": SendRecv()})
    for move in plan.moves:
        chains = [message.chain for message in move.messages]
        assert all(len(chain) == 2 for chain in chains)
        assert len(set(chains)) == len(chains)


@quick
@given(case=cases(), hosts=st.lists(st.sampled_from("abcd"), min_size=8, max_size=8))
def test_a_chain_enters_each_host_once(case: Case, hosts: list[str]) -> None:
    topology = Topology(tuple(hosts))
    plan = make_plan(case.source, case.destination, strategy=Broadcast(), topology=topology)
    for message in (message for move in plan.moves for message in move.messages):
        visited = [host for host, _ in groupby(message.chain, key=topology.host)]
        assert len(set(visited)) == len(visited)
        assert len(set(message.chain)) == len(message.chain)


def test_a_rank_has_at_most_128_sends_and_128_receives_a_round() -> None:
    source = spec(range(300), Shard(0), shape=(600, 600))
    plan = make_plan(source, spec(range(300, 600), Shard(1), shape=(600, 600)))
    (move,) = plan.moves
    assert len(move.hops) == 300 * 300
    for side in ("source", "destination"):
        counts = Counter((hop.round, getattr(hop, side)) for hop in move.hops)
        assert max(counts.values()) == MAX_PEERS_PER_ROUND == 128
    assert len({hop.round for hop in move.hops}) <= -(-600 // 128)


def test_the_digest_of_a_set_tells_which_tensor_lies_how_and_not_in_which_order_they_were_named() -> None:
    rows, columns = (ShardingSpec(Mesh([0, 1], ("x",)), (Shard(dim),), (8, 4), "float32") for dim in (0, 1))
    there = ShardingSpec(Mesh([2, 3], ("y",)), (Shard(0),))

    def digest(sources: dict[str, ShardingSpec]) -> str:
        return make_plan(sources, dict.fromkeys(sources, there)).digest()

    first = digest({"a": rows, "b": columns})
    assert first == digest({"b": columns, "a": rows})
    assert first == digest({"a": rows, "b": ShardingSpec(columns.mesh, (Shard(1),), (8, 4), "float32")})
    others = [{"a": columns, "b": rows}, {"a": rows, "c": columns}, {"a": rows}, {"a": rows, "b": rows}]
    assert len({first, *map(digest, others)}) == 5
