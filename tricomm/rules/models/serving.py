"""vLLM and SGLang: q|k|v and gate|up as one tensor each, all experts of a layer in w13 and w2."""

from collections.abc import Sequence
from typing import NamedTuple

from tricomm.errors import SpecError
from tricomm.kinds import checks_kinds
from tricomm.rules.expressions import Expression
from tricomm.rules.models import hf
from tricomm.rules.models.config import Model, assembled, check_counts, padded
from tricomm.rules.models.megatron import interleaved
from tricomm.rules.rules import Rules
from tricomm.rules.words import cat, each, fill, stack

VOCAB_MULTIPLE = 64
"""The vocabulary, and apart from it the tokens that adapters add, are filled up to a multiple of this."""


class Names(NamedTuple):
    """What the two systems call differently, also from model to model."""

    embed: str = "model.embed_tokens.weight"
    attention: str = "self_attn."
    q_a_and_kv_a: str = "fused_qkv_a_proj"
    expert_bias: str = "_bias"


@checks_kinds
def vllm(
    model: Model,
    *,
    tp: int = 1,
    etp: int = 1,
    lora_tokens: int = 0,
    slots: Sequence[int] | None = None,
    up_first: bool = False,
    glu_interleave: int | None = None,
) -> Rules:
    """From a Hugging Face checkpoint to vLLM, as its loaders leave it and before kernels shuffle it.

    Layouts there, G' being the kv heads or, if more, ``tp``: qkv_proj is ``Shard(0, segments=(hD, G'D, G'D))``,
    gate_up_proj ``Shard(0, segments=(I, I))``, o_proj and down_proj ``Shard(1)``; the experts ``Shard(0)`` or explicit
    by expert, or ``Shard(1, segments=(I, I))`` and ``Shard(2)``; the embedding ``Shard(0, segments=(V, added))``.

    Args:
        model: its sizes.
        tp: ranks of tensor parallelism: with more of them than kv heads, every kv head stands there several times.
        etp: ranks that share each expert: without expert parallelism all of them. The bias of down is added once, so
            that of these the first has it and the others have zeros (gpt-oss): w2_bias is cut by ``Shard(0)``.
        lora_tokens: tokens that adapters add, padded apart.
        slots: the expert in each slot, where some have several (EPLB); by default each expert once, in order.
        up_first: whether kernels want up before gate (FlashInfer, TensorRT-LLM).
        glu_interleave: rows of gate and up that alternate in w13, 0 for halves; by default 1 for gpt-oss, else 0.

    Example:
        >>> from tricomm.rules.models import QWEN3_30B_A3B
        >>> vllm(QWEN3_30B_A3B, tp=8).bind().shapes["model.layers.0.self_attn.qkv_proj.weight"]
        (6144, 2048)
    """
    check_counts(tp=tp, etp=etp)
    check_counts(0, lora_tokens=lora_tokens, glu_interleave=glu_interleave or 0)
    unknown = next((one for one in slots or () if not 0 <= one < model.experts), None)
    if unknown is not None:
        raise SpecError(f"slots name expert {unknown}, which is none of {model.experts}; count experts from 0")
    names = Names("model.embedding.weight", "attn.") if model.fused_experts else Names()
    numbers = tuple(range(model.experts)) if slots is None else tuple(slots)
    experts = _experts(model, names, "{logical[s]}", up_first, glu_interleave)
    _add_down_bias(experts, model, names, "{logical[s]}", (etp - 1) * len(numbers))
    return _served(model, names, tp, padded(lora_tokens, VOCAB_MULTIPLE), experts, numbers)


@checks_kinds
def sglang(
    model: Model, *, tp: int = 1, etp: int = 1, fuse_shared: bool = False, glu_interleave: int | None = None
) -> Rules:
    """From a Hugging Face checkpoint to SGLang; layouts as for vLLM.

    Args:
        model: its sizes.
        tp: ranks of tensor parallelism.
        etp: ranks that share each expert, as for vLLM.
        fuse_shared: whether the shared expert is one more expert after the last.
        glu_interleave: as for vLLM.

    Example:
        >>> from tricomm.rules.models import DEEPSEEK_V3
        >>> sglang(DEEPSEEK_V3, fuse_shared=True).bind().shapes["model.layers.60.mlp.experts.w2_weight"]
        (257, 7168, 2048)
    """
    check_counts(tp=tp, etp=etp)
    check_counts(0, glu_interleave=glu_interleave or 0)
    names = Names(q_a_and_kv_a="fused_qkv_a_proj_with_mqa", expert_bias="_weight_bias")
    experts = _experts(model, names, "{s}", False, glu_interleave, fuse_shared)
    _add_down_bias(experts, model, names, "{s}", (etp - 1) * model.experts)
    return _served(model, names, tp, 0, experts, tuple(range(model.experts)))


