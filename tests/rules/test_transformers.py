"""The maps against transformers' own code: what it writes to disk, and how it keeps the same in memory."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rules import peers
from tricomm.rules.models import Model, tensors, torchtitan, vllm

MODELS = {"Llama": peers.LLAMA, "Qwen3Moe": peers.QWEN, "DeepseekV3": peers.DEEPSEEK}
MODELS |= {"DeepseekV2": peers.DEEPSEEK_V2, "GptOss": peers.GPT_OSS}
SCRIPT = """
import sys
import safetensors.torch, torch, transformers
family = sys.argv[1]
sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
sizes |= dict(vocab_size=50, intermediate_size=48)
if family == "Qwen3Moe":
    sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
if family.startswith("Deepseek"):
    first, shared = (12, 1) if family == "DeepseekV3" else (None, 2)
    sizes |= dict(num_key_value_heads=4, n_routed_experts=4, moe_intermediate_size=16, n_shared_experts=shared)
    sizes |= dict(q_lora_rank=first, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    sizes |= dict(num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1)
if family == "GptOss":
    sizes |= dict(num_local_experts=4, num_experts_per_tok=2)
config = getattr(transformers, family + "Config")(**sizes)
model = getattr(transformers, family + "ForCausalLM")(config)
model.save_pretrained("saved")
torch.save(safetensors.torch.load_file("saved/model.safetensors"), "disk.pt")
torch.save(model.state_dict(), "memory.pt")
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers, which `make peers` installs"),
]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any, Any]:
    """A model, its tensors on disk, and those in memory."""
    folder: Path = tmp_path_factory.mktemp("transformers")
    peers.run(SCRIPT, folder, request.param)
    disk, memory = (torch.load(folder / name) for name in ("disk.pt", "memory.pt"))
    return MODELS[request.param], disk, memory


def test_names_and_shapes_are_those_on_disk(model: tuple[Model, Any, Any]) -> None:
    sizes, disk, _ = model
    found = tensors(sizes).bind().source_shapes
    assert found == {name: tuple(tensor.shape) for name, tensor in disk.items()}


def test_fused_experts_are_those_in_memory(model: tuple[Model, Any, Any]) -> None:
    sizes, disk, memory = model
    made = vllm(sizes).bind().evaluate(disk)
    fused = [name for name in memory if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(fused) == (2 * (sizes.layers - sizes.dense_layers) if sizes.experts else 0)
    for name in [] if sizes.fused_experts else fused:  # those are on disk as they are in memory
        ours = name.replace("gate_up_proj", "w13_weight").replace("down_proj", "w2_weight")
        assert torch.equal(made[ours], memory[name]), name


def test_there_and_back_is_what_was_on_disk(model: tuple[Model, Any, Any]) -> None:
    sizes, disk, _ = model
    for bound in (vllm(sizes).bind(), torchtitan(sizes).bind()):
        back = bound.reverse().evaluate(bound.evaluate(disk))
        assert all(torch.equal(back[name], tensor) for name, tensor in disk.items())
