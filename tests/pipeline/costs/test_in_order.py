"""Simulation without a clock says what the clock says, wherever it may stand in for it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pipeline.costs.test_simulate import quick, require_valid
from tests.pipeline.schedule.test_schedule import schedules
from tricomm import PlanError
from tricomm.pipeline import (
    Channel,
    Costs,
    Queues,
    Schedule,
    StageCost,
    Timeline,
    TransferCost,
    eager_one_f_one_b,
    in_turn,
    with_communication,
)
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.programs import Known

HOPS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25])


def both_ways(schedule: Schedule, costs: Costs, queues: Queues) -> tuple[Timeline | str, Timeline | str]:
    """(without a clock, on the clock); instead of a timeline, why there is none."""
    found: list[Timeline | str] = []
    for never_shared in (None, False):
        known = Known(never_shared=never_shared)
        try:
            found.append(run_clock(schedule, costs, queues, known=known))
        except PlanError as error:
            found.append(str(error))
        assert known.never_shared is not None
        assert known.never_shared is (never_shared is None)
    return found[0], found[1]


@quick
@given(schedules(), st.sampled_from([one for one in Queues if one is not Queues.BLOCKING]), st.data())
def test_every_schedule_takes_as_long_as_on_the_clock(schedule: Schedule, queues: Queues, data: st.DataObject) -> None:
    """Whatever the queues, for hops that share nothing; also where pipeline ranks wait for each other in a circle."""
    numbers, positive = st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.5, 1.0, 2.0])
    costs = Costs(
        tuple(StageCost(data.draw(positive), data.draw(numbers), data.draw(numbers)) for _ in range(schedule.stages))
    )
    for channel in schedule.channels:
        cost = TransferCost(data.draw(HOPS), data.draw(numbers))
        costs = costs.with_transfers([channel], cost.sharing(f"{channel} out", f"{channel} in"))
    given = with_communication(schedule, receives_ahead=data.draw(st.integers(0, 3)))
    found, expected = both_ways(given, costs, queues)
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
        return
    require_valid(found)
    assert found.compute == expected.compute
    assert sorted(found.transfers) == sorted(expected.transfers)
    assert [(one.begin, one.end) for one in found.transfers] == [(one.begin, one.end) for one in expected.transfers]


@pytest.mark.parametrize("hop", [0.5, 1.0, 2.0])
def test_turns_take_as_long_as_on_the_clock(hop: float) -> None:
    """A NIC that all transfers of a rank share is shared by none at one time where they take turns on it."""
    costs = nic_of(hop, lambda stage: f"host {stage}")
    schedule = in_turn(eager_one_f_one_b(4, 8, split=True), costs, trials=5)
    found, expected = both_ways(schedule, costs, Queues.PER_DIRECTION)
    assert isinstance(found, Timeline)
    assert isinstance(expected, Timeline)
    require_valid(found)
    assert (found.compute, sorted(found.transfers)) == (expected.compute, sorted(expected.transfers))


def nic_of(hop: float, host: Callable[[int], str], full_duplex: bool = True) -> Costs:
    """Four stages and their hosts."""
    costs = Costs.uniform(4, 1, 1, 1)
    for channel in (one for s in range(3) for one in (Channel(s, s + 1), Channel(s + 1, s))):
        ends = host(channel.sender), host(channel.receiver)
        costs = costs.with_transfers([channel], TransferCost(hop).sharing(*ends, full_duplex=full_duplex))
    return costs


def test_what_is_shared_is_left_to_the_clock() -> None:
    """At once on one NIC; in turn, where two pipeline ranks have one NIC, or a NIC sends and receives by turns."""
    schedule = eager_one_f_one_b(4, 4)

    def is_left(costs: Costs, queues: Queues) -> bool:
        return not Known().is_never_shared(schedule, costs, queues)

    assert is_left(nic_of(1, lambda stage: f"host {stage}"), Queues.PER_CHANNEL)
    assert is_left(nic_of(1, lambda stage: f"host {stage // 2}"), Queues.PER_DIRECTION)
    assert is_left(nic_of(1, lambda stage: f"host {stage}", full_duplex=False), Queues.PER_DIRECTION)
    slow = {Channel(0, 1): TransferCost(1.0, loads=(("a slow link", 2.0),))}
    assert is_left(Costs.uniform(4, 1, 1, 1).with_transfers(slow, slow[Channel(0, 1)]), Queues.PER_CHANNEL)
    assert not is_left(nic_of(1, lambda stage: f"host {stage}"), Queues.PER_DIRECTION)
    assert not is_left(Costs.uniform(4, 1, 1, 1, 2.0), Queues.PER_CHANNEL)
