"""What ``bench.model`` plans, four models at full size, and what it executes, the same ones with fewer and narrower
layers: each from the layout of a trainer to that of a server.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tricomm import ShardingSpec, Topology
from tricomm.rules import BoundRules
from tricomm.rules.models import (
    DEEPSEEK_V3,
    LLAMA_3_8B,
    LLAMA_3_70B,
    QWEN3_30B_A3B,
    Latent,
    Model,
    megatron,
    megatron_layouts,
    torchtitan,
    torchtitan_layouts,
    vllm,
    vllm_layouts,
)

Specs = dict[str, ShardingSpec]
SIZES = ((16, 16), (64, 32), (256, 128))
"""Ranks of the trainer and of the server."""

RANKS_OF_A_HOST = 8
NIC_BYTES_PER_SECOND = 50e9
"""400 Gb/s for each GPU."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's tensors on both sides, and the map between them.

    Attributes:
        layouts: of both sides, in words.
        rules: the map.
        source, destination: who holds what.
        topology: of all ranks.
    """

    layouts: str
    rules: BoundRules
    source: Specs
    destination: Specs
    topology: Topology


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how it is laid out.

    Attributes:
        name: of the model.
        setting: makes it for so many ranks of the trainer and of the server.
        published: what others report for a like move.
    """

    name: str
    setting: Callable[[int, int], Setting]
    published: str = ""


def rails(ranks: int) -> Topology:
    """Hosts of eight ranks, each with a NIC of its own."""
    hosts = tuple(f"host{rank // RANKS_OF_A_HOST}" for rank in range(ranks))
    return Topology(hosts, NIC_BYTES_PER_SECOND, RANKS_OF_A_HOST)


def llama_8b(trainers: int, servers: int) -> Setting:
    """FSDP2 to replicas of tensor parallelism 4."""
    return _from_torchtitan(LLAMA_3_8B, trainers, servers, server_tp=4)


def llama_70b(trainers: int, servers: int) -> Setting:
    """Stages of tensor parallelism 8 to replicas of it."""
    stages = 2 if trainers == 16 else 4
    return _from_megatron(LLAMA_3_70B, trainers, servers, tp=8, pp=stages, ep=1, server_tp=8, expert_parallel=False)


def qwen(trainers: int, servers: int) -> Setting:
    """Two stages of expert parallelism 8 to tensor parallelism 8, as in the published run."""
    return _from_megatron(QWEN3_30B_A3B, trainers, servers, tp=1, pp=2, ep=8, server_tp=8, expert_parallel=False)


def deepseek(trainers: int, servers: int) -> Setting:
    """Expert parallelism of up to 64 to whole experts on every rank."""
    return _from_megatron(
        DEEPSEEK_V3, trainers, servers, tp=1, pp=1, ep=min(trainers, 64), server_tp=8, expert_parallel=True
    )


CASES = (
    Case("Llama-3-8B", llama_8b),
    Case("Llama-3-70B", llama_70b),
    Case("Qwen3-30B-A3B", qwen, "16 -> 16: 0.74-1.00 s (NeMo RL, H100)"),
    Case("DeepSeek-V3", deepseek, "128 -> 128: 1.45 s (nccl_m2n, GB200); 2.4-2.8 s (NeMo RL, H100)"),
)


EXECUTED_RANKS = 4
"""Of the trainer, and as many of the server."""

SMALL_LLAMA_8B = replace(LLAMA_3_8B, layers=4, hidden=512, heads=4, kv_heads=2, intermediate=1792, vocab=16032)
SMALL_LLAMA_70B = replace(
    LLAMA_3_70B, layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1792, vocab=8016
)
SMALL_QWEN = replace(
    QWEN3_30B_A3B, layers=4, hidden=256, heads=8, head_dim=64, vocab=9496, experts=32, expert_intermediate=192
)
SMALL_DEEPSEEK = replace(
    DEEPSEEK_V3,
    layers=4,
    dense_layers=1,
    hidden=256,
    heads=8,
    latent=Latent(q_rank=96, kv_rank=32, nope=32, rope=16, value=32),
    intermediate=1024,
    vocab=8080,
    experts=32,
    expert_intermediate=256,
)

EXECUTED = (
    Case("Llama-3-8B", lambda trainers, servers: _from_torchtitan(SMALL_LLAMA_8B, trainers, servers, server_tp=2)),
    Case(
        "Llama-3-70B",
        lambda trainers, servers: _from_megatron(
            SMALL_LLAMA_70B, trainers, servers, tp=2, pp=2, ep=1, server_tp=4, expert_parallel=False
        ),
    ),
    Case(
        "Qwen3-30B-A3B",
        lambda trainers, servers: _from_megatron(
            SMALL_QWEN, trainers, servers, tp=1, pp=2, ep=2, server_tp=2, expert_parallel=False
        ),
    ),
    Case(
        "DeepSeek-V3",
        lambda trainers, servers: _from_megatron(
            SMALL_DEEPSEEK, trainers, servers, tp=1, pp=1, ep=4, server_tp=2, expert_parallel=True
        ),
    ),
)
"""Names, fusions and layouts as above; fewer layers and experts, and narrower ones."""


def _from_torchtitan(model: Model, trainers: int, servers: int, *, server_tp: int) -> Setting:
    trained, served = torchtitan(model).bind(), vllm(model, tp=server_tp).bind()
    source = torchtitan_layouts(trained.shapes, range(trainers), dtype="bfloat16")
    title = f"torchtitan FSDP {trainers}"
    return _setting(title, model, trained, source, served, trainers, servers, server_tp, expert_parallel=False)


def _from_megatron(
    model: Model,
    trainers: int,
    servers: int,
    *,
    tp: int,
    pp: int,
    ep: int,
    server_tp: int,
    expert_parallel: bool,
) -> Setting:
    trained, served = megatron(model, tp=tp).bind(), vllm(model, tp=server_tp).bind()
    source = megatron_layouts(model, trained.shapes, range(trainers), tp=tp, pp=pp, ep=ep, dtype="bfloat16")
    grid = " ".join(f"{axis} {size}" for axis, size in (("tp", tp), ("pp", pp), ("ep", ep)) if size > 1)
    return _setting(
        f"Megatron {grid}",
        model,
        trained,
        source,
        served,
        trainers,
        servers,
        server_tp,
        expert_parallel=expert_parallel,
    )


def _setting(
    trainer: str,
    model: Model,
    trained: BoundRules,
    source: Specs,
    served: BoundRules,
    trainers: int,
    servers: int,
    server_tp: int,
    *,
    expert_parallel: bool,
) -> Setting:
    ranks = range(trainers, trainers + servers)
    destination = vllm_layouts(model, served.shapes, ranks, tp=server_tp, expert_parallel=expert_parallel)
    source = {name: _kept_in_float32(name, spec) for name, spec in source.items()}
    experts = f" ep {servers}" if expert_parallel else ""
    layouts = f"{trainer} -> vLLM tp {server_tp} dp {servers // server_tp}{experts}"
    return Setting(layouts, trained.reverse().then(served), source, destination, rails(trainers + servers))


def _kept_in_float32(name: str, spec: ShardingSpec) -> ShardingSpec:
    """A router's bias is not cast."""
    return replace(spec, dtype="float32") if name.endswith("expert_bias") else spec
