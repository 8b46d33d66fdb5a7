"""The parts of gpu-check that also run without a GPU do here what they are to do there."""

import torch

from bench.gpu_transport import CASES, transport_part


def test_the_transport_part_on_gloo() -> None:
    outcomes = list(transport_part(torch.device("cpu"), overlap_nbytes=1 << 20, matrix=64))
    assert [outcome.name for outcome in outcomes] == [*(f"transport: {name}" for name in CASES), "transport: overlap"]
    assert all(outcome.passed for outcome in outcomes), outcomes
