"""What `bench.planner` says of fan-outs to thousands of ranks, of searches, and of the cases of `bench.reshard`."""

import pytest

from bench.planner.fan_out import FanOut
from bench.planner.irregular import layouts
from bench.planner.quality import BOUND, FORMULAS, SEARCH, WORSE, busy_seconds, topology_of
from bench.reshard.cases import CASES, Case
from tricomm import make_plan
from tricomm.plan.routes.searched import MOST_DELIVERIES, WORTH_SAYING, deliveries_of
from tricomm.plan.tasks import unit_tasks


@pytest.mark.parametrize(("megabytes", "ratio"), [(16, 2.1), (256, 1.3)])
def test_4096_receivers_take_little_longer_than_a_nic_and_a_tree_allow(megabytes: int, ratio: float) -> None:
    move = FanOut(sources=1, receivers=4096, devices=1, megabytes=megabytes, gigabytes_per_second=12.5)
    plan = make_plan(*move.specs, topology=move.topology)
    assert plan.wire_nbytes == plan.minimum_nbytes == 4096 * megabytes << 20
    assert plan.simulated_seconds() <= ratio * move.bound_seconds


def test_irregular_layouts_of_hundreds_of_ranks_are_searched_for_and_those_of_thousands_refused() -> None:
    source, destination = layouts(256)
    deliveries = deliveries_of([unit_tasks(source, destination, None, 0)])
    assert WORTH_SAYING < deliveries < MOST_DELIVERIES
    assert deliveries == 2 * 128 * 128  # which grows with the square of the ranks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formulas_are_as_good_as_search_on_emulated_hosts(case: Case) -> None:
    topology = topology_of(case)
    plans = [make_plan(*case.make(9600), topology=topology, strategy=strategy) for strategy in (FORMULAS, SEARCH)]
    seconds, searched = (plan.simulated_seconds() for plan in plans)
    assert seconds <= WORSE * searched
    assert seconds <= BOUND * max(plans[0].lower_bound_seconds(), searched / BOUND)
    busy = [max(busy_seconds(plan)) for plan in plans]
    assert busy[0] <= BOUND * busy[1]
