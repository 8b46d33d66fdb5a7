"""Connections: all that one rank exchanges with the others in a step; made once, and again after a failure."""

from collections.abc import Mapping, Sequence

import torch

from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.directed_link import Sizes, StepResharder
from tricomm.pipeline.run.edge import EdgeTensor, Link
from tricomm.pipeline.run.sizes import GivenSizes, SizeAgreement
from tricomm.pipeline.run.stage import Stage, StageRun
from tricomm.pipeline.run.tied import Tied, TiedGradients
from tricomm.pipeline.run.wiring import EdgeTensors, fifo_of, make_links
from tricomm.pipeline.schedule.actions import Edge
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.schedule import Schedule


class Connections:
    """The Links of a rank's edges, its tied parameters, and the agreement on sizes.

    Args:
        schedule: with sends and receives.
        stages, edges, tied, queues, name: of the Executor.
        runs: the stages of this rank.
        rank: this one.
        options: of the Resharders.

    Raises:
        SpecError, PlanError: arguments that break a rule.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        edges: EdgeTensors,
        tied: Sequence[Tied],
        queues: Queues,
        name: str,
        runs: Mapping[int, StageRun],
        rank: int,
        options: LinkOptions,
    ) -> None:
        self.schedule, self.edges = schedule, edges
        self._everybody = Mesh(sorted({rank for stage in stages for rank in stage.mesh.ranks}), ("rank",))
        self._name, self._options = name, options
        self._gathering: dict[int, StepResharder] = {}
        modules = {index: run.module for index, run in runs.items()}
        self.tied = [TiedGradients(one, modules, f"{name} tied {number}", options) for number, one in enumerate(tied)]
        fifo = fifo_of(queues)
        self.links: dict[Edge, Link] = make_links(schedule, edges, rank, name, fifo, options) if runs else {}
        self._sizes: Sequence[Sizes] = ()
        names = {size for tensors in edges.values() for tensor in tensors.values() for size in tensor.names}
        self._agreement: SizeAgreement | None = None
        if names and runs:
            first = stages[0].mesh.ranks[0]
            self._agreement = SizeAgreement(
                tuple(names), schedule.microbatches, first, self._everybody.ranks, name, options
            )

    def connect(self) -> None:
        """Meet the other ranks, all in one order."""
        for one in self.tied:
            one.connect()
        if self._agreement is not None:
            self._agreement.resharder.connect()
        else:
            self._sizes = [()] * self.schedule.microbatches
            for link in self.links.values():
                link.connect()

    def use(self, sizes: GivenSizes | None) -> None:
        """Agree on the sizes of a step, and connect what is new to them.

        Raises:
            SpecError: sizes that no edge names, or names without a size.
        """
        if self._agreement is None:
            if sizes:
                raise SpecError(f"sizes={dict(sizes)}, and no edge has a size with a name; leave them out")
            return
        agreed = self._agreement.agree(sizes)
        if agreed != self._sizes:
            for link in self.links.values():
                link.bind(agreed)
            self._sizes = agreed

    def check_rows(self, stage: int, rank: int, inputs: Mapping[str, Sequence[torch.Tensor] | torch.Tensor]) -> None:
        """Refuse microbatches that differ in their rows where what crosses the stage's edges is said not to.

        Args:
            stage: of this rank.
            rank: this one.
            inputs: of the stage, by name, that no edge brings.

        Raises:
            SpecError: an input has other rows in some microbatch than in the first, whose rows an edge expects of all.
        """
        for name, values in inputs.items():
            rows = [len(one) if one.ndim else 0 for one in values]
            if len(set(rows)) < 2:
                continue
            for edge, link in self.links.items():
                for tensor in link.tensors if stage in edge else ():
                    shapes = [
                        tensor.bound(dict(sizes)).local_shape(rank, stage == edge.source) for sizes in self._sizes
                    ]
                    if all(shape[:1] == (rows[0],) for shape in shapes):
                        raise SpecError(
                            f"input {name!r} of stage {stage} has {rows} rows in its microbatches, and edge {edge} "
                            f"carries {rows[0]} rows in each; name that size, as EdgeTensor(..., shape=('rows', ...)), "
                            f"and pass step(..., sizes={{'rows': {tuple(rows)}}})"
                        )

    def bound_edges(self) -> dict[Edge, list[EdgeTensor]]:
        """Return the tensors of all edges, with the sizes of the first microbatch of the last step."""
        sizes = dict(self._sizes[0]) if self._sizes else {}
        return {edge: [tensor.bound(sizes) for tensor in self.edges[edge].values()] for edge in self.schedule.edges}

    @property
    def nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds."""
        return sum(one.nbytes for link in self.links.values() for one in link.directed_links)

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks, in their order."""
        width = row.numel()
        if width not in self._gathering:
            shape = (self._everybody.size, width)
            source = ShardingSpec(self._everybody, (Shard(0),), shape, "float64")
            everywhere = ShardingSpec(self._everybody, (Replicate(),))
            channel = f"{self._name} numbers"
            self._gathering[width] = StepResharder(source, everywhere, channel=channel, **self._options)
        table = self._gathering[width](row[None])
        assert table is not None
        return table

    def abort(self, reason: str) -> None:
        """Tell all ranks that this one waits for, or that wait for it, that it does not go on."""
        for link in self.links.values():
            link.abort(reason)
        for one in self.tied:
            one.abort(reason)
        if self._agreement is not None:
            self._agreement.resharder.abort(reason)
        for resharder in self._gathering.values():
            resharder.abort(reason)

    def close(self) -> None:
        """Give back connections, threads and buffers."""
        for link in self.links.values():
            link.close()
        for one in self.tied:
            one.close()
        if self._agreement is not None:
            self._agreement.resharder.close()
        for resharder in self._gathering.values():
            resharder.close()
