"""Random expressions against numpy's own reshape, transpose, slices, concatenate and broadcast_to."""

import tracemalloc
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import of_random_draws
from tricomm.rules import Expression, Piece, Rules, cat, each, fill, source, stack, within, within_source
from tricomm.rules.cover import cover, without

quick = of_random_draws("TRICOMM_FUZZ_RULES", 150)

Pair = tuple[Expression, np.ndarray]
"""An expression, and what numpy makes of it."""


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12]), max_size=3)))


def leaf(number: int, shape: tuple[int, ...]) -> Pair:
    """Every element of every source has a value of its own."""
    return source(f"s{number}", shape), np.asarray(np.arange(prod(shape)).reshape(shape) + 10_000 * (number + 1))


@st.composite
def pairs(draw: Any) -> tuple[Pair, dict[str, np.ndarray]]:
    """An expression of up to eight steps over up to three sources."""
    leaves = draw(sources())
    return draw(grown(leaves)), {f"s{number}": array for number, (_, array) in enumerate(leaves)}


@st.composite
def sources(draw: Any) -> list[Pair]:
    """Up to three."""
    return [leaf(number, draw(shapes())) for number in range(draw(st.integers(1, 3)))]


@st.composite
def grown(draw: Any, leaves: list[Pair]) -> Pair:
    """An expression of up to eight steps."""
    pair = draw(st.sampled_from(leaves))
    for _ in range(draw(st.integers(0, 8))):
        steps = [indexed, permuted, unflattened, flattened, expanded, joined]
        step = draw(st.sampled_from(steps))
        pair = step(draw, pair, leaves)
        if pair[1].size > 3000 or pair[1].ndim > 6:
            break
    return pair


def indexed(draw: Any, pair: Pair, _: Any) -> Pair:
    made, array = pair
    index: list[Any] = []
    for size in array.shape:
        kind = draw(st.sampled_from(["all", "slice", "position", "new"]))
        if kind == "new":
            index.append(None)
        if kind == "position" and size:
            index.append(draw(st.integers(-size, size - 1)))
        elif kind == "slice":
            edge = st.none() | st.integers(-size - 1, size + 1)
            index.append(slice(draw(edge), draw(edge), draw(st.none() | st.integers(1, 4))))
        else:
            index.append(slice(None))
    if draw(st.booleans()):
        index = [..., *index[1:]] if len(index) == 1 else [*index, ...]
    return made[tuple(index)], np.asarray(array[tuple(index)])


def permuted(draw: Any, pair: Pair, _: Any) -> Pair:
    made, array = pair
    dims = draw(st.permutations(range(array.ndim)))
    signed = [dim - array.ndim * draw(st.booleans()) for dim in dims]
    return made.permute(*signed), array.transpose(dims)


