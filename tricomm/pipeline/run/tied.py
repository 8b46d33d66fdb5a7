"""Parameters that several stages hold copies of: an embedding that is also the output layer of a language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tricomm.errors import SpecError
from tricomm.kinds import explains_fields
from tricomm.layout.placement import Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions
from tricomm.pipeline.run.edges.directed_link import StepResharder
from tricomm.transport.handle import Handle


@explains_fields
@dataclass(frozen=True, slots=True)
class Tied:
    """Declare one parameter of which each of several stages holds a copy, in a layout of its own.

    At the end of a step, after ``after_backward``, each stage gets the gradients of the others and adds all of them in
    the order of the stages. Copies that begin equal and get the same updates therefore stay equal to the last bit. A
    frozen copy neither gives nor gets a gradient; where no copy has one in a step, none gets one.

    >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
    >>> whole = ShardingSpec(Mesh([0], ("tp",)), (Replicate(),), (32000, 512), "float32")
    >>> rows = ShardingSpec(Mesh([1, 2], ("tp",)), (Shard(0),), (32000, 512), "float32")
    >>> embedding = Tied({0: ("embedding.weight", whole), 3: ("head.weight", rows)})

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
    """Add the gradients of a tied parameter over its stages.

    Args:
        tied: the declaration.
        modules: of the stages that this rank computes.
        name: for the channels.
        options: of the Resharders.

    Raises:
        SpecError: a stage of this rank has no parameter of that name.
    """

    def __init__(self, tied: Tied, modules: Mapping[int, nn.Module], name: str, options: LinkOptions) -> None:
        self.stages = sorted(tied.parts)
        self.parameters = {
            stage: _parameter(modules[stage], stage, tied.parts[stage][0]) for stage in self.stages if stage in modules
        }
        specs = {stage: spec for stage, (_, spec) in tied.parts.items()}
        flags = {
            stage: ShardingSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, (1,), "uint8")
            for stage, spec in specs.items()
        }
        pairs = [
            (sender, receiver)
            for sender in self.stages
            for receiver in self.stages
            if sender != receiver and (sender in modules or receiver in modules)
        ]
        self.resharders = {
            pair: StepResharder(specs[pair[0]], specs[pair[1]], channel=f"{name} {pair[0]}>{pair[1]}", **options)
            for pair in pairs
        }
        self.flags = {
            pair: StepResharder(flags[pair[0]], flags[pair[1]], channel=f"{name} {pair[0]}>{pair[1]}", **options)
            for pair in pairs
        }
        """They tell whether the sender has a gradient at all."""

    def connect(self) -> None:
        """Meet the other ranks."""
        for pair, resharder in self.resharders.items():
            resharder.connect()
            self.flags[pair].connect()

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one does not go on."""
        for resharder in self.resharders.values():
            resharder.abort(reason)

    def close(self) -> None:
        """Give back connections."""
        for resharder in (*self.resharders.values(), *self.flags.values()):
            resharder.close()

    def add(self) -> None:
        """Make the ``grad`` of every copy that is not frozen the sum of all that there are."""
        has = {stage: one.requires_grad and one.grad is not None for stage, one in self.parameters.items()}
        flags: dict[tuple[int, int], Handle] = {}
        handles: dict[tuple[int, int], Handle] = {}
        for (sender, receiver), resharder in self.resharders.items():
            own = self.parameters.get(sender)
            flag = gradient = None
            if own is not None:
                flag = torch.full((1,), has[sender], dtype=torch.uint8, device=resharder.device)
                gradient = own.grad if has[sender] else torch.zeros_like(own)
                gradient = None if gradient is None else gradient.detach()
            flags[sender, receiver] = self.flags[sender, receiver].start(flag)
            handles[sender, receiver] = resharder.start(gradient)
        moved = {pair: (flags[pair].wait(), handle.wait()) for pair, handle in handles.items()}
        for receiver, parameter in self.parameters.items():
            terms: list[torch.Tensor] = []
            for sender in self.stages:
                if sender == receiver:
                    terms += [parameter.grad] if has[receiver] and parameter.grad is not None else []
                    continue
                there, gradient = moved[sender, receiver]
                if there is not None and gradient is not None and bool(there):
                    terms.append(gradient)
            if terms and parameter.requires_grad:
                parameter.grad = _sum(terms)


def _parameter(module: nn.Module, stage: int, name: str) -> nn.Parameter:
    found = dict(module.named_parameters(remove_duplicate=False))
    if name not in found:
        known = ", ".join(found) or "none"
        raise SpecError(f"stage {stage} has no parameter {name!r} to tie; its parameters are: {known}")
    return found[name]


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
