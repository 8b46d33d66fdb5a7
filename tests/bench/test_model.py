"""The benchmark of whole models: its cases are laid out and planned; the smallest is measured."""

from bench.model import run
from bench.model.cases import CASES, rails


def test_a_model_is_planned_at_full_size() -> None:
    row = run.measured(CASES[0], 16, 16, repeats=1)
    parameters, norms = 8_030_261_248, 65 * 4096
    assert row.tensors == (291, 195)
    assert row.minimum_nbytes == row.wire_nbytes == 2 * (4 * parameters + 12 * norms), "four replicas, norms on all"
    assert row.receiving_balance <= 1.05
    assert row.sending_balance <= 1.05
    assert row.bound_seconds <= row.simulated_seconds <= 1.05 * row.bound_seconds
    assert row.case[0] in run.table([row])


def test_every_gpu_has_a_nic() -> None:
    topology = rails(24)
    assert [topology.nic(rank) for rank in (0, 7, 8, 23)] == [0, 7, 8, 23]
    assert topology.nic_bytes_per_second * 8 == 400e9
