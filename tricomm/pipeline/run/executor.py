"""Executor: runs a schedule for ordinary modules, each stage on its own mesh."""

import time
from collections.abc import Callable, Sequence
from enum import Enum
from math import isfinite
from typing import Self, Unpack

import torch

from tricomm.errors import SpecError
from tricomm.kinds import explains_missing, refuse_wrong_kinds
from tricomm.options import LinkOptions, Options
from tricomm.pipeline.run.connections import await_all
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.generation import Generation, Setup, run_of
from tricomm.pipeline.run.sizes import GivenSizes
from tricomm.pipeline.run.stage import Stage
from tricomm.pipeline.run.step import Data, Evaluation, Observer, Step
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.run.wiring import EdgeTensors, check_queues, check_step, check_wiring
from tricomm.pipeline.schedule.actions import Action, Edge
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule
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
            here = (index for index, stage in enumerate(stages) if self.rank in stage.mesh)
            self.runs = {index: run_of(index, self.schedule, self.stages, edges) for index in here}
            """The stages of this rank."""
            self._setup = Setup(
                context=self.context,
                device=self.device,
                timeout_seconds=self.timeout_seconds,
                options=options,
                name=name,
                schedule=self.schedule,
                stages=self.stages,
                edges=edges,
                tied=self.tied,
                queues=queues,
                loss_scale=loss_scale,
                ranks=self.ranks,
                runs=self.runs,
            )
            self._generation = Generation(self._setup)
        except BaseException as error:
            reason = describe_failure(self.rank, f"the making of executor {name!r}", error)
            self.context.rendezvous.abort(self.ranks, reason, f"executor {name}")
            raise
        self.unique = self._generation.connect("", self._calls) if self.runs else ""
        """A name that no other executor has, on all ranks of the meshes."""

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
            return self._generation.connections.gather(row)
        except BaseException as error:
            self._fail(error, None)
            raise

    def close(self) -> None:
        """Give back connections, threads and buffers; a later step raises a SpecError. So does a dropped executor.

        ::

            executor.close()  # or use it as ``with Executor(...) as executor:``
        """
        self.state = State.CLOSED
        self._generation.connections.close()

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
        return self._generation.connections.bound_edges()

    @property
    def ring_nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds.

        ::

            print(f"{executor.ring_nbytes / 1e6:.0f} MB of receive buffers")
        """
        return self._generation.connections.nbytes

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
            place = f"executor {self.unique}, call {self._calls}"
            step = self._generation.step(trains, data, sizes, loss_weights, self.observer, place)
            step.run()
            if trains:
                self._generation.finish()
        except BaseException as error:
            # Whatever stops this rank (an error in a module, an interrupt) must reach those that wait for it.
            self._fail(error, None if step is None else step.action)
            raise
        if trains and self.on_step is not None:
            self.on_step(time.perf_counter() - began)
        return step.result()

    def _connect_again(self) -> None:
        """After a failure: wait until all ranks are in this call, and connect anew."""
        await_all(self.context.store, self.unique, self.rank, self.ranks, self._calls, self.timeout_seconds)
        self._generation.connections.close()
        self._generation = Generation(self._setup)
        self._generation.connect(self.unique, self._calls)
        self.state = State.READY

    def _fail(self, error: BaseException, action: Action | None) -> None:
        """Tell all ranks that this one waits for, or that wait for it."""
        self.state = State.FAILED
        self._generation.fail(error, action)
