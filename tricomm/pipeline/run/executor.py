"""Executor: runs a schedule for ordinary modules, each stage on its own mesh.

Made once on every rank, with the same arguments but for the modules, then called every step:

    stages = [
        Stage(mesh_a, ("tokens",), ("hidden",), module_a),  # module: None on ranks of other meshes
        Stage(mesh_b, ("hidden", "targets"), ("loss",), module_b, loss=(Replicate(),)),
    ]
    edges = {(0, 1): {"hidden": EdgeTensor(source_spec, destination_spec)}}
    executor = Executor(eager_one_f_one_b(2, 8), stages, edges)
    loss = executor.step({"tokens": tokens.chunk(8), "targets": targets.chunk(8)})  # gradients are in .grad
"""

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Self, Unpack

import torch

from tricomm.errors import SpecError, TransportError, TricommError
from tricomm.options import LinkOptions, Options
from tricomm.pipeline.run.directed_link import DirectedLink, ReceiveHandle
from tricomm.pipeline.run.edge import EdgeTensor, Link
from tricomm.pipeline.run.replicas import ReplicaCheck
from tricomm.pipeline.run.sizes import SizeAgreement
from tricomm.pipeline.run.stage import Stage, StageRun
from tricomm.pipeline.run.tied import Tied, TiedGradients
from tricomm.pipeline.run.wiring import Edges, check_wiring, data_names, fifo_of, make_links
from tricomm.pipeline.schedule.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.plan.plan import digest_of
from tricomm.transport.communicator import GroupContext, context_of, device_of, resolve_group

MAX_SIGNATURES = 16
"""Combinations of sizes whose plans are kept."""

Observer = Callable[[Action, float, float], None]
"""Told after each action of this rank when it began and ended, by time.perf_counter()."""


