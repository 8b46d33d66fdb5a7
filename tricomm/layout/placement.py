"""What one mesh axis does to a tensor. The names and their meaning are those of torch.distributed.tensor."""

from dataclasses import dataclass

from tricomm.errors import SpecError

REDUCTIONS = ("sum", "avg", "max", "min")


@dataclass(frozen=True, slots=True)
class Shard:
    """The axis cuts tensor dim ``dim`` as torch.chunk does: ceil(n / parts) each, the last ones less or none.

    Args:
        dim: the tensor dim; a negative one counts from the end.
        segments: sizes that add up to the dim. Each segment is cut on its own and a rank holds its parts
            of all of them, one after the other: fused query|key|value or gate|up weights.
    """

    dim: int
    segments: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool):
            raise SpecError(f"Shard(dim={self.dim!r}): dim must be an integer; name one tensor dim")
        if self.segments is not None:
            segments = tuple(self.segments)
            if not segments or not all(isinstance(size, int) and size >= 0 for size in segments):
                raise SpecError(
                    f"Shard(segments={self.segments!r}): segments must be sizes of at least 0; "
                    "give the size of each fused part, in order"
                )
            object.__setattr__(self, "segments", segments)

    def __repr__(self) -> str:
        return f"Shard({self.dim})" if self.segments is None else f"Shard({self.dim}, segments={self.segments})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank along the axis holds the same elements."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank along the axis holds a contribution; the tensor is their ``op`` (sum, avg, max or min)."""

    op: str = "sum"

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise SpecError(
                f"Partial({self.op!r}): tricomm reduces with one of {', '.join(REDUCTIONS)}; reduce before resharding"
            )

    def __repr__(self) -> str:
        return f"Partial({self.op!r})"


Placement = Shard | Replicate | Partial
