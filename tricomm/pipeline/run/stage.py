"""Stage: a part of a model on its own mesh; StageRun: its microbatches between forward and backward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from tricomm.autograd import gradient_scale
from tricomm.errors import SpecError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Placement
from tricomm.layout.spec import ShardingSpec
from tricomm.pipeline.run.backward import StageBackward
from tricomm.pipeline.schedule.actions import Kind

LOSS = "loss"
"""The name of the output that is a stage's loss."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A part of a model.

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
            if isinstance(names, str) or len(set(names)) != len(names):
                raise SpecError(f"{name}={names!r} of a stage must be a tuple of distinct names; write ('hidden',)")
            object.__setattr__(self, name, tuple(names))
        if (LOSS in self.outputs) != (self.loss is not None):
            raise SpecError(
                f"a stage with outputs={self.outputs} and loss={self.loss} is not clear about its loss; name an output "
                f"'{LOSS}' and give its placements on {self.mesh}, or neither"
            )
        if self.loss is not None:
            object.__setattr__(self, "loss", tuple(self.loss))
            ShardingSpec(self.mesh, self.loss, (), "float32")

    @property
    def loss_weight(self) -> float:
        """What a rank's value counts in the loss: 1/n for the mean of n."""
        return 1.0 if self.loss is None else gradient_scale(ShardingSpec(self.mesh, self.loss, (), "float32"))


class WithLoss(nn.Module):
    """A module and the loss of its output, as a last stage needs it.

    Args:
        module: takes all inputs but the last, and returns one tensor.
        loss: takes that tensor and the last input, and returns a scalar.
    """

    def __init__(self, module: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return self.loss(self.module(*inputs[:-1]), inputs[-1])


def _unaliased(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """The tensor, or a copy if it is a view of one of the others.

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
    """Notes what a stage costs; see :class:`tricomm.pipeline.Measurement`."""

    def recorded(self, kind: Kind, inputs: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
        """Around the computation of one action; a forward says what it reads."""


class StageRun:
    """One stage on one of its ranks.

    Args:
        index: of the stage, for messages.
        stage: with its module.
        takes: names of the inputs whose gradient goes back over an edge.
        gives: names of the outputs whose gradient comes back over an edge.
        loss_scale: the weight of the loss of a microbatch in that of the step.
    """

    def __init__(self, index: int, stage: Stage, takes: Sequence[str], gives: Sequence[str], loss_scale: float) -> None:
        if stage.module is None:
            raise SpecError(f"stage {index} has no module on a rank of its mesh {stage.mesh}; pass module=...")
        self.index = index
        self.stage = stage
        self.module: nn.Module = stage.module
        self.losses: list[torch.Tensor] = []
        self._takes = frozenset(takes)
        self._roots = tuple(name for name in stage.outputs if name in gives or name == LOSS)
        self.meter: Meter | None = None
        """Told of every computation while it is there."""
        self._loss_scale = loss_scale
        self._saved: dict[int, SavedForward] = {}

    def forward(self, microbatch: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs of a microbatch by name, detached, in memory that no input uses.

        Args:
            microbatch: which.
            inputs: by name. They are not changed unless the module does.

        Raises:
            SpecError: the module returns something else than its stage says.
        """
        given = {name: tensor.detach() for name, tensor in inputs.items()}
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items() if name in self._takes}
        with torch.enable_grad(), self._metered(Kind.FORWARD, given.values()):
            returned = self.module(*(given[name] for name in self.stage.inputs))
        outputs = dict(zip(self.stage.outputs, self._checked(returned), strict=True))
        if LOSS in outputs:
            self.losses.append(outputs[LOSS].detach())
        roots = [outputs[name] for name in self._roots]
        self._saved[microbatch] = SavedForward(leaves, StageBackward(list(leaves.values()), roots))
        return {name: _unaliased(tensor.detach(), inputs.values()) for name, tensor in outputs.items()}

    def backward(
        self, kind: Kind, microbatch: int, gradients: Mapping[str, Sequence[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The gradients of the inputs that have one, by name, in memory that no given gradient uses.

        Args:
            kind: BACKWARD, or INPUT_GRADIENT, after which ``weight_gradients`` is still to come.
            microbatch: which.
            gradients: by name of the output, one from each stage that took it.
        """
        saved = self._saved[microbatch]
        given = [self._gradient_of(name, gradients) for name in self._roots]
        with self._metered(kind):
            if kind is Kind.BACKWARD:
                found = saved.backward.run(given)
                del self._saved[microbatch]
            else:
                found = saved.backward.input_gradients(given)
        pairs = zip(saved.inputs.items(), found, strict=True)
        # What nobody used still owes a gradient to the stage that waits for it.
        return {name: torch.zeros_like(leaf) if one is None else _unaliased(one, given) for (name, leaf), one in pairs}

    def weight_gradients(self, microbatch: int) -> None:
        """The second half of a split backward."""
        with self._metered(Kind.WEIGHT_GRADIENT):
            self._saved.pop(microbatch).backward.weight_gradients()

    def weighted_losses(self) -> list[torch.Tensor]:
        """What each microbatch adds to the loss of the step."""
        return [loss * self._loss_scale for loss in self.losses]

    def reset(self) -> None:
        """Begin a step."""
        self.losses.clear()
        self._saved.clear()

    def _metered(self, kind: Kind, inputs: Iterable[torch.Tensor] = ()) -> AbstractContextManager[None]:
        return nullcontext() if self.meter is None else self.meter.recorded(kind, inputs)

    def _gradient_of(self, name: str, gradients: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        if name == LOSS:
            return torch.full_like(self.losses[-1], self._loss_scale * self.stage.loss_weight)
        first, *others = gradients[name]
        for other in others:
            first = first + other
        return first

    def _checked(self, returned: object) -> Sequence[torch.Tensor]:
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
        return tensors
