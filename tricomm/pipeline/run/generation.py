"""Generation: what an executor has from one connecting to the failure of a step, and steps on it."""

import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tricomm.errors import TransportError
from tricomm.options import LinkOptions
from tricomm.pipeline.run.connections import Connections
from tricomm.pipeline.run.replicas import ReplicaCheck
from tricomm.pipeline.run.sizes import GivenSizes
from tricomm.pipeline.run.stage import LOSS, Stage, StageRun
from tricomm.pipeline.run.step import Data, Observer, Programs, Step
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.run.unused import GradientUse
from tricomm.pipeline.run.wiring import EdgeTensors, check_data, gradient_names
from tricomm.pipeline.schedule.actions import Action, Edge
from tricomm.pipeline.schedule.check import Queues
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.plan.plan import digest_of
from tricomm.transport.coordination.intent import Intent
from tricomm.transport.group import GroupContext


@dataclass(frozen=True, slots=True)
class Setup:
    """What an executor runs, checked, and on which rank.

    Attributes:
        context: of the process group.
        device, timeout_seconds, options: of the moves.
        name, schedule, stages, edges, tied, queues, loss_scale: of the Executor; the schedule sends and receives.
        ranks: of all stages, sorted.
        runs: the stages of this rank.
    """

    context: GroupContext
    device: torch.device
    timeout_seconds: float
    options: LinkOptions
    name: str
    schedule: Schedule
    stages: tuple[Stage, ...]
    edges: EdgeTensors
    tied: tuple[Tied, ...]
    queues: Queues
    loss_scale: float | None
    ranks: tuple[int, ...]
    runs: Mapping[int, StageRun]


