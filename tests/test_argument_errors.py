"""What is wrong with an argument is said by value, rule and remedy, in the kind of error that the docstring names."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tests.kinds.calls import CALLS
from tests.kinds.pipeline_calls import PIPELINE_CALLS
from tests.kinds.test_kinds import limit_seconds
from tests.kinds.values import ROWS, WHOLE

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


class Broken:
    """Neither has a repr nor compares."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


def nested() -> list[Any]:
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


OPTIONS = {name: (tricomm.Options, {}) for name in tricomm.Options().given()}
TAKES_ANYTHING_WRONG = {
    **{f"Options.{name}": (tricomm.Options, {}, name) for name in OPTIONS if name not in ("group", "progress")},
    **{f"{name}.{one}": (*CALLS[name], one) for name, one in COUNTS.items()},
    **{f"Mesh.{one}": (*CALLS["Mesh"], one) for one in ("ranks", "axis_names")},
    **{f"make_plan.{one}": (*CALLS["make_plan"], one) for one in ("source", "destination", "strategy", "topology")},
    "Shard.dim": (*CALLS["Shard"], "dim"),
    "Partial.op": (*CALLS["Partial"], "op"),
    "ShardingSpec.placements": (*CALLS["ShardingSpec"], "placements"),
    "ShardingSpec.axis_order": (*CALLS["ShardingSpec"], "axis_order"),
    "ShardingSpec.dtype": (*CALLS["ShardingSpec"], "dtype"),
    "local_shard.tensor": (*CALLS["local_shard"], "tensor"),
    "local_shard.rank": (*CALLS["local_shard"], "rank"),
    "make_plan.rules": (*CALLS["make_plan"], "rules"),
    "LocalTransport.grouped": (*CALLS["LocalTransport"], "grouped"),
}


@pytest.mark.parametrize("name", TAKES_ANYTHING_WRONG)
@pytest.mark.parametrize(
    "value", [Broken(), nested(), b"x" * 200_000, torch.arange(3).numpy()], ids=lambda one: type(one).__name__
)
def test_a_value_that_cannot_be_shown_or_is_long_is_refused_in_few_words(name: str, value: Any) -> None:
    function, arguments, argument = TAKES_ANYTHING_WRONG[name]
    with pytest.raises(tricomm.SpecError) as caught:
        function(**{**arguments, argument: value})
    assert len(str(caught.value)) < 1000


class One:
    """An integer of another kind."""

    def __index__(self) -> int:
        return 1


def test_results_and_transports_are_made_of_what_their_docstrings_say() -> None:
    assert tricomm.LocalTransport(receives_ahead=One()) == tricomm.LocalTransport(receives_ahead=1)  # type: ignore[arg-type]
    with pytest.raises(tricomm.ArgumentError, match=r"Push\(skipped=array\(\[0, 1, 2\]\)\): skipped must be a string"):
        tricomm.Push(7, torch.arange(3).numpy())  # type: ignore[arg-type]
    for wrong in ({"seconds": None}, {"places": [1]}, {"busy": "x"}, {"note": 3}):
        with pytest.raises(tricomm.ArgumentError, match=f"Missing.*: {next(iter(wrong))} must be"):
            tricomm.Missing(**{"seconds": 1.0, "places": (), **wrong})  # type: ignore[arg-type]


def test_options_take_a_timeout_as_their_callers_do() -> None:
    assert tricomm.Options(timeout=timedelta(seconds=3)).seconds == 3.0


def test_what_was_forgotten_is_said_in_the_words_of_its_docstring() -> None:
    with pytest.raises(tricomm.ArgumentError) as caught:
        tricomm.Mesh([0, 1])
    assert str(caught.value) == (
        "Mesh(ranks=[0, 1]) lacks axis_names: one distinct name per axis, outermost first; write Mesh(ranks=..., "
        "axis_names=...)"
    )
    with pytest.raises(tricomm.ArgumentError, match=r"^reshard\(tensor=None\) lacks source and destination: layouts; "):
        tricomm.reshard(None)
    with pytest.raises(tricomm.ArgumentError, match=r"^make_plan has no option 'dtype'; "):
        tricomm.make_plan(ROWS, ROWS, dtype="int8")
    with pytest.raises(tricomm.ArgumentError, match=r"^Mesh: too many positional arguments; it takes ranks, axis_name"):
        tricomm.Mesh([0], ("x",), 3)


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_redistribute_says_how_to_write_into_a_dtensor() -> None:
    with pytest.raises(
        tricomm.ArgumentError, match=r"no option 'out', .* write reshard\(dtensor, source, None, out=out\)"
    ):
        tricomm.redistribute(None, None, (), out=torch.zeros(4))


# Planners ask these of values, very often, with the one argument that they have.
ASKED = {
    "Mesh.position", "Mesh.coordinate", "Mesh.axis", "ShardingSpec.resolved", "ShardingSpec.cutting_axes",
    "ShardingSpec.holding", "ShardingSpec.local_shape", "Topology.host", "Topology.nic", "Topology.nic_rate",
    "Topology.check_covers",
}  # fmt: skip


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", [*CALLS, *PIPELINE_CALLS])
def test_what_is_forgotten_or_too_much_is_said(name: str) -> None:
    """Each argument that is needed, left out by itself and with all after it; a word that it does not know."""
    function, arguments = {**CALLS, **PIPELINE_CALLS}[name]
    if getattr(function, "__module__", "tests").startswith("tests"):
        return  # a helper of these tests has a signature of its own
    if name in ASKED:
        return
    names = list(arguments)
    calls = [{one: arguments[one] for one in names if one != left_out} for left_out in names]
    calls += [{one: arguments[one] for one in names[:count]} for count in range(len(names))]
    found = []
    for given in [*calls, {**arguments, "surplus": 3}]:
        try:
            with limit_seconds(10):
                function(**given)
        except tricomm.TricommError as error:
            if "surplus" in given and "surplus" not in str(error):
                found.append(f"of surplus it says {error}")
        except BaseException as error:
            found.append(f"{list(given)}: {type(error).__name__}: {str(error)[:80]}")
        else:
            found += ["surplus is taken"] * ("surplus" in given)
    assert not found, f"{len(found)} bare errors:\n" + "\n".join(found)


@pytest.mark.parametrize("one", [tricomm.Meeting, tricomm.Publisher, tricomm.Subscriber, tricomm.Feed, tricomm.connect])
def test_jobs_of_their_own_hear_what_they_have_forgotten(one: Callable[..., Any]) -> None:
    with pytest.raises(tricomm.ArgumentError, match=rf"^{one.__name__}\(\) lacks \w+ and .*; write {one.__name__}\("):
        one()
