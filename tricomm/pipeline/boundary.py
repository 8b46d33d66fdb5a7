"""What crosses between two neighbouring stages on different meshes: activations one way, their gradients the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tricomm.autograd import gradient_scale, gradient_specs
from tricomm.errors import SpecError
from tricomm.reshard import Handle, Resharder
from tricomm.sharding import ShardingSpec

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Crossing:
    """One tensor of a stage boundary.

    Attributes:
        source: the layout of one microbatch's output at the stage that gives it.
        destination: the layout of the input at the stage that takes it; shape and dtype default to the source's.
        gradient: the layout in which the taking stage has the gradient; None is that of the input, where replicas
            have equal gradients. ``Partial`` on an axis says that the ranks along it have contributions to be added.

    Raises:
        SpecError: both on some rank, or a gradient that is not of the input's shape or on its mesh.
    """

    source: ShardingSpec
    destination: ShardingSpec
    gradient: ShardingSpec | None = None

    def __post_init__(self) -> None:
        both = sorted(set(self.source.mesh.ranks) & set(self.destination.mesh.ranks))
        if both:
            raise SpecError(
                f"rank {both[0]} is on {self.source.mesh} and on {self.destination.mesh}, and torch hands tensors "
                "between stages of one rank over without a transfer; give neighbouring stages ranks of their own"
            )
        gradient = self.gradient
        if gradient is not None and (
            gradient.mesh != self.destination.mesh or gradient.global_shape != self.source.global_shape
        ):
            raise SpecError(
                f"the gradient's layout {gradient} is not one of the input {self.destination}; take the mesh and the "
                "shape from the input and change only placements"
            )

    @property
    def is_differentiable(self) -> bool:
        """Whether a gradient comes back: integers have none."""
        return bool(getattr(torch, str(self.source.dtype)).is_floating_point)


class Way:
    """The tensors of one boundary in one direction; they have a communicator and a thread of their own."""

    def __init__(self, name: str, pairs: Sequence[tuple[ShardingSpec, ShardingSpec]], options: dict[str, Any]) -> None:
        self.movers = [Resharder(*pair, channel=name, **options) for pair in pairs]

    def meet(self) -> None:
        """Connect; blocks until the other side meets too."""
        for mover in self.movers:
            mover.meet()

    def send(self, tensors: Sequence[torch.Tensor]) -> list[Handle]:
        """Start to send this rank's shards."""
        return [mover.start(tensor.detach()) for mover, tensor in zip(self.movers, tensors, strict=True)]

    def receive(self) -> list[Handle]:
        """Post the receives of one microbatch; each handle gives a new tensor."""
        return [mover.start() for mover in self.movers]


class Boundary:
    """All that crosses between two neighbouring stages: activations one way, gradients the other."""

    def __init__(self, before: int, crossings: Sequence[Crossing], options: dict[str, Any]) -> None:
        back = [_gradient_pair(crossing) for crossing in crossings if crossing.is_differentiable]
        self.crossings = crossings
        self.activations = Way(
            f"stage {before} to {before + 1}", [(one.source, one.destination) for one in crossings], options
        )
        self.gradients = Way(f"stage {before + 1} to {before}", back, options)

    def meet(self) -> None:
        """Connect both ways."""
        self.activations.meet()
        self.gradients.meet()

    @cached_property
    def _scales(self) -> list[float]:
        return [gradient_scale(one.source) for one in self.crossings if one.is_differentiable]

    def gradients_of(self, handles: Sequence[Handle]) -> Tensors:
        """Per output, its gradient, None for integers."""
        arrived = [handle.wait() for handle in handles]
        scaled = iter(
            [
                tensor if scale == 1.0 or tensor is None else tensor * scale
                for tensor, scale in zip(arrived, self._scales, strict=True)
            ]
        )
        return tuple(next(scaled) if one.is_differentiable else None for one in self.crossings)


def _gradient_pair(crossing: Crossing) -> tuple[ShardingSpec, ShardingSpec]:
    source, destination = gradient_specs(crossing.source, crossing.destination)
    return crossing.gradient or source, destination


def check_place(rank: int, index: int, stages: int, arriving: Sequence[Crossing], leaving: Sequence[Crossing]) -> None:
    """Whether a stage has the boundaries that its place asks for, and this rank a part in them.

    Raises:
        SpecError: if not.
    """
    if not 0 <= index < stages:
        raise SpecError(f"stage_index={index} is not one of {stages} stages; count from 0")
    for name, crossings, wanted in (("arriving", arriving, index > 0), ("leaving", leaving, index < stages - 1)):
        if bool(crossings) != wanted:
            rule = "needs at least one tensor" if wanted else "must be empty"
            raise SpecError(
                f"{name} of stage {index} of {stages} has {len(crossings)} tensors and {rule}; the first stage has "
                "none arriving, the last none leaving, and all others both"
            )
    for side, meshes in (
        ("arrives at", [one.destination.mesh for one in arriving]),
        ("leaves", [one.source.mesh for one in leaving]),
    ):
        outside = next((mesh for mesh in meshes if rank not in mesh), None)
        if outside is not None:
            raise SpecError(
                f"rank {rank} makes stage {index}, but a tensor {side} {outside}, which has not this rank; only the "
                "ranks of a stage's mesh make it"
            )