def repeated(rows: Expression, heads: int, tp: int) -> Expression:
    """Rows of k or v, each head as often as ranks share it."""
    if tp <= heads:
        return rows
    if tp % heads:
        raise SpecError(f"tp={tp} ranks do not share {heads} kv heads evenly; choose a multiple of {heads}")
    return cat([rows.unflatten(0, (heads, -1))] * (tp // heads), dim=1).flatten(0, 1)


def _served(model: Model, names: Names, tp: int, added_tokens: int, experts: hf.Parts, slots: tuple[int, ...]) -> Rules:
    top = hf.top(model)
    rows = fill(0, (padded(model.vocab, VOCAB_MULTIPLE) - model.vocab + added_tokens, model.hidden))
    outside = {names.embed: cat([top["embed"], rows]), "model.norm.weight": top["norm"]}
    if not model.tied:
        outside["lm_head.weight"] = cat([top["head"], rows])
    drop = ("model.layers.{l}.*",) if model.mtp else ()
    result = assembled(outside, drop, l=model.mtp)
    norms = hf.norms(model)
    attention = _latent(model, names.q_a_and_kv_a) if model.latent else _attention(model, tp)
    both = {names.attention + name: part for name, part in attention.items()}
    both |= {"input_layernorm.weight": norms["attention_norm"], "post_attention_layernorm.weight": norms["mlp_norm"]}
    for layers, moe in model.kinds:
        parts = {**both, **(experts if moe else _mlp(hf.mlp(model), "mlp."))}
        named = {"model.layers.{l}." + name: part for name, part in parts.items()}
        result += assembled(named, l=layers, s=range(len(slots)), logical=slots)
    return result


def _attention(model: Model, tp: int) -> hf.Parts:
    parts = hf.grouped_attention(model)
    made = {}
    for suffix, ending in (("weight", ""), ("bias", "_bias")) if model.biases else (("weight", ""),):
        q, k, v = (parts[short + ending] for short in "qkv")
        made[f"qkv_proj.{suffix}"] = cat([q, repeated(k, model.kv_heads, tp), repeated(v, model.kv_heads, tp)])
        made[f"o_proj.{suffix}"] = parts["o" + ending]
    names = {"q_norm.weight": "q_norm", "k_norm.weight": "k_norm", "sinks": "sinks"}
    return made | {name: parts[short] for name, short in names.items() if short in parts}


def _latent(model: Model, q_a_and_kv_a: str) -> hf.Parts:
    parts = hf.latent_attention(model)
    names = {"q_a_layernorm": "q_a_norm", "q_b_proj": "q_b", "kv_a_layernorm": "kv_a_norm", "kv_b_proj": "kv_b"}
    names |= {"q_proj": "q", "o_proj": "o"}
    made = {f"{name}.weight": parts[short] for name, short in names.items() if short in parts}
    if "q" in parts:
        return {"kv_a_proj_with_mqa.weight": parts["kv_a"], **made}
    return {f"{q_a_and_kv_a}.weight": cat([parts["q_a"], parts["kv_a"]]), **made}


def _mlp(parts: hf.Parts, path: str) -> hf.Parts:
    return {f"{path}gate_up_proj.weight": cat([parts["gate"], parts["up"]]), f"{path}down_proj.weight": parts["down"]}


def _experts(
    model: Model, names: Names, index: str, up_first: bool, glu_interleave: int | None, fuse_shared: bool = False
) -> hf.Parts:
    if not model.experts:
        return {}
    rows = int(model.fused_experts) if glu_interleave is None else glu_interleave
    order = ("up", "gate") if up_first else ("gate", "up")

    def w13(parts: hf.Parts, ending: str = "") -> Expression:
        first, second = (parts[short + ending] for short in order)
        return interleaved(first, second, rows)

    expert, router = hf.expert(model, index), hf.router(model)
    shared = hf.shared_experts(model)
    word = "router" if model.fused_experts else "gate"
    gates = {f"{word}.weight": "router", f"{word}.bias": "router_bias", "gate.e_score_correction_bias": "expert_bias"}
    made = {name: router[short] for name, short in gates.items() if short in router}
    last: list[Expression] = []
    if fuse_shared and shared:
        last = [w13(shared), shared["down"]]
    elif shared:
        made |= _mlp(shared, "shared_experts.")
    made["experts.w13_weight"] = stack([each("s", w13(expert)), *last[:1]])
    made["experts.w2_weight"] = stack([each("s", expert["down"]), *last[1:]])
    if model.biases:
        made[f"experts.w13{names.expert_bias}"] = stack([each("s", w13(expert, "_bias"))])
    return {f"mlp.{name}": part for name, part in made.items()}


def _add_down_bias(parts: hf.Parts, model: Model, names: Names, index: str, zeros: int) -> None:
    """The bias of down of every slot, and so many rows of zeros for ranks that add none."""
    if model.experts and model.biases:
        bias = stack([each("s", hf.expert(model, index)["down_bias"])])
        parts[f"mlp.experts.w2{names.expert_bias}"] = cat([bias, fill(0, (zeros, model.hidden))])
