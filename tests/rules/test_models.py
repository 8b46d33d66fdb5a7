"""Maps of whole models: names and counts as the systems have them, and every small model there, across and back."""

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from tricomm import SpecError
from tricomm.rules import Rules
from tricomm.rules.models import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    QWEN3_30B_A3B,
    Latent,
    Model,
    layers_of_stage,
    megatron,
    sglang,
    tensors,
    torchtitan,
    vllm,
)

Maker = Callable[[Model], Rules]

LLAMA = Model(layers=2, hidden=6, heads=4, kv_heads=2, head_dim=4, intermediate=8, vocab=70, rope_pairs=True)
QWEN = Model(
    layers=2, hidden=6, heads=4, kv_heads=2, head_dim=4, vocab=70, experts=3, expert_intermediate=4, qk_norm=True
)
DEEPSEEK = Model(
    layers=3,
    hidden=6,
    heads=2,
    latent=Latent(q_rank=5, kv_rank=3, nope=2, rope=2, value=3),
    intermediate=8,
    vocab=70,
    experts=3,
    expert_intermediate=4,
    shared_experts=1,
    dense_layers=1,
    expert_bias=True,
)
DEEPSEEK_WHOLE_QUERIES = replace(DEEPSEEK, latent=Latent(q_rank=0, kv_rank=3, nope=2, rope=2, value=3))
GPT_OSS = Model(
    layers=2,
    hidden=4,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=70,
    experts=3,
    expert_intermediate=4,
    biases=True,
    fused_experts=True,
)
SMALL = {
    "llama": LLAMA,
    "llama, tied": replace(LLAMA, tied=True),
    "qwen": QWEN,
    "deepseek": DEEPSEEK,
    "deepseek, mtp": replace(DEEPSEEK, mtp_layers=2),
    "deepseek, queries whole": DEEPSEEK_WHOLE_QUERIES,
    "gpt-oss": GPT_OSS,
}
MAKERS: dict[str, Maker] = {
    "megatron": megatron,
    "megatron, tp 4": lambda model: megatron(model, tp=4, vocab_divisor=16, output_copy=True),
    "megatron, alternating": lambda model: megatron(model, glu_interleave=2),
    "torchtitan": torchtitan,
    "torchtitan, fused": lambda model: torchtitan(model, fused_qkv=True),
    "vllm": vllm,
    "vllm, tp 8": lambda model: vllm(model, tp=8, lora_tokens=3, up_first=True),
    "vllm, shared experts": lambda model: vllm(model, etp=4),
    "vllm, slots": lambda model: vllm(model, slots=[2, 0, 1, 2] if model.experts else None),
    "sglang": sglang,
    "sglang, shared fused": lambda model: sglang(model, fuse_shared=True, glu_interleave=0),
}


def arrays(model: Model) -> dict[str, Any]:
    """Every element of the checkpoint has a value of its own."""
    made, count = {}, 0
    for name, shape in tensors(model).bind().shapes.items():
        made[name] = np.arange(count, count + prod(shape)).reshape(shape)
        count += prod(shape)
    return made


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", SMALL)
def test_every_model_goes_to_every_system_and_back(name: str, maker: str) -> None:
    """Everything but what a server does not keep (layers for multi-token prediction) is carried, and comes back."""
    checkpoint = arrays(SMALL[name])
    bound = MAKERS[maker](SMALL[name]).bind({path: array.shape for path, array in checkpoint.items()})
    there = bound.evaluate(checkpoint)
    assert {path: array.shape for path, array in there.items()} == bound.shapes
    back = bound.reverse().evaluate(there)
    assert all((back[path] == checkpoint[path]).all() for path in back)
    missing = checkpoint.keys() - back.keys()
    word = r"(embed_tokens|shared_head\.head)\.weight" if maker.startswith("megatron") else ".*"
    assert all(re.fullmatch(rf"model\.layers\.[34]\.{word}", path) for path in missing)
    assert bool(missing) == bool(SMALL[name].mtp_layers)


