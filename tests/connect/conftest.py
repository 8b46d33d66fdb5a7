"""A meeting, and the worlds of a trainer and a server that have come to it, for tests that need no others."""

from collections.abc import Iterator

import pytest

from tests.connect.jobs import SECRET, SIZES, worlds_of
from tricomm import Meeting, World


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    with Meeting("tcp://127.0.0.1:0", secret=SECRET) as started:
        yield started


@pytest.fixture
def worlds(meeting: Meeting) -> Iterator[list[World]]:
    found = worlds_of(meeting, SIZES)
    yield found
    for world in found:
        world.close()
