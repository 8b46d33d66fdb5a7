"""The simulator against figures worked out elsewhere, the law of what a schedule hides, and small cases by hand."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pipeline.schedule.test_schedule import schedules
from tricomm import Mesh, PlanError, Replicate, Shard, ShardingSpec, Topology, make_plan
from tricomm.pipeline import (
    Action,
    Channel,
    Costs,
    Kind,
    Queues,
    Schedule,
    StageCost,
    Timeline,
    TransferCost,
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    simulate,
    with_communication,
    zero_bubble,
)
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.rates import fair_rates

quick = settings(max_examples=60, deadline=None, derandomize=True)

HOPS = (0, 0.5, 1, 1.5, 2, 3)

# Makespans for S = 4, M = 16, F = I = W = 1 at these hops, and the activations that stage 0 holds: from the project's
# facts on pipelines, made with another simulator.
TABLE: dict[str, tuple[Schedule, tuple[float, ...], int]] = {
    "GPipe": (gpipe(4, 16), (57, 60, 63, 73.5, 84, 120), 16),
    "1F1B": (one_f_one_b(4, 16), (57, 71, 85, 99, 113, 141), 4),
    "eager 1F1B": (eager_one_f_one_b(4, 16), (57, 60, 63, 66, 75, 93), 7),
    "eager 1F1B, split": (eager_one_f_one_b(4, 16, split=True), (54, 57, 60, 63, 66, 84), 7),
    "ZB-H1": (zero_bubble(4, 16), (51, 57, 71, 85, 99, 127), 4),
    "ZB-H2-like": (zero_bubble(4, 16, depth=1), (51, 52.5, 54, 60, 66, 84), 7),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_schedules(name: str) -> None:
    schedule, makespans, activations = TABLE[name]
    for hop, expected in zip(HOPS, makespans, strict=True):
        timeline = simulate(schedule, Costs.uniform(4, 1, 1, 1, hop))
        assert timeline.makespan_seconds == expected
        assert timeline.peaks()[0].activations == activations


def test_interleaving_trades_bubble_for_hops() -> None:
    schedule = interleaved_one_f_one_b(4, 16)
    found = [simulate(schedule, Costs.uniform(8, 0.5, 0.5, 0.5, hop)).makespan_seconds for hop in HOPS[:4]]
    assert found == [52.5, 59.5, 75.5, 94.5]


@pytest.mark.parametrize("stages", [2, 4, 7])
@pytest.mark.parametrize(("depth", "split"), [(0, False), (0, True), (1, False), (1, True), (2, False)])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 0.5, 1.5), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0)])
def test_the_law_of_what_is_hidden(stages: int, depth: int, split: bool, times: tuple[float, float, float]) -> None:
    """A hop of c adds only fill and drain, 2 (S - 1) c, if and only if c <= (depth (F + B) + W) / 2."""
    forward, inputs, weights = times
    total = forward + inputs + weights
    hidden = (depth * total + (weights if split else 0)) / 2
    microbatches = 3 * stages + 2
    schedule = eager_one_f_one_b(stages, microbatches, depth=depth, split=split)
    for hop, is_hidden in ((hidden, True), (hidden / 2, True), (hidden + 0.05, False)):
        # Pure latency: with occupancy a deep warm-up is limited by what the link carries, c <= F + B.
        costs = Costs.uniform(stages, *times, TransferCost(latency_seconds=hop))
        fill = (stages - 1) * (total - (weights if split else 0) + 2 * hop)
        expected = microbatches * total + fill
        found = simulate(schedule, costs).makespan_seconds
        assert (found <= expected + 1e-9) == is_hidden, f"{found} and {expected} at {hop}"


def test_occupancy_limits_what_a_deep_warm_up_hides() -> None:
    """With depth 2, a link is hidden up to F + B in full duplex, and (F + B) / 2 if both directions share it."""
    schedule = eager_one_f_one_b(4, 40, depth=2)
    for full_duplex, limit in ((True, 3.0), (False, 1.5)):
        for hop, is_hidden in ((limit, True), (limit + 0.1, False)):
            found = simulate(schedule, shared_links(4, hop, full_duplex)).makespan_seconds
            assert (found <= 40 * 3 + 3 * (3 + 2 * hop) + 1e-9) == is_hidden


def shared_links(stages: int, hop: float, full_duplex: bool) -> Costs:
    """A link of its own between each two stages, in both directions at once or not."""
    costs = Costs.uniform(stages, 1, 1, 1)
    for stage in range(stages - 1):
        for channel in (Channel(stage, stage + 1), Channel(stage + 1, stage)):
            name = f"link {stage} {'forward' if full_duplex and channel.is_forward else 'both'}"
            costs = costs.with_transfers([channel], TransferCost(hop, loads=((name, 1.0),)))
    return costs


def test_receives_hide_nothing_when_posted_late() -> None:
    """The order alone is worth little: 89 with receives right before their use, 92 for 1F1B that waits for each hop,
    and 63 with receives one action ahead (figures of the facts).
    """
    costs = Costs.uniform(4, 1, 1, 1, 1)
    late, ahead, free = (
        simulate(with_communication(eager_one_f_one_b(4, 16), receives_ahead=ahead), costs).makespan_seconds
        for ahead in (0, 1, 99)
    )
    assert (late, ahead, free) == (89, 63, 63)
    waiting = with_communication(one_f_one_b(4, 16), receives_ahead=0)
    assert simulate(waiting, costs, queues=Queues.BLOCKING).makespan_seconds == 92


def test_a_shared_queue_holds_up_what_stands_behind() -> None:
    """Stage 0 sends much to 2 and then little to 1: with one queue for both, 1 waits for what 2 gets."""
    schedule = Schedule.parse(
        [
            "0F0 0SEND_F0>2 0SEND_F0 0RECV_B0 0RECV_B0<2 0B0",
            "1RECV_F0 1F0 1B0 1SEND_B0",
            "2RECV_F0<0 2F0 2B0 2SEND_B0>0",
        ],
        [(0, 1), (0, 2)],
    )
    costs = Costs((StageCost(1, 1, 1),) * 3, {Channel(0, 2): TransferCost(4.0)}, TransferCost(1.0))
    begins = {}
    for queues in (Queues.PER_CHANNEL, Queues.PER_PIPELINE_RANK):
        timeline = simulate(schedule, costs, queues=queues)
        begins[queues] = timeline.compute[1][0].begin
    assert begins == {Queues.PER_CHANNEL: 2, Queues.PER_PIPELINE_RANK: 6}


def test_a_transfer_waits_for_both_ends_and_then_for_its_queue() -> None:
    schedule = Schedule.parse(
        [
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
            "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
        ]
    )
    costs = Costs((StageCost(1, 1, 1), StageCost(2, 1, 1)), {Channel(0, 1): TransferCost(3.0, 0.5)})
    timeline = simulate(schedule, costs)
    first, second = (one for one in timeline.transfers if one.channel == Channel(0, 1))
    assert (first.sent, first.posted, first.begin, first.end, first.arrival) == (1, 0, 1, 4, 4.5)
    assert (second.sent, second.begin, second.end, second.arrival) == (2, 4, 7, 7.5)
    begins = {str(span.action): span.begin for spans in timeline.compute for span in spans}
    assert begins == {"0F0": 0, "0F1": 1, "1F0": 4.5, "1B0": 6.5, "1F1": 8.5, "1B1": 10.5, "0B0": 8.5, "0B1": 12.5}
    assert timeline.makespan_seconds == 14.5
    assert timeline.exposed_seconds()[Channel(0, 1)] == 3.5


def test_transfers_that_share_a_nic_share_its_rate() -> None:
    """Stage 0 feeds 1 and 2 through one NIC: both take twice as long while they overlap."""
    edges = [(0, 1), (0, 2)]
    schedule = with_communication(one_f_one_b(3, 1, edges=edges), receives_ahead=9)
    hop = TransferCost(2.0)
    alone = Costs((StageCost(1, 1, 1),) * 3, {Channel(0, 1): hop, Channel(0, 2): hop})
    together = Costs(
        alone.stages,
        {Channel(0, 1): hop.sharing("host a", "host b"), Channel(0, 2): hop.sharing("host a", "host c")},
    )
    ends = {one.channel: one.end for one in simulate(schedule, alone).transfers}
    assert ends[Channel(0, 1)] == ends[Channel(0, 2)] == 3
    ends = {one.channel: one.end for one in simulate(schedule, together).transfers}
    assert ends[Channel(0, 1)] == ends[Channel(0, 2)] == 5
    shorter = together.with_transfers([Channel(0, 1)], TransferCost(1.0).sharing("host a", "host b"))
    ends = {one.channel: one.end for one in simulate(schedule, shorter).transfers}
    assert (ends[Channel(0, 1)], ends[Channel(0, 2)]) == (3, 4)


@pytest.mark.parametrize(
    ("loads", "rates"),
    [
        ([[("a", 1.0)]], [1.0]),
        ([[("a", 0.5)], [("a", 0.5)]], [1.0, 1.0]),
        ([[("a", 1.0)], [("a", 1.0)], [("b", 1.0)]], [0.5, 0.5, 1.0]),
        ([[("a", 1.0)], [("a", 0.25)]], [0.75, 1.0]),
        ([[("a", 1.0), ("b", 1.0)], [("a", 1.0)], [("b", 1.0)], [("b", 1.0)]], [1 / 3, 2 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_links_are_shared_max_min(loads: Any, rates: list[float]) -> None:
    assert fair_rates(loads) == pytest.approx(rates)


@quick
@given(schedules(), st.data())
def test_what_holds_for_every_timeline(schedule: Schedule, data: st.DataObject) -> None:
    numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25])
    positive = st.sampled_from([0.5, 1.0, 2.0])
    stages = tuple(
        StageCost(data.draw(positive), data.draw(numbers), data.draw(numbers)) for _ in range(schedule.stages)
    )
    ahead = data.draw(st.integers(0, 3))
    costs = Costs(stages)
    for channel in schedule.channels:
        cost = TransferCost(data.draw(numbers), data.draw(numbers))
        if data.draw(st.booleans()):
            cost = cost.sharing(
                f"nic {channel.sender % 2}", f"nic {channel.receiver % 2}", full_duplex=data.draw(st.booleans())
            )
        costs = costs.with_transfers([channel], cost)
    timeline = simulate(with_communication(schedule, receives_ahead=ahead), costs)
    require_valid(timeline)
    ideal = simulate(schedule, costs.without_transfers()).makespan_seconds
    assert timeline.makespan_seconds >= ideal - 1e-9
    assert "critical path" in str(timeline)


def require_valid(timeline: Timeline) -> None:
    """THE DEFINITION: order, dependencies, posts and queues hold on the clock; figures follow from the spans."""
    schedule, costs = timeline.schedule, timeline.costs
    spans = {span.action: span for row in timeline.compute for span in row}
    moved = {(one.channel, one.microbatch): one for one in timeline.transfers}
    assert len(moved) == len(schedule.channels) * schedule.microbatches
    for row, actions in zip(timeline.compute, schedule.lists, strict=True):
        assert [span.action for span in row] == [action for action in actions if action.is_compute]
        assert all(first.end <= second.begin for first, second in pairwise(row))
        assert all(span.end == span.begin + costs.seconds(span.action) for span in row)
    for action, span in spans.items():
        for channel in schedule.inputs(action):
            if channel in schedule.channels:
                assert span.begin >= moved[channel, action.microbatch].arrival
            else:
                assert span.begin >= spans[schedule.producer(channel, action.microbatch)].end
    for one in timeline.transfers:
        cost = costs.transfer(one.channel)
        assert one.sent >= spans[schedule.producer(one.channel, one.microbatch)].end
        assert one.begin >= max(one.sent, one.posted)
        assert one.end - one.begin >= cost.busy_seconds - 1e-9
        assert one.arrival == one.end + cost.latency_seconds
    for channel in schedule.channels:
        row = sorted((one for one in timeline.transfers if one.channel == channel), key=lambda one: one.sent)
        assert all(first.end <= second.begin for first, second in pairwise(row))
    path = timeline.critical_path()
    assert path[0].begin == 0
    assert path[-1].end == timeline.makespan_seconds
    assert all(first.end == second.begin for first, second in pairwise(path))
    for pipeline_rank, peak in enumerate(timeline.peaks()):
        assert peak.activations == most_held(timeline, pipeline_rank)
    assert all(0 <= seconds <= timeline.makespan_seconds for seconds in timeline.exposed_seconds().values())


def most_held(timeline: Timeline, pipeline_rank: int) -> int:
    """The most forwards that have begun and whose backward has not ended, counted in the order of the list."""
    most = held = 0
    for span in timeline.compute[pipeline_rank]:
        held += span.action.kind is Kind.FORWARD
        most = max(most, held)
        held -= span.action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
    return most


def test_bytes_are_counted_at_their_worst_moment() -> None:
    schedule = with_communication(gpipe(2, 3), receives_ahead=0)
    costs = Costs((StageCost(1, 1, 1, 100), StageCost(1, 1, 1, 10)), {Channel(0, 1): TransferCost(4.0, nbytes=7)})
    first, second = simulate(schedule, costs).peaks()
    assert (first.activations, second.activations, second.receives) == (3, 3, 3)
    assert first.nbytes == 3 * 100 + 3 * 7  # the first send takes longer than the three forwards
    assert second.nbytes == 3 * 10 + 3 * 7


def test_the_tensors_of_an_edge_travel_in_turn() -> None:
    both = TransferCost.in_turn([TransferCost(3.0, 0.5, 10, (("a", 1.0),)), TransferCost(1.0, 0.25, 2, (("b", 0.5),))])
    assert (both.busy_seconds, both.latency_seconds, both.nbytes) == (4.0, 0.5, 12)
    assert dict(both.loads) == {"a": 0.75, "b": 0.125}
    assert TransferCost.in_turn([]) == TransferCost()


def test_a_plan_gives_its_seconds_bytes_and_loads() -> None:
    """Two hosts of two ranks: half a tensor from each rank of the first to each of the second, over one NIC a host."""
    topology = Topology(("a", "a", "b", "b"), 100.0, latency_seconds=0, overhead_seconds=0)
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (100,), "float32")
    destination = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(0),))
    cost = TransferCost.of_plan(make_plan(source, destination, topology=topology))
    assert cost.busy_seconds == pytest.approx(4.0)
    assert cost.nbytes == 200
    assert dict(cost.loads) == pytest.approx({"NIC 0 out": 1.0, "NIC 1 in": 1.0})
    copied = TransferCost.of_plan(
        make_plan(source, ShardingSpec(Mesh([1, 0], ("x",)), (Replicate(),)), topology=topology)
    )
    assert copied.loads == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCost(-1, 1, 1), "forward_seconds=-1 must be a finite number from 0; measure it"),
        (lambda: TransferCost(float("inf")), "busy_seconds=inf must be a finite number from 0"),
        (lambda: TransferCost.of_bytes(8, 0), "bytes_per_second=0 must be above 0; give the rate of the link"),
        (lambda: Costs(()), "stages is empty; give one StageCost per stage"),
        (lambda: Costs((StageCost(0, 0, 0),)), "no stage takes any time, and there is nothing to schedule"),
        (lambda: simulate(gpipe(2, 1), Costs.uniform(3, 1, 1, 1)), "costs are of 3 stages and the schedule has 2"),
    ],
)
def test_errors_name_the_value_the_rule_and_the_remedy(make: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert message in str(caught.value)


def test_a_schedule_that_was_not_checked_still_ends() -> None:
    cycle = Schedule.parse(
        [
            "0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1",
            "1RECV_F0 1RECV_F1 1F1 1B1 1SEND_B1 1F0 1B0 1SEND_B0",
        ]
    )
    with pytest.raises(PlanError, match="0B0 at pipeline rank 0 waits for ever; call check, which says for what"):
        run_clock(cycle, Costs.uniform(2, 1, 1, 1))


def test_costs_are_values() -> None:
    hop = TransferCost.of_bytes(100, 50.0, 0.25)
    assert hop.seconds == 2.25
    costs = Costs((StageCost(1, 2, 3),) * 2, {Channel(0, 1): hop})
    assert hash(costs) == hash(Costs(costs.stages, costs.transfers))
    assert costs.transfer(Channel(0, 1)) == hop
    assert costs.transfer(Channel(1, 0)) == TransferCost()
    assert costs.seconds(Action.parse("1B0")) == 5


def test_costs_of_an_edge_that_a_schedule_has_not_are_refused() -> None:
    """They would be left out, and the hop that costs most would be free."""
    costs = Costs.uniform(3, 1, 1, 1).with_transfers([Channel(0, 2)], TransferCost(9.0))
    with pytest.raises(PlanError, match="the costs name edge 0-2, and the schedule has 0-1, 1-2; pass edges="):
        simulate(one_f_one_b(3, 4), costs)
    assert simulate(one_f_one_b(3, 4, edges=[(0, 1), (1, 2), (0, 2)]), costs).makespan_seconds > 20
