"""The stand-in keeps every rule that tricomm relies on, by the code that asks a GPU in gpu-check."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from bench.gpu_check import conformance
from bench.gpu_check.parts import Setting
from bench.gpu_check.rules import ONE_QUEUE_RULES, RULES, bed, failures, order
from tests.standin.device import Device, Limits, Stream
from tests.standin.nccl import Backend, Group, Work
from tests.standin.ranks import HOST, Threads
from tricomm.transport import nccl


class StandInBed:
    """See Bed."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.device, self.name = rank, HOST, ""
        self.accelerator = threads.standins[rank]
        self._threads = threads
        self._computed = 0

    def store(self, name: str) -> Any:
        return dist.PrefixStore(name, self.accelerator.store)

    def barrier(self) -> None:
        self._threads.barrier.wait()

    def compute(self, seconds: float) -> None:
        self.accelerator.current_stream(HOST).launch(lambda: None, seconds=seconds)

    def compute_anew(self) -> None:
        self._computed += 1
        self.accelerator.current_stream(HOST).launch(lambda: None, name=f"new {self._computed}")


def keep(rank: int, threads: Threads, rule: Callable[[bed.Bed], None]) -> str:
    return conformance.kept(rule, StandInBed(threads, rank))


def kept_by(rule: Callable[[bed.Bed], None], limits: Limits) -> list[str]:
    """What was laxer on each of two ranks."""
    with Threads(2, limits, timeout_seconds=20) as threads:
        return threads.run(keep, threads, rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule(rule: Callable[[bed.Bed], None]) -> None:
    assert kept_by(rule, Limits(queues=32, loads=True)) == ["", ""], "the stand-in is never laxer"


@pytest.mark.parametrize("rule", ONE_QUEUE_RULES, ids=lambda rule: rule.__name__)
def test_a_rule_of_one_queue(rule: Callable[[bed.Bed], None]) -> None:
    assert kept_by(rule, Limits(queues=1)) == ["", ""]
    assert "did not hold up" in kept_by(rule, Limits(queues=32))[0]
    with pytest.raises(AssertionError, match="a stream waited for another one"):
        kept_by(order.streams_have_queues_of_their_own, Limits(queues=1))


# ---- planted faults: each rule can be broken


def order_nothing(work: Work) -> None:
    """A wait that orders no stream."""


def end_nothing(backend: Backend) -> None:
    """An abort that ends nothing."""
    backend.is_aborted = True


def only_one(found: Device, priority: int = 0) -> Stream:
    """A device of one stream."""
    return found.default


def end_at_once(group: Group) -> None:
    """A group that ends without its messages."""
    group.done = True


FAULTS: dict[str, tuple[Callable[[bed.Bed], None], list[tuple[Any, str, Any]], str]] = {
    "a wait that orders nothing": (
        order.waiting_orders_the_stream,
        [(Work, "synchronize", order_nothing)],
        "7 was sent|the stream went on before",
    ),
    "groups that end at once": (
        order.groups_are_done_in_order,
        [(Group, "begin", end_at_once)],
        "7 was sent|ended without its message",
    ),
    "one stream": (
        order.high_priority_goes_first,
        [(Device, "new_stream", only_one)],
        "waited for all those before",
    ),
    "an abort that ends nothing": (
        failures.to_abort_ends_what_waits_here,
        [(Backend, "abort", end_nothing)],
        "a stream still waits",
    ),
    "a watchdog": (
        failures.nothing_watches_by_itself,
        [(nccl, "WITHOUT_WATCHDOG", {})],
        "a receive ended without its message|did not come to its end",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_that_is_broken_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, patches, told = FAULTS[name]
    for module in (bed, order, failures):
        monkeypatch.setattr(module, "SECONDS", 1.5, raising=False)
    for owner, attribute, value in patches:
        monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(AssertionError, match=told):
        kept_by(rule, Limits())


def test_a_rehearsal_says_where_they_are_kept() -> None:
    (outcome,) = conformance.rules(Setting("cpu", 10.0))
    assert outcome.passed is None
    assert "tests/standin" in outcome.text
