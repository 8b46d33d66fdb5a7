"""Hugging Face checkpoints: the names and shapes that every other system reads, so they are the common coordinates.

Each function gives source tensors under short names. ``{l}`` is the layer, ``{e}`` the expert.
"""

from tricomm.kinds import checks_kinds
from tricomm.rules.checks import Shape
from tricomm.rules.expressions import Expression
from tricomm.rules.models.config import Model, assembled
from tricomm.rules.rules import Rules
from tricomm.rules.words import source

LAYER = "model.layers.{l}."

Parts = dict[str, Expression]


def top(model: Model) -> Parts:
    """What stands outside of the layers: embed, norm, and head, which is the embedding where they are tied."""
    embed = source("model.embed_tokens.weight", (model.vocab, model.hidden))
    head = embed if model.tied else source("lm_head.weight", (model.vocab, model.hidden))
    return {"embed": embed, "norm": source("model.norm.weight", (model.hidden,)), "head": head}


def norms(model: Model) -> Parts:
    """Before attention, and before the MLP."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return {short: source(f"{LAYER}{name}.weight", (model.hidden,)) for short, name in names.items()}


def grouped_attention(model: Model) -> Parts:
    """q, k, v, o; their biases and the sinks; the norms of q and k."""
    q, kv, hidden = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.hidden
    shapes: dict[str, Shape] = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    parts = {short: source(f"{LAYER}self_attn.{short}_proj.weight", shape) for short, shape in shapes.items()}
    if model.biases:
        for short, shape in shapes.items():
            parts[f"{short}_bias"] = source(f"{LAYER}self_attn.{short}_proj.bias", shape[:1])
        parts["sinks"] = source(f"{LAYER}self_attn.sinks", (model.heads,))
    if model.qk_norm:
        for short in ("q_norm", "k_norm"):
            parts[short] = source(f"{LAYER}self_attn.{short}.weight", (model.head_dim,))
    return parts


def latent_attention(model: Model) -> Parts:
    """q_a and q_b, or q where queries are not compressed, kv_a, kv_b, o and the norms between."""
    sizes = model.latent
    assert sizes is not None
    queries = model.heads * (sizes.nope + sizes.rope)
    compressed: dict[str, tuple[str, Shape]] = {
        "q_a": ("q_a_proj", (sizes.q_rank, model.hidden)),
        "q_a_norm": ("q_a_layernorm", (sizes.q_rank,)),
        "q_b": ("q_b_proj", (queries, sizes.q_rank)),
    }
    shapes: dict[str, tuple[str, Shape]] = {
        **(compressed if sizes.q_rank else {"q": ("q_proj", (queries, model.hidden))}),
        "kv_a": ("kv_a_proj_with_mqa", (sizes.kv_rank + sizes.rope, model.hidden)),
        "kv_a_norm": ("kv_a_layernorm", (sizes.kv_rank,)),
        "kv_b": ("kv_b_proj", (model.heads * (sizes.nope + sizes.value), sizes.kv_rank)),
        "o": ("o_proj", (model.hidden, model.heads * sizes.value)),
    }
    return {short: source(f"{LAYER}self_attn.{name}.weight", shape) for short, (name, shape) in shapes.items()}


def mlp(model: Model, path: str = "mlp.", intermediate: int | None = None) -> Parts:
    """gate, up and down of one MLP."""
    size = model.intermediate if intermediate is None else intermediate
    shapes = {"gate": (size, model.hidden), "up": (size, model.hidden), "down": (model.hidden, size)}
    return {short: source(f"{LAYER}{path}{short}_proj.weight", shape) for short, shape in shapes.items()}


def shared_experts(model: Model) -> Parts:
    """gate, up and down of the experts that every token visits; empty where there are none."""
    if not model.shared_experts:
        return {}
    return mlp(model, "mlp.shared_experts.", model.shared_experts * model.expert_intermediate)


def expert(model: Model, index: str = "{e}") -> Parts:
    """Gate [I, H], up [I, H] and down [H, I] of one expert, with biases [I], [I] and [H] where the model has them."""
    if not model.fused_experts:
        return mlp(model, f"mlp.experts.{index}.", model.expert_intermediate)
    fused = fused_experts(model)
    gate_up, bias = fused["gate_up"][index].permute(1, 0), fused["gate_up_bias"][index]
    return {
        "gate": gate_up[0::2],
        "up": gate_up[1::2],
        "down": fused["down"][index].permute(1, 0),
        "gate_bias": bias[0::2],
        "up_bias": bias[1::2],
        "down_bias": fused["down_bias"][index],
    }


def fused_experts(model: Model) -> Parts:
    """All experts as gpt-oss keeps them: gate_up [E, H, 2I] of even and odd columns, down [E, I, H], their biases."""
    count, hidden, size = model.experts, model.hidden, model.expert_intermediate
    shapes: dict[str, tuple[str, Shape]] = {
        "gate_up": ("gate_up_proj", (count, hidden, 2 * size)),
        "gate_up_bias": ("gate_up_proj_bias", (count, 2 * size)),
        "down": ("down_proj", (count, size, hidden)),
        "down_bias": ("down_proj_bias", (count, hidden)),
    }
    return {short: source(f"{LAYER}mlp.experts.{name}", shape) for short, (name, shape) in shapes.items()}


def router(model: Model) -> Parts:
    """The router and its bias, and the bias that balances load."""
    word = "router" if model.fused_experts else "gate"
    parts = {"router": source(f"{LAYER}mlp.{word}.weight", (model.experts, model.hidden))}
    if model.biases:
        parts["router_bias"] = source(f"{LAYER}mlp.{word}.bias", (model.experts,))
    if model.expert_bias:
        parts["expert_bias"] = source(f"{LAYER}mlp.gate.e_score_correction_bias", (model.experts,))
    return parts


def mtp(model: Model) -> Parts:
    """What a layer for multi-token prediction has besides; embed and head are copies of the model's."""
    whole = {"embed": "embed_tokens", "head": "shared_head.head"}
    parts = {short: source(f"{LAYER}{name}.weight", (model.vocab, model.hidden)) for short, name in whole.items()}
    for short in ("enorm", "hnorm", "shared_head.norm"):
        parts[short] = source(f"{LAYER}{short}.weight", (model.hidden,))
    return parts | {"eh_proj": source(f"{LAYER}eh_proj.weight", (model.hidden, 2 * model.hidden))}


@checks_kinds
def tensors(model: Model) -> Rules:
    """Every tensor of the checkpoint as itself: its names and shapes, and the map from a checkpoint to a checkpoint.

    Example:
        >>> from tricomm.rules.models import LLAMA_3_8B
        >>> len(tensors(LLAMA_3_8B).bind().shapes)
        291
    """
    attention = latent_attention(model) if model.latent else grouped_attention(model)
    both = {**{f"a.{short}": part for short, part in attention.items()}, **norms(model)}
    experts = fused_experts(model) if model.fused_experts else expert(model)
    shared = {f"shared.{short}": part for short, part in shared_experts(model).items()}
    sparse = {**both, **router(model), **shared, **experts}
    outside = list(dict.fromkeys(top(model).values()))
    result = assembled({str(part): part for part in outside})
    for layers, moe in model.kinds:
        parts = sparse if moe else {**both, **mlp(model)}
        result += assembled({str(part): part for part in parts.values()}, l=layers, e=range(model.experts))
    if model.mtp:
        parts = {**sparse, **{f"mtp.{short}": part for short, part in mtp(model).items()}}
        result += assembled({str(part): part for part in parts.values()}, l=model.mtp, e=range(model.experts))
    return result
