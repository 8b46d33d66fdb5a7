"""The pipeline benchmark's methods do the work that they are measured by, with sleeps of no length."""

from collections import Counter

import pytest

from bench.pipeline.ranks import Setting, prepare, sample
from bench.pipeline.report import TORCH, Row, exposures, table
from bench.pipeline.run import methods_of, wire_bound_seconds
from bench.pipeline.work import Seconds
from tests.cases import RANKS
from tricomm import Topology
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Channel,
    Costs,
    Queues,
    StageCost,
    TransferCost,
    eager_one_f_one_b,
    in_turn,
    tune,
    with_communication,
)

AT_ONCE = Queues.PER_CHANNEL
MICROBATCHES = 4
STAGES = 4


@pytest.mark.parametrize(("devices", "queues"), [(1, AT_ONCE), (2, AT_ONCE), (2, Queues.PER_DIRECTION)])
def test_every_method_computes_every_microbatch(ranks: Ranks, devices: int, queues: Queues) -> None:
    size = STAGES * devices
    topology = Topology(tuple(f"host{rank // devices}" for rank in range(RANKS)), 1e9)
    setting = Setting(STAGES, devices, MICROBATCHES, Seconds(0.0, 0.0, 0.0), topology)
    eager = eager_one_f_one_b(STAGES, MICROBATCHES, depth=1, split=True)
    schedule = with_communication(eager) if queues is AT_ONCE else in_turn(eager, Costs.uniform(STAGES, 1, 1, 1, 2))
    methods = [one for one in methods_of(setting, 64, devices * devices, schedule, queues) if one.kind != "torch"]
    ranks.run(prepare, setting, methods)
    for method in methods:
        found = ranks.run(sample, method.name)
        for rank, one in enumerate(found):
            kinds = Counter(kind for kind, _, _ in one.spans)
            expected = {"F": MICROBATCHES, "I": MICROBATCHES, "W": MICROBATCHES} if rank < size else {}
            assert kinds == expected, f"{method.name}, rank {rank}"
        peaks = [one.peak for one in found[:size:devices]]
        assert peaks == ([4, 3, 2, 1] if method.kind == "leader" else [4, 4, 3, 1])


def test_the_second_half_of_a_backward_comes_later(ranks: Ranks) -> None:
    setting = Setting(STAGES, 1, MICROBATCHES, Seconds(0.0, 0.0, 0.0), Topology(("host",) * RANKS, 1e9))
    delayed = eager_one_f_one_b(STAGES, MICROBATCHES, split=True, weight_delay=1)
    schedule = with_communication(delayed)
    methods = [one for one in methods_of(setting, 64, 1, schedule) if one.schedule is not None]
    ranks.run(prepare, setting, methods)
    for method in methods:
        kinds = [kind for kind, _, _ in ranks.run(sample, method.name)[STAGES - 1].spans]
        assert "".join(kinds) == "FIFIWFIWFIWW", method.name


def row(method: str, hop: float, seconds: float, predicted: float | None = None) -> Row:
    return Row(method, 8, 1, False, hop, hop / 100, seconds, (seconds,), (1, 1, 1, 1), predicted, 1.0, None, (0.0,) * 4)


def test_verdicts_hold_ours_against_the_bound_and_the_fastest_peer() -> None:
    rows = [row("signal", 1, 1.0), row("tricomm", 1, 1.04, 1.0), *(row(name, 1, 2.0) for name in TORCH)]
    rows.append(row("leader + broadcast, 1F1B", 1, 1.5))
    (found,) = exposures(rows)
    assert found.bound_seconds == pytest.approx(1.06)
    assert found.ratio == pytest.approx(1.04 / 1.06)
    assert found.wire_ratio == pytest.approx(1 / 1.06)
    assert (found.fastest_peer, found.peer_ratio) == ("leader + broadcast, 1F1B", pytest.approx(1.5 / 1.04))
    assert "| 1 | 10.0 ms | tricomm | 1.040 s | 1.00 | 1 1 1 1 | -3.8% |" in table(rows)


@pytest.mark.parametrize("hop", [0.01, 0.045, 0.06])
@pytest.mark.parametrize("is_shared", [True, False])
def test_no_schedule_beats_the_bound_of_the_wires(hop: float, is_shared: bool) -> None:
    """The tuner reaches it where the hop is long; were it shorter, the bound would be wrong."""
    transfers = {}
    for stage in range(STAGES - 1):
        for sender, receiver in ((stage, stage + 1), (stage + 1, stage)):
            cost = TransferCost(hop)
            transfers[sender, receiver] = cost.sharing(f"{sender}", f"{receiver}") if is_shared else cost
    stages = (StageCost(0.03, 0.0, 0.06), *[StageCost(0.03, 0.03, 0.03)] * (STAGES - 1))
    costs = Costs(stages, {Channel(*channel): cost for channel, cost in transfers.items()})
    bound, best = wire_bound_seconds(costs, 8), tune(lambda _: costs, [8]).best.makespan_seconds
    assert bound <= best
    if hop == 0.06 and is_shared:
        # The NIC of stage 2: its first activation may leave after three forwards and two hops, 16 messages follow,
        # and the last gradient goes on through stage 1 to stage 0.
        assert bound == pytest.approx(3 * 0.03 + 2 * hop + 16 * hop + 0.03 + hop + 0.06)
        assert best == pytest.approx(bound)  # hops take turns on it, and it is never idle
