"""Bound maps: the way back, and the proofs that nothing is lost or defined twice."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rules.test_algebra import Pair, pairs, quick, require_sound
from tricomm import SpecError
from tricomm.rules import Rules, cat, each, fill, source, stack
from tricomm.rules.coalesce import coalesced
from tricomm.rules.cover import cover, defines_exactly_once
from tricomm.rules.lower import lower


@quick
@given(pairs(), st.booleans())
def test_there_and_back_is_where_one_was(drawn: tuple[Pair, dict[str, np.ndarray]], whole: bool) -> None:
    """Elements that are carried come back, the others are the fill. ``whole``: everything is carried besides."""
    (made, _), arrays = drawn
    copies = {f"copy.{name}": source(name) for name in arrays} if whole else {}
    rules = Rules({"out": made, **copies}, drop=["*"])
    bound = rules.bind({name: value.shape for name, value in arrays.items()})
    there = bound.evaluate(arrays) if all(tensor.sources for tensor in bound.tensors) else None
    back = bound.reverse(fill=-1)
    for tensor in back.tensors:
        require_sound(tensor.pieces, tensor.shape)
    if there is None:
        return
    returned = back.evaluate(there)
    for name, value in returned.items():
        kept = value != -1
        assert (value[kept] == arrays[name][kept]).all()
        carried = np.isin(arrays[name], np.concatenate([array.reshape(-1) for array in there.values()]))
        assert (kept == carried).all()
        assert kept.all() or not whole
    assert set(returned) == {name for name in arrays if any(name in tensor.sources for tensor in bound.tensors)}
    # What the reverse gives is mapped to the same again, wherever the destination is not a fill.
    if set(returned) == set(arrays):
        for name, value in bound.evaluate(returned).items():
            np.testing.assert_array_equal(value, there[name])


def test_the_way_back_of_a_way_back_is_the_way_there() -> None:
    rules = Rules(
        {
            "embed": cat([source("e", (10, 4)), fill(0, (6, 4))]),
            "qkv": cat([source(x, (n, 4)).unflatten(0, (2, -1)) for x, n in (("q", 8), ("k", 4))], dim=1).flatten(0, 1),
            "up": source("up", (8, 4)).unflatten(0, (2, 2, 2)).permute(0, 2, 1, 3).flatten(0, 2),
        }
    )
    bound = rules.bind()
    assert bound.reverse().reverse(fill=0) == bound
    assert [len(tensor.pieces) for tensor in bound.reverse().tensors] == [1, 1, 1, 1]
    assert bound.reverse().shapes == bound.source_shapes


def test_replicas_and_tied_tensors_come_back_from_the_first() -> None:
    weight = source("w", (4, 3))
    rules = Rules({"kv": weight.unflatten(0, (2, 1, 2)).expand(-1, 2, -1, -1).flatten(0, 2), "head": weight})
    back = rules.bind().reverse()
    assert [tensor.sources for tensor in back.tensors] == [("kv",)]
    made = rules.evaluate({"w": np.arange(12).reshape(4, 3)})
    made["head"] += 100
    made["kv"][2:4] += 100
    made["kv"][6:8] += 100
    assert back.evaluate(made)["w"].tolist() == np.arange(12).reshape(4, 3).tolist()


def test_overlapping_parts_come_back_each_once() -> None:
    """The first rule's elements from the first, the rest from the second."""
    x = source("x", (10, 6))
    bound = Rules({"a": x[1:6, ::2], "b": x[4:, 1:], "c": x}).bind()
    (back,) = bound.reverse().tensors
    require_sound(back.pieces, (10, 6))
    assert sorted(back.sources) == ["a", "b", "c"]
    values = {"a": np.full((5, 3), 1), "b": np.full((6, 5), 2), "c": np.full((10, 6), 3)}
    expected = np.full((10, 6), 3)
    expected[4:, 1:] = 2
    expected[1:6, ::2] = 1
    assert (bound.reverse().evaluate(values)["x"] == expected).all()


def test_lost_elements_need_a_name() -> None:
    x = source("x", (10, 4))
    half = Rules({"out": x[:6]})
    with pytest.raises(SpecError) as caught:
        half.bind()
    assert str(caught.value) == (
        "rule 'out': 16 of 40 elements of source 'x' (10, 4) are used nowhere, the first at [6, 0]; use them, or name "
        "them in drop=[source('x')[...]]"
    )
    with pytest.raises(SpecError, match=r"rule 'out': 8 of 40 elements of source 'x' .* the first at \[8, 0\]"):
        Rules({"out": x[:6]}, drop=[x[6:8]]).bind()
    bound = Rules({"out": x[:6]}, drop=[x[6:]]).bind()
    with pytest.raises(SpecError) as caught:
        bound.reverse()
    assert str(caught.value) == (
        "rule 'out' cannot be reversed: 16 elements of 'x' (10, 4) are carried nowhere, the first at [6, 0]; write "
        "reverse(fill=0), or reverse(drop=['x'])"
    )
    assert bound.reverse(drop=["x"]).tensors == ()
    back = bound.reverse(fill=0.5).evaluate({"out": np.ones((6, 4))})["x"]
    assert back[:, 0].tolist() == [1] * 6 + [0.5] * 4


