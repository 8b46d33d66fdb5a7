"""Every public callable of tricomm.rules and of its models, with arguments that it takes."""

import numpy as np

from tests.kinds.calls import Calls
from tricomm import rules
from tricomm.rules import Rules, each, models, source

TALL = source("w", (8, 4))
BOUND = Rules({"a": TALL[:4], "b": TALL[4:]}).bind()
BACK = Rules({"c": source("a", (4, 4)).permute(1, 0)}).bind()
PIECE = BOUND.tensors[0].pieces[0]
HELD = (((0, 2),), ((0, 4),))
GROUPS = Rules({"a": TALL}).groups
SIZES = {
    "layers": 2, "hidden": 8, "heads": 4, "vocab": 16, "intermediate": 8, "kv_heads": 2, "head_dim": 2, "latent": None,
    "experts": 2, "expert_intermediate": 4, "shared_experts": 1, "dense_layers": 1, "qk_norm": True, "biases": False,
    "fused_experts": False, "expert_bias": True, "rope_pairs": True, "tied": False, "mtp_layers": 0,
}  # fmt: skip
MODEL = models.Model(**SIZES)  # type: ignore[arg-type]
SHAPES = {
    "megatron": models.megatron(MODEL).bind().shapes,
    "torchtitan": models.torchtitan(MODEL).bind().shapes,
    "vllm": models.vllm(MODEL).bind().shapes,
}

RULES_CALLS: Calls = {
    "BoundRules": (rules.BoundRules, {"tensors": BOUND.tensors, "sources": BOUND.sources}),
    "BoundRules.evaluate": (BOUND.evaluate, {"arrays": {"w": np.zeros((8, 4))}}),
    "BoundRules.reverse": (BOUND.reverse, {"drop": ["x*"], "fill": None}),
    "BoundRules.then": (BOUND.then, {"other": BACK}),
    "Expression.__getitem__": (TALL.__getitem__, {"index": (slice(0, 2), 0)}),
    "Expression.expand": (lambda **given: TALL.expand(*given.values()), {"size": 8, "other": 4}),
    "Expression.flatten": (TALL.flatten, {"start_dim": 0, "end_dim": 1}),
    "Expression.permute": (lambda **given: TALL.permute(*given.values()), {"dim": 1, "other_dim": 0}),
    "Expression.to": (TALL.to, {"dtype": "bfloat16"}),
    "Expression.unflatten": (TALL.unflatten, {"dim": 0, "sizes": (2, 4)}),
    "Expression.unsqueeze": (TALL.unsqueeze, {"dim": 0}),
    "Latent": (models.Latent, {"q_rank": 8, "kv_rank": 8, "nope": 4, "rope": 4, "value": 8}),
    "Model": (models.Model, SIZES),
    "Rules": (Rules, {
        "definitions": {"a.{l}": source("w.{l}"), "b.{l}": source("v.{t[l]}")}, "drop": ["x.*", TALL[:2]], "l": [0, 1],
        "t": {0: "x", 1: "y"}}),
    "Rules.bind": (Rules({"a": source("w")}).bind, {"source_shapes": {"w": (8, 4)}, "dtypes": {"w": "float32"}}),
    "Rules.evaluate": (Rules({"a": source("w")}).evaluate, {"arrays": {"w": np.zeros((8, 4))}}),
    "Rules.of_groups": (Rules.of_groups, {"groups": GROUPS}),
    "cat": (rules.cat, {"parts": [TALL, TALL], "dim": 0}),
    "each": (each, {"variable": "e", "of": TALL}),
    "fill": (rules.fill, {"value": 0, "shape": (2, 2)}),
    "layers_of_stage": (models.layers_of_stage, {"layers": 4, "stages": 2, "stage": 0, "chunks": 1}),
    "megatron": (models.megatron, {
        "model": MODEL, "tp": 1, "vocab_divisor": 8, "glu_interleave": 0, "output_copy": False}),
    "megatron_layouts": (models.megatron_layouts, {
        "model": MODEL, "shapes": SHAPES["megatron"], "ranks": [0, 1], "tp": 2, "pp": 1, "ep": 1, "etp": 1, "chunks": 1,
        "glu_interleave": 0, "dtype": "bfloat16"}),
    "sglang": (models.sglang, {"model": MODEL, "tp": 1, "etp": 1, "fuse_shared": False, "glu_interleave": None}),
    "source": (source, {"name": "w", "shape": (2, 2)}),
    "stack": (rules.stack, {"parts": [TALL, TALL], "dim": 0}),
    "tensors": (models.tensors, {"model": MODEL}),
    "to_local": (rules.to_local, {"piece": rules.within(PIECE, HELD)[0], "region": HELD}),
    "to_local_source": (rules.to_local_source, {"piece": rules.within_source(PIECE, HELD)[0], "region": HELD}),
    "torchtitan": (models.torchtitan, {"model": MODEL, "fused_qkv": False}),
    "torchtitan_layouts": (models.torchtitan_layouts, {
        "shapes": SHAPES["torchtitan"], "ranks": [0, 1], "tp": 2, "ep": 1, "dtype": "bfloat16"}),
    "vllm": (models.vllm, {
        "model": MODEL, "tp": 1, "etp": 1, "lora_tokens": 0, "slots": [0, 1], "up_first": False,
        "glu_interleave": None}),
    "vllm_layouts": (models.vllm_layouts, {
        "model": MODEL, "shapes": SHAPES["vllm"], "ranks": [0, 1], "tp": 2, "expert_parallel": False,
        "dtype": "bfloat16"}),
    "within": (rules.within, {"piece": PIECE, "region": HELD}),
    "within_source": (rules.within_source, {"piece": PIECE, "region": HELD}),
}  # fmt: skip
