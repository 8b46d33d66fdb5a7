"""Arguments of the wrong kind: whatever a public function is given, it works or says what is wrong."""

import enum
import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
import tricomm.draw
import tricomm.pipeline as pl
import tricomm.rules.models
from tests.kinds.allowed import ALLOWED
from tests.kinds.calls import CALLS, off_meshes
from tests.kinds.pipeline_calls import PIPELINE_CALLS
from tests.kinds.rules_calls import RULES_CALLS
from tests.kinds.values import ROWS, WHOLE, WRONG
from tricomm import PlanError, SpecError, TransportError

# Values and results, which the library makes; and what torch or Python calls.
NOT_CALLED = {
    "Candidate", "Evaluation", "Handle", "Latest", "Missing", "Plan", "Progress", "Push", "Stats", "StepComparison",
    "World", "Timeline", "Tuned", "Kind", "Queues", "PerDirectionFifo", "Turns", "WithLoss.forward", "Options.of",
    "BoundSource", "BoundTensor", "Digit", "Expression",
    "Piece", "Piece.narrowed", "Piece.replaced", "Piece.source_strided", "Piece.split", "Piece.strided", "Piece.turned",
}  # fmt: skip
# Strategies call these with each other's values.
SEAMS = {"assign", "route", "before", "append", "share_host", "rates_between"}


@contextmanager
def limit_seconds(seconds: int) -> Iterator[None]:
    """End what goes on for ever."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EVERY = {**CALLS, **PIPELINE_CALLS, **RULES_CALLS}


@pytest.mark.parametrize("name", EVERY)
def test_what_a_public_callable_is_given_is_of_the_right_kind_or_refused(name: str) -> None:
    function, arguments = EVERY[name]
    with suppress(TransportError):  # there is nobody else: the arguments were right
        function(**arguments)
    found = []
    for parameter, right in arguments.items():
        allowed = ALLOWED.get(f"{name}.{parameter}", ALLOWED.get(parameter, "")).split()
        assert set(allowed) <= set(WRONG), f"{parameter}: no such values are given: {set(allowed) - set(WRONG)}"
        for word, value in WRONG.items():
            if callable(right) and callable(value):
                continue  # of the right kind; what it raises is its own
            outcome = outcome_of(lambda: function(**{**arguments, parameter: value}))  # noqa: B023
            if outcome != ("accepted" if word in allowed else "refused"):
                found.append(f"{parameter}={word}: {outcome}")
    assert not found, f"{len(found)} of them:\n" + "\n".join(found)


def outcome_of(call: Callable[[], object]) -> str:
    """Whether it was refused with an error of ours that says what is wrong, or accepted: if it then waits for others
    that are not there, its arguments were right.
    """
    try:
        with limit_seconds(10):
            call()
    except (SpecError, PlanError):
        return "refused"
    except TransportError:
        return "accepted"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "accepted"


@pytest.mark.parametrize("after", [3, True, "x", torch.zeros(2), ()], ids=str)
def test_what_is_no_event_is_refused_by_start(after: Any) -> None:
    """In host memory nothing waits for the event, so nothing else would say so."""
    with tricomm.Resharder(WHOLE, ROWS) as mover:
        with pytest.raises(tricomm.ArgumentError, match=r"^after=.* is no event; pass what record_event\(\) returned"):
            mover.start(torch.zeros(4, 4), after=after)
        assert mover.start(torch.ones(4, 4), after=mover.record_event()).wait().sum() == 16


@pytest.mark.parametrize("after", [3, True, "x", torch.zeros(2), ()], ids=str)
def test_what_is_no_event_is_refused_off_the_meshes(after: Any) -> None:
    with pytest.raises(tricomm.ArgumentError, match=r"^after=.* is no event; pass what record_event\(\) returned"):
        off_meshes().start(after=after)


@pytest.mark.parametrize("depends_on", [3, None, "x", [1], torch.zeros(2), {}], ids=str)
def test_what_are_no_handles_is_refused_off_the_meshes(depends_on: Any) -> None:
    with pytest.raises(tricomm.ArgumentError, match=r"^depends_on=.* must be Handles; pass what start\(\) returned"):
        off_meshes().start(depends_on=depends_on)
    assert off_meshes().start(depends_on=[off_meshes().start()]).wait() is None


def public(owner: Any) -> Iterator[str]:
    for name in owner.__all__:
        one = getattr(owner, name)
        if not callable(one) or (inspect.isclass(one) and issubclass(one, BaseException)):
            continue
        yield name
        if inspect.isclass(one) and not issubclass(one, enum.Enum):
            ours = [vars(each) for each in one.__mro__ if each.__module__.startswith("tricomm")]
            for method, value in {name: value for each in reversed(ours) for name, value in each.items()}.items():
                is_called = inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)
                if not method.startswith("_") and is_called and inspect.signature(getattr(one, method)).parameters:
                    takes = [p for p in inspect.signature(getattr(one, method)).parameters if p != "self"]
                    if takes and method not in SEAMS:
                        yield f"{name}.{method}"


def test_every_public_callable_is_there() -> None:
    assert set(public(tricomm)) - NOT_CALLED <= set(CALLS)
    assert {*public(pl), *public(tricomm.draw)} - NOT_CALLED <= set(PIPELINE_CALLS)
    assert {*public(tricomm.rules), *public(tricomm.rules.models)} - NOT_CALLED <= set(RULES_CALLS)
    assert len(EVERY) == len(CALLS) + len(PIPELINE_CALLS) + len(RULES_CALLS)
    names = {name for _, arguments in EVERY.values() for name in arguments}
    assert {name.rpartition(".")[2] for name in ALLOWED} <= names
