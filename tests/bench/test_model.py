"""The benchmark of whole models: its cases are laid out and planned; the smallest is measured."""

from pathlib import Path

import pytest
import torch

from bench.model import loopback, run
from bench.model.by_hand import fills_of, read, transfers_of, written
from bench.model.cases import CASES, EXECUTED, EXECUTED_RANKS, Case, rails
from bench.model.executed import planned_on, shards_of, whole_tensors
from tricomm import Topology
from tricomm.launch import Ranks


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


@pytest.mark.parametrize("case", EXECUTED, ids=lambda case: case.name)
def test_what_is_executed_is_level_and_written_by_hand_the_same(case: Case) -> None:
    """In one process: what the transfers by hand say, and fills, are all elements of every rank."""
    setting = case.setting(EXECUTED_RANKS, EXECUTED_RANKS)
    plan = planned_on(setting, Topology([f"host{rank}" for rank in range(2 * EXECUTED_RANKS)], 25e6))
    assert plan.wire_nbytes == plan.minimum_nbytes
    sending, receiving = plan.nic_seconds()
    assert run.balance(sending[:EXECUTED_RANKS]) <= 1.05
    assert run.balance(receiving[EXECUTED_RANKS:]) <= 1.05
    full, made = whole_tensors(setting)
    given = [shards_of(full, setting.source, rank) for rank in plan.participants]
    expected = [shards_of(made, setting.destination, rank) for rank in plan.participants]
    assert sum(tensor.nbytes for tensors in given for tensor in tensors.values()) <= 256 << 20
    out = [{name: torch.full_like(tensor, 77) for name, tensor in tensors.items()} for tensors in expected]
    for rank, tensors in enumerate(out):
        for place, value in fills_of(rank, setting, tensors):
            place.fill_(value)
    for transfer in (one for of_tensor in transfers_of(setting) for one in of_tensor):
        place = written(transfer.piece, transfer.needed, out[transfer.receiver][transfer.destination])
        place.copy_(read(transfer, given[transfer.sender][transfer.source]))
    for tensors, right in zip(out, expected, strict=True):
        assert tensors.keys() == right.keys()
        assert all(torch.equal(tensors[name], right[name]) for name in right)


@pytest.mark.processes
def test_a_checkpoint_brings_the_same(tmp_path: Path) -> None:
    """On every rank, each way is compared element by element before it is measured."""
    with Ranks(2 * EXECUTED_RANKS, preload=("bench.model.loopback",)) as ranks:
        read_at_once = ranks.run(loopback.prepare, 3, str(tmp_path))
    assert read_at_once[:EXECUTED_RANKS] == [0] * EXECUTED_RANKS, "trainers read nothing"
    assert min(read_at_once[EXECUTED_RANKS:]) > 0
    assert any(tmp_path.iterdir())
