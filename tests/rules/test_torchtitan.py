"""The map to torchtitan against its own code: the names and shapes of its models, and what its adapters make."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rules import peers
from tricomm.rules.models import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_3_8B,
    QWEN3_30B_A3B,
    Latent,
    Model,
    tensors,
    torchtitan,
)

FULL = [
    ("llama3", "8B", LLAMA_3_8B),
    ("qwen3", "30B-A3B", QWEN3_30B_A3B),
    ("deepseek_v3", "671B", DEEPSEEK_V3),
    ("deepseek_v3", "16B", DEEPSEEK_V2_LITE),
    ("gpt_oss", "20b", GPT_OSS_20B),
]
# Sizes that the adapter of a configuration asks for; gpt-oss's reads a quantised checkpoint, and knows other names.
SMALL: dict[str, tuple[str, Model]] = {
    "llama3": (
        "debugmodel",
        Model(layers=1, hidden=256, heads=16, kv_heads=16, head_dim=16, intermediate=768, vocab=100, rope_pairs=True),
    ),
    "qwen3": (
        "debugmodel_moe",
        Model(
            layers=1,
            hidden=8,
            heads=4,
            kv_heads=2,
            head_dim=4,
            vocab=20,
            experts=64,
            expert_intermediate=6,
            qk_norm=True,
        ),
    ),
    "deepseek_v3": (
        "671B",
        Model(
            layers=2,
            hidden=8,
            heads=4,
            latent=Latent(q_rank=5, kv_rank=3, nope=2, rope=2, value=3),
            intermediate=8,
            vocab=20,
            experts=256,
            expert_intermediate=4,
            shared_experts=1,
            dense_layers=1,
            expert_bias=True,
        ),
    ),
}
SCRIPT = """
import sys, torch
from importlib import import_module
family, flavor, what = sys.argv[1:]
spec = import_module(f"torchtitan.models.{family}").model_registry(flavor)
if what == "shapes":
    with torch.device("meta"):
        result = {name: tuple(tensor.shape) for name, tensor in spec.model.build().state_dict().items()}
else:
    result = spec.state_dict_adapter(spec.model, None).from_hf(torch.load("disk.pt"))
torch.save(result, "result.pt")
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("torchtitan") is None, reason="needs torchtitan, which `make peers` installs"),
]


def of_torchtitan(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the script finds."""
    peers.run(SCRIPT, folder, *arguments)
    result: dict[str, Any] = torch.load(folder / "result.pt")
    return result


@pytest.mark.parametrize(("family", "flavor", "model"), FULL)
def test_names_and_shapes_are_those_of_its_model(family: str, flavor: str, model: Model, tmp_path: Path) -> None:
    assert torchtitan(model).bind().shapes == of_torchtitan(tmp_path, family, flavor, "shapes")


@pytest.mark.parametrize("family", SMALL)
def test_it_makes_what_the_adapter_makes(family: str, tmp_path: Path) -> None:
    flavor, model = SMALL[family]
    torch.manual_seed(1)
    disk = {name: torch.randn(shape) for name, shape in tensors(model).bind().source_shapes.items()}
    torch.save(disk, tmp_path / "disk.pt")
    theirs = of_torchtitan(tmp_path, family, flavor, "tensors")
    ours = torchtitan(model, load_balance=False).bind().evaluate(disk)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
