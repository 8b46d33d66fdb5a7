"""What each rank of a server holds, against the loaders of the servers' own parameters, rank by rank.

The servers do not import on a CPU, so what their loaders narrow and copy is written down here in plain slices, from the
functions that are named, and compared with maps and layouts together. Read in vLLM (vllm/model_executor): at 0036d38d
layers/linear.py, at 002d6073 models/deepseek_v2.py, at 00db0119 layers/vocab_parallel_embedding.py, at 0014ec6c
layers/fused_moe/layer.py, and the models/gpt_oss.py in which GptOssModel has _load_weights_other; in SGLang
(python/sglang/srt): at 008d7d0e layers/moe/fused_moe_triton/layer.py, at 009c6808 models/gpt_oss.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.rules.test_models import DEEPSEEK, DEEPSEEK_WHOLE_QUERIES, GPT_OSS, LLAMA, QWEN, arrays
from tests.rules.test_shards import shard
from tricomm import SpecError
from tricomm.rules.models import Model, sglang, vllm, vllm_layouts

Arrays = dict[str, Any]

MODELS = {
    "llama": LLAMA,
    "qwen": replace(QWEN, experts=5),
    "deepseek": replace(DEEPSEEK, heads=4, experts=5),
    "deepseek, queries whole": replace(DEEPSEEK_WHOLE_QUERIES, heads=4, experts=4, shared_experts=2),
    "gpt-oss": replace(GPT_OSS, experts=4, expert_intermediate=8),
}


class Place(NamedTuple):
    """Where a rank stands: of ``tp`` ranks of a replica, and of all ``ranks`` that share the experts."""

    rank: int
    tp: int
    ranks: int
    expert_parallel: bool

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp


def part(whole: Any, dim: int, at: int, count: int) -> Any:
    """The at-th of so many even parts, which is what ``narrow(dim, rank * size, size)`` takes."""
    return np.split(whole, count, dim)[at]


def column(place: Place, *parts: Any) -> Any:
    """ColumnParallelLinear.weight_loader, and MergedColumnParallelLinear's: shard after shard, each narrowed."""
    return np.concatenate([part(one, 0, place.tp_rank, place.tp) for one in parts])


def row(place: Place, weight: Any) -> Any:
    """RowParallelLinear.weight_loader; a bias is no input's, and whole."""
    return weight if weight.ndim == 1 else part(weight, 1, place.tp_rank, place.tp)


