"""Sizes that change from step to step, and within a step, where a batch does not divide.

Sizes with a name: one rank knows them, all learn them before the step.

Rows: what crosses an edge is declared for a whole microbatch. Its first size is taken for the rows of the microbatch if
an input of the stage at either end has so many in its fullest microbatch; it then follows the rows of the others, as
``Tensor.split`` leaves them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import index
from typing import Any

import torch

from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.edges.directed_link import StepResharder
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.wiring import EdgeTensors

REMEDY = (
    "name the size that changes, as EdgeTensor(..., shape=('rows', ...)), and pass step(..., sizes={'rows': ...}) with "
    "one number for each microbatch"
)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step's microbatches, which differ.

    Attributes:
        declared: of a whole microbatch over all ranks: the first size of the tensors that follow.
        each: of each microbatch; the most are as declared.
    """

    declared: int
    each: tuple[int, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.each))

    @property
    def weights(self) -> list[float]:
        """The part of all rows that each microbatch has."""
        return [one / sum(self.each) for one in self.each]


def size_name(rows: int) -> str:
    """Name the first size of tensors that are declared with so many rows."""
    return f"{rows} rows"


def declared_rows(edges: EdgeTensors) -> dict[str, int]:
    """Return the names that ``with_named_rows`` gives, each with the size that was declared."""
    tensors = [one for tensors in edges.values() for one in tensors.values()]
    firsts = [one.source.shape[0] for one in tensors if one.source.shape and _named(one) is not one]
    return {size_name(rows): rows for rows in firsts}


def with_named_rows(edges: EdgeTensors) -> dict[tuple[int, int], dict[str, EdgeTensor]]:
    """Return the same edges with a name for each first size that is a number, so that it may change."""
    return {edge: {name: _named(one) for name, one in tensors.items()} for edge, tensors in edges.items()}


def _named(tensor: EdgeTensor) -> EdgeTensor:
    """Name the first size of a tensor, if its layout is one of any number of rows."""
    shape = tensor.source.shape
    if not shape or not (_is_regular(tensor.source) and _is_regular(tensor.destination)):
        return tensor
    source, destination = (replace(side, shape=None) for side in (tensor.source, tensor.destination))
    return EdgeTensor(source, destination, tensor.gradient, (size_name(shape[0]), *shape[1:]))


def _is_regular(spec: ShardingSpec) -> bool:
    """Whether a layout says for any number of rows who holds which."""
    cuts = (one for one in spec.placements if isinstance(one, Shard))
    return spec.holdings is None and not any(one.dim == 0 and one.segments is not None for one in cuts)


def rows_of(
    data: Mapping[str, Any], inputs: Mapping[int, Sequence[str]], edges: EdgeTensors, microbatches: int
) -> Rows | None:
    """Find the rows of the microbatches in a step's data; None if they do not differ, or no edge has so many.

    Args:
        data: of the step; inputs of stages of other ranks are looked at too, where they are given.
        inputs: per stage, the names that no edge brings.
        edges: what crosses, with numbers for its sizes.
        microbatches: of the step.

    Raises:
        SpecError: inputs have different rows, or it cannot be told what they mean for an edge.
    """
    counts_of = {name: row_counts(data.get(name, ())) for names in inputs.values() for name in names}
    if all(len(set(counts)) < 2 for counts in counts_of.values()):
        return None
    found: dict[str, tuple[list[int], set[int]]] = {}
    for stage, names in inputs.items():
        for name in names:
            counts = counts_of[name]
            declared = set(_declared(stage, edges, max(counts, default=0)))
            if len(counts) == microbatches and declared:
                known = found.setdefault(name, (counts, set()))[1]
                known |= declared
    uneven = [name for name, (counts, _) in found.items() if len(set(counts)) > 1]
    if not uneven:
        return None
    first = uneven[0]
    counts, declared = found[first]
    for name, (others, also) in found.items():
        if [Fraction(one, max(counts)) for one in counts] != [Fraction(one, max(others)) for one in others]:
            raise SpecError(
                f"the microbatches of input {first!r} have {counts} rows and those of {name!r} have {others}; all "
                f"inputs of a microbatch have the same rows: split them alike, or {REMEDY}"
            )
        declared = declared & also or declared
    whole = min(declared)
    each = [Fraction(whole * one, max(counts)) for one in counts]
    if len(declared) > 1 or any(one.denominator > 1 for one in each):
        raise SpecError(
            f"the microbatches of input {first!r} have {counts} rows, and how many rows cross the edges that carry "
            f"{' or '.join(map(str, sorted(declared)))} of a whole one cannot be told from that; {REMEDY}"
        )
    return Rows(whole, tuple(map(int, each)))


