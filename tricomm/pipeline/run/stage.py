"""Stage: a part of a model on its own mesh; StageRun: its microbatches between forward and backward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from tricomm.autograd.layouts import gradient_scale
from tricomm.errors import SpecError
from tricomm.kinds import checks_kinds, explains_fields, explains_missing, refuse_wrong_kinds
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Placement
from tricomm.layout.spec import ShardingSpec
from tricomm.pipeline.run.backward import StageBackward
from tricomm.pipeline.schedule.actions import Kind

LOSS = "loss"
"""The name of the output that is a stage's loss."""


@explains_fields
@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Describe a part of a model: where it runs, what it reads, what it returns.

    >>> from torch import nn
    >>> from tricomm import Mesh, Replicate
    >>> first = Stage(Mesh([0], ("x",)), ("tokens",), ("hidden",), nn.Linear(4, 8))
    >>> last = Stage(Mesh([1], ("x",)), ("hidden", "target"), ("loss",), loss=(Replicate(),))
    >>> last.module is None  # rank 0 does not run it
    True

    Attributes:
        mesh: the ranks that compute it together, in whatever way its module does.
        inputs: names of what ``module.forward`` takes, in its order. A name that an edge brings comes from an earlier
            stage; the others come from the data that each step is given.
        outputs: names of what it returns, in its order: a tensor, or a tuple if there are several. Each goes out over
            every edge that carries its name.
        module: the part itself, on the ranks of the mesh; elsewhere None. Parameters that the ranks share are its
            own business.
        loss: if the output "loss" is a scalar to be minimised, its layout, one placement per axis of the mesh:
            Replicate where the ranks of an axis have the same value, ``Partial("avg")`` where the loss is the mean of
            their values (each has a part of the batch), ``Partial()`` where it is the sum. The gradient that each rank
            computes is then that of the loss of the whole batch, so gradients of replicated parameters are to be
            *summed* over the ranks that saw different data.
        after_backward: called with the module at the end of each step, when its gradients are complete but for what
            its ranks owe each other; the place for an all-reduce over a data-parallel axis.

    Raises:
        SpecError: names that stand twice, or a loss without its output.
    """

    mesh: Mesh
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: nn.Module | None = None
    loss: tuple[Placement, ...] | None = None
    after_backward: Callable[[nn.Module], None] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            names = getattr(self, name)
            if not isinstance(names, list | tuple) or len(set(names)) != len(names):
                raise SpecError(f"{name}={names!r} of a stage must be a tuple of distinct names; write ('hidden',)")
            object.__setattr__(self, name, tuple(names))
        refuse_wrong_kinds(Stage.__init__, **{name: getattr(self, name) for name in Stage.__slots__})
        if (LOSS in self.outputs) != (self.loss is not None):
            raise SpecError(
                f"a stage with outputs={self.outputs} and loss={self.loss} is not clear about its loss; name an output "
                f"'{LOSS}' and give its placements on {self.mesh}, or neither"
            )
        if self.loss is not None:
            object.__setattr__(self, "loss", tuple(self.loss))
            _ = self.loss_spec

    @property
    def loss_spec(self) -> ShardingSpec:
        """The layout of the loss, a scalar.

        >>> from tricomm import Mesh, Partial
        >>> last = Stage(Mesh([2, 3], ("dp",)), ("hidden", "target"), ("loss",), loss=(Partial("avg"),))
        >>> print(last.loss_spec)
        float32[] avg over dp on (dp=2: ranks 2-3)
        """
        assert self.loss is not None
        return ShardingSpec(self.mesh, self.loss, (), "float32")

    @property
    def loss_weight(self) -> float:
        """What a rank's value counts in the loss: 1/n for the mean of n.

        >>> from tricomm import Mesh, Partial
        >>> last = Stage(Mesh([2, 3], ("dp",)), ("hidden", "target"), ("loss",), loss=(Partial("avg"),))
        >>> last.loss_weight
        0.5
        """
        return 1.0 if self.loss is None else gradient_scale(self.loss_spec)


@explains_missing
class WithLoss(nn.Module):
    """Join a module and the loss of its output, as a last stage needs it.

    >>> import torch
    >>> from torch import nn
    >>> module = WithLoss(nn.Identity(), nn.functional.mse_loss)
    >>> module(torch.zeros(2, 3), torch.ones(2, 3))  # the input of the module, then the target
    tensor(1.)

    Args:
        module: takes all inputs but the last, and returns one tensor.
        loss: takes that tensor and the last input, and returns a scalar.
    """

    @checks_kinds
    def __init__(self, module: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss.

        >>> module = WithLoss(nn.Identity(), nn.functional.l1_loss)
        >>> module.forward(torch.zeros(2), torch.full((2,), 3.0))
        tensor(3.)
        """
        return self.loss(self.module(*inputs[:-1]), inputs[-1])