class Generation:
    """See above. After a failure there is a new one.

    Args:
        setup: of the executor.

    Attributes:
        connections: to the other ranks.
        check: what compares gradients and losses in the first step that trains; None afterwards.

    Raises:
        SpecError, PlanError: arguments that break a rule.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        has_kernels = setup.context.accelerator_of(setup.device) is not None
        self._programs = Programs(setup.schedule, setup.edges, setup.runs, loads_kernels=has_kernels)
        what = (setup.schedule, setup.stages, setup.edges, setup.tied, setup.queues, setup.name)
        self.connections = Connections(*what, setup.runs, setup.context.rank, setup.options)
        self.check: ReplicaCheck | None = None
        self._use: GradientUse | None = None

    def connect(self, unique: str, calls: int) -> str:
        """Compare with all ranks what is about to run, then connect, in one order on all.

        Args:
            unique: the name of the executor on all ranks; "" has one made.
            calls: that were begun so far, this one included.

        Returns:
            The name.
        """
        setup = self._setup
        fields = {
            "the number of microbatches": str(setup.schedule.microbatches),
            "the schedule": " | ".join(" ".join(map(str, actions)) for actions in setup.schedule.lists),
            "queues": setup.queues.name,
            "stages": repr([(stage.mesh, stage.inputs, stage.outputs, stage.loss) for stage in setup.stages]),
            "edges": repr([(tuple(edge), dict(tensors)) for edge, tensors in setup.edges.items()]),
            "tied": repr(list(setup.tied)),
        }
        call = f"the connecting of executor {setup.name!r}"
        intent = Intent(setup.ranks, fields, digest_of(fields), f"executor {setup.name}", call)
        made = setup.context.rendezvous.join(intent, setup.timeout_seconds, decide=lambda _: uuid.uuid4().hex).decision
        self.connections.connect()
        unique = unique or made
        store, rank, name = setup.context.store, setup.context.rank, f"{unique}/{calls}"
        self.check = ReplicaCheck(store, rank, name, setup.timeout_seconds)
        names = {(edge[0], edge[1]): gradient_names(setup.schedule, one) for edge, one in setup.edges.items()}
        self._use = GradientUse(store, rank, name, setup.stages, names, setup.timeout_seconds)
        return unique

    def step(
        self,
        trains: bool,
        data: Data,
        sizes: GivenSizes | None,
        loss_weights: Sequence[float] | None,
        observer: Observer | None,
        place: str,
    ) -> Step:
        """Make the next step.

        Args:
            trains: whether it has backwards.
            data, sizes, loss_weights: as for ``Executor.step``.
            observer: of the executor.
            place: the executor and its call, equal on all ranks.

        Raises:
            SpecError: data, sizes or rows that do not fit.
        """
        setup, rank, microbatches = self._setup, self._setup.context.rank, self._setup.schedule.microbatches

        def compare(fields: dict[str, str], call: str) -> None:
            intent = Intent(setup.ranks, fields, digest_of(fields), place, call)
            setup.context.rendezvous.join(intent, setup.timeout_seconds)

        for index, names in self._programs.data_names.items():
            check_data(index, rank, names, data, microbatches)
        self.connections.use(sizes, data, compare)
        for index, names in self._programs.data_names.items():
            self.connections.check_rows(index, rank, {name: data[name] for name in names})
        for run in setup.runs.values():
            run.begin(loss_weights or self._weights())
            run.recorder = None
        if trains and self._use is not None:
            for index, recorder in self._use.begin({key: run.module for key, run in setup.runs.items()}).items():
                setup.runs[index].recorder = recorder
        program = self._programs.next(trains, self.connections.sizes)
        check = self.check if trains else None
        return Step(program, self.connections.links, data, check, observer, self._computing)

    def _weights(self) -> list[float]:
        """What each microbatch's loss counts where the step was not told: its part of the rows, or the loss_scale."""
        rows, scale, count = self.connections.rows, self._setup.loss_scale, self._setup.schedule.microbatches
        if scale is None and rows is not None:
            return rows.weights
        return [1.0 / count if scale is None else scale] * count

    def _computing(self, action: Action) -> AbstractContextManager[None]:
        """Say what this rank computes: meanwhile nobody is late that it will wait for."""
        what = f"the computation of {action} of executor {self._setup.name!r}"
        return self._setup.context.monitor.computing(what, self._setup.timeout_seconds)

    def finish(self) -> None:
        """Do what follows the last action of a step that trains."""
        if self._use is not None:
            self._use.settle()
        runs = self._setup.runs
        if self.check is not None:
            for index, run in runs.items():
                if LOSS in run.stage.outputs:
                    losses = torch.stack([run.losses[one].reshape(()) for one in sorted(run.losses)])
                    self.check.record_losses(f"stage {index}", run.stage.loss_spec, losses)
            self.check.compare()
            self.check = None
        for run in runs.values():
            if run.stage.after_backward is not None:
                run.stage.after_backward(run.module)
        for one in self.connections.tied:
            one.add()

    def fail(self, error: BaseException, action: Action | None) -> None:
        """Tell all ranks that this one waits for, or that wait for it, what stopped it, and in which action."""
        if isinstance(error, TransportError):
            reason = str(error)
        else:
            place = "" if action is None else f" in {action}"
            reason = f"rank {self._setup.context.rank} failed{place}: {type(error).__name__}: {error}"
        if self._use is not None:
            self._use.abort(reason)
        self.connections.abort(reason)


def run_of(index: int, schedule: Schedule, stages: Sequence[Stage], edges: EdgeTensors) -> StageRun:
    """What a rank of a stage computes.

    Args:
        index: of the stage.
        schedule, stages, edges: of the executor.
    """
    by_edge: dict[Edge, Sequence[str]] = {}
    for edge, tensors in edges.items():
        by_edge[Edge(*edge)] = gradient_names(schedule, tensors)
    inputs = [name for edge, names in by_edge.items() if edge[1] == index for name in names]
    outputs = [name for edge, names in by_edge.items() if edge[0] == index for name in names]
    return StageRun(index, stages[index], inputs, outputs)
