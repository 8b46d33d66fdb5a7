"""What is wrong with an argument is said by value, rule and remedy, in the kind of error that the docstring names."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

import tricomm
from tests.test_kinds import CALLS, ROWS, WHOLE

NO_INTEGERS: list[Any] = ["x", 2.5, True, [1], (), {}, object(), int, torch.zeros(2), "64"]
COUNTS = {
    "Auto": "search_up_to", "Broadcast": "chunk_bytes", "GlobalAllGather": "chunk_bytes",
    "LocalAllGather": "chunk_bytes",
    "SendRecv": "chunk_bytes", "Search": "nodes", "RandomizedGreedy": "trials", "make_plan": "rank",
    "Topology.flat": "ranks",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_integer_is_an_argument_error(name: str) -> None:
    """It names the argument, the value and what to give instead; a number out of range is another error."""
    function, arguments = CALLS[name]
    for value in NO_INTEGERS:
        with pytest.raises(tricomm.ArgumentError) as caught:
            function(**{**arguments, COUNTS[name]: value})
        assert COUNTS[name] in str(caught.value), caught.value


SHORT = torch.zeros(4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: tricomm.Options(timeout=3), tricomm.ArgumentError, "write timeout_seconds=3, or timeout=timedelta"),
        (lambda: tricomm.Options(timeouts=3), tricomm.ArgumentError, "has no option 'timeouts'; write timeout=..."),
        (lambda: tricomm.Options(3), tricomm.ArgumentError, "options are named; write name=value"),
        (lambda: tricomm.make_plan(WHOLE, ROWS, rank=99), tricomm.SpecError, "rank=99 is on neither mesh, .* or None"),
        (lambda: tricomm.local_shard(SHORT, ROWS, 0), tricomm.SpecError, "bfloat16, and its spec says .*float32; pass"),
        (lambda: tricomm.Auto(search_up_to=-1), tricomm.PlanError, "search_up_to=-1 must be"),
        (lambda: tricomm.RandomizedGreedy(seed="x"), tricomm.ArgumentError, "seed='x' must be an integer"),
    ],
)
def test_an_error_names_value_rule_and_remedy(call: Callable[[], Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        call()
    assert type(caught.value) is kind


def test_options_take_a_timeout_as_their_callers_do() -> None:
    assert tricomm.Options(timeout=timedelta(seconds=3)).seconds == 3.0
