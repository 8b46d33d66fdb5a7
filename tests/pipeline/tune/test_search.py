"""The tuner as somebody new to it meets it: what it refuses, what it says, and that its pruning loses nothing."""

import itertools
import re

import pytest

from tests.pipeline.tune.test_in_turn import one_nic_each
from tests.pipeline.tune.test_tune import HOPS, PROVEN
from tricomm import PlanError
from tricomm.pipeline import (
    Channel,
    Costs,
    Edge,
    Limits,
    StageCost,
    TransferCost,
    Workload,
    chain,
    eager_one_f_one_b,
    simulate,
    tune,
)
from tricomm.pipeline.tune.evaluate import Simulator, lower_bound_seconds
from tricomm.pipeline.tune.orders import CandidateOrder, distinct, known_orders
from tricomm.pipeline.tune.search import WORTH_IT


def test_costs_of_a_skip_edge_are_not_left_out() -> None:
    """A stage that also feeds the one after the next, over a hop so slow that it decides."""
    costs = Costs.uniform(3, 1, 1, 1, 0.1).with_transfers([Channel(0, 2), Channel(2, 0)], TransferCost(9.0))
    text = r"the costs name edge 0-2, which is none of the edges 0-1, 1-2; pass edges=\[\(0, 1\), \(0, 2\), \(1, 2\)\]"
    with pytest.raises(PlanError, match=text):
        tune(lambda _: costs, [6])
    edges = [(0, 1), (0, 2), (1, 2)]
    found = tune(lambda _: costs, [6], edges=edges)
    assert found.best.schedule.edges == tuple(Edge(*edge) for edge in edges)
    assert found.best.makespan_seconds > 6 * 9.0


@pytest.mark.parametrize(("stages", "microbatches", "activations"), PROVEN)
def test_the_bound_holds_and_is_near(stages: int, microbatches: int, activations: int) -> None:
    """Pruning by a bound above the proven optimum would lose schedules."""
    for hop, optimum in zip(HOPS, PROVEN[stages, microbatches, activations], strict=True):
        bound = lower_bound_seconds(Costs.uniform(stages, 1, 1, 1, hop), microbatches, chain(stages))
        assert 0.5 * optimum < bound <= optimum + 1e-9


@pytest.mark.parametrize("hop", [0.5, 1.0, 2.0, 4.0])
def test_the_bound_holds_where_hops_share_a_nic(hop: float) -> None:
    """On random and regular orders, in turn and at once."""
    costs = one_nic_each(hop)
    bound = lower_bound_seconds(costs, 8, chain(4))
    simulator = Simulator(costs)
    for order in known_orders(4, 8, chain(4), allow_split=True):
        assert simulator.ideal(order.schedule).makespan_seconds >= bound - 1e-9
    best = tune(lambda _: costs, [8]).best
    assert bound - 1e-9 <= best.makespan_seconds <= 1.25 * bound


def test_nothing_faster_is_pruned() -> None:
    """Every known order, with every way to post receives, evaluated one by one."""
    for hop, split in itertools.product((0.25, 1.5), (False, True)):
        costs = Costs(tuple(StageCost(1, 1 + one, 0.5) for one in range(3)), (), TransferCost(hop, 0.25))
        simulator = Simulator(costs)
        least = min(
            simulate(eager_one_f_one_b(3, 6, depth=depth, split=split), costs).makespan_seconds for depth in range(4)
        )
        best = tune(lambda _, costs=costs: costs, [6], allow_split=split).best  # type: ignore[misc]
        assert best.makespan_seconds <= least * (1 + WORTH_IT)
        assert simulator.run(best.schedule).makespan_seconds == best.makespan_seconds


def test_orders_that_compute_alike_are_one() -> None:
    """With as few microbatches as these, deeper warm-ups are the same."""
    found = distinct(known_orders(2, 2, chain(2), allow_split=False))
    assert [one.name for one in found] == ["GPipe", "1F1B"]
    assert isinstance(found[0], CandidateOrder)


