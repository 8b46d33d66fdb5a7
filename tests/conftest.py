"""Processes are started once and fed many cases."""

from collections.abc import Iterator

import pytest

from tests.cases import RANKS
from tricomm.launch import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(RANKS, timeout_seconds=60) as running:
        yield running
