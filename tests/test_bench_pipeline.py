"""The pipeline benchmark's methods do the work that they are measured by, with sleeps of no length."""

from collections import Counter

import pytest

from bench.pipeline import TORCH, Row, methods_of, table, verdicts
from bench.pipeline_ranks import Setting, prepare, sample
from bench.pipeline_work import Seconds
from tests.cases import RANKS
from tricomm import Topology
from tricomm.launch import Ranks
from tricomm.pipeline import eager_one_f_one_b, with_communication

MICROBATCHES = 4
STAGES = 4


@pytest.mark.parametrize("devices", [1, 2])
def test_every_method_computes_every_microbatch(ranks: Ranks, devices: int) -> None:
    size = STAGES * devices
    topology = Topology(tuple(f"host{rank // devices}" for rank in range(RANKS)), 1e9)
    setting = Setting(STAGES, devices, MICROBATCHES, Seconds(0.0, 0.0, 0.0), topology)
    schedule = with_communication(eager_one_f_one_b(STAGES, MICROBATCHES, depth=1, split=True))
    methods = [one for one in methods_of(setting, 64, devices * devices, schedule) if one.kind != "torch"]
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
    return Row(method, 8, 1, hop, hop / 100, seconds, (seconds,), (1, 1, 1, 1), predicted, None, (0.0,) * 4)


def test_verdicts_hold_ours_against_the_bound_and_the_fastest_peer() -> None:
    rows = [row("signal", 1, 1.0), row("tricomm", 1, 1.04, 1.0), *(row(name, 1, 2.0) for name in TORCH)]
    rows.append(row("leader + broadcast, 1F1B", 1, 1.5))
    (found,) = verdicts(rows)
    assert found.bound_seconds == pytest.approx(1.06)
    assert found.ratio == pytest.approx(1.04 / 1.06)
    assert (found.fastest_peer, found.peer_ratio) == ("leader + broadcast, 1F1B", pytest.approx(1.5 / 1.04))
    assert "| 1 | 10.0 ms | tricomm | 1.040 s | 1.00 | 1 1 1 1 | -3.8% |" in table(rows)