def test_no_two_lines_say_the_same() -> None:
    tuned = tune(lambda _: Costs.uniform(4, 1, 1, 1), [4, 8, 8, 4], limits=Limits(activations=6))
    lines = str(tuned).splitlines()
    assert len(lines) == len(set(lines))
    figures = [re.sub(r"  .*?, (\d+ microbatches), .*?, holds", r" \1", line[9:]) for line in lines if "next:" in line]
    assert len(figures) == len(set(figures))


def test_a_choice_that_is_not_the_fastest_is_explained() -> None:
    """Hops that nearly hide: the depth that hides all of them gains less than costs are known to."""
    costs = Costs((StageCost(1, 1, 0.7),) * 2, (), TransferCost(1.05, 0.02))
    tuned = tune(lambda _: costs, [12])
    fastest = min(tuned.compared, key=lambda one: one.makespan_seconds)
    assert fastest is not tuned.best
    assert fastest.activations > tuned.best.activations
    text = str(tuned).splitlines()[1]
    assert text.startswith("  though ")
    assert "faster: less than the 0.5% that costs are known to, and the chosen one takes" in text
    assert f"{tuned.best.activations} activations instead of {fastest.activations}" in text
    plain = tune(lambda _: Costs.uniform(2, 1, 1, 1), [4])
    assert plain.best.makespan_seconds == min(one.makespan_seconds for one in plain.compared)
    assert "though" not in str(plain)


def test_a_long_search_tells_how_far_it_is() -> None:
    told: list[tuple[int, int, float | None]] = []
    tuned = tune(
        lambda _: one_nic_each(1.5),
        [4, 8],
        progress=lambda done, known, best: told.append((done, known, best and best.makespan_seconds)),
    )
    assert len(told) > 10
    assert all(done <= known for done, known, _ in told)
    assert told[-1][0] == told[-1][1]
    assert min(best for _, _, best in told if best is not None) <= tuned.best.makespan_seconds


# ---- what an action takes however small its microbatch


def test_overhead_is_estimated_from_two_numbers_of_microbatches() -> None:
    """With work of 8 and 0.4 for each action, 8 microbatches look the best if the overhead is not known."""
    work, fixed = 8.0, 0.4

    def measured(count: int) -> Costs:
        hop = TransferCost(0.8 / count)
        return Costs.uniform(2, work / count + fixed, work / count + fixed, work / count + fixed, hop).with_transfers(
            [Channel(0, 1), Channel(1, 0)], hop
        )

    fitted = Workload.fitted({2: measured(2), 4: measured(4)})
    for count in (2, 4, 8, 16):
        for found, wanted in zip(fitted.costs(count).stages, measured(count).stages, strict=True):
            assert found.forward_seconds == pytest.approx(wanted.forward_seconds)
            assert found.weight_gradient_seconds == pytest.approx(wanted.weight_gradient_seconds)
        assert fitted.costs(count).transfer(Channel(0, 1)).busy_seconds == pytest.approx(0.8 / count)
    from_one = tune(Workload.measured(measured(4), 4).costs, [2, 4, 8, 16]).best.microbatches
    from_two = tune(fitted.costs, [2, 4, 8, 16]).best.microbatches
    truth = {count: tune(measured, [count]).best.makespan_seconds for count in (2, 4, 8, 16)}
    assert truth[from_two] == min(truth.values())
    assert truth[from_one] > 1.2 * min(truth.values())


def test_a_fit_gives_no_negative_time() -> None:
    faster = Workload.fitted({2: Costs.uniform(1, 1.0, 0.5, 0.5), 4: Costs.uniform(1, 0.4, 0.5, 0.6)})
    assert faster.overheads[0].forward_seconds == 0.0, "less than no overhead is none"
    assert faster.stages[0].weight_gradient_seconds == 0.0, "longer with less to do: all of it is overhead"
    assert faster.overheads[0].weight_gradient_seconds == pytest.approx(0.55)
    with pytest.raises(PlanError, match=r"measured has the numbers of microbatches \[2\] and stages \[1\]; give costs"):
        Workload.fitted({2: Costs.uniform(1, 1, 1, 1)})
    with pytest.raises(PlanError, match="overheads are of 2 stages of 1; give one for each"):
        Workload((StageCost(1, 1, 1),), {}, 0.0, (StageCost(0, 0, 0),) * 2)