@pytest.mark.parametrize("name", SMALL)
def test_from_trainer_to_server_is_the_way_by_the_checkpoint(name: str) -> None:
    """A trainer's map back, then vLLM's map, as one: the same as vLLM's own map of the checkpoint, in torch's types."""
    model = replace(SMALL[name], mtp_layers=0)
    checkpoint = {path: torch.from_numpy(array) for path, array in arrays(model).items()}
    server = vllm(model, tp=4).bind()
    direct = server.evaluate(checkpoint)
    for trainer in (megatron(model, tp=2), megatron(model, glu_interleave=4), torchtitan(model, fused_qkv=True)):
        there = trainer.bind()
        pushed = there.reverse().then(server)
        held = there.evaluate(checkpoint)
        made = pushed.evaluate(held)
        assert all(torch.equal(made[path], direct[path]) for path in direct)
        assert pushed.source_shapes == there.shapes
        assert sum(len(tensor.pieces) for tensor in pushed.tensors) <= 1.5 * len(held) + 8
        pulled = pushed.reverse(fill=0).evaluate(made)
        zero = {name for name in held if "expert_bias" in name and not held[name].any()}
        assert held.keys() - pulled.keys() - zero <= {"lm_head.weight"}, "the copy of a tied embedding"
        assert all(torch.equal(tensor, held[path]) for path, tensor in pulled.items())


def test_checkpoints_have_the_published_sizes() -> None:
    """Names and parameters, counted by others."""
    published = [
        (LLAMA_3_8B, 291, 8_030_261_248),
        (LLAMA_3_70B, 723, 70_553_706_496),
        (QWEN3_30B_A3B, 18_867, 30_532_122_624),
        (DEEPSEEK_V3, 45_395, 671_026_419_200),
        (DEEPSEEK_V2_LITE, 5_291, 15_706_484_224),
        (GPT_OSS_20B, 411, 20_914_757_184),
    ]
    for model, count, numel in published:
        shapes = tensors(model).bind().shapes
        assert (len(shapes), sum(map(prod, shapes.values()))) == (count, numel)
    few = [tensors(replace(DEEPSEEK_V3, layers=4, mtp_layers=count)).bind().shapes for count in (0, 1)]
    mtp = {name: shape for name, shape in few[1].items() if name not in few[0]}
    assert len(mtp) == 786 + 2, "and copies of embedding and head"
    assert sum(map(prod, mtp.values())) == 11_610_068_224 + 2 * 129_280 * 7_168


@pytest.mark.parametrize(
    ("model", "trainer", "titan", "server"),
    [
        (LLAMA_3_8B, 195, 291, 195),
        (LLAMA_3_70B, 483, 723, 483),
        (replace(QWEN3_30B_A3B, layers=2), 263 * 2 + 3, 13 * 2 + 3, 9 * 2 + 3),
        (replace(DEEPSEEK_V3, layers=5), 3 * 11 + 2 * 525 + 3, 3 * 12 + 2 * 17 + 3, 3 * 10 + 2 * 14 + 3),
    ],
    ids=["llama 8B", "llama 70B", "qwen3 of two layers", "deepseek v3 of five"],
)
def test_systems_have_as_many_tensors_and_pieces_as_they_should(
    model: Model, trainer: int, titan: int, server: int
) -> None:
    """As many pieces as the checkpoint has tensors: one for each, none is cut into several. Fills are a few more."""
    checkpoint = len(tensors(model).names)
    for rules, count in ((megatron(model, tp=8), trainer), (torchtitan(model), titan), (vllm(model, tp=16), server)):
        bound = rules.bind()
        assert len(bound.tensors) == count
        pieces = [piece for tensor in bound.tensors for piece in tensor.pieces]
        assert len([piece for piece in pieces if piece.tensor is not None]) == checkpoint
        assert len([piece for piece in pieces if piece.tensor is None]) <= 2
        assert sum(len(tensor.pieces) for tensor in bound.reverse().tensors) == checkpoint


def test_experts_of_gpt_oss_are_one_piece_wherever_they_are_one_tensor() -> None:
    """One [E, H, 2I] of even and odd columns, written expert by expert, is one strided copy of all."""
    for interleave in (0, 1):
        bound = vllm(GPT_OSS_20B, glu_interleave=interleave).bind()
        assert all(len(tensor.pieces) == 1 for tensor in bound.tensors if ".experts." in tensor.name)


