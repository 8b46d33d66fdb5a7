"""Processes are started once for the whole run and fed many cases.

``make test`` runs two workers, one a core: all tests that start processes go to one of them, so that there is one set.
"""

from collections.abc import Iterator, Sequence

import pytest

from tests.cases import RANKS
from tricomm.launch import Ranks

WITH_PROCESSES = ("tests/test_cluster.py", "tests/test_failures.py", "tests/test_gpu_check.py", "tests/test_readme.py")
"""Files whose tests start processes of their own."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(RANKS, timeout_seconds=60) as started:
        yield started


def pytest_collection_modifyitems(items: Sequence[pytest.Function]) -> None:
    for item in items:
        if "ranks" in item.fixturenames or item.nodeid.startswith(WITH_PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))
