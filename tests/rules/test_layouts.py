"""Which rank holds what, by formulas; and whole small models pushed from the grid of a trainer to that of a server."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rules.test_models import DEEPSEEK, GPT_OSS, LLAMA, QWEN, arrays
from tests.rules.test_shards import moved, shard
from tricomm import SpecError
from tricomm.layout.intervals import Region
from tricomm.rules.models import (
    Model,
    megatron,
    megatron_layouts,
    torchtitan,
    torchtitan_layouts,
    vllm,
    vllm_layouts,
)

MODELS = {name: replace(model, layers=2) for name, model in (("llama", LLAMA), ("deepseek", DEEPSEEK))}
MODELS["qwen"] = replace(QWEN, layers=2, experts=4)
MODELS["gpt-oss"] = replace(GPT_OSS, layers=2, experts=4)

Regions = dict[str, list[Region]]


def regions(specs: Any) -> Regions:
    return {name: [spec.holding(rank) for rank in spec.mesh.ranks] for name, spec in specs.items()}


def trainers(model: Model) -> list[tuple[Any, Regions]]:
    """Maps and layouts: FSDP alone, with TP, with EP; Megatron's grids."""
    titan = torchtitan(model, fused_qkv=model.qk_norm).bind()
    made = [
        (titan, torchtitan_layouts(titan.shapes, range(4))),
        (titan, torchtitan_layouts(titan.shapes, range(4), tp=2, ep=2)),
        (titan, torchtitan_layouts(titan.shapes, range(6), ep=1)),
    ]
    for ranks, grid in ((4, {"tp": 2, "pp": 2}), (4, {"tp": 4}), (8, {"tp": 2, "pp": 2, "chunks": 1, "etp": 2})):
        bound = megatron(model, tp=grid["tp"], vocab_divisor=8).bind()
        made.append((bound, megatron_layouts(model, bound.shapes, range(ranks), **grid)))
    if model.experts == 4:
        interleaved = megatron(model, tp=2, vocab_divisor=8, glu_interleave=2).bind()
        grid = {"tp": 2, "ep": 2, "etp": 2, "glu_interleave": 2}
        made.append((interleaved, megatron_layouts(model, interleaved.shapes, range(8), **grid)))
    return [(bound, regions(specs)) for bound, specs in made]


def servers(model: Model) -> list[tuple[Any, Regions]]:
    made = []
    for ranks, tp, expert_parallel in ((1, 1, False), (2, 2, False), (4, 4, True), (4, 2, False), (3, 1, True)):
        bound = vllm(model, tp=tp, etp=1 if expert_parallel else ranks).bind()
        specs = vllm_layouts(model, bound.shapes, range(100, 100 + ranks), tp=tp, expert_parallel=expert_parallel)
        made.append((bound, regions(specs)))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_every_grid_pushes_to_every_grid(name: str) -> None:
    """Each trainer to some server and each server from some trainer; what a rank gets is its part of the whole."""
    model = MODELS[name]
    checkpoint = arrays(model)
    for number, (trainer, held) in enumerate(trainers(model)):
        server, needed = servers(model)[number % 5]
        shards, _ = moved(trainer.reverse().then(server), trainer.evaluate(checkpoint), held, needed)
        for path, whole in server.evaluate(checkpoint).items():
            for local, region in zip(shards[path], needed[path], strict=True):
                np.testing.assert_array_equal(local, shard(whole, region))


@pytest.mark.parametrize("name", MODELS)
def test_every_element_is_held(name: str) -> None:
    for bound, layouts in trainers(MODELS[name]) + servers(MODELS[name]):
        assert layouts.keys() == bound.shapes.keys()
        for path, shape in bound.shapes.items():
            counts = np.zeros(shape, int)
            for region in layouts[path]:
                index = [[at for start, stop in intervals for at in range(start, stop)] for intervals in region]
                counts[np.ix_(*index)] += 1
            assert (counts >= 1).all(), path


