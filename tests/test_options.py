"""The options and statistics that all callers share: what is taken, and that what is passed on is the same."""

import inspect
import pickle
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, Unpack, get_type_hints

import pytest

import tricomm
from tricomm import Naive, Options, Resharder, SendRecv, Stats, Topology, reshard, reshard_async
from tricomm.options import LinkOptions, PlanOptions, ReshardOptions, StageOptions
from tricomm.pipeline import Executor, Link
from tricomm.stats import Traffic

CHOSEN: dict[str, Any] = {
    "strategy": SendRecv(64),
    "balance": Naive(),
    "topology": Topology(("a", "b")),
    "staging_bytes": 1024,
    "device": "cpu",
    "timeout_seconds": 3,
    "confirm": True,
    "channel": "one",
    "name": "layer 3",
    "transport": "network",
}


def test_every_option_has_a_type_and_a_field() -> None:
    assert set(get_type_hints(ReshardOptions)) == {field.name for field in fields(Options)} | {"timeout"}
    assert set(get_type_hints(ReshardOptions)) - set(get_type_hints(LinkOptions)) == {
        "channel",
        "name",
        "rules",
        "differentiable",
        "grad_placements",
        "progress",
        "checksum",
        "hooks",
        "stays_in_place",
    }
    assert set(get_type_hints(LinkOptions)) - set(get_type_hints(StageOptions)) == {"device"}


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (reshard, ReshardOptions),
        (reshard_async, ReshardOptions),
        (Resharder.__init__, ReshardOptions),
        (Link.__init__, LinkOptions),
        (Executor.__init__, LinkOptions),
    ],
)
def test_callers_take_typed_options(function: Any, known: type) -> None:
    assert get_type_hints(function)["options"] == Unpack[known]


def test_plan_options_are_those_of_make_plan() -> None:
    keywords = {name for name, p in inspect.signature(tricomm.make_plan).parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert keywords - {"rank", "rules"} == set(get_type_hints(PlanOptions))  # stages of pipelines share the rest


def test_what_is_passed_on_is_the_same() -> None:
    chosen = Options.of(CHOSEN, "test")
    assert Options.of(chosen.given(), "test") == chosen
    assert hash(Options.of(chosen.given(), "test")) == hash(chosen)
    for name, value in CHOSEN.items():
        assert replace(chosen, **{name: getattr(Options(), name)}) != chosen, f"{name}={value!r} is not carried"


def test_a_timeout_is_seconds_or_a_timedelta() -> None:
    for given in ({"timeout_seconds": 90}, {"timeout_seconds": timedelta(minutes=1.5)}, {"timeout": timedelta(0, 90)}):
        assert Options.of(given, "test").seconds == 90.0
    assert Options.of({}, "test").seconds == 300.0


@pytest.mark.parametrize("typo", ["timeout_second", "Strategy", "chanel", "staging_byte", "toplogy", "names"])
def test_the_nearest_option_is_named(typo: str) -> None:
    with pytest.raises(tricomm.ArgumentError, match=r"write [a-z_]+=\.\.\.") as caught:
        Options.of({typo: 1}, "test")
    nearest = str(caught.value).split("write ")[1].removesuffix("=...")
    assert nearest in CHOSEN


def test_progress_may_be_whatever_takes_one() -> None:
    def with_more(progress: object, prefix: str = "") -> None: ...

    for callback in (print, with_more, [].append, lambda *_: None, partial(with_more, prefix="a"), int.__call__):
        assert Options(progress=callback).progress is callback


def test_stats_add_up() -> None:
    one = Stats(calls=1, messages=3, nbytes=10, minimum_nbytes=8, wait_seconds=0.5)
    gloo = replace(one, transports=(Traffic(transport="gloo", messages=2, nbytes=6), Traffic(transport="memory")))
    total = sum([one, gloo, gloo], Stats())
    assert (total.calls, total.messages, total.nbytes, total.minimum_nbytes, total.wait_seconds) == (3, 9, 30, 24, 1.5)
    assert total.transports == (Traffic(transport="gloo", messages=4, nbytes=12), Traffic(transport="memory"))
    assert pickle.loads(pickle.dumps(total)) == total


def test_stats_in_one_line() -> None:
    trainer = Stats(calls=2, tensors=20, nbytes=4_000_000, pack_seconds=0.25, unpack_seconds=0.25)
    assert trainer.line == "20 tensors in 2 calls: 4.00 MB sent in 0.500 s, 0.01 GB/s"
    server = replace(trainer, received_nbytes=3_000_000_000, minimum_nbytes=2_000_000_000, wait_seconds=1.0)
    assert server.line == "20 tensors in 2 calls: 3000.00 MB received (minimum 2000.00 MB) in 1.500 s, 2.00 GB/s"
    assert Stats().line == "0 tensors in 0 calls: 0.00 MB sent in 0.000 s"


def test_stats_say_that_memory_is_read_and_not_sent() -> None:
    one = Stats(calls=1, messages=2, nbytes=8, received_messages=1, received_nbytes=4, wait_seconds=0.5)
    by_memory, mixed = (replace(one, transports=(Traffic(transport=name),)) for name in ("memory", "gloo and memory"))
    assert "2 messages sent, 8 bytes; 1 received, 4 bytes" in str(one)
    assert "2 messages read by others, 8 bytes; 1 read from others, 4 bytes" in str(by_memory)
    assert by_memory.line.startswith("0 tensors in 1 calls: 0.00 MB read from others (minimum 0.00 MB)")
    for both in (mixed, one + by_memory + replace(one, transports=(Traffic(transport="gloo"),))):
        assert "messages sent or read by others" in str(both)
        assert " received or read, " in str(both)
