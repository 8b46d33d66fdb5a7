"""Megatron-core: q, k and v of each group together, gate and up as one, a matrix of its own for every expert.

Names carry the layer and the expert as the whole model counts them. A stage or a rank of experts counts its own from
0: ``layers_of_stage`` says which global ones they are.
"""

from collections.abc import Sequence

from tricomm.errors import SpecError
from tricomm.kinds import checks_kinds
from tricomm.rules.expressions import Expression
from tricomm.rules.models import hf
from tricomm.rules.models.config import Model, assembled, check_counts, padded
from tricomm.rules.rules import Rules
from tricomm.rules.words import cat, fill


@checks_kinds
def megatron(
    model: Model, *, tp: int = 1, vocab_divisor: int = 128, glu_interleave: int = 0, output_copy: bool = False
) -> Rules:
    """From a Hugging Face checkpoint to Megatron-core (Transformer Engine's grouped experts).

    Layouts there: linear_qkv and linear_fc1 are ``Shard(0)``, linear_fc1 in ``segments=(I, I)``, which is how each rank
    holds its own gate before its own up; linear_proj and linear_fc2 are ``Shard(1)``; what a latent compresses and
    all norms are replicated.

    Args:
        model: its sizes.
        tp: ranks of tensor parallelism, on which the padding of the vocabulary depends.
        vocab_divisor: the padded vocabulary is a multiple of this times ``tp`` (make_vocab_size_divisible_by).
        glu_interleave: rows of gate and of up that alternate in an expert's fc1 (moe_mlp_glu_interleave_size).
        output_copy: whether a tied embedding has its second copy, as on the last of several stages.

    Example:
        >>> from tricomm.rules.models import QWEN3_30B_A3B
        >>> megatron(QWEN3_30B_A3B, tp=8).bind().shapes["decoder.layers.0.mlp.experts.linear_fc1.weight127"]
        (1536, 2048)
    """
    check_counts(tp=tp, vocab_divisor=vocab_divisor)
    check_counts(0, glu_interleave=glu_interleave)
    top = hf.top(model)
    rows = fill(0, (padded(model.vocab, vocab_divisor * tp) - model.vocab, model.hidden))
    outside = {
        "embedding.word_embeddings.weight": cat([top["embed"], rows]),
        "decoder.final_layernorm.weight": top["norm"],
    }
    if not model.tied or output_copy:
        outside["output_layer.weight"] = cat([top["head"], rows])
    result = assembled(outside)
    for layers, moe in model.kinds:
        result += assembled(_layer(model, moe, "decoder.layers.{l}.", glu_interleave), l=layers, e=range(model.experts))
    if model.mtp:
        result += _mtp(model, glu_interleave)
    return result


