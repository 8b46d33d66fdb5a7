"""Processes are started once and fed many cases, but for files that leave much behind in them."""

from collections.abc import Iterator

import pytest

from tests.cases import RANKS
from tricomm.launch import Ranks

LEAVE_LANES = {
    "test_bench_pipeline",
    "test_edge",
    "test_executor",
    "test_gloo",
    "test_pipeline_rules",
    "test_torch_adapter",
}
"""Files whose tests connect ranks over and over. Lanes live as long as their process, and gloo's threads of each look
for work 100 times a second: hundreds of them would slow down whatever runs later.
"""


@pytest.fixture(scope="session")
def started() -> Iterator[list[Ranks]]:
    """The processes, if there are any."""
    running: list[Ranks] = []
    yield running
    for ranks in running:
        ranks.__exit__()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, started: list[Ranks]) -> Iterator[Ranks]:
    if not started:
        started.append(Ranks(RANKS, timeout_seconds=60).__enter__())
    yield started[0]
    if request.module.__name__.removeprefix("tests.") in LEAVE_LANES:
        started.pop().__exit__()
