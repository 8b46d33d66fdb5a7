"""Gradients of a Resharder: the half of it that moves them back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch

from tricomm.autograd.layouts import NO_GRADIENTS_OF_MANY, describe_undifferentiable, gradient_scale, gradient_specs
from tricomm.autograd.tape import is_in_backward, tape_of
from tricomm.compiled.registry import InGraph, register
from tricomm.errors import SpecError, TricommError
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.tensor_checker import Given, describe_transform
from tricomm.plan import Plan
from tricomm.plan.describe import describe_layouts
from tricomm.transport.group import GroupContext
from tricomm.transport.session import Session
from tricomm.transport.telling import name_error


class Gradients(ABC):
    """The half of a Resharder that is about gradients."""

    context: GroupContext
    device: torch.device
    options: Options
    plan: Plan
    rank: int
    in_graph: InGraph | None
    channel: str
    name: str
    _session: Session | None
    _gradient: Any = None
    _about: str = ""
    """Of one whose name tricomm made: what that is about, which says enough in an error."""

    def _call(self, tensor: Given, out: Given) -> Any:
        """Reshard whatever this is a Resharder of, a tensor or many."""
        call: Any = self
        return call(tensor, out=out)

    def _move_in_graph(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Move what the operator of a graph is given: an empty tensor off the source mesh."""
        facts = self.in_graph
        assert facts is not None
        given = tensor if facts.has_source else None
        moved: torch.Tensor | None = self._move(given, None, requires_grad=facts.has_gradient)
        return moved

    def _facts_for_graphs(self) -> InGraph | None:
        """What a graph has to know of it; None of many tensors, which no graph holds."""
        if self.plan.is_mapping:
            return None
        source, destination = self.plan.source, self.plan.destination
        has_result = self.rank in destination.mesh
        return InGraph(
            register(self),
            self.rank in source.mesh,
            has_result,
            self._is_everywhere,
            destination.local_shape(self.rank) if has_result else (0,),
            torch_dtype(destination.element_type),
            self.device,
            torch_dtype(source.element_type),
            self.options.differentiable,
        )

    @property
    def label(self) -> str:
        """The Resharder in words, for errors.

        ::

            print(mover.label)  # Resharder of float32[8/x, 4] on ...
        """
        return f"Resharder of {describe_layouts(self.plan)}" if self._session is None else self._session.identity.label

    def _name_error(self, error: BaseException) -> None:
        """Let an error of ours say what the calls are about."""
        name_error(error, self.name, self._about)

    def _tell(self, error: BaseException) -> None:
        """Count a call that this rank does not make, and tell the others why."""
        self._name_error(error)
        if self._session is not None:
            self._session.calls += 1
            self._session.tell(error)

    def _refuse(self, error: TricommError) -> NoReturn:
        """End a call that this rank does not make."""
        self._tell(error)
        raise error

    @abstractmethod
    def _mover_of_gradient(self, source: ShardingSpec, destination: ShardingSpec) -> Any:
        """Make the Resharder of the way back."""

    @abstractmethod
    def _move(self, tensor: Given, out: Given, *, requires_grad: bool) -> Any:
        """Move a tensor."""

    def _forward(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Reshard a detached tensor whose gradient is going to be asked for."""
        moved: torch.Tensor | None = self._move(tensor, None, requires_grad=True)
        return moved

    def gradient(self) -> Self:
        """The Resharder that brings the gradient of the result back to the layout of the source.

        Where a source is Partial its contributions all get the same gradient, which for an average is still to
        be multiplied by ``gradient_scale``. With ranks on one mesh only (a pipeline), call it yourself in the
        backward pass, with the gradient on the destination's ranks and None on the others.

        ::

            gradient = mover.gradient()(output.grad if rank in destination.mesh else None)
            if rank in source.mesh:
                hidden.backward(gradient * mover.gradient_scale)
        """
        if self.plan.is_mapping:
            raise SpecError(NO_GRADIENTS_OF_MANY)
        if self._gradient is None:
            self._gradient = self._mover_of_gradient(
                *gradient_specs(self.plan.source, self.plan.destination, self.options.grad_placements)
            )
        found: Self = self._gradient
        return found

    @property
    def gradient_scale(self) -> float:
        """What the result of ``gradient()`` is to be multiplied by: 1, or 1/n for a Partial("avg") over n ranks.

        ::

            mover = tricomm.Resharder(ShardingSpec(mesh, (Partial("avg"),), (8,), "float32"), whole)
            mover.gradient_scale  # 0.25 where the mesh has 4 ranks
        """
        return gradient_scale(self.plan.source)

    def _differentiated(self, tensor: torch.Tensor, out: Given) -> torch.Tensor | None:
        """Reshard such that gradients come back."""
        problem = describe_transform() or describe_undifferentiable(self.plan, out is not None)
        if problem is not None:
            self._refuse(SpecError(problem))
        result: torch.Tensor | None = ReshardFunction.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result

    # ---- between ranks that hold different things: what a tape asks for

    @property
    def _is_everywhere(self) -> bool:
        """Whether all ranks are on both meshes, so that each of them takes part in both directions."""
        return not self.plan.is_mapping and self.plan.is_on_the_same_ranks

    def _recorded(self, tensor: Given, out: Given) -> torch.Tensor | None:
        """Reshard, and have the gradient moved back by whichever backward comes."""
        try:
            problem = describe_transform()
            if out is not None:
                problem = "a differentiable move cannot go into out; leave out=None, or call under torch.no_grad()"
            if problem is not None:
                raise SpecError(problem)
            assert not isinstance(tensor, Mapping), "layouts of many are refused when they are planned"
            if is_in_backward():
                return self._recomputed(tensor)
            tape = tape_of(self.context.tapes, self.channel)
        except SpecError as error:
            self._refuse(error)
        return tape.record(self, tensor, self.device)

    def _recomputed(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Reshard once more, in a backward: a checkpoint computes again what it did not keep.

        Raises:
            SpecError: not all ranks are on both meshes, so that some wait for the gradient and not for this.
        """
        if not self._is_everywhere:
            raise SpecError(
                f"{self.label} is called again inside of a backward, as in a checkpoint, and other ranks do not "
                "compute it again; leave the move out of the checkpointed function"
            )
        if tensor is None or not tensor.requires_grad:
            return self._forward(tensor)
        result: torch.Tensor | None = ReshardFunction.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result

    def _backward(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Move the gradient of a result back to the source."""
        moved: torch.Tensor | None = self.gradient()._call(gradient, None)
        scale = self.gradient_scale
        return moved if scale == 1.0 or moved is None else moved * scale

    def _check_second_backward(self) -> None:
        """Refuse gradients of gradients where not all ranks would take part.

        Raises:
            SpecError: some ranks are on one mesh only.
        """
        if not self._is_everywhere:
            raise SpecError(
                f"create_graph=True asks for gradients of the gradient of {self.label}, in which ranks on one mesh "
                "only would not take part; leave create_graph out"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """All that take part.

        ::

            if rank in mover.ranks:
                mover(tensor)
        """
        return self.plan.participants

    def _forget_gradient(self) -> None:
        """Make what moves gradients anew: after a failure the ranks have not made equally many calls of it."""
        self._gradient = None

    def _tell_of_gradient(self, error: BaseException) -> None:
        """Tell those who wait for the gradient that it does not come."""
        self.gradient()._tell(error)


class ReshardFunction(torch.autograd.Function):
    """A reshard of ranks that are all on both meshes, so that each of them takes part in both directions."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mover: "Gradients") -> torch.Tensor | None:
        """Move."""
        ctx.mover = mover
        return mover._forward(tensor.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, None]:
        """Move back."""
        return ctx.mover._backward(gradients[0]), None
