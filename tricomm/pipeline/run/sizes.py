"""Sizes that change from step to step: one rank knows them, all learn them before the step."""

from collections.abc import Mapping, Sequence

import torch

from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.directed_link import Sizes, StepResharder

GivenSizes = Mapping[str, int | Sequence[int]]
"""By name, one size for all microbatches of a step or one for each."""


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
        shape = (microbatches, len(self.names))
        here = ShardingSpec(Mesh([source], ("rank",)), (Replicate(),), shape, "int64")
        everywhere = ShardingSpec(Mesh(sorted(ranks), ("rank",)), (Replicate(),))
        self.resharder = StepResharder(here, everywhere, channel=f"{name} sizes", **options)

    def agree(self, given: GivenSizes | None) -> list[Sizes]:
        """Return the sizes of each microbatch of the step.

        Args:
            given: must be there on the source; what other ranks give is not looked at.

        Raises:
            SpecError: a size is missing, has a name that no edge has, or is given for some microbatches only.
        """
        rows = None
        if self.resharder.rank == self.source:
            rows = torch.tensor(self._rows(given), device=self.resharder.device)
        handle = self.resharder.start(rows)
        learned = handle.wait() if rows is None else rows
        assert learned is not None
        return [tuple(zip(self.names, row, strict=True)) for row in learned.tolist()]

    def _rows(self, given: GivenSizes | None) -> list[list[int]]:
        """Per microbatch, the sizes in the order of their names."""
        if given is None or sorted(given) != list(self.names):
            raise SpecError(
                f"sizes={given} on rank {self.source}, where the edges have sizes named {self.names}; pass a "
                "number for each to step(sizes=...)"
            )
        columns = []
        for name in self.names:
            size = given[name]
            column = [size] * self.microbatches if isinstance(size, int) else list(size)
            if len(column) != self.microbatches or not all(isinstance(one, int) and one >= 0 for one in column):
                raise SpecError(
                    f"sizes={dict(given)} gives {name!r} the sizes {column}, and a step has {self.microbatches} "
                    "microbatches; give one whole number for all of them, or one for each"
                )
            columns.append(column)
        return [list(row) for row in zip(*columns, strict=True)]
