"""torchtitan: q, k and v apart, w1 (gate), w3 (up) and w2 (down), the experts of a layer as one tensor."""

from tricomm.kinds import checks_kinds
from tricomm.rules.expressions import Expression
from tricomm.rules.models import hf
from tricomm.rules.models.config import Model, assembled
from tricomm.rules.models.megatron import grouped
from tricomm.rules.rules import Rules
from tricomm.rules.words import each, fill, stack

_LATENT = {
    "wq.weight": "q",
    "wq_a.weight": "q_a",
    "q_norm.weight": "q_a_norm",
    "wq_b.weight": "q_b",
    "wkv_a.weight": "kv_a",
    "kv_norm.weight": "kv_a_norm",
    "wkv_b.weight": "kv_b",
    "wo.weight": "o",
}
_GROUPED = {
    "qkv_linear.wq.weight": "q",
    "qkv_linear.wq.bias": "q_bias",
    "qkv_linear.wk.weight": "k",
    "qkv_linear.wk.bias": "k_bias",
    "qkv_linear.wv.weight": "v",
    "qkv_linear.wv.bias": "v_bias",
    "wo.weight": "o",
    "wo.bias": "o_bias",
    "q_norm.weight": "q_norm",
    "k_norm.weight": "k_norm",
    "sinks": "sinks",
}
_MLP = {"w1": "gate", "w2": "down", "w3": "up"}
_EXPERTS = {"w1_EFD": "gate", "w2_EDF": "down", "w3_EFD": "up"}


@checks_kinds
def torchtitan(model: Model, *, fused_qkv: bool = False, load_balance: bool = True) -> Rules:
    """From a Hugging Face checkpoint to torchtitan (names of its 0.3).

    Args:
        model: its sizes.
        fused_qkv: whether q, k and v are one tensor, by group.
        load_balance: whether experts have the bias that balances their load (load_balance_coeff), which is zero where
            the checkpoint has none.

    Example:
        >>> from tricomm.rules.models import QWEN3_30B_A3B
        >>> torchtitan(QWEN3_30B_A3B).bind().shapes["layers.0.moe.routed_experts.inner_experts.w1_EFD"]
        (128, 768, 2048)
    """
    top = hf.top(model)
    outside = {"tok_embeddings.weight": top["embed"], "norm.weight": top["norm"], "lm_head.weight": top["head"]}
    drop = ("model.layers.{l}.*",) if model.mtp else ()
    result = assembled(outside, drop, l=model.mtp)
    for layers, moe in model.kinds:
        mlp = _experts(model, load_balance) if moe else _mlp(hf.mlp(model), "feed_forward.")
        parts = {**_attention(model, fused_qkv), **mlp}
        norms = hf.norms(model)
        parts |= {"attention_norm.weight": norms["attention_norm"], "ffn_norm.weight": norms["mlp_norm"]}
        named = {"layers.{l}." + name: part for name, part in parts.items()}
        result += assembled(named, l=layers, e=range(model.experts))
    return result


def paired(rows: Expression, heads: int) -> Expression:
    """Rows of q or k: within each head, the rows p and D / 2 + p become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).permute(0, 2, 1, 3).flatten(0, 2)


def _attention(model: Model, fused_qkv: bool) -> hf.Parts:
    parts = hf.latent_attention(model) if model.latent else hf.grouped_attention(model)
    if model.rope_pairs:
        parts |= {"q": paired(parts["q"], model.heads), "k": paired(parts["k"], model.kv_heads)}
    made = {name: parts[short] for name, short in (_LATENT if model.latent else _GROUPED).items() if short in parts}
    if fused_qkv and not model.latent:
        for suffix in ("weight", "bias") if model.biases else ("weight",):
            rows = [made.pop(f"qkv_linear.w{short}.{suffix}") for short in "qkv"]
            made[f"qkv_linear.wqkv.{suffix}"] = grouped(rows, model.kv_heads)
    return {f"attention.{name}": part for name, part in made.items()}


def _mlp(parts: hf.Parts, path: str) -> hf.Parts:
    return {f"{path}{name}.weight": parts[short] for name, short in _MLP.items()}


def _experts(model: Model, load_balance: bool) -> hf.Parts:
    router, path = hf.router(model), "moe.routed_experts.inner_experts."
    made = {"moe.router.gate.weight": router["router"]}
    if model.biases:
        made["moe.router.gate.bias"] = router["router_bias"]
    if load_balance or model.expert_bias:
        made["moe.expert_bias_E"] = router.get("expert_bias", fill(0, (model.experts,)).to("float32"))
    if model.shared_experts:
        made |= _mlp(hf.shared_experts(model), "moe.shared_experts.")
    if model.fused_experts:
        fused = hf.fused_experts(model)
        weights = {"mlp1_weight_EGD": "gate_up", "mlp2_weight_EDF": "down"}  # of even and odd rows, and as it is
        biases = {"mlp1_bias_EG": "gate_up_bias", "mlp2_bias_ED": "down_bias"}
        made |= {f"{path}{name}": fused[short].permute(0, 2, 1) for name, short in weights.items()}
        return made | {f"{path}{name}": fused[short] for name, short in biases.items()}
    expert = hf.expert(model)
    return made | {f"{path}{name}": stack([each("e", expert[short])]) for name, short in _EXPERTS.items()}
