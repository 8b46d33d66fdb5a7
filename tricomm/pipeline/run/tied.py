"""Parameters that several stages hold copies of: an embedding that is also the output layer of a language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tricomm.errors import SpecError
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.directed_link import StepResharder
from tricomm.transport.handle import Handle


@dataclass(frozen=True, slots=True)
class Tied:
    """One parameter of which each of several stages holds a copy, in a layout of its own.

    At the end of a step, after ``after_backward``, each stage gets the gradients of the others and adds all of them in
    the order of the stages. Copies that begin equal and get the same updates therefore stay equal to the last bit.

    Attributes:
        parts: per stage, the name of the parameter in its module and the layout of the parameter on the stage's mesh.
            Ranks that hold the same elements must have equal gradients by then.

    Raises:
        SpecError: fewer than two stages, or layouts of different tensors.
    """

    parts: Mapping[int, tuple[str, ShardingSpec]]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise SpecError(f"tied parameter {dict(self.parts)} is of one stage; name each stage that holds a copy")
        specs = [spec for _, spec in self.parts.values()]
        for spec in specs:
            if (spec.global_shape, spec.element_type) != (specs[0].global_shape, specs[0].element_type):
                raise SpecError(f"tied copies {specs[0]} and {spec} are different tensors; give one shape and dtype")
            if spec.partial_axes:
                raise SpecError(f"tied copy {spec} is Partial; sum its gradient in after_backward and say Replicate()")


class TiedGradients:
    """Adds the gradients of a tied parameter over its stages.

    Args:
        tied: the declaration.
        modules: of the stages that this rank computes.
        name: for the channels.
        options: of :class:`tricomm.Resharder`.
    """

    def __init__(self, tied: Tied, modules: Mapping[int, nn.Module], name: str, options: LinkOptions) -> None:
        self.stages = sorted(tied.parts)
        self.parameters = {
            stage: modules[stage].get_parameter(tied.parts[stage][0]) for stage in self.stages if stage in modules
        }
        specs = {stage: spec for stage, (_, spec) in tied.parts.items()}
        self.resharders = {
            (giver, taker): StepResharder(specs[giver], specs[taker], channel=f"{name} {giver}>{taker}", **options)
            for giver in self.stages
            for taker in self.stages
            if giver != taker and (giver in modules or taker in modules)
        }

    def connect(self) -> None:
        """Meet the other ranks."""
        for resharder in self.resharders.values():
            resharder.connect()

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on."""
        for resharder in self.resharders.values():
            resharder.abort(reason)

    def close(self) -> None:
        """Give back connections."""
        for resharder in self.resharders.values():
            resharder.close()

    def add(self) -> None:
        """Make the ``grad`` of every copy the sum of all."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        handles: dict[tuple[int, int], Handle] = {}
        for (giver, taker), resharder in self.resharders.items():
            own = self.parameters.get(giver)
            handles[giver, taker] = resharder.start(None if own is None else own.grad)
        moved = {pair: handle.wait() for pair, handle in handles.items()}
        for taker, parameter in self.parameters.items():
            terms = [parameter.grad if giver == taker else moved[giver, taker] for giver in self.stages]
            parameter.grad = _sum([term for term in terms if term is not None])


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
