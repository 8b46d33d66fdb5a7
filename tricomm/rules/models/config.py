"""Sizes of a model: all that its maps depend on."""

from collections.abc import Mapping
from dataclasses import dataclass

from tricomm.errors import SpecError
from tricomm.kinds import checks_fields
from tricomm.rules.expressions import Expression
from tricomm.rules.resolve import words
from tricomm.rules.rules import Rules

MAX_COUNT = 1 << 40
"""Of rows, ranks or layers."""


def check_counts(least: int = 1, **counts: int) -> None:
    """Refuse sizes, and numbers of ranks or stages, that are none.

    Raises:
        SpecError: one is below the least that makes sense, or beyond any machine.
    """
    for name, count in counts.items():
        if not least <= count <= MAX_COUNT:
            raise SpecError(f"{name}={count} must be from {least} to {MAX_COUNT}; give how many there are")


@checks_fields
@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek): ranks of the two compressions, and parts of a head.

    ``q_rank`` is 0 where queries are not compressed (DeepSeek-V2-Lite).

    >>> latent = Latent(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)  # DeepSeek-V3
    >>> 128 * (latent.nope + latent.rope)  # rows of q_b, of 128 heads
    24576
    """

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int

    def __post_init__(self) -> None:
        check_counts(0, q_rank=self.q_rank)
        check_counts(**{name: getattr(self, name) for name in ("kv_rank", "nope", "rope", "value")})


@checks_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder of a family that the maps know.

    Attributes:
        layers, hidden, heads, vocab: as everywhere.
        intermediate: of a dense MLP; 0 where there is none.
        kv_heads, head_dim: of grouped-query attention.
        latent: instead of them, multi-head latent attention.
        experts, expert_intermediate, shared_experts: of a mixture of experts; 0 where there is none.
        dense_layers: how many of the first layers are dense although there are experts.
        qk_norm: norms of q and k heads (Qwen3).
        biases: of q, k, v, o, the router and the experts, and attention sinks (gpt-oss).
        fused_experts: on disk, gate and up of all experts are the even and odd columns of one tensor (gpt-oss).
        expert_bias: a bias per expert that balances load (DeepSeek-V3's e_score_correction_bias).
        rope_pairs: torchtitan rotates neighbouring rows of a head, not its halves (Llama).
        tied: the output uses the embedding.
        mtp_layers: layers for multi-token prediction after the last one.

    Example:
        >>> from tricomm.rules.models import vllm
        >>> small = Model(layers=2, hidden=64, heads=4, vocab=1000, intermediate=128, kv_heads=2, head_dim=16)
        >>> vllm(small, tp=2).bind().shapes["model.embed_tokens.weight"]  # rows to a multiple of 64
        (1024, 64)
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    intermediate: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    latent: Latent | None = None
    experts: int = 0
    expert_intermediate: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    qk_norm: bool = False
    biases: bool = False
    fused_experts: bool = False
    expert_bias: bool = False
    rope_pairs: bool = False
    tied: bool = False
    mtp_layers: int = 0

    def __post_init__(self) -> None:
        check_counts(layers=self.layers, hidden=self.hidden, heads=self.heads, vocab=self.vocab)
        others = ("intermediate", "kv_heads", "head_dim", "experts", "expert_intermediate", "shared_experts")
        check_counts(0, **{name: getattr(self, name) for name in (*others, "dense_layers", "mtp_layers")})
        if self.latent is None and (not self.head_dim or not self.kv_heads or self.heads % self.kv_heads):
            raise SpecError(
                f"{self.heads} heads do not share {self.kv_heads} kv heads of {self.head_dim} evenly; give "
                "head_dim, and kv_heads that divide them, or latent=Latent(...)"
            )
        if not self.experts and not self.intermediate:
            raise SpecError("a model without experts needs its MLP's intermediate size; give intermediate=...")

    @property
    def kinds(self) -> tuple[tuple[range, bool], ...]:
        """The layers of each kind: which ones, and whether they have experts.

        >>> from tricomm.rules.models import DEEPSEEK_V3
        >>> DEEPSEEK_V3.kinds
        ((range(0, 3), False), (range(3, 61), True))
        """
        dense = self.dense_layers if self.experts else self.layers
        kinds = ((range(dense), False), (range(dense, self.layers), True))
        return tuple((layers, moe) for layers, moe in kinds if layers)

    @property
    def mtp(self) -> range:
        """The layers for multi-token prediction, as counted on disk.

        >>> from tricomm.rules.models import DEEPSEEK_V3
        >>> DEEPSEEK_V3.mtp
        range(61, 61)
        """
        return range(self.layers, self.layers + self.mtp_layers)


LLAMA_3_8B = Model(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256, rope_pairs=True
)
LLAMA_3_70B = Model(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, intermediate=28672, vocab=128256, rope_pairs=True
)
QWEN3_30B_A3B = Model(
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    vocab=151936,
    experts=128,
    expert_intermediate=768,
    qk_norm=True,
)
DEEPSEEK_V3 = Model(
    layers=61,
    hidden=7168,
    heads=128,
    latent=Latent(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128),
    intermediate=18432,
    vocab=129280,
    experts=256,
    expert_intermediate=2048,
    shared_experts=1,
    dense_layers=3,
    expert_bias=True,
)
DEEPSEEK_V2_LITE = Model(
    layers=27,
    hidden=2048,
    heads=16,
    latent=Latent(q_rank=0, kv_rank=512, nope=128, rope=64, value=128),
    intermediate=10944,
    vocab=102400,
    experts=64,
    expert_intermediate=1408,
    shared_experts=2,
    dense_layers=1,
)
GPT_OSS_20B = Model(
    layers=24,
    hidden=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocab=201088,
    experts=32,
    expert_intermediate=2880,
    biases=True,
    fused_experts=True,
)


def assembled(parts: Mapping[str, Expression], drop: tuple[str, ...] = (), **indices: object) -> Rules:
    """Rules of these parts, with those of the index variables and tables that they use."""
    named = set().union(*(words(what) for part in parts.items() for what in part), *map(words, drop))
    return Rules(parts, drop=drop, **{name: values for name, values in indices.items() if name in named})


def padded(size: int, multiple: int) -> int:
    """The size, rounded up to a multiple."""
    return -(-size // multiple) * multiple
