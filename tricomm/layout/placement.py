"""What one mesh axis does to a tensor. The names and their meaning are those of torch.distributed.tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.kinds import explains_missing

REDUCTIONS = ("sum", "avg", "max", "min")


@explains_missing
@dataclass(frozen=True, slots=True, init=False)
class Shard:
    """Cut tensor dim ``dim`` along the axis as torch.chunk does: ceil(n / parts) each, the last ones less or none.

    Args:
        dim: the tensor dim; a negative one counts from the end.
        segments: sizes that add up to the dim. Each segment is cut on its own and a rank holds its parts
            of all of them, one after the other: fused query|key|value or gate|up weights.

    Raises:
        SpecError: segments that are no sizes; an ArgumentError where an argument is of the wrong kind.

    Example:
        >>> from tricomm import Mesh, ShardingSpec
        >>> pair = Mesh([0, 1], ("tp",))
        >>> ShardingSpec(pair, [Shard(0)], (7, 4), "float32").local_shape(1)  # torch.chunk: 4 rows, then 3
        (3, 4)
        >>> ShardingSpec(pair, [Shard(0, segments=[4, 2])], (6,), "float32").holding(1)  # half of each segment
        (((2, 4), (5, 6)),)
    """

    dim: int
    segments: tuple[int, ...] | None = None

    def __init__(self, dim: int, segments: Sequence[int] | None = None) -> None:
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ArgumentError(f"Shard(dim={shown(dim)}): dim must be an integer; name one tensor dim")
        if segments is not None:
            is_sequence = isinstance(segments, Sequence) and not isinstance(segments, str | bytes)
            if not is_sequence or not all(isinstance(size, int) and not isinstance(size, bool) for size in segments):
                raise ArgumentError(
                    f"Shard(segments={shown(segments)}): segments must be sizes, a tuple of integers; "
                    "give the size of each fused part, in order"
                )
            if not segments or min(segments) < 0:
                raise SpecError(
                    f"Shard(segments={segments!r}): segments must be sizes of at least 0; "
                    "give the size of each fused part, in order"
                )
            segments = tuple(segments)
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "segments", segments)

    def __repr__(self) -> str:
        return f"Shard({self.dim})" if self.segments is None else f"Shard({self.dim}, segments={self.segments})"


@explains_missing
@dataclass(frozen=True, slots=True)
class Replicate:
    """Hold the same elements on every rank along the axis.

    Example:
        >>> from tricomm import Mesh, ShardingSpec
        >>> print(ShardingSpec(Mesh([0, 1], ("dp",)), [Replicate()], (8, 4), "float32"))
        float32[8, 4] replicated over dp on (dp=2: ranks 0-1)
    """


@explains_missing
@dataclass(frozen=True, slots=True)
class Partial:
    """Hold a contribution on every rank along the axis; the tensor is their ``op`` (sum, avg, max or min).

    Several axes may be Partial where the order in which they are reduced does not matter: with one op, or with sums
    and averages.

    Raises:
        SpecError: another reduction; an ArgumentError where it is not a word.

    Example:
        >>> from tricomm import Mesh, Shard, ShardingSpec
        >>> mesh = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
        >>> print(ShardingSpec(mesh, [Partial("avg"), Shard(1)], (8, 4), "bfloat16"))
        bfloat16[8, 4/tp] avg over dp on (dp=2 tp=2: ranks 0-3)
    """

    op: str = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.op, str):
            raise ArgumentError(
                f"Partial({shown(self.op)}): the reduction is a word; use one of {', '.join(REDUCTIONS)}"
            )
        if self.op not in REDUCTIONS:
            raise SpecError(
                f"Partial({shown(self.op)}): tricomm reduces with one of {', '.join(REDUCTIONS)}; reduce before "
                "resharding"
            )

    def __repr__(self) -> str:
        return f"Partial({self.op!r})"


Placement = Shard | Replicate | Partial
