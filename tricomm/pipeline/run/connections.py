"""Connections: all that one rank exchanges with the others in a step; made once, and again after a failure.

A rank whose part of a failed call was done already returned from it, and hears of the failure in its next call, one
later than the others. So those that are behind give up their call, and all go on with that of the one furthest on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tricomm.errors import SpecError, TransportError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.directed_link import Sizes, StepResharder
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.sizes import (
    REMEDY,
    GivenSizes,
    Rows,
    SizeAgreement,
    StepSizes,
    checked_sizes,
    declared_rows,
    row_counts,
    rows_of,
    size_name,
    with_named_rows,
)
from tricomm.pipeline.run.stage import Stage, StageRun
from tricomm.pipeline.run.tied import Tied, TiedGradients
from tricomm.pipeline.run.wiring import EdgeTensors, data_names, fifo_of, make_links
from tricomm.pipeline.schedule.actions import Edge
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.transport.coordination.store import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PAUSE_GROWTH,
    post_note,
    store_errors,
)

Compare = Callable[[dict[str, str], str], None]
"""Given fields and a name of what is done: returns once all ranks have called it with the same fields."""


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
        named = with_named_rows(edges)
        self.links: dict[Edge, Link] = make_links(schedule, named, rank, name, fifo, options) if runs else {}
        tensors = [one for tensors in edges.values() for one in tensors.values()]
        self._names = sorted({size for one in tensors for size in one.names})
        self._inputs = {index: data_names(index, stage, edges) for index, stage in enumerate(stages)}
        self._declared = declared_rows(edges)
        self._sizes: Sequence[Sizes] = ()
        self._step: StepSizes | None = None
        self._compared: set[Rows] = set()
        self.rows: Rows | None = None
        """Of the microbatches of the last step, if they differ."""
        self._agreement: SizeAgreement | None = None
        if self._names and runs:
            first = stages[0].mesh.ranks[0]
            self._agreement = SizeAgreement(
                self._names, schedule.microbatches, first, self._everybody.ranks, name, options
            )

    @property
    def sizes(self) -> tuple[Sizes, ...]:
        """Those of each microbatch of the step."""
        return tuple(self._sizes)

    def connect(self) -> None:
        """Meet the other ranks, all in one order."""
        for one in self.tied:
            one.connect()
        if self._agreement is not None:
            self._agreement.resharder.connect()
        else:
            self._sizes = [self._sizes_in(StepSizes({}, None), 0)] * self.schedule.microbatches
            for link in self.links.values():
                link.bind(self._sizes)

    def use(self, sizes: GivenSizes | None, data: Mapping[str, Any], compare: Compare) -> None:
        """Agree on the sizes of a step, and connect what is new to them.

        Args:
            sizes: as the step was given them.
            data: of the step, whose rows say how the sizes differ between its microbatches.
            compare: returns once all ranks of the pipeline have called it with the same.

        Raises:
            SpecError: sizes that no edge names, names without a size, or rows that do not fit them.
            TransportError: another rank was given other rows.
        """
        step = self._step_sizes(sizes, data, compare)
        if step == self._step:
            return
        agreed = [self._sizes_in(step, microbatch) for microbatch in range(self.schedule.microbatches)]
        if agreed != self._sizes:
            for link in self.links.values():
                link.bind(agreed)
            self._sizes = agreed
        self._step, self.rows = step, step.rows

    def _step_sizes(self, sizes: GivenSizes | None, data: Mapping[str, Any], compare: Compare) -> StepSizes:
        count = self.schedule.microbatches
        if self._agreement is not None:
            is_source = self._agreement.resharder.rank == self._agreement.source
            return self._agreement.agree(self._found_sizes(sizes, data) if is_source else None)
        if sizes:
            raise SpecError(f"sizes={dict(sizes)}, and no edge has a size with a name; leave them out")
        rows = rows_of(data, self._inputs, self.edges, count)
        if rows is not None and rows not in self._compared:
            try:
                compare({"the rows of the microbatches": str(rows)}, f"a step whose microbatches have {rows} rows")
            except TransportError as error:
                raise TransportError(
                    f"{error}; the microbatches of this rank have {rows} rows, and every rank must find the same in "
                    f"the data that it is given, also in inputs of other stages; or {REMEDY}"
                ) from error
            self._compared.add(rows)
        return StepSizes({}, rows)

    def _found_sizes(self, given: GivenSizes | None, data: Mapping[str, Any]) -> StepSizes:
        """Return the sizes that this rank tells to all: as given, and where one is given for all, as the data have."""
        count = self.schedule.microbatches
        named = checked_sizes(given, self._names, count, self._everybody.ranks[0])
        assert given is not None
        told = {name for name in self._names if isinstance(given[name], Sequence)}
        fullest = {name: max(column) for name, column in named.items()}
        followed: dict[tuple[int, int], dict[str, EdgeTensor]] = {}
        for edge, tensors in self.edges.items():
            followed[edge] = {name: one.bound(fullest) for name, one in tensors.items() if not told & {*one.shape[:1]}}
        rows = rows_of(data, self._inputs, followed, count)
        if rows is not None:
            firsts = {one.shape[0] for tensors in self.edges.values() for one in tensors.values() if one.shape}
            follow = [name for name in named if name in firsts - told and named[name][0] == rows.declared]
            named.update((name, list(rows.each)) for name in follow)
        return StepSizes(named, rows)

    def _sizes_in(self, step: StepSizes, microbatch: int) -> Sizes:
        """Return the sizes of a microbatch, of all names that the links know."""
        sizes = self._declared | {name: column[microbatch] for name, column in step.named.items()}
        if step.rows is not None and size_name(step.rows.declared) in sizes:
            sizes[size_name(step.rows.declared)] = step.rows.each[microbatch]
        return tuple(sorted(sizes.items()))

    def check_rows(self, stage: int, rank: int, inputs: Mapping[str, Sequence[torch.Tensor] | torch.Tensor]) -> None:
        """Refuse microbatches that differ in their rows otherwise than what crosses the stage's edges.

        Args:
            stage: of this rank.
            rank: this one.
            inputs: of the stage, by name, that no edge brings.

        Raises:
            SpecError: an input has as many rows as an edge expects in its fullest microbatch, and others elsewhere.
        """
        for name, values in inputs.items():
            rows = row_counts(values)
            if len(set(rows)) < 2:
                continue
            for edge, link in self.links.items():
                for tensor in link.tensors if stage in edge else ():
                    bound = [tensor.bound(dict(sizes)) for sizes in self._sizes]
                    shapes = [one.local_shape(rank, stage == edge.source) for one in bound]
                    expected = [shape[0] for shape in shapes if shape]
                    fullest = rows.index(max(rows))
                    if expected and expected[fullest] == rows[fullest] and expected != rows:
                        raise SpecError(
                            f"input {name!r} of stage {stage} has {rows} rows in its microbatches, and edge {edge} "
                            f"carries {expected} rows in them; {REMEDY}"
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


RESUMES_AT = "executor/{name}/resumes at/{rank}"


def await_all(store: Any, name: str, rank: int, ranks: Sequence[int], call: int, timeout_seconds: float) -> None:
    """Return when all ranks have come to a call.

    Args:
        store: that the ranks share.
        name: of the executor, never used before on this store.
        rank: this one.
        ranks: all.
        call: the number of the call of the executor in which this rank is.
        timeout_seconds: how long to wait.

    Raises:
        TransportError: a rank is further on, or did not come within the timeout.
    """
    post_note(store, RESUMES_AT.format(name=name, rank=rank), call)
    deadline = time.monotonic() + timeout_seconds
    for other in ranks:
        pause = FIRST_PAUSE_SECONDS
        while (there := _call_of(store, RESUMES_AT.format(name=name, rank=other))) < call:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {other} did not call the executor again within the timeout after a step had failed; every "
                    "rank of its meshes calls it as often as the others"
                )
            time.sleep(pause)
            pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)
        if there > call:
            raise TransportError(
                f"rank {other} has gone on to call {there} of the executor, as it heard of the failure one call later, "
                f"and this rank is in call {call}; the next call of all works"
            )


def _call_of(store: Any, key: str) -> int:
    with store_errors():
        return int(store.get(key)) if store.check([key]) else 0