@checks_kinds
def layers_of_stage(layers: int, stages: int, stage: int, chunks: int = 1) -> tuple[tuple[int, ...], ...]:
    """The layers of each chunk of a pipeline stage, for models whose layers are cut evenly.

    Example:
        >>> layers_of_stage(8, stages=2, stage=0, chunks=2)
        ((0, 1), (4, 5))
    """
    check_counts(layers=layers, stages=stages, chunks=chunks)
    if not 0 <= stage < stages:
        raise SpecError(f"stage={stage} is none of {stages} stages; count from 0")
    if layers % (stages * chunks):
        raise SpecError(
            f"{layers} layers are not cut evenly into {stages} stages of {chunks} chunks; list them yourself"
        )
    each = layers // (stages * chunks)
    starts = [chunk * layers // chunks + stage * each for chunk in range(chunks)]
    return tuple(tuple(range(start, start + each)) for start in starts)


def grouped(parts: Sequence[Expression], groups: int) -> Expression:
    """q, k and v (weights or biases, any head sizes): for each group its q heads, then its k, then its v."""
    return cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def interleaved(gate: Expression, up: Expression, rows: int) -> Expression:
    """``rows`` rows of gate, as many of up, and so on; 0 for all gate before all up."""
    if not rows:
        return cat([gate, up])
    return cat([part.unflatten(0, (-1, rows)) for part in (gate, up)], dim=1).flatten(0, 1)


def _layer(model: Model, moe: bool, path: str, glu_interleave: int) -> hf.Parts:
    norms = hf.norms(model)
    attention = _latent(model) if model.latent else _attention(model)
    before = "input_layernorm.weight" if model.latent else "self_attention.linear_qkv.layer_norm_weight"
    parts = {before: norms["attention_norm"], **attention}
    if moe:
        parts |= {"pre_mlp_layernorm.weight": norms["mlp_norm"], **_experts(model, glu_interleave)}
    else:
        parts |= {"mlp.linear_fc1.layer_norm_weight": norms["mlp_norm"], **_mlp(hf.mlp(model), "mlp.")}
    return {path + name: part for name, part in parts.items()}


def _attention(model: Model) -> hf.Parts:
    parts = hf.grouped_attention(model)
    names = {
        "linear_proj.weight": "o",
        "linear_proj.bias": "o_bias",
        "q_layernorm.weight": "q_norm",
        "k_layernorm.weight": "k_norm",
        "core_attention.softmax_offset": "sinks",
    }
    made = {"linear_qkv.weight": grouped([parts[short] for short in "qkv"], model.kv_heads)}
    if model.biases:
        made["linear_qkv.bias"] = grouped([parts[f"{short}_bias"] for short in "qkv"], model.kv_heads)
    made |= {name: parts[short] for name, short in names.items() if short in parts}
    return {f"self_attention.{name}": part for name, part in made.items()}


def _latent(model: Model) -> hf.Parts:
    parts = hf.latent_attention(model)
    names = {
        "linear_q_proj.weight": "q",
        "linear_q_down_proj.weight": "q_a",
        "linear_q_up_proj.layer_norm_weight": "q_a_norm",
        "linear_q_up_proj.weight": "q_b",
        "linear_kv_down_proj.weight": "kv_a",
        "linear_kv_up_proj.layer_norm_weight": "kv_a_norm",
        "linear_kv_up_proj.weight": "kv_b",
        "linear_proj.weight": "o",
    }
    return {f"self_attention.{name}": parts[short] for name, short in names.items() if short in parts}


def _mlp(parts: hf.Parts, path: str) -> hf.Parts:
    return {f"{path}linear_fc1.weight": cat([parts["gate"], parts["up"]]), f"{path}linear_fc2.weight": parts["down"]}


def _experts(model: Model, glu_interleave: int) -> hf.Parts:
    expert, router = hf.expert(model), hf.router(model)
    names = {"router.weight": "router", "router.bias": "router_bias", "router.expert_bias": "expert_bias"}
    made = {name: router[short] for name, short in names.items() if short in router}
    made["experts.linear_fc1.weight{e}"] = interleaved(expert["gate"], expert["up"], glu_interleave)
    made["experts.linear_fc2.weight{e}"] = expert["down"]
    if model.biases:
        made["experts.linear_fc1.bias{e}"] = interleaved(expert["gate_bias"], expert["up_bias"], glu_interleave)
        made["experts.linear_fc2.bias{e}"] = expert["down_bias"]
    if model.shared_experts:
        made |= _mlp(hf.shared_experts(model), "shared_experts.")
    return {f"mlp.{name}": part for name, part in made.items()}


def _mtp(model: Model, glu_interleave: int) -> Rules:
    """Layers for multi-token prediction, counted from 0; they use the model's own embedding and head."""
    own = hf.mtp(model)
    path = "mtp.layers.{mtp[l]}."
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
    parts = {f"{path}{name}.weight": own[short] for name, short in names.items()}
    parts |= _layer(model, True, f"{path}mtp_model_layer.", glu_interleave)
    drop = tuple(str(own[short]) for short in ("embed", "head"))
    counted = {layer: number for number, layer in enumerate(model.mtp)}
    return assembled(parts, drop, l=model.mtp, e=range(model.experts), mtp=counted)