def unflattened(draw: Any, pair: Pair, _: Any) -> Pair:
    made, array = pair
    if not array.ndim:
        return pair
    dim = draw(st.integers(0, array.ndim - 1))
    size = array.shape[dim]
    divisors = [n for n in range(1, size + 1) if size % n == 0] or [1]
    first = draw(st.sampled_from(divisors))
    second = draw(st.sampled_from([n for n in divisors if (size // first) % n == 0]))
    sizes = (first, second, size // first // second)
    written = (-1, *sizes[1:]) if prod(sizes[1:]) and draw(st.booleans()) else sizes
    return made.unflatten(dim, written), array.reshape(*array.shape[:dim], *sizes, *array.shape[dim + 1 :])


def flattened(draw: Any, pair: Pair, _: Any) -> Pair:
    made, array = pair
    if not array.ndim:
        return pair
    start = draw(st.integers(0, array.ndim - 1))
    end = draw(st.integers(start, array.ndim - 1))
    shape = (*array.shape[:start], prod(array.shape[start : end + 1]), *array.shape[end + 1 :])
    return made.flatten(start, end - array.ndim), array.reshape(shape)


def expanded(draw: Any, pair: Pair, _: Any) -> Pair:
    made, array = pair
    repeats = [draw(st.integers(0, 3)) if size == 1 else -1 for size in array.shape]
    front = [draw(st.integers(1, 2))] if draw(st.booleans()) else []
    sizes = [size if repeat == -1 else repeat for size, repeat in zip(array.shape, repeats, strict=True)]
    return made.expand(*front, *repeats), np.broadcast_to(array, (*front, *sizes))


def joined(draw: Any, pair: Pair, leaves: list[Pair]) -> Pair:
    """With itself, a part of itself, a fill and whatever source fits."""
    made, array = pair
    others: list[Pair] = [pair, (fill(7, array.shape), np.full(array.shape, 7))]
    others += [other for other in leaves if other[1].shape == array.shape]
    if array.ndim and draw(st.booleans()):
        dim = draw(st.integers(0, array.ndim - 1))
        cuts = [slice(None)] * dim + [slice(draw(st.integers(0, array.shape[dim])), None, draw(st.integers(1, 2)))]
        others.append((made[tuple(cuts)], array[tuple(cuts)]))
        chosen = draw(st.lists(st.sampled_from(others), min_size=1, max_size=3))
        parts = [pair, *chosen]
        return cat([one for one, _ in parts], dim=dim), np.concatenate([value for _, value in parts], dim)
    dim = draw(st.integers(0, array.ndim))
    chosen = draw(st.lists(st.sampled_from(others), min_size=0, max_size=2))
    parts = [pair, *chosen]
    return stack([one for one, _ in parts], dim=dim - array.ndim - 1), np.stack([value for _, value in parts], dim)


def require_sound(pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> None:
    """Every destination element once, counted one by one."""
    counts = np.zeros(shape, int)
    for piece in pieces:
        assert min(piece.shape, default=2) > 1, "no digit of size 1"
        for place, _ in places(piece):
            counts[place] += 1
    assert (counts == 1).all()


@quick
@given(pairs())
def test_an_expression_is_what_numpy_makes_of_it(drawn: tuple[Pair, dict[str, np.ndarray]]) -> None:
    (made, array), arrays = drawn
    assert made.shape == array.shape
    rules = Rules({"out": made}, drop=["*"])
    bound = rules.bind({name: value.shape for name, value in arrays.items()})
    require_sound(bound.tensors[0].pieces, array.shape)
    if bound.tensors[0].sources:
        np.testing.assert_array_equal(rules.evaluate(arrays)["out"], array, strict=True)
        tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        assert torch.equal(rules.evaluate(tensors)["out"], torch.from_numpy(array.copy()))


@quick
@given(pairs())
def test_an_expression_prints_as_the_line_that_makes_it(drawn: tuple[Pair, dict[str, np.ndarray]]) -> None:
    (made, _), _ = drawn
    again = eval(repr(made), {"source": source, "cat": cat, "stack": stack, "fill": fill})
    assert again == made
    assert hash(again) == hash(made)
    assert "\n" not in repr(made)
    rules = Rules({"out": made}, drop=["*"])
    assert eval(repr(rules), {"Rules": Rules, "source": source, "cat": cat, "stack": stack, "fill": fill}) == rules


@quick
@given(pairs(), st.data())
def test_holdings_cut_pieces_into_pieces(drawn: tuple[Pair, dict[str, np.ndarray]], data: Any) -> None:
    """The elements of the parts are those of the piece within the region, each once, and each from where it was."""
    (made, array), arrays = drawn
    bound = Rules({"out": made}, drop=["*"]).bind({name: value.shape for name, value in arrays.items()})
    for piece in bound.tensors[0].pieces:
        whole = places(piece)
        region = data.draw(regions(array.shape))
        found = [pair for part in within(piece, region) for pair in places(part)]
        assert sorted(found) == sorted(pair for pair in whole if inside(pair[0], region))
        if piece.tensor is not None:
            region = data.draw(regions(arrays[bound.tensors[0].sources[piece.tensor]].shape))
            found = [pair for part in within_source(piece, region) for pair in places(part)]
            assert sorted(found) == sorted(pair for pair in whole if inside(pair[1], region))


def places(piece: Piece) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Destination and source coordinates of every element, one by one."""
    result = []
    for index in np.ndindex(piece.shape):
        there, source_place = list(piece.start), list(piece.source_start)
        for place, digit in zip(index, piece.digits, strict=True):
            there[digit.dim] += place * digit.step
            if digit.source_dim >= 0:
                source_place[digit.source_dim] += place * digit.source_step
        result.append((tuple(there), tuple(source_place)))
    return result


def inside(place: tuple[int, ...], region: Any) -> bool:
    return all(
        any(start <= at < stop for start, stop in intervals) for at, intervals in zip(place, region, strict=True)
    )


@st.composite
def regions(draw: Any, shape: tuple[int, ...]) -> Any:
    """Per dim one or two intervals."""
    result = []
    for size in shape:
        edges = sorted(draw(st.integers(0, size)) for _ in range(4))
        result.append(((edges[0], edges[1]), (edges[2], edges[3])) if draw(st.booleans()) else ((edges[0], edges[3]),))
    return tuple(result)


@quick
@given(pairs(), st.data())
def test_what_is_left_when_pieces_are_taken_away(drawn: tuple[Pair, dict[str, np.ndarray]], data: Any) -> None:
    (made, array), arrays = drawn
    bound = Rules({"out": made}, drop=["*"]).bind({name: value.shape for name, value in arrays.items()})
    pieces = bound.tensors[0].pieces
    whole = Rules({"out": fill(0, array.shape)}).bind().tensors[0].pieces
    region = data.draw(regions(array.shape))
    taken = [part for piece in pieces for part in within(piece, region)]
    left = without(whole, taken)
    counts = np.zeros(array.shape, int)
    for piece in (*left, *taken):
        for place, _ in places(piece):
            counts[place] += 1
    assert (counts == 1).all()
    found = cover(array.shape, tuple(taken))
    missing = [place for place in np.ndindex(array.shape) if not inside(place, region)]
    assert found.missing_numel == len(missing)
    assert found.missing == min(missing, default=None)
    twice = cover(array.shape, (*whole, *taken))
    assert twice.repeated == min((place for piece in taken for place, _ in places(piece)), default=None)


def test_a_dim_may_have_more_coordinates_than_fit_into_memory() -> None:
    many = 3 << 40
    (whole,) = Rules({"out": fill(0, (many,))}).bind().tensors[0].pieces
    assert cover((many,), (whole,)) == (0, None, None)
    (end,) = within(whole, [((1 << 40, many),)])
    assert cover((many,), (end,)) == (1 << 40, (0,), None)
    assert cover((many,), (whole, end)) == (0, None, (1 << 40,))


def test_a_long_dim_is_cut_without_being_listed() -> None:
    """84 million elements, which would take a gigabyte one by one, taken away at odd places and in many runs."""
    many = 84_000_001
    whole_flat = source("flat", (many,))
    parts = {"out": whole_flat[7:-5], "odd": whole_flat[:21].unflatten(0, (3, 7))}
    flat = Rules(parts, drop=[whole_flat[-5:]])
    tracemalloc.start()
    back = flat.bind().reverse(fill=0)
    (whole,) = Rules({"out": fill(0, (many,))}).bind().tensors[0].pieces
    blocks = source("flat", (many,))[3:80_000_003].unflatten(0, (80, 1_000_000))[:, 1:999_999]
    striped = Rules({"out": blocks}, drop=["flat"]).bind().tensors[0].pieces
    left = without([whole], [piece.turned() for piece in striped])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(back) == f"flat ({many},): 3 pieces of odd, out"
    assert [(piece.start, piece.shape) for piece in back.tensors[0].pieces] == [
        ((0,), (7,)), ((7,), (many - 12,)), ((many - 5,), (5,))
    ]  # fmt: skip
    assert sum(piece.numel for piece in left) == many - 80 * 999_998
    assert peak < 50e6


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (cat([source("x", (16,))[0:4], source("x", (16,))[4:10], source("x", (16,))[10:]]), 1),
        (cat([source("x", (16,))[i::4] for i in range(4)]), 1),
        (cat([source("x", (16,))[i::4] for i in (0, 2, 1, 3)]), 1),
        (cat([source("x", (16,))[i::4] for i in (0, 3, 1, 2)]), 2),
        (stack([source("x", (4, 3, 2))[i] for i in range(4)]), 1),
        (stack([source("x", (4, 3, 2))[i] for i in range(4)], dim=2), 1),
        (source("x", (4, 6)).flatten().unflatten(0, (24,)), 1),
        (source("x", (4, 6)).flatten().unflatten(0, (6, 4)), 4),
        (source("x", (400, 6)).flatten().unflatten(0, (600, 4)), 4),
        (source("x", (100, 4)).flatten()[2:102], 3),
        (source("x", (8, 3)).unflatten(0, (2, 4)).permute(1, 0, 2).flatten(0, 1), 1),
        (fill(0, (3, 4)), 1),
        (cat([fill(0, (3, 4)), fill(0, (5, 4))]), 1),
        (cat([fill(0, (3, 4)), fill(1, (5, 4))]), 2),
        (source("x", ()), 1),
        (source("x", (0, 4)), 0),
    ],
)
def test_pieces_are_few(written: Expression, expected: int) -> None:
    pieces = Rules({"out": written}, drop=["*"]).bind().tensors[0].pieces
    require_sound(pieces, written.shape or ())
    assert len(pieces) == expected


def test_new_dims_from_either_end() -> None:
    x = source("x", (2, 3))
    assert [x.unsqueeze(dim).shape for dim in (0, 1, 2, -1, -2, -3)] == [
        tuple(torch.empty(2, 3).unsqueeze(dim).shape) for dim in (0, 1, 2, -1, -2, -3)
    ]
    assert source("later").unsqueeze(-2) == source("later")[..., None, :]


def test_equal_maps_have_equal_normal_forms() -> None:
    """However they are written."""
    x, q, k = source("x", (8, 6)), source("q", (4, 6)), source("k", (4, 6))
    pairs = [
        (cat([x[0:3], x[3:]]), x),
        (x.permute(1, 0).permute(1, 0), x),
        (x.unflatten(0, (2, 4)).flatten(0, 1), x),
        (stack([x[i] for i in range(8)]), x),
        (cat([x[:, i : i + 1] for i in range(6)], dim=1), x),
        (stack([q, k]).flatten(0, 1), cat([q, k])),
        (cat([q.permute(1, 0), k.permute(1, 0)], dim=1).permute(1, 0), cat([q, k])),
    ]
    for written, plain in pairs:
        first, second = (Rules({"out": made}, drop=["*"]).bind() for made in (written, plain))
        assert first.tensors == second.tensors


def test_indices_tables_and_each() -> None:
    """Names of several variables, physical to logical experts, positions by an index, and parts beside an each."""
    arrays = {f"l{layer}.e{e}": np.full((2,), 10 * layer + e) for layer in range(2) for e in range(3)}
    arrays["shared"] = np.full((2,), 99)
    rules = Rules(
        {
            "l{l}.slots": stack([each("s", source("l{l}.e{logical[s]}")), source("shared")]),
            "copy.{l}.{e}": source("l{l}.e{e}"),
            "word.{word_of[l]}": source("l{l}.e0")[0],
        },
        l=range(2),
        e=range(3),
        s=range(5),
        logical=[0, 1, 2, 0, 1],
        word_of={0: "zero", 1: "one"},
    )
    made = rules.evaluate(arrays)
    assert made["l1.slots"][:, 0].tolist() == [10, 11, 12, 10, 11, 99]
    assert made["copy.1.2"].tolist() == [12, 12]
    assert made["word.one"] == 10
    assert list(made)[:2] == ["l0.slots", "l1.slots"]
    apart = Rules(
        {"expert.{e}": source("l0.slots")["{e}"], "again.{e}": source("l0.slots")["{twice[e]}"]},
        e=range(3),
        twice=[0, 2, 4],
        drop=["*"],
    )
    assert apart.evaluate({"l0.slots": made["l0.slots"]})["again.2"].tolist() == [1, 1]
    chained = Rules({"x.{l}": source("{b[a[l]]}")}, l=[5], a={5: 1}, b=["p", "q"])
    assert chained.source_names == ("q",)
    assert chained.names == ("x.5",)


def test_maps_of_different_layers_are_added() -> None:
    dense = Rules({"l.{l}.mlp": source("{l}.mlp", (2,))}, l=range(1))
    moe = Rules({"l.{l}.mlp": stack([each("e", source("{l}.{e}", (2,)))])}, l=range(1, 3), e=range(2))
    both = dense + moe
    assert both.names == ("l.0.mlp", "l.1.mlp", "l.2.mlp")
    assert both.bind().shapes == {"l.0.mlp": (2,), "l.1.mlp": (2, 2), "l.2.mlp": (2, 2)}
    assert eval(repr(both), {"Rules": Rules, "source": source, "stack": stack, "each": each}) == both
    table = Rules({"{t[l]}": source("{u[l]}")}, l=["x"], t={"x": "a"}, u={"x": 1})
    assert repr(table) == "Rules({'{t[l]}': source('{u[l]}')}, l=('x',), t={'x': 'a'}, u={'x': 1})"
    assert eval(repr(table), {"Rules": Rules, "source": source}) == table
    assert repr(each("e", source("{e}"))) == "each('e', source('{e}'))"
    assert str(both).splitlines() == [
        "l.{l}.mlp <- {l}.mlp  for l in 0:1",
        "l.{l}.mlp <- stack([each('e', {l}.{e})], dim=0)  for l in 1:3",
    ]
