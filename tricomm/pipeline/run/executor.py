"""Executor: runs a schedule for ordinary modules, each stage on its own mesh."""

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from math import isfinite
from typing import Self, Unpack

import torch

from tricomm.errors import SpecError, TransportError
from tricomm.kinds import explains_missing, refuse_wrong_kinds
from tricomm.options import LinkOptions, Options
from tricomm.pipeline.run.connections import Connections, await_all
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.replicas import ReplicaCheck
from tricomm.pipeline.run.sizes import GivenSizes
from tricomm.pipeline.run.stage import LOSS, Stage, StageRun
from tricomm.pipeline.run.step import Data, Evaluation, Observer, Programs, Step
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.run.unused import GradientUse
from tricomm.pipeline.run.wiring import EdgeTensors, check_data, check_queues, check_step, check_wiring, gradient_names
from tricomm.pipeline.schedule.actions import Action, Edge
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.plan.plan import digest_of
from tricomm.transport.coordination.intent import Intent
from tricomm.transport.group import GroupContext, context_of, device_of, resolve_group
from tricomm.transport.telling import describe_failure


class State(Enum):
    """What an executor may do next."""

    READY = "ready for a step"
    FAILED = "a step failed; the next one connects anew"
    CLOSED = "closed"


@explains_missing
class Executor:
    """Run the steps of a pipeline on this rank.

    Every rank of every mesh makes it with the same arguments (but for modules, which only a stage's own ranks have)
    and then calls ``step`` and ``evaluate`` as often as the others. Each edge is a :class:`Link`: activations are
    resharded from the layout of the one stage to that of the other, and gradients back.

    In its first step the ranks of a stage that are said to compute equal gradients of an input, or an equal loss,
    compare them, and a stage that would train nothing is refused. On GPUs the first step, and the first with new sizes,
    hides no communication: a kernel that is new to a device waits for whatever runs there, so nothing may be under way
    that waits for another rank. Parameters that no loss depends on get no gradient,
    as in one process, also where another stage is the one that makes no use of them.

    A step adds to the ``grad`` of the parameters the gradient of the mean of the losses of its microbatches, each
    weighted by its rows where these differ. Zeroing gradients and stepping optimisers is the caller's, as is whatever
    else the ranks of one stage owe each other.

    After an error in a step the next one connects anew, if all ranks call it; gradients may then hold a part of the
    step that failed, and are to be zeroed.

    Two stages that share one rank, which need no communication:

    >>> import torch
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> from torch import nn
    >>> from tricomm import Mesh, Replicate, ShardingSpec
    >>> from tricomm.pipeline import EdgeTensor, Schedule, Stage, WithLoss
    >>> here = Mesh([0], ("x",))
    >>> spec = ShardingSpec(here, (Replicate(),), (2, 3), "float32")
    >>> stages = [
    ...     Stage(here, ("x",), ("hidden",), nn.Linear(3, 3)),
    ...     Stage(here, ("hidden", "y"), ("loss",), WithLoss(nn.Linear(3, 3), nn.functional.mse_loss), (Replicate(),)),
    ... ]
    >>> schedule = Schedule.parse(["0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"])
    >>> with Executor(schedule, stages, {(0, 1): {"hidden": EdgeTensor(spec, spec)}}) as executor:
    ...     loss = executor.step({"x": torch.ones(2, 2, 3), "y": torch.ones(2, 2, 3)})
    ...     same = executor.evaluate({"x": torch.ones(2, 2, 3), "y": torch.ones(2, 2, 3)}).loss
    >>> bool(loss == same), stages[0].module.weight.grad.shape
    (True, torch.Size([3, 3]))
    >>> dist.destroy_process_group()

    Args:
        schedule: of as many stages, with the same edges. Without sends and receives it gets them, with receives one
            compute action ahead. One of forwards only evaluates in ``step`` too.
        stages: one for each, in order.
        edges: what crosses from which stage to which.
        queues: PER_CHANNEL lets all hops of a rank run at once; PER_DIRECTION lets them take turns, and wants a
            schedule that was made for it (``tune`` says which is better: ``tuned.best.queues``).
        tied: parameters of which several stages hold copies.
        loss_scale: the weight of each microbatch's loss; None is its part of the rows, which is one over their number
            if all have as many.
        name: tells executors of the same ranks apart.
        options: those of :class:`tricomm.Options` but ``channel`` and ``name``, which the Executor chooses. The
            timeout bounds how long a rank waits for another, the other's compute included.

    Attributes:
        observer: None, or a function that is told after each action of this rank the action and when it began and
            ended, by ``time.perf_counter()``. A forward or backward counts the wait for what it needs, a send or
            receive only its start: what stages cost, :class:`tricomm.pipeline.Measurement` tells.
        state: what it may do next.

    Raises:
        SpecError, PlanError: arguments that break a rule; the other ranks get a TransportError that says so.
        TransportError: the ranks were given different arguments, or one of them refused or did not come.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        edges: EdgeTensors,
        *,
        queues: Queues = Queues.PER_CHANNEL,
        tied: Sequence[Tied] = (),
        loss_scale: float | None = None,
        name: str = "pipeline",
        **options: Unpack[LinkOptions],
    ) -> None:
        self.context: GroupContext = context_of(resolve_group(options.get("group")))
        self.rank = self.context.rank
        self.name, self.queues = name, queues
        self.state = State.READY
        self.observer: Observer | None = None
        self.on_step: Callable[[float], None] | None = None
        """Told how long each step took that trains, while there is a Measurement."""
        self.measurements = 0
        """How many Measurements were made of it."""
        self.ranks = tuple(range(self.context.size))  # until it is known whose stages they are
        self._options = options
        self._calls = 0
        try:
            kinds = {"queues": queues, "tied": tied, "loss_scale": loss_scale, "name": name}
            refuse_wrong_kinds(Executor.__init__, schedule=schedule, stages=stages, edges=edges, **kinds)
            self.ranks = tuple(sorted({rank for stage in stages for rank in stage.mesh.ranks}))
            self.stages, self.edges, self.tied = tuple(stages), edges, tuple(tied)
            self.options = Options.of(options, "Executor", LinkOptions)
            self.timeout_seconds = self.options.seconds
            self.device = device_of(self.options.device, self.options.group)
            check_queues(queues)
            self.schedule = schedule if schedule.has_communication else with_communication(schedule)
            check_wiring(self.schedule, self.stages, edges)
            check(self.schedule, queues)
            if loss_scale is not None and not isfinite(loss_scale):
                raise SpecError(f"loss_scale={loss_scale} is no finite number; give the weight of a microbatch's loss")
            self._loss_scale = loss_scale
            self.runs = {index: self._run_of(index) for index, stage in enumerate(stages) if self.rank in stage.mesh}
            """The stages of this rank."""
            self._programs = self._new_programs()
            self._connections = self._new_connections()
        except BaseException as error:
            reason = describe_failure(self.rank, f"the making of executor {name!r}", error)
            self.context.rendezvous.abort(self.ranks, reason, f"executor {name}")
            raise
        self.unique = self._connect() if self.runs else ""
        """A name that no other executor has, on all ranks of the meshes."""
        self._check = self._new_check()
        self._use = self._new_use()

    def step(
        self, data: Data, *, sizes: GivenSizes | None = None, loss_weights: Sequence[float] | None = None
    ) -> torch.Tensor | None:
        """Run all microbatches forward and backward.

        ::

            optimizer.zero_grad()
            loss = executor.step({"x": x.split(4), "target": target.split(4)})  # microbatches of 4 rows
            optimizer.step()

        Args:
            data: the inputs that no edge brings, by name: one tensor for each microbatch, as this rank's module takes
                it. Microbatches may have fewer rows than the edges declare, as ``tensor.split`` leaves them: what
                crosses has fewer then too. Every rank must see that, be it in an input that only another stage takes.
            sizes: the sizes of this step that the edges name: one number, or one for each microbatch where these
                differ otherwise than the rows of the data do. The first rank of the first stage tells them to all
                others, and what those give is not looked at. The first step with new sizes makes and connects the
                plans of all edges, for some milliseconds per edge; those of the last 16 combinations are kept.
            loss_weights: one for each microbatch instead of ``loss_scale``, such as its part of the rows; on the ranks
                of the loss.

        Returns:
            The loss of the step as this rank's module gave it (its part, if the loss is Partial), detached; None on
            ranks without a loss.

        Raises:
            SpecError: the executor was closed, gradients are disabled, data are missing or too few, or a tensor is not
                what its edge declares. The other ranks get a TransportError that says so.
            TransportError: another rank failed; the message says which, and why. A rank whose part was done already
                returns, and gets the error in its next call. Ranks of the *same* stage that wait for a failed one
                inside of their own collectives are freed by the timeout of their own process group only.
        """
        return self._run(True, data, sizes, loss_weights).loss

    def evaluate(
        self, data: Data, *, sizes: GivenSizes | None = None, loss_weights: Sequence[float] | None = None
    ) -> Evaluation:
        """Run all microbatches forward only, without a graph; no gradient is touched.

        Modules stay in the mode in which they are: call ``module.eval()`` before, where dropout is to be off.

        ::

            loss = executor.evaluate({"x": x.split(4), "target": target.split(4)}).loss

        Args:
            data, sizes, loss_weights: as for ``step``.

        Raises:
            SpecError, TransportError: as for ``step``.
        """
        return self._run(False, data, sizes, loss_weights)

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Give every rank the numbers of all: one row for each of ``ranks``.

        ::

            norms = executor.gather(torch.tensor([norm_of_this_stage], dtype=torch.float64))

        Args:
            row: shape (n,), float64, n the same on all ranks.

        Raises:
            SpecError: the executor was closed, or its last step failed.
            TransportError: another rank failed.
        """
        if self.state is not State.READY:
            raise SpecError(f"the ranks of executor {self.name!r} cannot tell each other numbers: {self.state.value}")
        try:
            refuse_wrong_kinds(Executor.gather, row=row)
            return self._connections.gather(row)
        except BaseException as error:
            self._fail(error, None)
            raise

    def close(self) -> None:
        """Give back connections, threads and buffers; a later step raises a SpecError. So does a dropped executor.

        ::

            executor.close()  # or use it as ``with Executor(...) as executor:``
        """
        self.state = State.CLOSED
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bound_edges(self) -> dict[Edge, list[EdgeTensor]]:
        """Return the tensors of all edges, with the sizes of the last step.

        ::

            executor.step(data, sizes={"length": 100})
            executor.bound_edges()[Edge(0, 1)][0].source.shape  # (8, 100, 512)
        """
        return self._connections.bound_edges()

    @property
    def ring_nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds.

        ::

            print(f"{executor.ring_nbytes / 1e6:.0f} MB of receive buffers")
        """
        return self._connections.nbytes

    # ---- one call

    def _check_given(
        self, trains: bool, data: Data, sizes: GivenSizes | None, loss_weights: Sequence[float] | None
    ) -> None:
        refuse_wrong_kinds(Executor.step, sizes=sizes, loss_weights=loss_weights)
        check_step(trains, data, loss_weights, self.schedule.microbatches)

    def _run(
        self, trains: bool, data: Data, sizes: GivenSizes | None, loss_weights: Sequence[float] | None
    ) -> Evaluation:
        if self.state is State.CLOSED:
            raise SpecError("a step of an executor that was closed; make another, or close it later")
        if not self.runs:
            self._check_given(False, data, sizes, loss_weights)
            return Evaluation()
        self._calls += 1
        began = time.perf_counter()
        step: Step | None = None
        try:
            if self.state is State.FAILED:
                self._connect_again()
            trains = trains and self.schedule.has_backward
            self._check_given(trains, data, sizes, loss_weights)
            for index, names in self._programs.data_names.items():
                check_data(index, self.rank, names, data, self.schedule.microbatches)
            self._connections.use(sizes, data, self._compare)
            for index, names in self._programs.data_names.items():
                self._connections.check_rows(index, self.rank, {name: data[name] for name in names})
            for run in self.runs.values():
                run.begin(loss_weights or self._weights())
                run.recorder = None
            if trains:
                for index, recorder in self._use.begin({key: run.module for key, run in self.runs.items()}).items():
                    self.runs[index].recorder = recorder
            check = self._check if trains else None
            program = self._programs.next(trains, self._connections.sizes)
            step = Step(program, self._connections.links, data, check, self.observer, self._computing)
            step.run()
            if trains:
                self._finish()
        except BaseException as error:
            # Whatever stops this rank (an error in a module, an interrupt) must reach those that wait for it.
            self._fail(error, None if step is None else step.action)
            raise
        if trains and self.on_step is not None:
            self.on_step(time.perf_counter() - began)
        return step.result()

    def _weights(self) -> list[float]:
        """What each microbatch's loss counts where the step was not told: its part of the rows, or the loss_scale."""
        rows, count = self._connections.rows, self.schedule.microbatches
        if self._loss_scale is None and rows is not None:
            return rows.weights
        return [1.0 / count if self._loss_scale is None else self._loss_scale] * count

    def _compare(self, fields: dict[str, str], call: str) -> None:
        """Return once all ranks have come with the same fields."""
        intent = Intent(self.ranks, fields, digest_of(fields), f"executor {self.unique}, call {self._calls}", call)
        self.context.rendezvous.join(intent, self.timeout_seconds)

    def _computing(self, action: Action) -> AbstractContextManager[None]:
        """Say what this rank computes: meanwhile nobody is late that it will wait for."""
        what = f"the computation of {action} of executor {self.name!r}"
        return self.context.monitor.computing(what, self.timeout_seconds)

    def _finish(self) -> None:
        """What follows the last action of a step that trains."""
        self._use.settle()
        if self._check is not None:
            for index, run in self.runs.items():
                if LOSS in run.stage.outputs:
                    losses = torch.stack([run.losses[one].reshape(()) for one in sorted(run.losses)])
                    self._check.record_losses(f"stage {index}", run.stage.loss_spec, losses)
            self._check.compare()
            self._check = None
        for run in self.runs.values():
            if run.stage.after_backward is not None:
                run.stage.after_backward(run.module)
        for one in self._connections.tied:
            one.add()

    # ---- connecting and failing

    def _run_of(self, index: int) -> StageRun:
        by_edge = {edge: gradient_names(self.schedule, tensors) for edge, tensors in self.edges.items()}
        inputs = [name for edge, names in by_edge.items() if edge[1] == index for name in names]
        outputs = [name for edge, names in by_edge.items() if edge[0] == index for name in names]
        return StageRun(index, self.stages[index], inputs, outputs)

    def _new_programs(self) -> Programs:
        has_kernels = self.context.accelerator_of(self.device) is not None
        return Programs(self.schedule, self.edges, self.runs, loads_kernels=has_kernels)

    def _new_connections(self) -> Connections:
        what = (self.schedule, self.stages, self.edges, self.tied)
        return Connections(*what, self.queues, self.name, self.runs, self.rank, self._options)

    def _connect(self) -> str:
        """Compare with all ranks what is about to run, then connect, in one order on all; returns a name for it."""
        fields = {
            "the number of microbatches": str(self.schedule.microbatches),
            "the schedule": " | ".join(" ".join(map(str, actions)) for actions in self.schedule.lists),
            "queues": self.queues.name,
            "stages": repr([(stage.mesh, stage.inputs, stage.outputs, stage.loss) for stage in self.stages]),
            "edges": repr([(tuple(edge), dict(tensors)) for edge, tensors in self.edges.items()]),
            "tied": repr(list(self.tied)),
        }
        call = f"the connecting of executor {self.name!r}"
        intent = Intent(self.ranks, fields, digest_of(fields), f"executor {self.name}", call)
        unique = self.context.rendezvous.join(intent, self.timeout_seconds, decide=lambda _: uuid.uuid4().hex).decision
        self._connections.connect()
        return unique

    def _new_check(self) -> ReplicaCheck | None:
        """Make what compares gradients and losses in the next step, which is the first one or follows a failure."""
        return ReplicaCheck(self.context.store, self.rank, f"{self.unique}/{self._calls}", self.timeout_seconds)

    def _new_use(self) -> GradientUse:
        """Make what asks which inputs have a gradient."""
        edges = {(edge[0], edge[1]): gradient_names(self.schedule, one) for edge, one in self.edges.items()}
        name = f"{self.unique}/{self._calls}"
        return GradientUse(self.context.store, self.rank, name, self.stages, edges, self.timeout_seconds)

    def _connect_again(self) -> None:
        """After a failure: wait until all ranks are in this call, and connect anew."""
        await_all(self.context.store, self.unique, self.rank, self.ranks, self._calls, self.timeout_seconds)
        self._connections.close()
        self._programs = self._new_programs()
        self._connections = self._new_connections()
        self._connect()
        self._check = self._new_check()
        self._use = self._new_use()
        self.state = State.READY

    def _fail(self, error: BaseException, action: Action | None) -> None:
        """Tell all ranks that this one waits for, or that wait for it."""
        if isinstance(error, TransportError):
            reason = str(error)
        else:
            place = "" if action is None else f" in {action}"
            reason = f"rank {self.rank} failed{place}: {type(error).__name__}: {error}"
        self.state = State.FAILED
        self._use.abort(reason)
        self._connections.abort(reason)