class Entry(torch.autograd.Function):
    """Hand a leaf to a module as a tensor that the module may change in place, which no leaf may be.

    Both share memory and version counter, so autograd still refuses a change that would spoil a backward.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        """Return the same memory."""
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient as it is."""
        return gradients[0]


def _unaliased(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the tensor, or a copy if it is a view of one of the others.

    A stage may pass on what it was given. That is a receive buffer, which the next microbatch may fill while it is
    still being sent on.
    """
    place = tensor.untyped_storage().data_ptr()
    return tensor.clone() if any(other.untyped_storage().data_ptr() == place for other in others) else tensor


@dataclass(frozen=True, slots=True)
class SavedForward:
    """What a microbatch leaves behind after its forward.

    Attributes:
        inputs: the leaves that get a gradient, by name.
        backward: of the graph from there to the outputs that get one.
    """

    inputs: dict[str, torch.Tensor]
    backward: StageBackward


class Meter(Protocol):
    """Records what a stage costs; see :class:`tricomm.pipeline.Measurement`."""

    def recorded(self, kind: Kind, inputs: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
        """Surround the computation of one action; a forward says what it reads."""


class GraphRecorder(Protocol):
    """Looks at the graphs of a stage; see :mod:`tricomm.pipeline.run.unused`."""

    inputs_with_gradient: set[str]

    def record(self, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """Look at the graph of a microbatch."""


class StageRun:
    """Compute the microbatches of one stage on one of its ranks.

    Args:
        index: of the stage, for messages.
        stage: with its module.
        gradient_inputs: names of the inputs whose gradient goes back over an edge.
        gradient_outputs: names of the outputs whose gradient comes back over an edge.
    """

    def __init__(
        self, index: int, stage: Stage, gradient_inputs: Sequence[str], gradient_outputs: Sequence[str]
    ) -> None:
        if stage.module is None:
            raise SpecError(f"stage {index} has no module on a rank of its mesh {stage.mesh}; pass module=...")
        self.index = index
        self.stage = stage
        self.module: nn.Module = stage.module
        self.losses: dict[int, torch.Tensor] = {}
        """Per microbatch, as the module gave it."""
        self.meter: Meter | None = None
        """Told of every computation while it is there."""
        self.recorder: GraphRecorder | None = None
        """Told of every graph and gradient while it is there."""
        self._gradient_inputs = frozenset(gradient_inputs)
        self._roots = tuple(name for name in stage.outputs if name in gradient_outputs or name == LOSS)
        self._saved: dict[int, SavedForward] = {}
        self._loss_weights: Sequence[float] = ()

    def begin(self, loss_weights: Sequence[float]) -> None:
        """Begin a step in which the losses of the microbatches have these weights."""
        self.losses.clear()
        self._saved.clear()
        self._loss_weights = loss_weights

    def forward(
        self, microbatch: int, inputs: Mapping[str, torch.Tensor], *, check_trains: bool = False
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs of a microbatch, by name, detached, in memory that no input uses.

        Args:
            microbatch: which.
            inputs: by name. They are not changed unless the module does.
            check_trains: whether to refuse outputs through which nothing of this stage would be trained.

        Raises:
            SpecError: the module returns something else than its stage says, or what trains nothing.
        """
        given = {name: tensor.detach() for name, tensor in inputs.items()}
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items() if name in self._gradient_inputs}
        with torch.enable_grad(), self._metered(Kind.FORWARD, given.values()):
            entries = {name: Entry.apply(leaf) for name, leaf in leaves.items()}  # type: ignore[no-untyped-call]
            returned = self.module(*({**given, **entries}[name] for name in self.stage.inputs))
        outputs = self._named(returned)
        roots = [outputs[name] for name in self._roots]
        if check_trains:
            self._check_trains(roots, bool(leaves))
        if LOSS in outputs:
            self.losses[microbatch] = outputs[LOSS].detach()
        if self.recorder is not None:
            self.recorder.record(dict(zip(self._roots, roots, strict=True)), leaves)
        self._saved[microbatch] = SavedForward(leaves, StageBackward(list(leaves.values()), roots))
        return {name: _unaliased(tensor.detach(), inputs.values()) for name, tensor in outputs.items()}

    def evaluate(self, microbatch: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As forward, without a graph: nothing is kept for a backward."""
        with torch.no_grad():
            outputs = self._named(self.module(*(inputs[name].detach() for name in self.stage.inputs)))
        if LOSS in outputs:
            self.losses[microbatch] = outputs[LOSS]
        return {name: _unaliased(tensor, inputs.values()) for name, tensor in outputs.items()}

    def backward(
        self, kind: Kind, microbatch: int, gradients: Mapping[str, Sequence[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Compute the gradients of the inputs that have one, by name, in memory that no given gradient uses.

        Args:
            kind: BACKWARD, or INPUT_GRADIENT, after which ``weight_gradients`` is still to come.
            microbatch: which.
            gradients: by name of the output, one from each stage that took it.
        """
        saved = self._saved[microbatch]
        given = [self._gradient_of(name, microbatch, gradients) for name in self._roots]
        with self._metered(kind):
            if kind is Kind.BACKWARD:
                found = saved.backward.run(given)
                del self._saved[microbatch]
            else:
                found = saved.backward.input_gradients(given)
        if self.recorder is not None:
            pairs_found = zip(saved.inputs, found, strict=True)
            self.recorder.inputs_with_gradient |= {name for name, one in pairs_found if one is not None}
        pairs = zip(saved.inputs.items(), found, strict=True)
        # What nobody used still owes a gradient to the stage that waits for it.
        return {name: torch.zeros_like(leaf) if one is None else _unaliased(one, given) for (name, leaf), one in pairs}

    def weight_gradients(self, microbatch: int) -> None:
        """Run the second half of a split backward."""
        with self._metered(Kind.WEIGHT_GRADIENT):
            self._saved.pop(microbatch).backward.weight_gradients()

    def weighted_losses(self) -> list[torch.Tensor]:
        """Return what each microbatch adds to the loss of the step."""
        return [loss * self._loss_weights[microbatch] for microbatch, loss in self.losses.items()]

    def _metered(self, kind: Kind, inputs: Iterable[torch.Tensor] = ()) -> AbstractContextManager[None]:
        return nullcontext() if self.meter is None else self.meter.recorded(kind, inputs)

    def _gradient_of(self, name: str, microbatch: int, gradients: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        if name == LOSS:
            weight = self._loss_weights[microbatch] * self.stage.loss_weight
            return torch.full_like(self.losses[microbatch], weight)
        first, *others = gradients[name]
        for other in others:
            first = first + other
        return first

    def _check_trains(self, roots: Sequence[torch.Tensor], has_inputs: bool) -> None:
        has_parameters = any(parameter.requires_grad for parameter in self.module.parameters())
        if roots and (has_parameters or has_inputs) and not any(root.requires_grad for root in roots):
            what = "its parameters" if has_parameters else "the stages before it"
            raise SpecError(
                f"what stage {self.index} returns as {self._roots} does not require grad, so {what} would not be "
                "trained; do not detach it or compute it under torch.no_grad, or, if that is meant, freeze the "
                "parameters with requires_grad_(False) and declare what crosses with gradient=None"
            )

    def _named(self, returned: object) -> dict[str, torch.Tensor]:
        """Check what the module returned; by name."""
        names = self.stage.outputs
        tensors = returned if isinstance(returned, tuple) else (returned,)
        if len(tensors) != len(names) or not all(isinstance(one, torch.Tensor) for one in tensors):
            found = ", ".join(type(one).__name__ for one in tensors)
            raise SpecError(
                f"the module of stage {self.index} returned ({found}), and its outputs are {names}; return a tensor, "
                "or a tuple with one tensor for each name"
            )
        if LOSS in names and tensors[names.index(LOSS)].numel() != 1:
            shape = tuple(tensors[names.index(LOSS)].shape)
            raise SpecError(f"the loss of stage {self.index} has shape {shape}; it must be a scalar: take its mean")
        return dict(zip(names, tensors, strict=True))
