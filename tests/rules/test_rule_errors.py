"""Every error text: the rule, the value, the remedy."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tricomm import SpecError
from tricomm.errors import ArgumentError
from tricomm.rules import Rules, cat, each, fill, source, stack

q = source("q", (8, 4))
unknown = source("u")


def bind(rules: Rules, shapes: Any = None, dtypes: Any = None) -> Any:
    return rules.bind(shapes, dtypes)


CASES: list[tuple[Callable[[], Any], str]] = [
    # made: arguments
    (lambda: source(""), "source('') names no tensor; give its name, such as 'layers.{l}.q'"),
    (lambda: source("a.{l"), "'a.{l' has a brace without its partner; write {l} or {table[l]}"),
    (lambda: source("a.{l+1}"), "{l+1} in 'a.{l+1}' is no index; write {l} or {table[l]}"),
    (lambda: source("a.{t[l}"), "{t[l} in 'a.{t[l}' is no index; write {l} or {table[l]}"),
    (lambda: source("q", (2, -1)), "source('q') has shape (2, -1); sizes are at least 0"),
    (lambda: source("q", (2.5,)), "shape=2.5 is no integer; give one"),
    (lambda: fill("x", (2,)), "fill('x', ...) is no number; give the one value that fills"),
    (lambda: each("e+", q), "each('e+', ...) names no index variable; write each('e', source('up.{e}'))"),
    (
        lambda: each("e", "up"),
        "each() was given 'up', which is no expression; write source(name) or fill(...)",
    ),
    (lambda: cat([]), "cat(()) joins nothing; give a list of expressions"),
    (
        lambda: cat(q),
        "cat(source('q', (8, 4))) takes a list; write cat([...], dim=0), with each() in it to repeat",
    ),
    (
        lambda: stack([q, "k"]),
        "stack() was given 'k', which is no expression; write source(name) or fill(...)",
    ),
    (lambda: q["e"], "q['e'] is no position; write an index variable in braces, such as '{e}'"),
    (lambda: q[::-1], "q[::-1]: a slice's step is at least 1; torch has no other"),
    (lambda: q[1.5], "a position in q=1.5 is no integer; give one"),
    (lambda: q[..., 0, ...], "q[..., 0, ...]: an index has at most one '...'"),
    (lambda: q.unflatten(0, (-1, -1)), "q.unflatten(0, (-1, -1)): sizes are at least 0, and at most one of them is -1"),
    (lambda: q.unflatten(0, 4), "sizes=4 must be integers; give a tuple of them"),
    (lambda: q.permute(0, 0), "q.permute(0, 0): (0, 0) are not all dims once each; give an order of 0 to 1"),
    (lambda: q.permute(0, 2), "q.permute(0, 2): (0, 2) are not all dims once each; give an order of 0 to 1"),
    (lambda: q.expand(8, -2), "q.expand(8, -2): sizes are at least 0, or -1 to keep a dim"),
    (lambda: q.to("float12"), "dtype 'float12' is not an element type that tricomm moves; "),
    # made: shapes
    (
        lambda: cat([q, source("k", (2, 5))]),
        "cat([q, k], dim=0): k has shape (2, 5) and q has (8, 4); the parts of a cat agree in every dim but 0; slice "
        "or fill one of them",
    ),
    (
        lambda: stack([q, source("k", (2, 4))]),
        "stack([q, k], dim=0): k has shape (2, 4) and q has (8, 4); the parts of a stack agree in every dim; slice or "
        "fill one of them",
    ),
    (lambda: cat([q, q], dim=2), "cat([q, q], dim=2): parts of shape (8, 4) have no dim 2 to join; choose 0 to 1"),
    (lambda: q[8], "q[8]: position 8 lies outside of a dim of size 8 in (8, 4)"),
    (lambda: q[0, 0, 0], "q[0, 0, 0]: q has shape (8, 4), fewer dims than the index; leave entries out"),
    (
        lambda: q.unflatten(0, (3, 3)),
        "q.unflatten(0, (3, 3)): dim 0 of q has size 8, which is not the product of (3, 3); give sizes that divide it, "
        "or slice or fill first",
    ),
    (
        lambda: q.unflatten(0, (3, -1)),
        "q.unflatten(0, (3, -1)): dim 0 of q has size 8, which is not the product of (3, -1); give sizes that divide "
        "it, or slice or fill first",
    ),
    (lambda: q.unflatten(2, (4, 2)), "q.unflatten(2, (4, 2)): q has shape (8, 4), so no dim 2"),
    (lambda: q.flatten(1, 0), "q.flatten(1, 0): dim 1 stands after dim 0 in (8, 4); give the earlier one first"),
    (lambda: q.permute(1, 0, 2), "q.permute(1, 0, 2): q has shape (8, 4); permute its 2 dims, not 3"),
    (
        lambda: q.expand(16, 4),
        "q.expand(16, 4): q has shape (8, 4), and only a dim of size 1 or a new one in front can be repeated; "
        "unsqueeze or unflatten first",
    ),
    # rules
    (lambda: Rules([q]), "Rules([source('q', (8, 4))]) takes a mapping; write Rules({'name': source('name')})"),
    (lambda: Rules({"a": "q"}), "rule 'a': 'q' is no expression under a name; write source(name) or the like"),
    (
        lambda: Rules({"a": q}, drop="mtp.*"),
        "drop='mtp.*' is no list of name patterns and expressions; write drop=['mtp.*']",
    ),
    (
        lambda: Rules({"a.{l}": unknown}, l=3),
        "l=3 must be index values; give a range, a list, or a mapping of ints and strings",
    ),
    (lambda: Rules({"a.{l}": unknown}), "index 'l' has no values; pass l=range(...) to Rules"),
    (
        lambda: Rules({"a": unknown}, l=range(2)),
        "l=range(0, 2) is used by no rule; write {l} in a name, or leave it out",
    ),
    (
        lambda: Rules({"a.{l}": unknown, "a.1": q}, l=range(2)),
        "destination 'a.1' is defined twice, by rule 'a.{l}' and by rule 'a.1'; remove one, or give their index "
        "variables values that do not meet",
    ),
    (
        lambda: Rules({"a": unknown}) + Rules({"a": q}),
        "destination 'a' is defined twice, by rule 'a' and by rule 'a'; remove one, or give their index variables "
        "values that do not meet",
    ),
    (
        lambda: Rules({"a.{l}": stack([each("e", source("{e}", (2,))), source("x", (3,))])}, l=range(2), e=range(2)),
        "rule 'a.{l}': stack([0, 1, x], dim=0): x has shape (3,) and 0 has (2,); the parts of a stack agree in every "
        "dim; slice or fill one of them",
    ),
    # bound
    (
        lambda: Rules({"a": source("x.{l}")}, l=range(2)).bind({"x.0": (2,)}),
        "rule 'a': index 'l' is bound neither by the destination's name nor by each('l', ...); use it in one of them",
    ),
    (
        lambda: Rules({"a.{l}": source("{t[l]}")}, l=range(2)).bind({}),
        "rule 'a.{l}': table 't' is not given; pass t=[...] or t={...} to Rules",
    ),
    (
        lambda: Rules({"a.{l}": source("{t[l]}")}, l=range(2), t=["x"]).bind({"x": (2,)}),
        "rule 'a.{l}': table 't' has no entry for 1; it has 1; extend it",
    ),
    (
        lambda: Rules({"a.{l}": unknown["{l}"]}, l=["x"]).bind({"u": (2,)}),
        "rule 'a.{l}': {l} is 'x' here, and only an integer can index a dim; give a table of integers",
    ),
    (
        lambda: Rules({"a.{l}": stack([each("l", unknown)])}, l=range(2)).bind({"u": (2,)}),
        "rule 'a.{l}': index 'l' is bound already; each() needs a variable of its own",
    ),
    (
        lambda: Rules({"a": stack([each("l", unknown)])}, l=[]).bind({"u": (2,)}),
        "rule 'a': stack([each('l', u)], dim=0) joins nothing here, because its index variable has no values; leave "
        "the rule out",
    ),
    (
        lambda: Rules({"a": unknown}).bind(),
        "rule 'a': source 'u' has no shape; pass source_shapes, or write source(name, shape)",
    ),
    (
        lambda: Rules({"layers.{l}": source("l.{l}.weight")}, l=range(2)).bind(
            {"l.0.weight": (2,), "l.1.wieght": (2,)}
        ),
        "rule 'layers.{l}': source 'l.1.weight' is not among the 2 source tensors; did you mean 'l.1.wieght'?",
    ),
    (
        lambda: Rules({"a": unknown}).bind({"other": (2,)}),
        "rule 'a': source 'u' is not among the 1 source tensors; pass its shape, or correct the name",
    ),
    (
        lambda: Rules({"a": q}).bind({"q": (8, 5)}),
        "rule 'a': source 'q' has shape (8, 5), but the rule says (8, 4); correct the rule's sizes, or choose another "
        "tensor",
    ),
    (
        lambda: Rules({"a": unknown.unflatten(0, (4, 2))}).bind({"u": (6,)}),
        "rule 'a': u.unflatten(0, (4, 2)): dim 0 of u has size 6, which is not the product of (4, 2); give sizes that "
        "divide it, or slice or fill first",
    ),
    (
        lambda: Rules({"a": cat([q, q])}).bind(dtypes={}),
        "rule 'a': source 'q' has no dtype among the 0; pass it, or pass no dtypes at all",
    ),
    (
        lambda: Rules({"a": cat([q, unknown])}).bind({"q": (8, 4), "u": (1, 4)}, {"q": "float32", "u": torch.bfloat16}),
        "rule 'a': q is float32 and u is bfloat16; cast one of them with .to()",
    ),
    (
        lambda: Rules({"a": q.to("bfloat16")[:].to("float32")}).bind(dtypes={"q": "float32"}),
        "rule 'a': q.to('bfloat16')[:].to('float32') casts twice, which rounds twice; keep the last .to() only",
    ),
    (
        lambda: Rules({"a": q.to("float32")}).bind(dtypes={"q": "complex64"}),
        "rule 'a': cannot cast complex64 to float32: the imaginary part would be lost; ",
    ),
    # evaluated
    (
        lambda: Rules({"a": q}).evaluate({"q": [1, 2]}),
        "source 'q' is [1, 2]; give a numpy array or a torch tensor",
    ),
    (
        lambda: Rules({"a": q, "b": fill(0, (2,))}).evaluate({"q": np.zeros((8, 4))}),
        "b is made of fills alone and has no dtype; write fill(...).to('float32') or the like",
    ),
    (
        lambda: Rules({"a": q.to("bfloat16")}).evaluate({"q": np.zeros((8, 4))}),
        "a has dtype bfloat16, which numpy has not; evaluate torch tensors instead",
    ),
    (
        lambda: Rules({"a": q}).bind().evaluate({"k": np.zeros(2)}),
        "source 'q' is missing among the 1 arrays; pass it by that name",
    ),
    (
        lambda: Rules({"a": q}).bind(dtypes={"q": "float32"}).evaluate({"q": np.zeros((8, 4))}),
        "source 'q' is (8, 4) float64, but the map was bound to (8, 4) float32; bind it anew",
    ),
    (
        lambda: Rules({"a": q}).bind().evaluate({"q": np.zeros((8, 3))}),
        "source 'q' is (8, 3) float64, but the map was bound to (8, 4); bind it anew",
    ),
    (
        lambda: Rules({"a": q.to("complex64")}).bind(dtypes={"q": "float32"}).reverse(),
        "cannot cast complex64 to float32: the imaginary part would be lost; ",
    ),
]


@pytest.mark.parametrize(("wrong", "text"), CASES, ids=[text[:60] for _, text in CASES])
def test_what_is_wrong_is_said(wrong: Callable[[], Any], text: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(text)}") as caught:
        wrong()
    assert text.endswith(" ") or str(caught.value) == text
    kind = r"give a numpy|"
    kind += (
        r"is no (integer|number|tensor|expression|list)|must be (integers|index values)|names no|takes a (list|mapping)"
    )
    assert isinstance(caught.value, ArgumentError) == bool(re.search(kind, text))


def test_an_expression_is_not_iterated_for_ever() -> None:
    with pytest.raises(TypeError):
        list(q)  # type: ignore[call-overload]


def test_a_sum_with_something_else_is_refused() -> None:
    with pytest.raises(TypeError):
        Rules({"a": q}) + {"b": q}  # type: ignore[operator]
