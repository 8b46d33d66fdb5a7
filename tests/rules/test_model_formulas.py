"""Every element of every tensor of small models, in each system, against formulas over single indices.

No torch word is used here and nothing of ``tricomm.rules.models`` but sizes: for a destination name and an index, a
formula says the checkpoint's name and index, as the systems' own documents and loaders have it; None is a zero.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rules.test_models import DEEPSEEK, DEEPSEEK_WHOLE_QUERIES, GPT_OSS, LLAMA, QWEN, arrays
from tricomm.rules import Rules
from tricomm.rules.models import Model, megatron, sglang, torchtitan, vllm

Index = tuple[int, ...]
Place = tuple[str, Index] | None
Formula = Callable[[Model, tuple[str, ...], Index], Place]

MODELS = {
    "llama": LLAMA,
    "qwen": QWEN,
    "deepseek": DEEPSEEK,
    "deepseek, queries whole": DEEPSEEK_WHOLE_QUERIES,
    "gpt-oss": GPT_OSS,
}
HF = "model.layers.{}."


def named(path: str) -> Formula:
    """The same tensor under another name; ``{}`` are the groups of the pattern."""
    return lambda _, groups, index: (path.format(*groups), index)


def padded(name: str) -> Formula:
    return lambda model, _, index: (name, index) if index[0] < model.vocab else None


def joined(first: str, second: str, rows: Callable[[Model], int]) -> Formula:
    """Rows of one tensor, then those of another."""

    def place(model: Model, groups: tuple[str, ...], index: Index) -> Place:
        row, count = index[0], rows(model)
        name, row = (first, row) if row < count else (second, row - count)
        return name.format(*groups), (row, *index[1:])

    return place


def grouped_qkv(model: Model, groups: tuple[str, ...], index: Index) -> Place:
    """By group of kv heads: R = (h/G + 2) D rows."""
    layer, kind = groups
    size, per_group = model.head_dim, model.heads // model.kv_heads
    group, within = divmod(index[0], (per_group + 2) * size)
    head, d = divmod(within, size)
    row = (group * per_group + head if head < per_group else group) * size + d
    word = "q" if head < per_group else "k" if head == per_group else "v"
    return f"model.layers.{layer}.self_attn.{word}_proj.{kind}", (row, *index[1:])


def served_qkv(tp: int) -> Formula:
    """q, then k, then v; rank r of t > G has kv head r // (t / G)."""

    def place(model: Model, groups: tuple[str, ...], index: Index) -> Place:
        layer, kind = groups
        size, copies = model.head_dim, max(tp // model.kv_heads, 1)
        row, rows = index[0], model.heads * size
        if row < rows:
            return f"model.layers.{layer}.self_attn.q_proj.{kind}", index
        word, row = divmod(row - rows, model.kv_heads * copies * size)
        head, d = divmod(row, size)
        return f"model.layers.{layer}.self_attn.{'kv'[word]}_proj.{kind}", (head // copies * size + d, *index[1:])

    return place


def pairs_of_rope(word: str) -> Formula:
    """TT[a, 2p + c] = HF[a, c D/2 + p], for Llama."""

    def place(model: Model, groups: tuple[str, ...], index: Index) -> Place:
        row, size = index[0], model.head_dim
        if model.rope_pairs:
            head, within = divmod(row, size)
            p, c = divmod(within, 2)
            row = head * size + c * size // 2 + p
        return f"model.layers.{groups[0]}.self_attn.{word}_proj.{groups[1]}", (row, *index[1:])

    return place


def expert(model: Model, layer: str, e: int, word: str, kind: str, index: Index) -> Place:
    """Element [row, column] of gate, up or down of one expert, or [row] of its bias."""
    path = f"model.layers.{layer}.mlp.experts."
    if not model.fused_experts:
        return f"{path}{e}.{word}_proj.weight", index
    name = path + ("down_proj" if word == "down" else "gate_up_proj") + ("_bias" if kind == "bias" else "")
    row = index[0] if word == "down" else 2 * index[0] + (word == "up")
    return name, (e, row) if kind == "bias" else (e, index[1], row)


def gate_and_up(alternate: Callable[[Model], int], stacked: bool = False) -> Callable[..., Place]:
    """``n`` rows of gate, then of up, and so on; n = 0 for all gate first. Stacked: the first index is the expert."""

    def place(model: Model, groups: tuple[str, ...], index: Index) -> Place:
        layer, kind, number = (*groups, "")[:3]
        e, index = (int(number), index) if not stacked else (index[0], index[1:])
        n = alternate(model) or model.expert_intermediate
        block, within = divmod(index[0], 2 * n)
        word, j = divmod(within, n)
        if e == model.experts:  # the shared expert behind the others
            path = f"model.layers.{layer}.mlp.shared_experts.{('gate', 'up')[word]}_proj.weight"
            return path, (block * n + j, *index[1:])
        return expert(model, layer, e, ("gate", "up")[word], kind, (block * n + j, *index[1:]))

    return place


def down(model: Model, groups: tuple[str, ...], index: Index) -> Place:
    layer, kind, number = groups
    return expert(model, layer, int(number), "down", kind, index)


def all_down(model: Model, groups: tuple[str, ...], index: Index) -> Place:
    if groups[1] == "bias" and index[0] >= model.experts:
        return None  # ranks that share an expert with the first add no bias
    if index[0] == model.experts:
        return f"model.layers.{groups[0]}.mlp.shared_experts.down_proj.weight", index[1:]
    return expert(model, groups[0], index[0], "down", groups[1], index[1:])


def whole_experts(word: str) -> Formula:
    return lambda model, groups, index: expert(model, groups[0], index[0], word, "weight", index[1:])


def intermediate(model: Model) -> int:
    return model.intermediate


def shared(model: Model) -> int:
    return model.expert_intermediate * model.shared_experts


def q_rank(model: Model) -> int:
    assert model.latent is not None
    return model.latent.q_rank


def mlp(path: str, rows: Callable[[Model], int]) -> Formula:
    return joined(f"{HF}{path}gate_proj.weight", f"{HF}{path}up_proj.weight", rows)


M = r"decoder\.layers\.(\d+)\."
A = HF + "self_attn."
MEGATRON: dict[str, Formula] = {
    r"embedding\.word_embeddings\.weight": padded("model.embed_tokens.weight"),
    r"output_layer\.weight": padded("lm_head.weight"),
    r"decoder\.final_layernorm\.weight": named("model.norm.weight"),
    M + r"(?:self_attention\.linear_qkv\.layer_norm_weight|input_layernorm\.weight)": named(
        HF + "input_layernorm.weight"
    ),
    M + r"(?:pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)": named(
        HF + "post_attention_layernorm.weight"
    ),
    M + r"self_attention\.linear_qkv\.(weight|bias)": grouped_qkv,
    M + r"self_attention\.linear_proj\.(weight|bias)": named(A + "o_proj.{}"),
    M + r"self_attention\.([qk])_layernorm\.weight": named(A + "{}_norm.weight"),
    M + r"self_attention\.core_attention\.softmax_offset": named(A + "sinks"),
    M + r"self_attention\.linear_q_proj\.weight": named(A + "q_proj.weight"),
    M + r"self_attention\.linear_q_down_proj\.weight": named(A + "q_a_proj.weight"),
    M + r"self_attention\.linear_q_up_proj\.weight": named(A + "q_b_proj.weight"),
    M + r"self_attention\.linear_kv_down_proj\.weight": named(A + "kv_a_proj_with_mqa.weight"),
    M + r"self_attention\.linear_kv_up_proj\.weight": named(A + "kv_b_proj.weight"),
    M + r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight": named(A + "{}_a_layernorm.weight"),
    M + r"mlp\.linear_fc1\.weight": mlp("mlp.", intermediate),
    M + r"mlp\.linear_fc2\.weight": named(HF + "mlp.down_proj.weight"),
    M + r"mlp\.shared_experts\.linear_fc1\.weight": mlp("mlp.shared_experts.", shared),
    M + r"mlp\.shared_experts\.linear_fc2\.weight": named(HF + "mlp.shared_experts.down_proj.weight"),
    M + r"mlp\.experts\.linear_fc1\.(weight|bias)(\d+)": gate_and_up(lambda _: 0),
    M + r"mlp\.experts\.linear_fc2\.(weight|bias)(\d+)": down,
    M + r"mlp\.router\.expert_bias": named(HF + "mlp.gate.e_score_correction_bias"),
    M + r"mlp\.router\.(weight|bias)": lambda model, groups, index: (
        f"model.layers.{groups[0]}.mlp.{'router' if model.biases else 'gate'}.{groups[1]}",
        index,
    ),
}
T = r"layers\.(\d+)\."
TORCHTITAN: dict[str, Formula] = {
    r"tok_embeddings\.weight": named("model.embed_tokens.weight"),
    r"lm_head\.weight": named("lm_head.weight"),
    r"norm\.weight": named("model.norm.weight"),
    T + r"attention_norm\.weight": named(HF + "input_layernorm.weight"),
    T + r"ffn_norm\.weight": named(HF + "post_attention_layernorm.weight"),
    T + r"attention\.qkv_linear\.wq\.(weight|bias)": pairs_of_rope("q"),
    T + r"attention\.qkv_linear\.wk\.(weight|bias)": pairs_of_rope("k"),
    T + r"attention\.qkv_linear\.wv\.(weight|bias)": named(A + "v_proj.{}"),
    T + r"attention\.wo\.(weight|bias)": named(A + "o_proj.{}"),
    T + r"attention\.sinks": named(A + "sinks"),
    T + r"attention\.wq\.weight": named(A + "q_proj.weight"),
    T + r"attention\.wq_a\.weight": named(A + "q_a_proj.weight"),
    T + r"attention\.wq_b\.weight": named(A + "q_b_proj.weight"),
    T + r"attention\.wkv_a\.weight": named(A + "kv_a_proj_with_mqa.weight"),
    T + r"attention\.wkv_b\.weight": named(A + "kv_b_proj.weight"),
    T + r"attention\.kv_norm\.weight": named(A + "kv_a_layernorm.weight"),
    T + r"attention\.([qk])_norm\.weight": lambda model, groups, index: (
        f"model.layers.{groups[0]}.self_attn.{groups[1]}_{'a_layernorm' if model.latent else 'norm'}.weight",
        index,
    ),
    T + r"feed_forward\.w1\.weight": named(HF + "mlp.gate_proj.weight"),
    T + r"feed_forward\.w2\.weight": named(HF + "mlp.down_proj.weight"),
    T + r"feed_forward\.w3\.weight": named(HF + "mlp.up_proj.weight"),
    T + r"moe\.shared_experts\.w1\.weight": named(HF + "mlp.shared_experts.gate_proj.weight"),
    T + r"moe\.shared_experts\.w2\.weight": named(HF + "mlp.shared_experts.down_proj.weight"),
    T + r"moe\.shared_experts\.w3\.weight": named(HF + "mlp.shared_experts.up_proj.weight"),
    T + r"moe\.routed_experts\.inner_experts\.w1_EFD": whole_experts("gate"),
    T + r"moe\.routed_experts\.inner_experts\.w2_EDF": whole_experts("down"),
    T + r"moe\.routed_experts\.inner_experts\.w3_EFD": whole_experts("up"),
    T + r"moe\.routed_experts\.inner_experts\.mlp1_weight_EGD": lambda _, groups, index: (
        f"model.layers.{groups[0]}.mlp.experts.gate_up_proj",
        (index[0], index[2], index[1]),
    ),
    T + r"moe\.routed_experts\.inner_experts\.mlp2_weight_EDF": lambda _, groups, index: (
        f"model.layers.{groups[0]}.mlp.experts.down_proj",
        (index[0], index[2], index[1]),
    ),
    T + r"moe\.routed_experts\.inner_experts\.mlp1_bias_EG": named(HF + "mlp.experts.gate_up_proj_bias"),
    T + r"moe\.routed_experts\.inner_experts\.mlp2_bias_ED": named(HF + "mlp.experts.down_proj_bias"),
    T + r"moe\.expert_bias_E": lambda model, groups, index: (
        (f"model.layers.{groups[0]}.mlp.gate.e_score_correction_bias", index) if model.expert_bias else None
    ),
    T + r"moe\.router\.gate\.(weight|bias)": MEGATRON[M + r"mlp\.router\.(weight|bias)"],
}
S = r"model\.layers\.(\d+)\."
SERVED: dict[str, Formula] = {
    r"model\.(?:embedding|embed_tokens)\.weight": padded("model.embed_tokens.weight"),
    r"lm_head\.weight": padded("lm_head.weight"),
    r"model\.norm\.weight": named("model.norm.weight"),
    S + r"(input|post_attention)_layernorm\.weight": named(HF + "{}_layernorm.weight"),
    S + r"(?:self_)?attn\.o_proj\.(weight|bias)": named(A + "o_proj.{}"),
    S + r"(?:self_)?attn\.sinks": named(A + "sinks"),
    S + r"self_attn\.([qk])_norm\.weight": named(A + "{}_norm.weight"),
    S + r"self_attn\.fused_qkv_a_proj(?:_with_mqa)?\.weight": joined(
        A + "q_a_proj.weight", A + "kv_a_proj_with_mqa.weight", q_rank
    ),
    S + r"self_attn\.(q|kv)_a_layernorm\.weight": named(A + "{}_a_layernorm.weight"),
    S + r"self_attn\.(q|kv)_b_proj\.weight": named(A + "{}_b_proj.weight"),
    S + r"self_attn\.(q_proj|kv_a_proj_with_mqa)\.weight": named(A + "{}.weight"),
    S + r"mlp\.gate_up_proj\.weight": mlp("mlp.", intermediate),
    S + r"mlp\.down_proj\.weight": named(HF + "mlp.down_proj.weight"),
    S + r"mlp\.shared_experts\.gate_up_proj\.weight": mlp("mlp.shared_experts.", shared),
    S + r"mlp\.shared_experts\.down_proj\.weight": named(HF + "mlp.shared_experts.down_proj.weight"),
    S + r"mlp\.(router|gate)\.(weight|bias|e_score_correction_bias)": named(HF + "mlp.{}.{}"),
    S + r"mlp\.experts\.w13_(?:weight_)?(weight|bias)": gate_and_up(
        lambda model: int(model.fused_experts), stacked=True
    ),
    S + r"mlp\.experts\.w2_(?:weight_)?(weight|bias)": all_down,
}
QKV = S + r"(?:self_)?attn\.qkv_proj\.(weight|bias)"

SYSTEMS: dict[str, tuple[Callable[[Model], Rules], dict[str, Formula]]] = {
    "megatron": (lambda model: megatron(model, tp=3, vocab_divisor=8), MEGATRON),
    "megatron, alternating by 2": (
        lambda model: megatron(model, glu_interleave=2),
        MEGATRON | {M + r"mlp\.experts\.linear_fc1\.(weight|bias)(\d+)": gate_and_up(lambda _: 2)},
    ),
    "torchtitan": (torchtitan, TORCHTITAN),
    "vllm": (vllm, SERVED | {QKV: served_qkv(1)}),
    "vllm, tp 8": (lambda model: vllm(model, tp=8, etp=2), SERVED | {QKV: served_qkv(8)}),
    "sglang": (lambda model: sglang(model, tp=2, fuse_shared=True), SERVED | {QKV: served_qkv(2)}),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_element_stands_where_the_formula_says(name: str, system: str) -> None:
    model = replace(MODELS[name], layers=2)
    make, formulas = SYSTEMS[system]
    checkpoint = {path: array + 1 for path, array in arrays(model).items()}
    for path, made in make(model).evaluate(checkpoint).items():
        found: list[Any] = [
            (formula, match.groups())
            for pattern, formula in formulas.items()
            if (match := re.fullmatch(pattern, path)) is not None
        ]
        assert len(found) == 1, path
        formula, groups = found[0]
        for index in np.ndindex(made.shape):
            place = formula(model, groups, index)
            assert made[index] == (0 if place is None else checkpoint[place[0]][place[1]]), (path, index)
