"""Step: one step of a pipeline on one rank, from its first action to its last."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.directed_link import DirectedLink, ReceiveHandle, SendHandle, Sizes
from tricomm.pipeline.run.replicas import ReplicaCheck
from tricomm.pipeline.run.stage import LOSS, StageRun
from tricomm.pipeline.run.wiring import EdgeTensors, data_names, gradient_names
from tricomm.pipeline.schedule.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.schedule.communication import with_synchronous_communication
from tricomm.pipeline.schedule.schedule import Schedule

Data = Mapping[str, Sequence[torch.Tensor] | torch.Tensor]
"""Inputs that no edge brings, by name: one tensor for each microbatch."""

Observer = Callable[[Action, float, float], None]
"""Told after each action of this rank when it began and ended, by time.perf_counter()."""


Computing = Callable[[Action], AbstractContextManager[None]]
"""What surrounds the computation of an action."""


def _nothing(action: Action) -> AbstractContextManager[None]:
    return nullcontext()


class Program:
    """What a rank does in every step, worked out once.

    Args:
        schedule: with sends and receives; of forwards only for an evaluation.
        edges: what crosses them.
        runs: the stages of this rank.
        is_synchronous: whether a rank goes on only when what it sends or receives has crossed; for a schedule of
            ``with_synchronous_communication``.
    """

    def __init__(
        self, schedule: Schedule, edges: EdgeTensors, runs: Mapping[int, StageRun], is_synchronous: bool = False
    ) -> None:
        self.schedule, self.edges, self.runs, self.is_synchronous = schedule, edges, runs, is_synchronous
        self.gradient_names = {edge: gradient_names(schedule, tensors) for edge, tensors in edges.items()}
        self.data_names = {index: data_names(index, run.stage, edges) for index, run in runs.items()}
        self.actions: Sequence[Action] = ()
        if runs:
            self.actions = schedule.lists[schedule.pipeline_rank_of(next(iter(runs)))]

    def kept_outputs(self, stage: int) -> tuple[str, ...]:
        """The outputs of a stage that no edge carries, but for the loss."""
        carried = {name for (source, _), tensors in self.edges.items() if source == stage for name in tensors}
        return tuple(name for name in self.runs[stage].stage.outputs if name not in carried and name != LOSS)


MAX_SIZES = 1024
"""Sizes of so many microbatches are remembered, those used last; the same on all ranks, as all take the same steps."""


class Programs:
    """What a rank does in steps that train and in evaluations, and in the first of either with new sizes.

    A kernel that a device has not run before waits for all that run there while the driver loads it, and the host waits
    with it, in whatever it asks of the device. A receive runs until its message comes, a send until it is received. So
    two ranks that load kernels while messages are under way can wait for each other. Nothing is under way in the first
    step, in which all kernels run that later ones need.

    Args:
        schedule, edges, runs: see Program.
        loads_kernels: whether this rank computes on such a device.
    """

    def __init__(
        self, schedule: Schedule, edges: EdgeTensors, runs: Mapping[int, StageRun], loads_kernels: bool
    ) -> None:
        schedules = {True: schedule, False: schedule.forward_only()}
        self._usual = {trains: Program(one, edges, runs) for trains, one in schedules.items()}
        self._first = {
            trains: Program(with_synchronous_communication(one), edges, runs, is_synchronous=True)
            for trains, one in schedules.items()
            if loads_kernels
        }
        self._had: dict[tuple[bool, Sizes | None], None] = {}
        self.data_names = self._usual[True].data_names

    def next(self, trains: bool, sizes: tuple[Sizes, ...]) -> Program:
        """Return that of the next step.

        Args:
            trains: whether it has backwards.
            sizes: of its microbatches.
        """
        if not self._first:
            return self._usual[trains]
        # A kernel is of one microbatch, in whatever company that comes; None stands for what every step has.
        keys = [(trains, one) for one in dict.fromkeys([None, *sizes])]
        had = all(key in self._had for key in keys)
        for key in keys:
            self._had.pop(key, None)
            self._had[key] = None  # as the last
        while len(self._had) > MAX_SIZES:
            del self._had[next(iter(self._had))]
        return (self._usual if had else self._first)[trains]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation gives, on this rank.

    >>> evaluation = Evaluation(torch.tensor(0.5), (torch.tensor(0.25), torch.tensor(0.75)))
    >>> evaluation.loss, len(evaluation.losses)  # the mean, and one a microbatch
    (tensor(0.5000), 2)

    Attributes:
        loss: of all microbatches together, weighted as in a step; None on ranks without a loss.
        losses: of each microbatch, as the module gave it.
        outputs: by name, those that no edge carries, one tensor for each microbatch.
    """

    loss: torch.Tensor | None = None
    losses: tuple[torch.Tensor, ...] = ()
    outputs: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """Carry out the actions of one step in order.

    Attributes:
        program: what is done.
        links: of this rank's edges.
        data: of the step, checked.
        check: where gradients of the first step are recorded; None in all others.
        observer: told of each action.
        computing: surrounds what a stage computes, without its waits; told of the action.
        action: that is being carried out; None before and after.
        outputs: of an evaluation, by name, then by microbatch.
    """

    program: Program
    links: Mapping[Edge, Link]
    data: Data
    check: ReplicaCheck | None = None
    observer: Observer | None = None
    computing: Computing = _nothing
    action: Action | None = None
    outputs: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    _posted: dict[tuple[Channel, int], ReceiveHandle] = field(default_factory=dict)
    _produced: dict[tuple[Channel, int], list[torch.Tensor]] = field(default_factory=dict)
    _held: dict[tuple[int, int], list[ReceiveHandle]] = field(default_factory=dict)

    def run(self) -> None:
        """Carry out all actions of this rank, and wait until what it sent has left."""
        for action in self.program.actions:
            self.action = action
            began = time.perf_counter()
            if action.kind.is_compute:
                self._compute(action)
            elif action.kind.is_send:
                self._send(action)
            else:
                self._receive(action)
            if self.observer is not None:
                self.observer(action, began, time.perf_counter())
        self.action = None
        for link in self.links.values():
            link.flush()

    def result(self) -> Evaluation:
        """Return what the stages of this rank gave."""
        runs = self.program.runs.values()
        weighted = [loss for run in runs for loss in run.weighted_losses()]
        losses = [run.losses[one] for run in runs for one in sorted(run.losses)]
        outputs = {name: tuple(one[number] for number in sorted(one)) for name, one in self.outputs.items()}
        return Evaluation(torch.stack(weighted).sum() if weighted else None, tuple(losses), outputs)

    def _compute(self, action: Action) -> None:
        run = self.program.runs[action.stage]
        if action.kind is Kind.FORWARD:
            self._forward(action, run)
        elif action.kind is Kind.WEIGHT_GRADIENT:
            with self.computing(action):
                run.weight_gradients(action.microbatch)
        else:
            self._backward(action, run)
        if self.program.schedule.ends_microbatch(action):
            for handle in self._held.pop((action.stage, action.microbatch), ()):
                handle.release()

    def _send(self, action: Action) -> None:
        tensors = self._produced.pop((action.channel, action.microbatch))
        directed_link = self._directed_link(action.channel)
        if directed_link is not None:
            self._settle(directed_link.send(tensors, action.microbatch))

    def _receive(self, action: Action) -> None:
        directed_link = self._directed_link(action.channel)
        if directed_link is not None:
            self._post(directed_link, action.channel, action.microbatch)

    def _forward(self, action: Action, run: StageRun) -> None:
        schedule, stage, microbatch = self.program.schedule, action.stage, action.microbatch
        inputs = {name: self.data[name][microbatch] for name in self.program.data_names[stage]}
        for channel in schedule.inputs(action):
            inputs.update(zip(self.program.edges[channel.edge], self._arrived(channel, action), strict=True))
        with self.computing(action):
            if schedule.has_backward:
                outputs = run.forward(microbatch, inputs, check_trains=self.check is not None)
            else:
                outputs = run.evaluate(microbatch, inputs)
        if not schedule.has_backward:
            for name in self.program.kept_outputs(stage):
                self.outputs.setdefault(name, {})[microbatch] = outputs[name]
        channels = schedule.outputs(action)
        takers = Counter(name for channel in channels for name in self.program.edges[channel.edge])
        for channel in channels:
            # A stage of this rank may change what it gets in place; others must not see that.
            is_own = self._directed_link(channel) is None
            names = self.program.edges[channel.edge]
            tensors = [outputs[name].clone() if is_own and takers[name] > 1 else outputs[name] for name in names]
            self._hand_over(channel, microbatch, tensors)

    def _backward(self, action: Action, run: StageRun) -> None:
        schedule, names_of = self.program.schedule, self.program.gradient_names
        gradients: dict[str, list[torch.Tensor]] = {}
        for channel in schedule.inputs(action):
            for name, gradient in zip(names_of[channel.edge], self._arrived(channel, action), strict=True):
                gradients.setdefault(name, []).append(gradient)
        with self.computing(action):
            found = run.backward(action.kind, action.microbatch, gradients)
        for channel in schedule.outputs(action):
            names = names_of[channel.edge]
            link = self.links.get(channel.edge)
            if self.check is not None and link is not None and action.microbatch == 0:
                for name, spec in zip(names, link.gradient_layouts(), strict=True):
                    self.check.record_gradient(f"input {name!r} of stage {action.stage}", spec, found[name])
            self._hand_over(channel, action.microbatch, [found[name] for name in names])

    def _hand_over(self, channel: Channel, microbatch: int, tensors: list[torch.Tensor]) -> None:
        """Put tensors where the send action, or the other stage of this pipeline rank, finds them."""
        directed_link = self._directed_link(channel)
        if channel in self.program.schedule.channels or directed_link is None:
            self._produced[channel, microbatch] = tensors
        else:
            directed_link.send(tensors, microbatch)
            self._post(directed_link, channel, microbatch)

    def _post(self, directed_link: DirectedLink, channel: Channel, microbatch: int) -> None:
        """Post a receive."""
        handle = self._posted[channel, microbatch] = directed_link.recv(microbatch)
        self._settle(handle)

    def _settle(self, handle: SendHandle | ReceiveHandle) -> None:
        """Where all is synchronous, wait until it has crossed."""
        if self.program.is_synchronous:
            handle.join()

    def _arrived(self, channel: Channel, action: Action) -> Sequence[torch.Tensor]:
        """Wait for what comes over a channel, for an action of this rank; nothing if the channel carries nothing."""
        key = (channel, action.microbatch)
        if self._directed_link(channel) is None:
            return self._produced.pop(key, ())
        handle = self._posted.pop(key)
        self._held.setdefault((action.stage, action.microbatch), []).append(handle)
        return handle.wait_all()

    def _directed_link(self, channel: Channel) -> DirectedLink | None:
        """The direction that a channel names; None if nothing crosses it, or only from stage to stage of this rank."""
        link = self.links.get(channel.edge)
        if link is None:
            return None
        return link.forward if channel.is_forward else link.backward