def qkv(place: Place, model: Model, q: Any, k: Any, v: Any) -> Any:
    """QKVParallelLinear.weight_loader: of k and v the shard of rank // replicas, each rank having one head at least."""
    replicas = place.tp // model.kv_heads if place.tp >= model.kv_heads else 1
    kv = [part(one, 0, place.tp_rank // replicas, place.tp // replicas) for one in (k, v)]
    return np.concatenate([part(q, 0, place.tp_rank, place.tp), *kv])


def vocabulary(place: Place, weight: Any) -> Any:
    """VocabParallelEmbedding.weight_loader: a part of the rows padded to 64; what is no token's is zero."""
    rows = -(-len(weight) // 64) * 64 // place.tp
    start = min(place.tp_rank * rows, len(weight))
    stop = min(start + rows, len(weight)) if place.tp_rank * rows < len(weight) else start
    return np.concatenate([weight[start:stop], np.zeros((rows - (stop - start), weight.shape[1]), int)])


def own_experts(place: Place, model: Model) -> range:
    """determine_expert_map: the first ranks have one more; all of them without expert parallelism."""
    if not place.expert_parallel:
        return range(model.experts)
    base, rest = divmod(model.experts, place.ranks)
    start = place.rank * base + min(place.rank, rest)
    return range(start, start + base + (place.rank < rest))


def moe_part(place: Place, whole: Any, dim: int) -> Any:
    """FusedMoEParallelConfig: without expert parallelism, ranks of all replicas share an expert."""
    return whole if place.expert_parallel else part(whole, dim, place.rank, place.ranks)


def experts(place: Place, model: Model, disk: Arrays, path: str) -> Arrays:
    """FusedMoE._load_w13 (gate, then up) and _load_w2."""
    own = [
        [disk[f"{path}{e}.{word}_proj.weight"] for word in ("gate", "up", "down")] for e in own_experts(place, model)
    ]
    w13 = [np.concatenate([moe_part(place, gate, 0), moe_part(place, up, 0)]) for gate, up, _ in own]
    return {f"{path}w13_weight": np.stack(w13), f"{path}w2_weight": np.stack([moe_part(place, d, 1) for *_, d in own])}


def gpt_oss_experts(place: Place, model: Model, disk: Arrays, path: str) -> Arrays:
    """GptOssModel._load_weights_other: narrowed first, then permuted; the bias of down on the first rank alone."""
    own = own_experts(place, model)
    gate_up, gate_up_bias, down, down_bias = (
        disk[path + name][own.start : own.stop]
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    return {
        f"{path}w13_weight": moe_part(place, gate_up, 2).transpose(0, 2, 1),
        f"{path}w13_bias": moe_part(place, gate_up_bias, 1),
        f"{path}w2_weight": moe_part(place, down, 1).transpose(0, 2, 1),
        f"{path}w2_bias": down_bias if place.expert_parallel or place.rank == 0 else 0 * down_bias,
    }


def latent(place: Place, disk: Arrays, path: str) -> Arrays:
    """DeepseekV2MLAAttention: what is compressed is replicated (disable_tp), what is not is cut by heads."""
    made = {f"{path}o_proj.weight": row(place, disk[f"{path}o_proj.weight"])}
    for name in ("q_b_proj", "kv_b_proj", "q_proj"):
        if f"{path}{name}.weight" in disk:
            made[f"{path}{name}.weight"] = column(place, disk[f"{path}{name}.weight"])
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if f"{path}{name}.weight" in disk:
            made[f"{path}{name}.weight"] = disk[f"{path}{name}.weight"]
    kv_a = disk[f"{path}kv_a_proj_with_mqa.weight"]
    if f"{path}q_proj.weight" in disk:
        return made | {f"{path}kv_a_proj_with_mqa.weight": kv_a}
    return made | {f"{path}fused_qkv_a_proj.weight": np.concatenate([disk[f"{path}q_a_proj.weight"], kv_a])}


def grouped(place: Place, model: Model, disk: Arrays, path: str) -> Arrays:
    """Attention of Llama, Qwen3 and gpt-oss; the latter's name and sinks are those of OAIAttention."""
    ours = path.replace("self_attn", "attn") if model.fused_experts else path
    made: Arrays = {}
    for kind in ("weight", "bias") if model.biases else ("weight",):
        parts = [disk[f"{path}{word}_proj.{kind}"] for word in "qkv"]
        made[f"{ours}qkv_proj.{kind}"] = qkv(place, model, *parts)
        made[f"{ours}o_proj.{kind}"] = row(place, disk[f"{path}o_proj.{kind}"])
    if model.biases:
        made[f"{ours}sinks"] = part(disk[f"{path}sinks"], 0, place.tp_rank, place.tp)
    return made | {name: disk[name] for word in "qk" if (name := f"{path}{word}_norm.weight") in disk}


def mlp(place: Place, disk: Arrays, path: str) -> Arrays:
    gate, up, down = (disk[f"{path}{word}_proj.weight"] for word in ("gate", "up", "down"))
    return {f"{path}gate_up_proj.weight": column(place, gate, up), f"{path}down_proj.weight": row(place, down)}


def loaded(place: Place, model: Model, disk: Arrays) -> Arrays:
    """Every parameter of a rank of vLLM after load_weights."""
    embed = "model.embedding.weight" if model.fused_experts else "model.embed_tokens.weight"
    made = {embed: vocabulary(place, disk["model.embed_tokens.weight"]), "model.norm.weight": disk["model.norm.weight"]}
    made["lm_head.weight"] = vocabulary(place, disk["lm_head.weight"])
    for layers, moe in model.kinds:
        for layer in layers:
            path = f"model.layers.{layer}."
            made |= {name: disk[name] for word in ("input", "post_attention")
                     if (name := f"{path}{word}_layernorm.weight")}  # fmt: skip
            attention = f"{path}self_attn."
            made |= latent(place, disk, attention) if model.latent else grouped(place, model, disk, attention)
            if not moe:
                made |= mlp(place, disk, f"{path}mlp.")
                continue
            made |= {name: disk[name] for name in disk if name.startswith((f"{path}mlp.gate.", f"{path}mlp.router."))}
            of_family = gpt_oss_experts if model.fused_experts else experts
            made |= of_family(place, model, disk, f"{path}mlp.experts.")
            if model.shared_experts:
                made |= mlp(place, disk, f"{path}mlp.shared_experts.")
    return made


GRIDS = [(1, 1, False), (2, 2, False), (4, 2, False), (4, 4, False), (2, 1, True), (4, 2, True)]


@pytest.mark.parametrize(("ranks", "tp", "expert_parallel"), GRIDS)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_of_vllm_hold_what_its_loaders_leave(name: str, ranks: int, tp: int, expert_parallel: bool) -> None:
    model = MODELS[name]
    disk = arrays(model)
    bound = vllm(model, tp=tp, etp=1 if expert_parallel else ranks).bind()
    specs = vllm_layouts(model, bound.shapes, range(ranks), tp=tp, expert_parallel=expert_parallel)
    made = bound.evaluate(disk)
    for rank in range(ranks):
        expected = loaded(Place(rank, tp, ranks, expert_parallel), model, disk)
        assert made.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(shard(made[path], specs[path].holding(rank)), array, err_msg=path)


def test_a_bias_that_every_rank_would_add_is_refused() -> None:
    bound = vllm(GPT_OSS, tp=2).bind()
    with pytest.raises(
        SpecError, match=r"'model.layers.0.mlp.experts.w2_bias' has 3 rows, and where 2 ranks share each"
    ):
        vllm_layouts(GPT_OSS, bound.shapes, range(2), tp=2)
    shared = vllm(GPT_OSS, tp=2, etp=2).bind()
    with pytest.raises(SpecError, match=r"make the map with vllm\(\.\.\., etp=1\)"):
        vllm_layouts(GPT_OSS, shared.shapes, range(2), tp=2, expert_parallel=True)


@pytest.mark.parametrize(("make", "first"), [(vllm, "_bias"), (sglang, "_weight_bias")])
def test_the_bias_of_down_is_added_once(make: Callable[..., Any], first: str) -> None:
    """GptOssForCausalLM._load_normal_weights of SGLang has zeros, too, where get_moe_tensor_parallel_rank() is not 0;
    its FusedMoE calls the biases w13_weight_bias and w2_weight_bias.
    """
    disk = arrays(GPT_OSS)
    made = make(GPT_OSS, etp=3).evaluate(disk)[f"model.layers.1.mlp.experts.w2{first}"]
    np.testing.assert_array_equal(made[:3], disk["model.layers.1.mlp.experts.down_proj_bias"])
    assert made.shape == (9, GPT_OSS.hidden)
    assert not made[3:].any()
