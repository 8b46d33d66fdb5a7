"""Maps of model families as data: from a Hugging Face checkpoint to Megatron-core, torchtitan, vLLM and SGLang.

Each is a function of a small :class:`Model` that gives ``Rules``, with shapes, so that they are bound without any file:

>>> from tricomm.rules.models import LLAMA_3_8B, megatron, vllm
>>> server = vllm(LLAMA_3_8B, tp=2).bind()
>>> print(server.tensors[3])
model.layers.0.self_attn.qkv_proj.weight (6144, 4096): 3 pieces of model.layers.0.self_attn.q_proj.weight, \
model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight
>>> trainer = megatron(LLAMA_3_8B, tp=4).bind()
>>> trainer.shapes["embedding.word_embeddings.weight"]
(128512, 4096)
>>> trainer.reverse().shapes["model.embed_tokens.weight"]
(128256, 4096)

The trainer's map back and then the server's is the map from the one to the other:

>>> print(trainer.reverse().then(server).tensors[3])
model.layers.0.self_attn.qkv_proj.weight (6144, 4096): 2 pieces of decoder.layers.0.self_attention.linear_qkv.weight

Two, because k and v of all groups stand alike on both sides.
"""

from tricomm.rules.models.config import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    QWEN3_30B_A3B,
    Latent,
    Model,
)
from tricomm.rules.models.hf import tensors
from tricomm.rules.models.layouts import megatron_layouts, torchtitan_layouts, vllm_layouts
from tricomm.rules.models.megatron import layers_of_stage, megatron
from tricomm.rules.models.serving import sglang, vllm
from tricomm.rules.models.torchtitan import torchtitan

__all__ = [
    "DEEPSEEK_V2_LITE",
    "DEEPSEEK_V3",
    "GPT_OSS_20B",
    "LLAMA_3_8B",
    "LLAMA_3_70B",
    "QWEN3_30B_A3B",
    "Latent",
    "Model",
    "layers_of_stage",
    "megatron",
    "megatron_layouts",
    "sglang",
    "tensors",
    "torchtitan",
    "torchtitan_layouts",
    "vllm",
    "vllm_layouts",
]