class Executor:
    """Runs the steps of a pipeline on this rank.

    Every rank of every mesh makes it with the same arguments (but for modules, which only a stage's own ranks have)
    and then calls ``step`` as often. Each edge is a :class:`Link`: activations are resharded from the layout of the one
    stage to that of the other, and gradients back.

    In its first step the ranks of a stage that are said to compute equal gradients of an input compare them.

    A step adds to the ``grad`` of the parameters the gradient of the mean of the losses of its microbatches. Zeroing
    gradients and stepping optimisers is the caller's, as is whatever else the ranks of one stage owe each other.

    Args:
        schedule: of as many stages, with the same edges. Without sends and receives it gets them, with receives one
            compute action ahead.
        stages: one for each, in order.
        edges: what crosses from which stage to which.
        queues: PER_CHANNEL lets all hops of a rank run at once; PER_DIRECTION lets them take turns, and wants a
            schedule that was made for it (``tune`` says which is better: ``tuned.best.queues``).
        tied: parameters of which several stages hold copies.
        loss_scale: the weight of each microbatch's loss; None is one over their number.
        name: tells executors of the same ranks apart.
        options: those of :class:`tricomm.Options` but ``channel`` and ``name``, which the Executor chooses. The
            timeout bounds how long a rank waits for another, the other's compute included.

    Attributes:
        observer: None, or a function that is told after each action of this rank the action and when it began and
            ended, by ``time.perf_counter()``. A forward or backward counts the wait for what it needs, a send or
            receive only its start: what stages cost, :class:`tricomm.pipeline.Measurement` tells.

    Raises:
        SpecError, PlanError: arguments that break a rule; the other ranks get a TransportError that says so.
        TransportError: the ranks were given different arguments, or one of them refused or did not come.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        edges: Edges,
        *,
        queues: Queues = Queues.PER_CHANNEL,
        tied: Sequence[Tied] = (),
        loss_scale: float | None = None,
        name: str = "pipeline",
        **options: Unpack[LinkOptions],
    ) -> None:
        self.context: GroupContext = context_of(resolve_group(options.get("group")))
        self.rank = self.context.rank
        self.name = name
        self.failure: str | None = None
        self._is_closed = False
        self.observer: Observer | None = None
        self.measurements = 0
        """How many Measurements were made of it."""
        self.ranks = tuple(sorted({rank for stage in stages for rank in stage.mesh.ranks}))
        self._options = options
        self._links: dict[Edge, Link] = {}
        self._bound: OrderedDict[tuple[tuple[str, int], ...], dict[Edge, Link]] = OrderedDict()
        self._action: Action | None = None
        self._replicas: ReplicaCheck | None = None
        try:
            self.options = Options.of(options, "Executor", LinkOptions)
            self.timeout_seconds = self.options.seconds
            self.device = device_of(self.options.device, self.options.group)
            self.queues, self._turns = queues, fifo_of(queues)
            self.schedule = schedule if schedule.has_communication else with_communication(schedule)
            self.stages, self.edges = tuple(stages), edges
            check_wiring(self.schedule, self.stages, edges)
            check(self.schedule, queues)
            scale = 1.0 / schedule.microbatches if loss_scale is None else loss_scale
            self._flowing = {edge: _with_gradient(tensors) for edge, tensors in edges.items()}
            self.runs = {i: self._run_of(i, scale) for i, stage in enumerate(stages) if self.rank in stage.mesh}
            """The stages of this rank."""
            self._data_names = {index: data_names(index, stages[index], edges) for index in self.runs}
            self.pipeline_rank = self.schedule.pipeline_rank_of(next(iter(self.runs))) if self.runs else None
            modules = {index: run.module for index, run in self.runs.items()}
            self._tied = [
                TiedGradients(one, modules, f"{name} tied {number}", options) for number, one in enumerate(tied)
            ]
            names = {size for tensors in edges.values() for tensor in tensors.values() for size in tensor.names}
            self._sizes: SizeAgreement | None = None
            if names:
                self._sizes = SizeAgreement(tuple(names), stages[0].mesh.ranks[0], self.ranks, name, options)
            elif self.runs:
                self._bound[()] = make_links(self.schedule, edges, {}, self.rank, name, self._turns, options)
        except TricommError as error:
            self.context.rendezvous.abort(self.ranks, f"{type(error).__name__}: {error}", f"executor {name}")
            raise
        self.unique = self._connect(tied) if self.runs else ""
        """A name that no other executor has, on all ranks of the meshes."""
        self._posted: dict[tuple[Channel, int], ReceiveHandle] = {}
        self._outbox: dict[tuple[Channel, int], list[torch.Tensor]] = {}
        self._held: dict[tuple[int, int], list[ReceiveHandle]] = {}

    def step(
        self, data: Mapping[str, Sequence[torch.Tensor]], *, sizes: Mapping[str, int] | None = None
    ) -> torch.Tensor | None:
        """Run all microbatches forward and backward.

        Args:
            data: the inputs that no edge brings, by name: one tensor for each microbatch, as this rank's module takes
                it. Names that the stages of this rank do not take are ignored.
            sizes: the sizes of this step that the edges name. The first rank of the first stage tells them to all
                others, and what those give is not looked at. The first step with new sizes makes and connects the
                plans of all edges, for some milliseconds per edge; those of the last 16 combinations are kept.

        Returns:
            The loss of the step as this rank's module gave it (its part, if the loss is Partial), detached; None on
            ranks without a loss.

        Raises:
            SpecError: the executor was closed, data are missing or too few, or a tensor is not what its edge declares.
            TransportError: another rank failed; the message says which, and why. The executor is broken then, and a
                new one is to be made. A rank whose part was done already returns, and gets the error in its next
                step. Ranks of the *same* stage that wait for a failed one inside of their own collectives are freed
                by the timeout of their own process group only.
        """
        if self._is_closed:
            raise SpecError("a step of an executor that was closed; make another, or close it later")
        if not self.runs:
            return None
        if self.failure is not None:
            raise TransportError(f"the executor failed in an earlier step; make a new one ({self.failure})")
        try:
            self._bind(sizes)
            mine = self._checked(data)
            for run in self.runs.values():
                run.reset()
            assert self.pipeline_rank is not None
            for action in self.schedule.lists[self.pipeline_rank]:
                self._action = action
                began = time.perf_counter()
                self._do(action, mine)
                if self.observer is not None:
                    self.observer(action, began, time.perf_counter())
            self._action = None
            self._finish()
        except BaseException as error:
            # Whatever stops this rank (an error in a module, an interrupt) must reach those that wait for it.
            self._fail(error)
            raise
        losses = [loss for run in self.runs.values() for loss in run.weighted_losses()]
        return torch.stack(losses).sum() if losses else None

    def close(self) -> None:
        """Give back connections, threads and buffers; a later step raises a SpecError. So does a dropped executor."""
        self._is_closed = True
        for links in (self._links, *self._bound.values()):
            for link in links.values():
                link.close()
        for one in self._tied:
            one.close()
        if self._sizes is not None:
            self._sizes.resharder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bound_edges(self) -> dict[Edge, list[EdgeTensor]]:
        """The tensors of all edges, with the sizes of the last step."""
        sizes = dict(next(reversed(self._bound), ()))
        return {edge: [tensor.bound(sizes) for tensor in self.edges[edge].values()] for edge in self.schedule.edges}

    @property
    def ring_nbytes(self) -> int:
        """Bytes of receive buffers that this rank holds."""
        return sum(directed_link.nbytes for link in self._links.values() for directed_link in link.directed_links)

    # ---- one action

    def _do(self, action: Action, data: Mapping[str, Sequence[torch.Tensor]]) -> None:
        kind, microbatch = action.kind, action.microbatch
        if kind.is_compute:
            run = self.runs[action.stage]
            if kind is Kind.FORWARD:
                self._forward(action, run, data)
            elif kind is Kind.WEIGHT_GRADIENT:
                run.weight_gradients(microbatch)
            else:
                self._backward(action, run)
            if kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
                for handle in self._held.pop((action.stage, microbatch), ()):
                    handle.release()
            return
        directed_link = self._directed_link(action.channel)
        if kind.is_send:
            tensors = self._outbox.pop((action.channel, microbatch))
            if directed_link is not None:
                directed_link.send(tensors, microbatch)
        elif directed_link is not None:
            self._posted[action.channel, microbatch] = directed_link.recv(microbatch)

    def _forward(self, action: Action, run: StageRun, data: Mapping[str, Sequence[torch.Tensor]]) -> None:
        stage, microbatch = action.stage, action.microbatch
        inputs = {name: data[name][microbatch] for name in self._data_names[stage]}
        for channel in self.schedule.inputs(action):
            inputs.update(zip(self.edges[channel.edge], self._take(channel, action), strict=True))
        outputs = run.forward(microbatch, inputs)
        for channel in self.schedule.outputs(action):
            self._give(channel, microbatch, [outputs[name] for name in self.edges[channel.edge]])

    def _backward(self, action: Action, run: StageRun) -> None:
        gradients: dict[str, list[torch.Tensor]] = {}
        for channel in self.schedule.inputs(action):
            for name, gradient in zip(self._flowing[channel.edge], self._take(channel, action), strict=True):
                gradients.setdefault(name, []).append(gradient)
        found = run.backward(action.kind, action.microbatch, gradients)
        for channel in self.schedule.outputs(action):
            names = self._flowing[channel.edge]
            if self._replicas is not None and action.microbatch == 0 and (link := self._links.get(channel.edge)):
                specs = [link.tensors[index].gradient_specs()[0] for index in link.differentiable]
                for name, spec in zip(names, specs, strict=True):
                    self._replicas.note(f"input {name!r} of stage {action.stage}", spec, found[name])
            self._give(channel, action.microbatch, [found[name] for name in names])

    def _give(self, channel: Channel, microbatch: int, tensors: list[torch.Tensor]) -> None:
        """Put tensors where the send action, or the other stage of this pipeline rank, finds them."""
        directed_link = self._directed_link(channel)
        if channel in self.schedule.channels or directed_link is None:
            self._outbox[channel, microbatch] = tensors
        else:
            directed_link.send(tensors, microbatch)
            self._posted[channel, microbatch] = directed_link.recv(microbatch)

    def _take(self, channel: Channel, action: Action) -> Sequence[torch.Tensor]:
        """What came over a channel, for an action of this rank; nothing if the channel carries nothing."""
        key = (channel, action.microbatch)
        if self._directed_link(channel) is None:
            return self._outbox.pop(key, ())
        handle = self._posted.pop(key)
        self._held.setdefault((action.stage, action.microbatch), []).append(handle)
        return handle.wait_all()

    def _directed_link(self, channel: Channel) -> DirectedLink | None:
        link = self._links.get(channel.edge)
        if link is None:
            return None
        return link.forward if channel.is_forward else link.backward

    # ---- around the actions

    def _run_of(self, index: int, loss_scale: float) -> StageRun:
        takes = [name for edge, names in self._flowing.items() if edge[1] == index for name in names]
        gives = [name for edge, names in self._flowing.items() if edge[0] == index for name in names]
        return StageRun(index, self.stages[index], takes, gives, loss_scale)

    def _connect(self, tied: Sequence[Tied]) -> str:
        """Compare with all ranks what is about to run, then connect, in one order on all; returns a name for it."""
        fields = {
            "the number of microbatches": str(self.schedule.microbatches),
            "the schedule": " | ".join(" ".join(map(str, actions)) for actions in self.schedule.lists),
            "queues": self.queues.name,
            "stages": repr([(stage.mesh, stage.inputs, stage.outputs, stage.loss) for stage in self.stages]),
            "edges": repr([(tuple(edge), dict(tensors)) for edge, tensors in self.edges.items()]),
            "tied": repr(list(tied)),
        }
        unique: str = self.context.rendezvous.join(
            digest_of(fields),
            self.ranks,
            lambda: fields,
            self.timeout_seconds,
            decide=lambda _: uuid.uuid4().hex,
            channel=f"executor {self.name}",
        )
        self._replicas = ReplicaCheck(self.context.store, self.rank, unique, self.timeout_seconds)
        for one in self._tied:
            one.connect()
        if self._sizes is not None:
            self._sizes.resharder.connect()
        else:
            self._links = self._bound[()]
            for link in self._links.values():
                link.connect()
        return unique

    def _bind(self, sizes: Mapping[str, int] | None) -> None:
        """Use the Links for the sizes of this step; make and connect them if they are new."""
        if self._sizes is None:
            if sizes:
                raise SpecError(f"sizes={dict(sizes)}, and no edge has a size with a name; leave them out")
            return
        agreed = self._sizes.agree(sizes)
        key = tuple(sorted(agreed.items()))
        links = self._bound.get(key)
        if links is self._links and links:
            return
        for link in self._links.values():
            for directed_link in link.directed_links:
                directed_link.drop_buffers()
        if links is None:
            links = make_links(self.schedule, self.edges, agreed, self.rank, self.name, self._turns, self._options)
            self._links = links
            for link in links.values():
                link.connect()
            if len(self._bound) >= MAX_SIGNATURES:
                self._bound.popitem(last=False)
        self._bound[key] = self._links = links
        self._bound.move_to_end(key)

    def _checked(self, data: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, Sequence[torch.Tensor]]:
        """The data that the stages of this rank take."""
        mine: dict[str, Sequence[torch.Tensor]] = {}
        for index, names in self._data_names.items():
            for name in names:
                found = len(data[name]) if name in data else 0
                if found != self.schedule.microbatches:
                    raise SpecError(
                        f"input {name!r} of stage {index} has {found} tensors in the step's data on rank {self.rank}, "
                        f"and the schedule has {self.schedule.microbatches} microbatches; pass one for each, such as "
                        f"{{{name!r}: tensor.chunk({self.schedule.microbatches})}}"
                    )
                mine[name] = data[name]
        return mine

    def _finish(self) -> None:
        for link in self._links.values():
            link.flush()
        if self._replicas is not None:
            self._replicas.compare()
            self._replicas = None
        for run in self.runs.values():
            if run.stage.after_backward is not None:
                run.stage.after_backward(run.module)
        for one in self._tied:
            one.add()

    def _fail(self, error: BaseException) -> None:
        """Tell all ranks that this one waits for, or that wait for it."""
        if isinstance(error, TransportError):
            reason = str(error)
        else:
            place = "" if self._action is None else f" in {self._action}"
            reason = f"rank {self.rank} failed{place}: {type(error).__name__}: {error}"
        self.failure = reason
        for link in self._links.values():
            link.abort(reason)
        for one in self._tied:
            one.abort(reason)
        if self._sizes is not None:
            self._sizes.resharder.abort(reason)
        self._posted.clear()
        self._outbox.clear()
        self._held.clear()


def _with_gradient(tensors: Mapping[str, EdgeTensor]) -> tuple[str, ...]:
    """The names of those that have a gradient, in the order in which gradients cross."""
    return tuple(name for name, tensor in tensors.items() if tensor.gradient is not None)