def test_unused_sources_need_a_name() -> None:
    shapes = {"a": (2,), "mtp.0": (3,), "mtp.1": (3,), "empty": (0, 4), "b.1": (2,)}
    rules = Rules({"out": source("a")})
    with pytest.raises(SpecError) as caught:
        rules.bind(shapes)
    assert str(caught.value) == (
        "3 of 5 source tensors are used by no rule, the first is 'mtp.0' (3,); write a rule for each, or name them in "
        "drop=['mtp.0']"
    )
    bound = Rules({"out": source("a")}, drop=["mtp.*", "b.{e}"], e=[1]).bind(shapes)
    assert bound.source_shapes == shapes
    assert [tensor.name for tensor in bound.reverse().tensors] == ["a"]


def test_regions_are_dropped_for_every_index() -> None:
    rules = Rules(
        {"o.{l}": source("w.{l}")[:2]}, drop=[source("w.{l}")[2:], source("one.{e}")], l=range(2), e=["x", "y"]
    )
    shapes: dict[str, Any] = {"w.0": (3,), "w.1": (5,), "one.x": (1,), "one.y": (2,)}
    assert rules.bind(shapes).shapes == {"o.0": (2,), "o.1": (2,)}


def test_dtypes_are_kept_and_cast() -> None:
    rules = Rules({"w": source("w"), "bias": source("b").to("float32"), "one": fill(1, (2,)).to("bfloat16")})
    arrays = {"w": torch.ones(3, dtype=torch.bfloat16), "b": torch.full((2,), 0.1, dtype=torch.float64)}
    made = rules.evaluate(arrays)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "w": torch.bfloat16,
        "bias": torch.float32,
        "one": torch.bfloat16,
    }
    assert torch.equal(made["bias"], arrays["b"].float())
    bound = rules.bind({"w": (3,), "b": (2,)}, {"w": torch.bfloat16, "b": "float64"})
    assert bound.dtypes == {"w": "bfloat16", "bias": "float32", "one": "bfloat16"}
    assert bound.reverse().dtypes == {"w": "bfloat16", "b": "float64"}
    assert rules.bind({"w": (3,), "b": (2,)}).dtypes == {"w": None, "bias": None, "one": "bfloat16"}


def test_evaluation_takes_any_strides_and_parameters() -> None:
    rules = Rules({"t": source("w").permute(1, 0)})
    wide = torch.arange(48.0).reshape(6, 8)
    weight = torch.nn.Parameter(wide[1:5, ::2])
    made = rules.evaluate({"w": weight})["t"]
    assert torch.equal(made, weight.detach().t())
    assert not made.requires_grad
    array = np.arange(48).reshape(6, 8)[5:1:-1, ::2]
    np.testing.assert_array_equal(rules.evaluate({"w": array})["t"], array.T)


def test_a_bound_map_prints_and_is_a_value() -> None:
    shapes = {"a.0": (2, 4), "a.1": (2, 4)}
    one = Rules({"s": stack([each("e", source("a.{e}"))])}, e=range(2)).bind(shapes)
    other = Rules({"s": cat([source("a.0")[None], source("a.1")[None]])}).bind(shapes)
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == "s (2, 2, 4): 2 pieces of a.0, a.1"
    assert str(one.tensors[0].pieces[1]) == (
        "[2, 4] at [1, 0, 0] <- tensor 1 at [0, 0]: 2(d1+1 <- d0+1) 4(d2+1 <- d1+1)"
    )
    (ones,) = Rules({"one": fill(1, (1, 1))}).bind().tensors
    assert str(ones) == "one (1, 1): 1 piece of fills"
    assert str(ones.pieces[0]) == "[] at [0, 0] <- 1: one element"


def test_a_planted_fault_is_found() -> None:
    """The proof of "exactly once" can fail: one piece twice, one left out, one moved."""
    (tensor,) = Rules({"out": cat([source("a", (2, 3)), source("b", (2, 3))])}).bind().tensors
    first, second = tensor.pieces
    assert defines_exactly_once(tensor.shape, (first, second))
    assert not defines_exactly_once(tensor.shape, (first, second, second))
    assert not defines_exactly_once(tensor.shape, (first,))
    assert not defines_exactly_once(tensor.shape, (first, first))