def test_names_are_those_of_the_systems() -> None:
    """One layer of each kind, name by name."""
    trained = {re.sub(r"\d+$", "{e}", re.sub(r"\.\d+\.", ".{l}.", name)) for name in megatron(DEEPSEEK).names}
    assert trained == {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        "decoder.layers.{l}.input_layernorm.weight",
        "decoder.layers.{l}.self_attention.linear_q_down_proj.weight",
        "decoder.layers.{l}.self_attention.linear_q_up_proj.layer_norm_weight",
        "decoder.layers.{l}.self_attention.linear_q_up_proj.weight",
        "decoder.layers.{l}.self_attention.linear_kv_down_proj.weight",
        "decoder.layers.{l}.self_attention.linear_kv_up_proj.layer_norm_weight",
        "decoder.layers.{l}.self_attention.linear_kv_up_proj.weight",
        "decoder.layers.{l}.self_attention.linear_proj.weight",
        "decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.{l}.mlp.linear_fc1.weight",
        "decoder.layers.{l}.mlp.linear_fc2.weight",
        "decoder.layers.{l}.pre_mlp_layernorm.weight",
        "decoder.layers.{l}.mlp.router.weight",
        "decoder.layers.{l}.mlp.router.expert_bias",
        "decoder.layers.{l}.mlp.experts.linear_fc1.weight{e}",
        "decoder.layers.{l}.mlp.experts.linear_fc2.weight{e}",
        "decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight",
    }
    layer = {name.removeprefix("model.layers.1.") for name in vllm(QWEN).names if ".1." in name}
    assert layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate.weight",
        "mlp.experts.w13_weight",
        "mlp.experts.w2_weight",
    }
    titan = {name.removeprefix("layers.1.") for name in torchtitan(QWEN).names if ".1." in name}
    assert {"attention.qkv_linear.wq.weight", "moe.routed_experts.inner_experts.w1_EFD"} <= titan
    mtp = [name for name in megatron(replace(DEEPSEEK, mtp_layers=2)).names if name.startswith("mtp.")]
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.mtp_model_layer.mlp.router.weight"} <= set(mtp)


def test_fused_shared_experts_are_the_last_ones() -> None:
    checkpoint = arrays(DEEPSEEK)
    made = sglang(DEEPSEEK, fuse_shared=True).evaluate(checkpoint)
    path = "model.layers.2.mlp."
    assert made[f"{path}experts.w13_weight"].shape == (4, 8, 6)
    assert (made[f"{path}experts.w13_weight"][3, :4] == checkpoint[f"{path}shared_experts.gate_proj.weight"]).all()
    assert (made[f"{path}experts.w2_weight"][3] == checkpoint[f"{path}shared_experts.down_proj.weight"]).all()
    assert not any("shared_experts" in name for name in made)


def test_a_map_without_experts_in_a_slot_is_refused() -> None:
    """EPLB's table must hold every expert, or weights were lost."""
    with pytest.raises(
        SpecError, match=r"6 of \d+ source tensors are used by no rule, the first is 'model.layers.0.mlp"
    ):
        vllm(QWEN, slots=[0, 1, 0]).bind(tensors(QWEN).bind().shapes)


def test_layers_of_stages() -> None:
    assert layers_of_stage(8, 2, 0, 2) == ((0, 1), (4, 5))
    assert layers_of_stage(8, 2, 1, 2) == ((2, 3), (6, 7))
    assert layers_of_stage(6, 3, 2) == ((4, 5),)
    with pytest.raises(SpecError, match="7 layers are not cut evenly into 2 stages of 1 chunks; list them yourself"):
        layers_of_stage(7, 2, 0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match=r"4 heads do not share 3 kv heads of 4 evenly; give head_dim, and kv_heads"):
        replace(LLAMA, kv_heads=3)
    with pytest.raises(SpecError, match=r"a model without experts needs its MLP's intermediate size"):
        replace(LLAMA, intermediate=0)
    with pytest.raises(SpecError, match=r"tp=3 ranks do not share 2 kv heads evenly; choose a multiple of 2"):
        vllm(LLAMA, tp=3)
    with pytest.raises(SpecError, match=r"tp=0 must be from 1 to \d+; give how many there are"):
        megatron(LLAMA, tp=0)
    with pytest.raises(SpecError, match=r"which is not the product of \(-1, 3\)"):
        megatron(QWEN, glu_interleave=3)
