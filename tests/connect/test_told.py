"""Rules and bound maps as bytes: what is told is what is heard, and what cannot be is refused on either side."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.connect.maps import BOUND, RULES, SHAPES
from tests.rules.test_algebra import Pair, pairs, quick
from tricomm.connect.meeting.wire import WireError, Writer
from tricomm.connect.told import maps
from tricomm.connect.told import rules as told_rules
from tricomm.connect.told.maps import decode_map, encode_map
from tricomm.connect.told.rules import MAX_DEPTH
from tricomm.errors import SpecError
from tricomm.rules import BoundRules, Expression, Rules, cat, each, fill, source, stack
from tricomm.rules.models import Model, megatron, torchtitan, vllm
from tricomm.rules.names import Scope, frozen
from tricomm.rules.rules import Group


def require_told(told: Rules | BoundRules) -> Any:
    """It is heard as it was told, prints so, and is told again as the same bytes."""
    data = encode_map(told)
    heard = decode_map(data)
    assert heard == told
    assert repr(heard) == repr(told)
    assert encode_map(heard) == data
    return heard


@quick
@given(pairs())
def test_drawn_rules_are_heard_as_they_are_told_and_mean_the_same(drawn: tuple[Pair, dict[str, np.ndarray]]) -> None:
    (made, array), arrays = drawn
    shapes = {name: value.shape for name, value in arrays.items()}
    rules = Rules({"out": made}, drop=["*"])
    heard = require_told(rules)
    assert heard.bind(shapes) == rules.bind(shapes)
    bound = require_told(rules.bind(shapes, dict.fromkeys(shapes, "int64")))
    if bound.tensors[0].sources:
        for one in (heard, bound):
            np.testing.assert_array_equal(one.evaluate(arrays)["out"], array, strict=True)


WORDS = st.text("abz ", max_size=3)
INDICES = st.lists(st.integers(-3, 2**40) | WORDS | st.booleans(), min_size=1, max_size=3, unique_by=str)


@quick
@given(st.data())
def test_drawn_names_and_indices_are_heard_as_they_are_told(data: Any) -> None:
    ranges = st.builds(range, st.integers(-5, 5), st.integers(-5, 9), st.integers(1, 3) | st.integers(-3, -1))
    values = data.draw(INDICES | ranges)
    table = data.draw(INDICES.map(lambda found: dict(zip(values, found * 9, strict=False))))
    parts = [source("s.{i}"), each("j", source("{i}.{j}")), fill(data.draw(st.floats(allow_nan=False)), (2,))]
    region = [source("s.{i}")[1:]]
    rules = Rules(
        {"out.{i}": stack(parts), "of.{t[i]}.{i}": source("s.{i}")}, drop=["*x", *region], i=values, j=values, t=table
    )
    heard = require_told(rules)
    assert [type(one) for one in heard.groups[0].scope.values("i")] == [type(one) for one in values]


def test_rules_with_everything_are_heard_as_they_are_told_and_mean_the_same() -> None:
    heard = require_told(RULES)
    assert heard.names == RULES.names
    assert "word.zero.True" in heard.names
    assert heard.bind(SHAPES, dict.fromkeys(SHAPES, "float32")) == RULES.bind(SHAPES, dict.fromkeys(SHAPES, "float32"))
    require_told(BOUND)
    require_told(BOUND.reverse())
    require_told(Rules({}))
    heard = decode_map(encode_map(Rules({"n": cat([source("x"), fill(float("nan"), (2,))])})))
    assert np.isnan(heard.evaluate({"x": np.ones(1)})["n"]).tolist() == [False, True, True]


def test_the_maps_of_models_are_few_bytes() -> None:
    model = Model(layers=2, hidden=64, heads=8, kv_heads=2, head_dim=8, intermediate=96, vocab=130, rope_pairs=True)
    for rules in (megatron(model), torchtitan(model), vllm(model, tp=2)):
        require_told(rules)
        require_told(rules.bind())
    between = torchtitan(model).bind().reverse().then(vllm(model, tp=2).bind())
    require_told(between)
    large = vllm(replace(model, layers=90), tp=2)
    assert len(encode_map(large)) < 10_000
    assert len(encode_map(large.bind())) / len(large.names) < 250


# ---- what is refused


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (Rules({"a": source("x" * 5000)}), "a name has 5000 bytes"),
        (Rules({"a": source("x")[1 << 70]}), "more than 64 bits"),
        (Rules({"a": source("x", (1 << 64,))}), "more than 64 bits"),
        (Rules({"a": fill(1 << 70, (2,))}), "more than 64 bits"),
        (Rules({"a.{i}": source("x")}, i=[1 << 70]), "more than 64 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_told_is_refused_where_it_is_given(told: Rules, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        encode_map(told)


def test_expressions_are_told_to_some_depth() -> None:
    made: Expression = source("x", (2,))
    for _ in range(MAX_DEPTH - 1):
        made = made[:]
    require_told(Rules({"a": made}))
    with pytest.raises(SpecError, match=f"more than {MAX_DEPTH} within each other"):
        encode_map(Rules({"a": made[:]}))


def forged(*groups: Group) -> bytes:
    """What nobody could have made by Rules, as it would be told."""
    rules = object.__new__(Rules)
    object.__setattr__(rules, "groups", groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(told_rules, "_made_nbytes", lambda _: 0)
        return encode_map(rules)


def of(definitions: dict[str, Expression], **indices: Any) -> Group:
    """A group that was not checked."""
    return Group(tuple(definitions.items()), (), Scope(tuple((key, frozen(key, one)) for key, one in indices.items())))


MANY = range(1 << 60)
FORGED = {
    "many tensors": (forged(of({"a.{i}": source("b.{i}")}, i=MANY)), "stand for"),
    "many parts": (forged(of({"a": stack([each("i", fill(0, (1,)))])}, i=MANY)), "stand for"),
    "many of many": (
        forged(of({"a": stack([each("i", stack([each("j", source("x"))]))])}, i=range(10**6), j=range(10**6))),
        "stand for",
    ),
    "long names": (forged(of({"{t[i]}" * 600: source("b.{i}")}, i=range(2000), t=["x" * 4000] * 2000)), "stand for"),
    "sizes beyond 64 bits": (
        forged(of({"a": fill(0, (1 << 62, 1 << 62)).flatten()})),
        "one of more than",
    ),
    "twice": (forged(of({"a": source("b")}), of({"a": source("c")})), "defined twice"),
    "no values": (forged(of({"a.{i}": source("b")})), "has no values"),
    "unused": (forged(of({"a": source("b")}, i=[0])), "used by no rule"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_what_a_peer_should_not_tell_is_refused_and_takes_no_memory(what: str) -> None:
    data, words = FORGED[what]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=words):
            decode_map(data)
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 20 * len(data)
    finally:
        tracemalloc.stop()


def changed(**fields: Any) -> BoundRules:
    """A map with one piece that was meddled with."""
    first = BOUND.tensors[0]
    piece = first.pieces[0]
    digits = fields.pop("digits", None)
    if digits is not None:
        piece = replace(piece, digits=tuple(d._replace(**digits) for d in piece.digits))
    pieces = (replace(piece, **fields), *first.pieces[1:])
    return replace(BOUND, tensors=(replace(first, pieces=pieces), *BOUND.tensors[1:]))


@pytest.mark.parametrize(
    "fields",
    [
        {"start": (5, 0)}, {"start": (-1, 0)}, {"source_start": (0, 1)}, {"start": (0,)}, {"tensor": 7},
        {"digits": {"size": 1 << 40}}, {"digits": {"step": 0}}, {"digits": {"dim": 5}}, {"digits": {"source_dim": 2}},
        {"digits": {"source_step": -1}}, {"digits": {"source_dim": -1}}, {"digits": ()},
    ],
    ids=str,
)  # fmt: skip
def test_a_piece_that_lies_outside_of_its_tensors_is_refused(fields: dict[str, Any]) -> None:
    """Packing would read and write there, whatever memory that is."""
    if fields.get("digits") == ():
        data = encode_map(replace(BOUND, tensors=(replace(BOUND.tensors[0], pieces=BOUND.tensors[0].pieces[1:]),)))
    else:
        data = encode_map(changed(**fields))
    with pytest.raises(WireError, match=r"lies outside|number 7 of 2|not as many|another order"):
        decode_map(data)


def test_a_map_is_looked_at_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_map(BOUND)
    pieces = sum(len(form) for form in {tensor.pieces for tensor in BOUND.tensors})
    monkeypatch.setattr(maps, "MAX_PROVEN", pieces)
    assert decode_map(data) == BOUND
    monkeypatch.setattr(maps, "MAX_PROVEN", pieces - 1)
    with pytest.raises(WireError, match="pieces of different kinds"):
        decode_map(data)


def test_bytes_left_over_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(WireError, match="left over"):
        decode_map(encode_map(BOUND) + b"x")
    with pytest.raises(WireError, match="3 is no kind of a map"):
        decode_map(Writer(3).done())
