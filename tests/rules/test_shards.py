"""Maps between shards: what ranks hold of the sources becomes what ranks hold of the destinations, piece by piece.

What a planner will do with pieces, written as plainly as it can be: whoever holds elements of a piece copies them
from its shard into the shards that need them, by the strides of both.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rules.test_algebra import Pair, pairs, quick
from tricomm import Mesh, Shard, ShardingSpec, SpecError
from tricomm.layout.intervals import Region, region_shape
from tricomm.rules import BoundRules, Piece, Rules, source, to_local, to_local_source, within, within_source
from tricomm.rules.models import Model, megatron, vllm


@st.composite
def holdings(draw: Any, shape: tuple[int, ...]) -> list[Region]:
    """One to three ranks that hold every element once, in intervals of any order along one dim."""
    whole: Region = tuple(((0, size),) for size in shape)
    ranks = draw(st.integers(1, 3))
    if not shape or ranks == 1:
        return [whole]
    dim = draw(st.integers(0, len(shape) - 1))
    edges = [0, *sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=4))), shape[dim]]
    parts = draw(st.permutations(list(pairwise(edges))))
    return [(*whole[:dim], tuple(parts[rank::ranks]), *whole[dim + 1 :]) for rank in range(ranks)]


def shard(array: np.ndarray, region: Region) -> np.ndarray:
    """THE DEFINITION of what a rank has: the coordinates of its intervals, in their order, per dim."""
    index = [[at for start, stop in intervals for at in range(start, stop)] for intervals in region]
    return np.ascontiguousarray(array[np.ix_(*index)]) if index else array.copy()


def view(array: np.ndarray, shape: tuple[int, ...], placed: tuple[int, tuple[int, ...]]) -> np.ndarray:
    """By an offset and strides in elements, and never outside of the shard."""
    offset, strides = placed
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert 0 <= offset <= last < array.size
    flat = array.reshape(-1)[offset:]
    return np.lib.stride_tricks.as_strided(flat, shape, [stride * array.itemsize for stride in strides])


def strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def moved(bound: BoundRules, arrays: dict[str, np.ndarray], sources: dict[str, list[Region]], needed: Any) -> Any:
    """Every rank's shards of the destinations; and how many elements were copied from one shard to another."""
    held = {name: [shard(arrays[name], region) for region in regions] for name, regions in sources.items()}
    result: dict[str, list[np.ndarray]] = {}
    count = 0
    for tensor in bound.tensors:
        result[tensor.name] = [np.full(region_shape(region), -1, np.int64) for region in needed[tensor.name]]
        for region, local in zip(needed[tensor.name], result[tensor.name], strict=True):
            for piece in (part for one in tensor.pieces for part in within(one, region)):
                there = to_local(piece, region)
                target = view(local, piece.shape, there.strided(strides(local)))
                if piece.tensor is None:
                    target[...] = piece.value
                else:
                    name = tensor.sources[piece.tensor]
                    count += sum(copied(there, local, *one) for one in zip(sources[name], held[name], strict=True))
    return result, count


def copied(piece: Piece, local: np.ndarray, region: Region, owned: np.ndarray) -> int:
    """Copy what one rank of the source holds of a piece; the number of elements."""
    count = 0
    for part in within_source(piece, region):
        here = to_local_source(part, region)
        values = view(owned, part.shape, here.source_strided(strides(owned)))
        view(local, part.shape, part.strided(strides(local)))[...] = values
        count += part.numel
    return count


@quick
@given(pairs(), st.data())
def test_shards_become_shards(drawn: tuple[Pair, dict[str, np.ndarray]], data: Any) -> None:
    (made, array), arrays = drawn
    bound = Rules({"out": made}, drop=["*"]).bind({name: value.shape for name, value in arrays.items()})
    sources = {name: data.draw(holdings(value.shape), label=name) for name, value in arrays.items()}
    needed = {"out": data.draw(holdings(array.shape), label="out")}
    shards, count = moved(bound, arrays, sources, needed)
    for local, region in zip(shards["out"], needed["out"], strict=True):
        np.testing.assert_array_equal(local, shard(array, region))
    assert count == sum(piece.numel for piece in bound.tensors[0].pieces if piece.tensor is not None)


def test_a_trainer_of_four_ranks_pushes_to_a_server_of_three() -> None:
    """Megatron's rows are cut inside of heads (t = 4 > G = 2), vLLM's at its segments; nothing is gathered."""
    model = Model(layers=1, hidden=6, heads=6, kv_heads=2, head_dim=2, intermediate=12, vocab=70)
    server = vllm(model, tp=1).bind()
    trainer = megatron(model, tp=4, vocab_divisor=6).bind()
    checkpoint = {
        name: np.random.default_rng(0).integers(0, 10**6, shape) for name, shape in server.source_shapes.items()
    }
    pushed = trainer.reverse().then(server)

    def cut(shape: tuple[int, ...], ranks: int, dim: int, *segments: int) -> list[Region]:
        spec = ShardingSpec(Mesh(range(ranks), ("tp",)), (Shard(dim, segments=segments or None),), shape)
        return [spec.holding(rank) for rank in range(ranks)]

    halves = {"linear_fc1.weight": (12, 12), "gate_up_proj.weight": (12, 12), "qkv_proj.weight": (12, 4, 4)}
    by_column = ("linear_proj.weight", "linear_fc2.weight", "o_proj.weight", "down_proj.weight")

    def layouts(bound: BoundRules, ranks: int) -> dict[str, list[Region]]:
        made = {}
        for name, shape in bound.shapes.items():
            segments = next((sizes for word, sizes in halves.items() if name.endswith(word)), ())
            made[name] = cut(shape, ranks, int(name.endswith(by_column)), *segments)
        return made

    shards, count = moved(pushed, trainer.evaluate(checkpoint), layouts(trainer, 4), layouts(server, 3))
    for name, whole in server.evaluate(checkpoint).items():
        for local, region in zip(shards[name], layouts(server, 3)[name], strict=True):
            np.testing.assert_array_equal(local, shard(whole, region))
    assert count == sum(array.size for array in checkpoint.values()), "every element travels once"


def test_a_piece_outside_of_a_shard_is_refused() -> None:
    (tensor,) = Rules({"w": source("w", (8,))}).bind().tensors
    with pytest.raises(
        SpecError, match=r"coordinate 0 lies in none of \(\(4, 8\),\); cut the piece by within\(\) first"
    ):
        to_local(tensor.pieces[0], (((4, 8),),))
