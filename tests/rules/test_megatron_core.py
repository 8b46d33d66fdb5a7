"""The map to Megatron-core against its own code: it loads what the map makes, and projects as the checkpoint says."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from tests.rules import peers
from tricomm.rules.models import Model, megatron, tensors

# It starts a group of one rank. On a CPU without Transformer Engine, so that norms and
# experts are modules of their own.
SCRIPT = """
import sys, torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
# Latent attention asks for a GPU, and for Transformer Engine, also where there are none.
torch.cuda.current_device = lambda: torch.device("cpu")
multi_latent_attention.TELinear = ()
family, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
parallel_state.initialize_model_parallel(1, 1)
sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, use_cpu_initialization=True)
sizes |= dict(add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu)
sizes |= dict(normalization="RMSNorm", hidden_dropout=0, attention_dropout=0)
make = TransformerConfig
if not family.startswith("deepseek"):
    sizes |= dict(num_query_groups=2, kv_channels=8)
if family != "llama":
    sizes |= dict(num_moe_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2, qk_layernorm=True)
if family.startswith("deepseek"):
    make = MLATransformerConfig
    first, shared = (12, 16) if family == "deepseek" else (None, 32)
    sizes |= dict(q_lora_rank=first, kv_lora_rank=10, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=6)
    sizes |= dict(multi_latent_attention=True, moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=shared)
    sizes |= dict(rope_type="rope")
if family == "deepseek":
    sizes |= dict(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
config = make(**sizes)
spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
for layer in spec.layer_specs:
    layer.submodules.self_attention.submodules.core_attention = IdentityOp
model = GPTModel(config, spec, vocab_size=128, max_sequence_length=16, position_embedding_type="rope",
                 share_embeddings_and_output_weights=False)
made = torch.load("made.pt")
found = model.load_state_dict(made, strict=False)
missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
results = {"missing": missing, "unexpected": found.unexpected_keys}
if not missing and not found.unexpected_keys:
    layer, x = model.decoder.layers[1], torch.load("x.pt")
    if not family.startswith("deepseek"):
        results["qkv"] = layer.self_attention.get_query_key_value_tensors(x)
    mlps = layer.mlp.experts.local_experts if family != "llama" else [layer.mlp]
    results["mlps"] = [mlp(x)[0] for mlp in mlps]
torch.save(results, "results.pt")
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core, which `make peers` installs"),
]


def without_transformer_engine(name: str) -> str:
    """The name of a tensor where norms and experts are modules of their own."""
    name = re.sub(r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight", name)
    name = re.sub(r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight", name)
    name = re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", name)
    return re.sub(r"experts\.(linear_fc[12])\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name)


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("llama", peers.LLAMA),
        ("qwen", peers.QWEN),
        ("deepseek", peers.DEEPSEEK),
        ("deepseek v2", peers.DEEPSEEK_V2),
    ],
)
def test_it_loads_and_projects(family: str, model: Model, tmp_path: Path) -> None:
    torch.manual_seed(1)
    disk = {name: torch.randn(shape) / 4 for name, shape in tensors(model).bind().source_shapes.items()}
    made = megatron(model).bind().evaluate(disk)
    torch.save({without_transformer_engine(name): tensor for name, tensor in made.items()}, tmp_path / "made.pt")
    x = torch.randn(3, 1, 32)
    torch.save(x, tmp_path / "x.pt")
    peers.run(SCRIPT, tmp_path, family, str(tmp_path / "store"))
    results = torch.load(tmp_path / "results.pt")
    assert results["missing"] == results["unexpected"] == []

    layer = "model.layers.1."
    if model.latent is None:
        for name, found in zip("qkv", results["qkv"], strict=True):
            expected = linear(x, disk[f"{layer}self_attn.{name}_proj.weight"]).unflatten(-1, (-1, 8))
            if model.qk_norm and name != "v":
                expected = rms_norm(expected, (8,), disk[f"{layer}self_attn.{name}_norm.weight"], eps=1e-5)
            torch.testing.assert_close(found, expected)
    paths = [f"{layer}mlp.experts.{expert}." for expert in range(model.experts)] or [f"{layer}mlp."]
    for path, found in zip(paths, results["mlps"], strict=True):
        gate, up, down = (disk[f"{path}{name}_proj.weight"] for name in ("gate", "up", "down"))
        torch.testing.assert_close(found, linear(silu(linear(x, gate)) * linear(x, up), down))
