"""Sizes that change from step to step: one rank knows them, all learn them before the step."""

from collections.abc import Mapping, Sequence

import torch

from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.directed_link import StepResharder


class SizeAgreement:
    """Tells all ranks of a pipeline the sizes of a step: one small broadcast from the first rank of the first stage.

    The other ranks wait for it where they would else wait for their first activation, so it costs its latency once per
    step at the front of the pipeline. The teller does not wait.

    Args:
        names: of the sizes.
        teller: the rank that knows them.
        ranks: all that must learn them.
        name: for the channel.
        options: of :class:`tricomm.Resharder`.
    """

    def __init__(
        self, names: Sequence[str], teller: int, ranks: Sequence[int], name: str, options: LinkOptions
    ) -> None:
        self.names = tuple(sorted(names))
        self.teller = teller
        shape = (len(self.names),)
        source = ShardingSpec(Mesh([teller], ("rank",)), (Replicate(),), shape, "int64")
        everyone = ShardingSpec(Mesh(sorted(ranks), ("rank",)), (Replicate(),))
        self.resharder = StepResharder(source, everyone, channel=f"{name} sizes", **options)

    def agree(self, given: Mapping[str, int] | None) -> dict[str, int]:
        """The sizes of the step.

        Args:
            given: must be there on the teller; what other ranks give is not looked at.

        Raises:
            SpecError: a size is missing or has a name that no edge has.
        """
        told = None
        if self.resharder.rank == self.teller:
            if given is None or sorted(given) != list(self.names):
                raise SpecError(
                    f"sizes={given} on rank {self.teller}, where the edges have sizes named {self.names}; pass a "
                    "number for each to step(sizes=...)"
                )
            told = torch.tensor([given[name] for name in self.names], device=self.resharder.device)
        handle = self.resharder.start(told)
        if told is not None:
            assert given is not None
            return {name: given[name] for name in self.names}
        learned = handle.wait()
        assert learned is not None
        return dict(zip(self.names, learned.tolist(), strict=True))
