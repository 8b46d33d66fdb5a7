"""Which rank holds what of a model's tensors in each system: a ``ShardingSpec`` for every destination of a map.

A map says nothing of ranks and a layout nothing of names on the other side, so any two of them go together.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tricomm.errors import SpecError
from tricomm.kinds import checks_kinds
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.checks import Shape
from tricomm.rules.models.config import Model, check_counts
from tricomm.rules.models.megatron import layers_of_stage

Cuts = dict[str, Shard]
"""How the axes of a mesh cut a tensor; those that are left out replicate it."""

Specs = dict[str, ShardingSpec]

_TORCHTITAN_COLUMNS = re.compile(
    r".*\.(w[qkv]|wqkv|wq_b|wkv_b|w1|w3)\.(weight|bias)|(tok_embeddings|lm_head)\.weight|.*\.sinks"
)
_TORCHTITAN_ROWS = re.compile(r".*\.(wo|w2)\.weight")
_MEGATRON_COLUMNS = re.compile(
    r".*(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(weight|bias)|.*softmax_offset"
    r"|.*(word_embeddings|output_layer)\.weight"
)
_SERVER_COLUMNS = re.compile(r".*\.(q_proj|q_b_proj|kv_b_proj)\.weight|.*\.sinks")
_SERVER_ROWS = re.compile(r".*\.(o_proj|down_proj)\.weight")


@checks_kinds
def torchtitan_layouts(
    shapes: Mapping[str, Shape], ranks: Sequence[int], *, tp: int = 1, ep: int = 1, dtype: Any = None
) -> Specs:
    """Torchtitan with FSDP2: every tensor cut by rows over the ranks of data parallelism, after tp or ep has cut it.

    Args:
        shapes: of ``torchtitan(model).bind()``.
        ranks: all of them, those of one tensor-parallel group side by side.
        tp: ranks of tensor parallelism.
        ep: ranks of expert parallelism; the others cut each expert's rows once there are more ranks than experts.
        dtype: of all tensors, if it is known.

    Example:
        >>> from tricomm.rules.models import LLAMA_3_8B, torchtitan
        >>> shapes = torchtitan(LLAMA_3_8B).bind().shapes
        >>> torchtitan_layouts(shapes, range(8), tp=2)["layers.0.attention.wo.weight"].local_shape(0)
        (1024, 2048)
    """
    check_counts(tp=tp, ep=ep)
    mesh, cut = _grid(ranks, dp=len(ranks) // tp, tp=tp), _Cutter(dtype)
    sparse = _grid(ranks, efsdp=len(ranks) // ep, ep=ep)

    def spec(name: str, shape: Shape) -> ShardingSpec:
        if ".inner_experts." in name:
            rest = 1 if len(ranks) > shape[0] and len(shape) > 1 else 0
            return cut(sparse, shape, {"ep": Shard(0), "efsdp": Shard(rest)}, ("ep", "efsdp"))
        cuts: Cuts = {"dp": Shard(0)}
        if _TORCHTITAN_COLUMNS.fullmatch(name):
            cuts["tp"] = Shard(0)
        elif _TORCHTITAN_ROWS.fullmatch(name):
            cuts["tp"] = Shard(1)
        return cut(mesh, shape, cuts, ("tp", "dp"))

    return {name: spec(name, shape) for name, shape in shapes.items()}


@checks_kinds
def megatron_layouts(
    model: Model,
    shapes: Mapping[str, Shape],
    ranks: Sequence[int],
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    chunks: int = 1,
    glu_interleave: int = 0,
    dtype: Any = None,
) -> Specs:
    """Megatron-core: stages of ranks, in each of them a grid (dp, tp), and (edp, ep, etp) for the experts.

    Args:
        model: its sizes.
        shapes: of ``megatron(model, ...).bind()``.
        ranks: all of them, stage after stage, those of one tensor-parallel group side by side.
        tp, pp, ep, etp: ranks of tensor, pipeline, expert and experts' tensor parallelism.
        chunks: parts of the model on each stage (virtual stages).
        glu_interleave: as the map was made with; then an expert's fc1 is cut by plain rows.
        dtype: of all tensors, if it is known.

    Example:
        >>> from tricomm.rules.models import QWEN3_30B_A3B, megatron
        >>> shapes = megatron(QWEN3_30B_A3B, tp=2).bind().shapes
        >>> specs = megatron_layouts(QWEN3_30B_A3B, shapes, range(8), tp=2, pp=2, ep=4)
        >>> print(specs["decoder.layers.47.mlp.experts.linear_fc1.weight127"].mesh)
        (edp=1 ep=1 etp=1: rank 7)
    """
    check_counts(tp=tp, pp=pp, ep=ep, etp=etp, chunks=chunks)
    check_counts(0, glu_interleave=glu_interleave)
    size = len(ranks) // pp
    stages = [list(ranks[stage * size : (stage + 1) * size]) for stage in range(pp)]
    owner = {layer: s for s in range(pp) for part in layers_of_stage(model.layers, pp, s, chunks) for layer in part}
    dense = [_grid(stage, dp=size // tp, tp=tp) for stage in stages]
    each = -(-model.experts // ep)
    if model.experts % ep:
        raise SpecError(f"{model.experts} experts are not shared evenly by ep={ep} ranks; choose a divisor")
    sparse, cut = [_experts_grids(stage, ep, etp) for stage in stages], _Cutter(dtype)

    def spec(name: str, shape: Shape) -> ShardingSpec:
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        stage = owner[int(layer[1])] if layer else 0 if name.startswith("embedding") else pp - 1
        expert = re.search(r"\.experts\.linear_fc(\d)\.(weight|bias)(\d+)$", name)
        if expert:
            mesh = sparse[stage][int(expert[3]) // each]
            return cut(mesh, shape, _fc(f"fc{expert[1]}.{expert[2]}", shape, "etp", bool(glu_interleave)))
        if _MEGATRON_COLUMNS.fullmatch(name):
            return cut(dense[stage], shape, {"tp": Shard(0)})
        if name.endswith("linear_proj.weight"):
            return cut(dense[stage], shape, {"tp": Shard(1)})
        return cut(dense[stage], shape, _fc(name[-len("fc1.weight") :], shape, "tp", False))

    return {name: spec(name, shape) for name, shape in shapes.items()}


@checks_kinds
def vllm_layouts(
    model: Model,
    shapes: Mapping[str, Shape],
    ranks: Sequence[int],
    *,
    tp: int = 1,
    expert_parallel: bool = False,
    dtype: Any = None,
) -> Specs:
    """vLLM: replicas of data parallelism for attention; the experts over all ranks, whole or each cut by rows.

    Args:
        model: its sizes.
        shapes: of ``vllm(model, tp=tp, ...).bind()``.
        ranks: all of them, those of one replica side by side.
        tp: ranks of tensor parallelism in each replica.
        expert_parallel: whether ranks hold whole experts; if these do not divide, the first ranks one more.
        dtype: of all tensors; of the server it defaults to the trainer's.

    Example:
        >>> from tricomm.rules.models import QWEN3_30B_A3B, vllm
        >>> shapes = vllm(QWEN3_30B_A3B, tp=8).bind().shapes
        >>> specs = vllm_layouts(QWEN3_30B_A3B, shapes, range(8), tp=8)
        >>> specs["model.layers.0.mlp.experts.w13_weight"].local_shape(0)
        (128, 192, 2048)
    """
    check_counts(tp=tp)
    mesh, cut = _grid(ranks, dp=len(ranks) // tp, tp=tp), _Cutter(dtype)
    flat = _grid(ranks, ep=len(ranks))
    plain = model.fused_experts
    queries = model.heads * model.head_dim
    vocab = -(-model.vocab // 64) * 64

    def experts(name: str, shape: Shape) -> ShardingSpec:
        if name.endswith(".w2_bias"):
            _check_down_bias(name, shapes, 1 if expert_parallel else len(ranks))
        if expert_parallel:
            return (
                cut(flat, shape, {"ep": Shard(0)}) if shape[0] % len(ranks) == 0 else _shared_out(ranks, shape, dtype)
            )
        rows = shape[1] // 2
        if ".w13_" in name:
            return cut(flat, shape, {"ep": Shard(1) if plain else Shard(1, segments=(rows, rows))})
        return cut(flat, shape, {"ep": Shard(2 if len(shape) == 3 else 0)})

    def spec(name: str, shape: Shape) -> ShardingSpec:
        if ".experts.w" in name:
            return experts(name, shape)
        cuts: Cuts = {}
        if ".qkv_proj." in name:
            heads = (shape[0] - queries) // 2
            cuts["tp"] = Shard(0, segments=(queries, heads, heads))
        elif ".gate_up_proj." in name:
            cuts["tp"] = Shard(0, segments=(shape[0] // 2, shape[0] // 2))
        elif re.search(r"embed|lm_head", name):
            cuts["tp"] = Shard(0, segments=(vocab, shape[0] - vocab))
        elif _SERVER_COLUMNS.fullmatch(name):
            cuts["tp"] = Shard(0)
        elif _SERVER_ROWS.fullmatch(name):
            cuts["tp"] = Shard(1)
        return cut(mesh, shape, cuts)

    return {name: spec(name, shape) for name, shape in shapes.items()}


def _grid(ranks: Sequence[int], **axes: int) -> Mesh:
    """The ranks on named axes, the last one fastest."""
    sizes = list(axes.values())
    if prod(sizes) != len(ranks) or not len(ranks):
        raise SpecError(f"{len(ranks)} ranks are no grid of {axes}; give as many ranks as its axes multiply to")
    nested: list[object] = list(ranks)
    for size in reversed(sizes[1:]):
        nested = [nested[at : at + size] for at in range(0, len(nested), size)]
    return Mesh(nested, tuple(axes))  # type: ignore[arg-type]


def _experts_grids(ranks: list[int], ep: int, etp: int) -> list[Mesh]:
    """For each place in the experts' parallelism, the ranks that hold its experts."""
    groups = len(ranks) // (ep * etp)
    _grid(ranks, edp=groups, ep=ep, etp=etp)
    held = [[rank for at, rank in enumerate(ranks) if at // etp % ep == place] for place in range(ep)]
    return [_grid(some, edp=groups, ep=1, etp=etp) for some in held]


class _Cutter:
    """Makes layouts, each once: thousands of tensors lie alike, and to check a layout takes longer than to find it."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._made: dict[object, ShardingSpec] = {}

    def __call__(self, mesh: Mesh, shape: Shape, cuts: Cuts, order: tuple[str, ...] = ()) -> ShardingSpec:
        placements = tuple([cuts.get(axis, Replicate()) for axis in mesh.axis_names])
        key = (id(mesh), shape, placements, order)  # meshes outlive this, and are long to compare
        if key not in self._made:
            self._made[key] = ShardingSpec(mesh, placements, shape, self._dtype, order or None)
        return self._made[key]


def _fc(kind: str, shape: Shape, axis: str, plain: bool) -> Cuts:
    """Of an MLP's two matrices: gate and up each by rows, down by columns; a bias of down is whole."""
    if kind.startswith("fc1"):
        return {axis: Shard(0) if plain else Shard(0, segments=(shape[0] // 2, shape[0] // 2))}
    return {axis: Shard(1)} if kind == "fc2.weight" else {}


def _check_down_bias(name: str, shapes: Mapping[str, Shape], etp: int) -> None:
    """Refuse a bias that was not made for so many ranks that share each expert: it would be added as often."""
    slots = shapes[name.replace("_bias", "_weight")][0]
    if shapes[name][0] != etp * slots:
        raise SpecError(
            f"{name!r} has {shapes[name][0]} rows, and where {etp} ranks share each of {slots} experts, the first has "
            f"its bias and the others zeros; make the map with vllm(..., etp={etp})"
        )


def _shared_out(ranks: Sequence[int], shape: Shape, dtype: Any) -> ShardingSpec:
    """Whole experts: as many for each rank, and one more for the first ones while some are left."""
    base, more = divmod(shape[0], len(ranks))
    starts = [place * base + min(place, more) for place in range(len(ranks) + 1)]
    rest = tuple(((0, size),) for size in shape[1:])
    held = {rank: (((starts[at], starts[at + 1]),), *rest) for at, rank in enumerate(ranks)}
    return ShardingSpec.explicit(held, shape, dtype)
