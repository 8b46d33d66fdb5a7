"""Sender choices against exhaustive search on small cases, and what they promise on large ones."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricomm import (
    Auto,
    Broadcast,
    Ensemble,
    GlobalAllGather,
    LeastLoaded,
    LocalAllGather,
    Mesh,
    Naive,
    Partial,
    RandomizedGreedy,
    Replicate,
    Search,
    SendRecv,
    Shard,
    ShardingSpec,
    Split,
    Topology,
    make_plan,
)
from tricomm.plan import Plan
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.senders.flow import Job, share
from tricomm.plan.senders.policy import SendLoads, divide_by_choice
from tricomm.plan.senders.search import sending_seconds
from tricomm.plan.senders.split import receiving_seconds
from tricomm.plan.tasks import Task, unit_tasks

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RATE = 1e6
WHOLE = (7200, 64)


def subsets(items: Any) -> list[tuple[Any, ...]]:
    items = list(items)
    return [chosen for size in range(1, len(items) + 1) for chosen in combinations(items, size)]


def least_factor(jobs: list[Job], speeds: dict[int, float], before: dict[int, float]) -> float:
    """THE DEFINITION (Gale's condition): no set of machines has more work that nobody else may do than its time."""
    worst = max(before.values(), default=0.0)
    for chosen in subsets(speeds):
        work = sum(before.get(machine, 0.0) * speeds[machine] for machine in chosen)
        for job in jobs:
            elsewhere = [limit for machine, limit in job.limits.items() if machine not in chosen]
            inside = any(machine in chosen for machine in job.limits)
            if inside and None not in elsewhere:
                work += max(0, job.amount - sum(limit for limit in elsewhere if limit is not None))
        worst = max(worst, work / sum(speeds[machine] for machine in chosen))
    return worst


@st.composite
def sharings(draw: Any) -> tuple[list[Job], dict[int, float], dict[int, float]]:
    machines = range(draw(st.integers(1, 5)))
    speeds = {machine: draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])) for machine in machines}
    before = {machine: draw(st.sampled_from([0.0, 0.0, 40.0])) for machine in machines}
    jobs = []
    for _ in range(draw(st.integers(1, 6))):
        allowed = draw(st.sets(st.sampled_from(machines), min_size=1))
        amount = draw(st.integers(1, 200))
        limits: dict[int, int | None] = {
            machine: draw(st.sampled_from([None, amount, amount // 2])) for machine in sorted(allowed)
        }
        if all(limit is not None for limit in limits.values()):
            limits[min(allowed)] = None
        jobs.append(Job(amount, limits))
    return jobs, speeds, before


@quick
@given(sharings())
def test_the_flow_finds_the_least_factor_and_keeps_every_limit(case: Any) -> None:
    jobs, speeds, before = case
    found = share(jobs, speeds, before)
    assert float(found.factor) == pytest.approx(least_factor(jobs, speeds, before), rel=1e-9, abs=1e-2)
    load = {machine: before[machine] * speed for machine, speed in speeds.items()}
    for job, amounts in zip(jobs, found.amounts, strict=True):
        assert sum(amounts.values()) == job.amount
        for machine, amount in amounts.items():
            limit = job.limits[machine]
            assert limit is None or amount <= limit
            load[machine] += float(amount)
    assert all(load[machine] <= float(found.factor) * speeds[machine] + 1e-2 for machine in speeds)


def sending_bound(tasks: tuple[Task, ...], topology: Topology, fan_out: FanOut) -> float:
    """The optimum of sending with one NIC a host, from every set of NICs and what only they can send."""
    worst = 0.0
    _, demands, forced = divide_by_choice(tasks, topology)
    every = range(max(topology.nic(rank) for rank in range(len(topology.hosts))) + 1)
    for chosen in subsets(every):
        work = sum(a.nbytes for a in forced if crosses(a, topology) and topology.nic(a.sender) in chosen)
        for demand in demands:
            senders = {topology.nic(rank) for rank in demand.holders}
            relays = {topology.nic(ranks[0]) for ranks in demand.hosts}
            copies = len(demand.hosts) if fan_out is not FanOut.EVERY_RANK else sum(map(len, demand.hosts))
            if senders <= {*chosen}:
                outside = len(relays - {*chosen}) if fan_out is FanOut.ONCE else 0
                work += demand.nbytes * max(copies - outside, 1)
        worst = max(worst, work / sum(topology.nic_rate(nic).send_bytes_per_second for nic in chosen))
    return worst


def crosses(assignment: Any, topology: Topology) -> bool:
    return topology.host(assignment.sender) != topology.host(assignment.receivers[0])


@st.composite
def exchanges(draw: Any) -> tuple[ShardingSpec, ShardingSpec, Topology]:
    """Up to four hosts of up to two devices, some NICs faster than others, meshes that may overlap."""
    hosts = tuple(name for name in "abcd" for _ in range(draw(st.integers(1, 2))))
    rates = {name: tuple(RATE * draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)) for name in "abcd"}
    specs = []
    for _ in range(2):
        ranks = draw(st.permutations(range(len(hosts))))
        size = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if n <= len(ranks)]))
        first = draw(st.sampled_from([n for n in (1, 2, 3) if size % n == 0]))
        grid = [list(ranks[i : i + size // first]) for i in range(0, size, size // first)]
        placements = tuple(draw(st.sampled_from([Shard(0), Shard(1), Replicate(), Replicate()])) for _ in range(2))
        specs.append(ShardingSpec(Mesh(grid, ("x", "y")), placements, WHOLE, "float32"))
    return specs[0], specs[1], Topology(hosts, rates)


@quick
@given(case=exchanges(), fan_out=st.sampled_from(FanOut))
def test_split_reaches_the_optimum_of_the_fractional_problem(case: Any, fan_out: FanOut) -> None:
    source, destination, topology = case
    tasks = unit_tasks(source, destination)
    optimum = sending_bound(tasks, topology, fan_out)
    goal = max(optimum, receiving_seconds(tasks, topology))
    found = sending_seconds(Split().assign(tasks, topology, fan_out), topology, fan_out)
    assert found <= goal * 1.01 + 1e-9
    for balance in (Naive(), LeastLoaded(), Search(), RandomizedGreedy(10), Ensemble()):
        other = sending_seconds(balance.assign(tasks, topology, fan_out), topology, fan_out)
        assert other >= optimum * (1 - 1e-9) or isinstance(balance, Naive)
        assert found <= max(other, goal) * 1.01 + 1e-9


@quick
@given(case=exchanges())
def test_search_with_nodes_enough_finds_the_best_choice_of_one_sender(case: Any) -> None:
    source, destination, topology = case
    tasks = unit_tasks(source, destination)
    _, demands, forced = divide_by_choice(tasks, topology)
    options = [sorted({topology.nic(rank): rank for rank in demand.holders}.values()) for demand in demands]
    if len(list(zip(range(2000), product(*options), strict=False))) == 2000:
        return
    best = float("inf")
    for choice in product(*options):
        loads = SendLoads(topology, FanOut.EVERY_HOST)
        for assignment in forced:
            loads.add(assignment, assignment.nbytes)
        for sender, demand in zip(choice, demands, strict=True):
            loads.assign(sender, demand)
        best = min(best, loads.nics.busiest)
    chosen = Search(10**6).assign(tasks, topology, FanOut.EVERY_HOST)
    assert sending_seconds(chosen, topology, FanOut.EVERY_HOST) == pytest.approx(best)


def nic_nbytes(plan: Plan) -> tuple[Counter[int], Counter[int]]:
    """Bytes that leave and enter each NIC, from the hops alone."""
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    topology = plan.topology
    for move in plan.moves:
        for hop in move.hops:
            if topology.host(hop.source) != topology.host(hop.destination):
                nbytes = move.messages[hop.message].chunk_nbytes(hop.chunk)
                out[topology.nic(hop.source)] += nbytes
                into[topology.nic(hop.destination)] += nbytes
    return out, into


def spec(hosts: int, devices: int, first: int, *placements: Any) -> ShardingSpec:
    ranks = [[first + host * devices + device for device in range(devices)] for host in range(hosts)]
    return ShardingSpec(Mesh(ranks, ("host", "device")), placements, WHOLE, "float32")


def cluster(hosts: int, devices: int, **options: Any) -> Topology:
    names = tuple(f"h{host}" for host in range(hosts) for _ in range(devices))
    options = {"nic_bytes_per_second": RATE, "latency_seconds": 0.0, "overhead_seconds": 0.0, **options}
    return Topology(names, **options)


NBYTES = WHOLE[0] * WHOLE[1] * 4


def test_two_holders_send_half_each_where_three_tasks_do_not_divide() -> None:
    """Two hosts to three: one sender per task takes 2/3 of the tensor's time, Split 1/2."""
    source, destination = spec(2, 1, 0, Replicate(), Replicate()), spec(3, 1, 2, Shard(0), Replicate())
    for balance, most in ((Split(), 1 / 2), (LeastLoaded(), 2 / 3), (Ensemble(), 2 / 3)):
        plan = make_plan(source, destination, topology=cluster(5, 1), balance=balance)
        plan.verify()
        out, _ = nic_nbytes(plan)
        assert max(out.values()) / NBYTES == pytest.approx(most, rel=0.01)
        assert plan.lower_bound_seconds() == pytest.approx(NBYTES / 2 / RATE)


def test_a_faster_nic_sends_more() -> None:
    source, destination = spec(2, 1, 0, Replicate(), Replicate()), spec(4, 1, 2, Shard(0), Replicate())
    rates = {"h0": RATE, "h1": 3 * RATE, **{f"h{host}": RATE for host in range(2, 6)}}
    plan = make_plan(source, destination, topology=cluster(6, 1, nic_bytes_per_second=rates))
    out, _ = nic_nbytes(plan)
    assert out[1] / out[0] == pytest.approx(3, rel=0.02)


def test_a_slow_nic_sends_what_a_fast_one_would_send_last() -> None:
    """The fast one alone would take as long: with no moment to spare, and while the slow one sends nothing."""
    source, destination = spec(2, 2, 0, Replicate(), Replicate()), spec(2, 2, 4, Shard(0), Replicate())
    rates = {"h0": 2 * RATE, "h1": RATE, "h2": 2 * RATE, "h3": RATE}
    plan = make_plan(source, destination, topology=cluster(4, 2, nic_bytes_per_second=rates))
    out, _ = nic_nbytes(plan)
    assert out[0] == out[1] == NBYTES / 2


def test_the_receiver_that_has_to_send_most_forwards_nothing() -> None:
    """Host 1 receives task A with host 2 and sends task B: so it is last in A's chain."""
    topology = cluster(5, 1)
    both = ShardingSpec.explicit({0: (((0, 3600),), ((0, 64),)), 1: (((3600, 7200),), ((0, 64),))}, WHOLE, "float32")
    wanted = {1: (0, 3600), 2: (0, 3600), 3: (3600, 7200), 4: (3600, 7200)}
    destination = ShardingSpec.explicit({rank: ((rows,), ((0, 64),)) for rank, rows in wanted.items()}, WHOLE)
    plan = make_plan(both, destination, topology=topology, strategy=Broadcast())
    out, _ = nic_nbytes(plan)
    assert max(out.values()) == NBYTES // 2


@pytest.mark.parametrize(("strategy", "copies"), [(SendRecv(), 4), (LocalAllGather(), 2), (GlobalAllGather(), 1)])
def test_how_often_a_task_leaves_its_sender(strategy: Any, copies: int) -> None:
    source, destination = spec(1, 1, 0, Replicate(), Replicate()), spec(2, 2, 1, Replicate(), Replicate())
    plan = make_plan(source, destination, topology=Topology(("s", "a", "a", "b", "b"), RATE), strategy=strategy)
    plan.verify()
    out, _ = nic_nbytes(plan)
    assert out[0] == copies * NBYTES


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_a_broadcast_uses_all_nics_of_a_host(devices: int) -> None:
    source, destination = spec(1, devices, 0, Replicate(), Replicate()), spec(2, devices, devices, *[Replicate()] * 2)
    topology = cluster(3, devices, nics_per_host=devices)
    plan = make_plan(source, destination, topology=topology, strategy=Broadcast())
    plan.verify()
    out, into = nic_nbytes(plan)
    for loads in (out, into):
        assert max(loads.values()) == pytest.approx(NBYTES / devices, rel=0.05)
    assert plan.lower_bound_seconds() == pytest.approx(NBYTES / devices / RATE)
    assert plan.simulated_seconds() < 1.1 * plan.lower_bound_seconds()


@quick
@given(case=exchanges(), partial=st.booleans())
def test_nics_are_busy_for_what_the_hops_carry(case: Any, partial: bool) -> None:
    source, destination, topology = case
    if partial:
        source = replace(source, placements=(Partial(), source.placements[1]))
    plan = make_plan(source, destination, topology=topology)
    for seconds, nbytes, direction in zip(plan.nic_seconds(), nic_nbytes(plan), (0, 1), strict=True):
        rates = [topology.nic_rate(nic)[direction] for nic in range(len(seconds))]
        assert seconds.tolist() == pytest.approx([nbytes[nic] / rate for nic, rate in enumerate(rates)])
        assert plan.simulated_seconds() >= max(seconds) * (1 - 1e-9)


@quick
@given(case=exchanges())
def test_auto_is_within_5_percent_of_the_best_named_strategy(case: Any) -> None:
    source, destination, topology = case
    named = (SendRecv(), Broadcast(), LocalAllGather(), GlobalAllGather())
    auto, *others = (
        make_plan(source, destination, topology=topology, strategy=strategy).simulated_seconds()
        for strategy in (Auto(), *named)
    )
    assert auto <= 1.05 * min(others)
