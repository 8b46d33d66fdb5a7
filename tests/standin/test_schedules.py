"""The proof that schedules cannot deadlock, against the stand-in: what it accepts runs, and what it refuses hangs."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.pipeline.schedule.test_schedule import schedules
from tests.pipeline.test_executor import SCHEDULES, turned
from tests.standin.device import Limits
from tests.standin.pipeline import steps
from tests.standin.ranks import Threads
from tricomm import PlanError
from tricomm.pipeline import (
    Queues,
    Schedule,
    check,
    eager_one_f_one_b,
    one_f_one_b,
    with_communication,
)

STRICT = Limits(error_seconds=None)
CHAIN = [(0, 1), (1, 2), (2, 3)]
SKIPS = [*CHAIN, (0, 3), (1, 3)]


@pytest.fixture
def six() -> Iterator[Threads]:
    """Six ranks."""
    with Threads(6, STRICT) as threads:
        yield threads


@pytest.mark.parametrize("edges", [CHAIN, SKIPS], ids=["a chain", "skips"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_of_the_pipelines_runs(six: Threads, kind: str, edges: list[tuple[int, int]]) -> None:
    if kind == "interleaved":
        edges = [*edges, (3, 4), (4, 5), (5, 6), (6, 7)]
    schedule = with_communication(SCHEDULES[kind](4, edges))
    check(schedule)
    six.run(steps, six, schedule, f"{kind} {edges}")


@pytest.mark.parametrize("kind", ["1f1b", "eager 2 split", "zero bubble", "interleaved"])
def test_every_schedule_in_turns_runs(six: Threads, kind: str) -> None:
    schedule = turned(SCHEDULES[kind](4, CHAIN + [(3, 4), (4, 5), (5, 6), (6, 7)] * (kind == "interleaved")))
    check(schedule, Queues.PER_DIRECTION)
    six.run(steps, six, schedule, f"{kind} in turn", Queues.PER_DIRECTION)


LOADS = Limits(error_seconds=None, loads=True)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_kernels_are_loaded_in_a_first_step_that_hides_nothing(kind: str) -> None:
    edges = SKIPS + [(3, 4), (4, 5), (5, 6), (6, 7)] * (kind == "interleaved")
    schedule = with_communication(SCHEDULES[kind](4, edges))
    with Threads(6, LOADS) as threads:
        threads.run(steps, threads, schedule, kind, Queues.PER_CHANNEL, (0, 0, 0), 0.0, 10.0, True)


def test_kernels_that_are_loaded_while_messages_are_under_way_can_hang() -> None:
    """And the ranks are told: the monitor asks a device that answers nobody, and goes on without its answer."""
    schedule = with_communication(SCHEDULES["gpipe"](4, SKIPS))
    with Threads(4, LOADS) as threads, pytest.raises(AssertionError, match=r"TransportError: .* answers nothing in"):
        threads.run(steps, threads, schedule, "loading", Queues.PER_CHANNEL, (0, 1), 0.0, 1.5, True)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedules(), st.integers(0, 4))
def test_any_schedule_that_is_proved_runs(schedule: Schedule, ahead: int) -> None:
    lowered = with_communication(schedule, receives_ahead=ahead)
    check(lowered)
    with Threads(6, STRICT) as threads:
        threads.run(steps, threads, lowered, "any")


REFUSED_IN_TURN = Schedule.parse(
    [
        "0F0 0SEND_F0>2 0SEND_F0 0RECV_B0 0RECV_B0<2 0B0",
        "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0",
        "2RECV_F0 2RECV_F0<0 2F0 2B0 2SEND_B0 2SEND_B0>0",
    ],
    [(0, 1), (1, 2), (0, 2)],
)
"""Rank 0 sends to 2 first, and rank 2 receives from 1 first, which waits for rank 0."""


def test_what_the_proof_refuses_hangs(six: Threads) -> None:
    check(REFUSED_IN_TURN)
    with pytest.raises(PlanError, match="cannot run with queues"):
        check(REFUSED_IN_TURN, Queues.PER_DIRECTION)
    six.run(steps, six, REFUSED_IN_TURN, "each channel by itself")
    with pytest.raises(AssertionError, match=r"TransportError|hangs"):
        six.run(steps, six, REFUSED_IN_TURN, "in turn", Queues.PER_DIRECTION, (0,), 0.0, 1.5)


def test_computation_that_takes_time_runs_too(six: Threads) -> None:
    six.run(steps, six, with_communication(one_f_one_b(4, 4)), "slow", Queues.PER_CHANNEL, (0,), 0.02)


def test_with_one_hardware_queue_the_same_schedule_hangs() -> None:
    """A stage in the middle has two streams for each of four channels, and one for compute."""
    schedule = with_communication(eager_one_f_one_b(4, 6, depth=1))
    for queues in (32, 16):
        with Threads(4, Limits(queues=queues, error_seconds=None)) as threads:
            threads.run(steps, threads, schedule, f"{queues} queues")
    with (
        Threads(4, Limits(queues=1, error_seconds=None)) as threads,
        pytest.raises(AssertionError, match=r"TransportError|hangs"),
    ):
        # Whether a step does hangs on what comes first; of a few one does, on a busy machine too.
        threads.run(steps, threads, schedule, "one queue", Queues.PER_CHANNEL, tuple(range(8)), 0.0, 1.5)
