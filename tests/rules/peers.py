"""What the tests against other projects' own code share: small models, and a process in which that code runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tricomm.rules.models import Latent, Model

SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 50, "kv_heads": 2, "head_dim": 8}
LLAMA = Model(**SIZES, intermediate=48, rope_pairs=True)
QWEN = Model(**SIZES, experts=4, expert_intermediate=16, qk_norm=True)
DEEPSEEK = Model(
    **SIZES,
    latent=Latent(q_rank=12, kv_rank=10, nope=8, rope=4, value=6),
    intermediate=48,
    experts=4,
    expert_intermediate=16,
    shared_experts=1,
    dense_layers=1,
    expert_bias=True,
)
DEEPSEEK_V2 = replace(DEEPSEEK, latent=replace(DEEPSEEK.latent, q_rank=0), shared_experts=2, expert_bias=False)
GPT_OSS = Model(**SIZES, experts=4, expert_intermediate=48, biases=True, fused_experts=True)


def run(script: str, folder: Path, *arguments: str) -> None:
    """Run a script in a folder, where it finds its files and leaves what it made.

    This checkout is not on its path: transformers looks for a package "kernels", and would find that of the checkout.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", script, *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