@quick
@given(pairs(), pairs())
def test_one_map_after_another_is_both(first: tuple[Pair, dict[str, np.ndarray]], second: Any) -> None:
    """The second map reads what the first makes: by one map of both, and by both in turn."""
    (made, array), arrays = first
    (other, _), others = second
    target = next((name for name, value in others.items() if value.size == array.size), None)
    middle = {name: source(f"x.{name}", value.shape) for name, value in others.items()}
    if target is not None:  # this source of the second map is what the first makes, in its own shape
        line = made.flatten() if array.ndim else made[None]
        middle[target] = line.unflatten(0, others[target].shape) if others[target].ndim else line[0]
    values = arrays | {f"x.{name}": value + 500_000 for name, value in others.items() if name != target}
    shapes = {name: np.shape(value) for name, value in values.items()}
    there = Rules(middle, drop=["*"]).bind(shapes)
    back = Rules({"out": other}, drop=["*"]).bind(there.shapes)
    both = there.then(back)
    require_sound(both.tensors[0].pieces, both.tensors[0].shape)
    if all(tensor.sources for tensor in (*there.tensors, *both.tensors)):
        np.testing.assert_array_equal(both.evaluate(values)["out"], back.evaluate(there.evaluate(values))["out"])


def test_maps_that_do_not_meet_are_refused() -> None:
    first = Rules({"b": source("a", (4,)).to("bfloat16")}).bind(dtypes={"a": "float32"})
    for shape, dtype, text in [
        ((5,), "bfloat16", r"rule 'c' reads 'b' as \(5,\) bfloat16, but the map before it makes \(4,\) bfloat16; bind"),
        ((4,), "float32", r"rule 'c' reads 'b' as \(4,\) float32, but the map before it makes \(4,\) bfloat16; bind"),
    ]:
        with pytest.raises(SpecError, match=text):
            first.then(Rules({"c": source("b")}).bind({"b": shape}, {"b": dtype}))
    with pytest.raises(SpecError, match="rule 'c' reads 'd', which the map before it does not make; add a rule for it"):
        first.then(Rules({"c": source("d")}).bind({"d": (4,)}))
    again = Rules({"c": source("b").to("float32")}).bind({"b": (4,)}, {"b": "bfloat16"})
    with pytest.raises(
        SpecError, match="rounds 'a' from float32 to bfloat16 on the way to float32; cast in one of the"
    ):
        first.then(again)
    assert first.then(Rules({"c": source("b")}).bind({"b": (4,)}, {"b": "bfloat16"})).dtypes == {"c": "bfloat16"}


@pytest.mark.parametrize("cells", [1, 3, 1 << 22])
def test_counting_in_parts_is_counting(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """However few combinations are counted at once."""
    monkeypatch.setattr("tricomm.rules.cover.MAX_CELLS", cells)
    x = source("x", (5, 4, 3))
    (tensor,) = Rules({"x": cat([x[:2], cat([x[2:, 1:], x[2:, :1]], dim=1)])}).bind().tensors
    count = cover.__wrapped__
    assert count((5, 4, 3), tensor.pieces) == (0, None, None)
    assert count((5, 4, 3), tensor.pieces[1:]) == (24, (0, 0, 0), None)
    assert count((5, 4, 3), (*tensor.pieces[:2], tensor.pieces[1])) == (9, (2, 3, 0), (2, 0, 0))


def test_faults_planted_in_the_library_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bind, reverse and then prove what they made, whatever they were told."""
    rules = Rules({"out": cat([source("a", (2, 3)), source("b", (2, 3))])})
    bound = rules.bind()
    fault = "this is a fault of tricomm, report it"
    monkeypatch.setattr("tricomm.rules.bound.coalesced", lambda pieces: coalesced(pieces)[:-1])
    with pytest.raises(SpecError, match=f"the reverse of rule 'out' defines 'a' twice or not at all; {fault}"):
        bound.reverse()
    with pytest.raises(SpecError, match=f"rule 'copy' after another map is not whole; {fault}"):
        bound.then(Rules({"copy": source("out", (4, 3))}).bind())
    monkeypatch.setattr("tricomm.rules.bind.lower", lambda *arguments: lower(*arguments)[:-1])
    with pytest.raises(SpecError, match=rf"rule 'out': cat\(\[a, b\], dim=0\) is not defined exactly once .*; {fault}"):
        rules.bind()