def rows(spec: Any, rank: int, dim: int = 0) -> list[int]:
    return [at for start, stop in spec.holding(rank)[dim] for at in range(start, stop)]


def test_fsdp_cuts_what_tp_has_cut() -> None:
    """Eight rows on (dp, tp) = 2 x 2: rank (d, r) starts at (2 r + d) 8 / 4."""
    specs = torchtitan_layouts({"layers.0.feed_forward.w1.weight": (8, 4)}, range(4), tp=2)
    (spec,) = specs.values()
    assert [rows(spec, rank) for rank in range(4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    few = torchtitan_layouts({"layers.0.moe.routed_experts.inner_experts.w1_EFD": (2, 8, 3)}, range(4), ep=2)
    (spec,) = few.values()
    assert [(rows(spec, rank), rows(spec, rank, 1)) for rank in range(4)] == [
        ([0], [0, 1, 2, 3]),
        ([1], [0, 1, 2, 3]),
        ([0], [4, 5, 6, 7]),
        ([1], [4, 5, 6, 7]),
    ]


def test_megatron_counts_ranks_by_tp_first_and_experts_by_etp_first() -> None:
    """tp-dp-pp for what is dense, etp-ep-edp-pp for experts; the local expert i is the global ep E / ep + i."""
    model = replace(QWEN, layers=8, experts=4)
    bound = megatron(model, tp=2, vocab_divisor=8).bind()
    grid = {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "chunks": 2}
    specs = megatron_layouts(model, bound.shapes, range(16), **grid)
    stage = {layer: specs[f"decoder.layers.{layer}.mlp.router.weight"].mesh.ranks[0] // 8 for layer in range(8)}
    assert [layer for layer, number in stage.items() if number == 0] == [0, 1, 4, 5]
    assert specs["embedding.word_embeddings.weight"].mesh.ranks == tuple(range(8))
    assert specs["output_layer.weight"].mesh.ranks == tuple(range(8, 16))
    qkv = specs["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert [rows(qkv, rank)[0] for rank in range(8)] == [0, 16] * 4
    for expert in range(4):
        spec = specs[f"decoder.layers.2.mlp.experts.linear_fc2.weight{expert}"]
        assert [rank for rank in range(16) if rank in spec.mesh.ranks] == [
            8 + rank for rank in range(8) if rank % 2 == expert // 2
        ]


def test_vllm_gives_the_first_ranks_one_expert_more() -> None:
    """Ten experts on four ranks: 3, 3, 2, 2, over all ranks of all replicas."""
    model = replace(QWEN, layers=1, experts=10)
    bound = vllm(model, tp=2).bind()
    specs = vllm_layouts(model, bound.shapes, [4, 5, 6, 7], tp=2, expert_parallel=True)
    assert [rows(specs["model.layers.0.mlp.experts.w13_weight"], rank) for rank in (4, 5, 6, 7)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7],
        [8, 9],
    ]
    whole = vllm_layouts(model, bound.shapes, [4, 5, 6, 7], tp=2)
    assert rows(whole["model.layers.0.mlp.experts.w13_weight"], 5, 1) == [1, 5], "the second row of gate, and of up"
    assert rows(whole["model.layers.0.self_attn.qkv_proj.weight"], 6) == [*range(8), *range(16, 20), *range(24, 28)]


def test_grids_that_do_not_fit_are_refused() -> None:
    bound = megatron(QWEN).bind()
    with pytest.raises(SpecError, match=re.escape("3 experts are not shared evenly by ep=2 ranks; choose a divisor")):
        megatron_layouts(QWEN, bound.shapes, range(2), ep=2)
    with pytest.raises(SpecError, match=re.escape("4 ranks are no grid of {'dp': 1, 'tp': 3}; give as many ranks as")):
        torchtitan_layouts(bound.shapes, range(4), tp=3)
