"""Sizes that change from step to step: one rank knows them, all learn them before the step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.directed_link import StepResharder
from tricomm.pipeline.run.rows import Rows

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
        column = [size] * microbatches if isinstance(size, int) else list(size)
        if len(column) != microbatches or not all(isinstance(one, int) and one >= 0 for one in column):
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