def row_counts(values: object) -> list[int]:
    """Count the rows of each microbatch; none for what are no tensors with rows."""
    if isinstance(values, torch.Tensor):
        return [values.shape[1]] * len(values) if values.ndim > 1 else []
    if not isinstance(values, Sequence):
        return []
    return [len(one) for one in values if isinstance(one, torch.Tensor) and one.ndim]


def _declared(stage: int, edges: EdgeTensors, rows: int) -> Iterator[int]:
    """Yield the first sizes of what crosses to or from a stage, of which a rank there, or all, hold so many."""
    for (source, destination), tensors in edges.items():
        for side, place in ((source, "source"), (destination, "destination")):
            for tensor in tensors.values() if side == stage else ():
                spec: ShardingSpec = getattr(tensor, place)
                if spec.shape and rows in {spec.shape[0], *(spec.local_shape(rank)[0] for rank in spec.mesh.ranks)}:
                    yield spec.shape[0]


GivenSizes = Mapping[str, int | Sequence[int]]
"""By name, one size for all microbatches of a step or one for each."""


ROW_COLUMNS = 2
"""What else is told of each microbatch: the rows of a whole one, and its own; 0 if none differs."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The sizes of one step.

    Attributes:
        named: by name, one for each microbatch.
        rows: of the microbatches, if they differ; then also the sizes that are declared as a number follow.
    """

    named: Mapping[str, Sequence[int]]
    rows: Rows | None

    def table(self, names: Sequence[str], microbatches: int) -> list[list[int]]:
        """Per microbatch, the sizes in the order of their names, then what is told of rows."""
        rows = self.rows or Rows(0, (0,) * microbatches)
        columns = [*(self.named[name] for name in names), (rows.declared,) * microbatches, rows.each]
        return [list(row) for row in zip(*columns, strict=True)]


def checked_sizes(given: GivenSizes | None, names: Sequence[str], microbatches: int, rank: int) -> dict[str, list[int]]:
    """Return what a step was given as sizes, by name, one for each microbatch.

    Raises:
        SpecError: a size is missing, has a name that no edge has, or is given for some microbatches only.
    """
    if given is None or sorted(given) != sorted(names):
        raise SpecError(
            f"sizes={given} on rank {rank}, where the edges have sizes named {tuple(sorted(names))}; pass a "
            "number for each to step(sizes=...)"
        )
    columns = {}
    for name, size in given.items():
        column = [index(one) for one in (size if isinstance(size, Sequence) else [size] * microbatches)]
        if len(column) != microbatches or min(column) < 0:
            raise SpecError(
                f"sizes={dict(given)} gives {name!r} the sizes {column}, and a step has {microbatches} "
                "microbatches; give one whole number for all of them, or one for each"
            )
        columns[name] = column
    return columns


class SizeAgreement:
    """Tell all ranks of a pipeline the sizes of a step: one small broadcast from the first rank of the first stage.

    The other ranks wait for it where they would else wait for their first activation, so it costs its latency once per
    step at the front of the pipeline. The source does not wait.

    Args:
        names: of the sizes.
        microbatches: of a step; each may have sizes of its own.
        source: the rank that knows them.
        ranks: all that must learn them.
        name: for the channel.
        options: of the Resharders.
    """

    def __init__(
        self,
        names: Sequence[str],
        microbatches: int,
        source: int,
        ranks: Sequence[int],
        name: str,
        options: LinkOptions,
    ) -> None:
        self.names = tuple(sorted(names))
        self.microbatches = microbatches
        self.source = source
        shape = (microbatches, len(self.names) + ROW_COLUMNS)
        here = ShardingSpec(Mesh([source], ("rank",)), (Replicate(),), shape, "int64")
        everywhere = ShardingSpec(Mesh(sorted(ranks), ("rank",)), (Replicate(),))
        self.resharder = StepResharder(here, everywhere, channel=f"{name} sizes", **options)

    def agree(self, given: "StepSizes | None") -> "StepSizes":
        """Return the sizes of the step.

        Args:
            given: there on the source; what other ranks give is not looked at.
        """
        table = None
        if self.resharder.rank == self.source:
            assert given is not None
            table = torch.tensor(given.table(self.names, self.microbatches), device=self.resharder.device)
        handle = self.resharder.start(table)
        learned = handle.wait() if table is None else table
        assert learned is not None
        *columns, declared, each = learned.T.tolist()
        named = dict(zip(self.names, columns, strict=True))
        return StepSizes(named, Rows(declared[0], tuple(each)) if declared[0] else None)
