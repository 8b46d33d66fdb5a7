"""Local tensors against their specs: the last check before anything is sent."""

import torch

from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.dtype import OPAQUE, dtype_name
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.overlap import has_shared_elements, share_memory
from tricomm.plan import Plan

IN_A_TRANSFORM = (
    "tricomm was called inside of a torch.func transform (vmap, grad, jvp), where tensors have no memory of their own; "
    "call it outside, or use torch.autograd for gradients"
)


class TensorChecker:
    """What one rank passes in and gets out of a plan, computed once, checked on every call.

    Args:
        plan: the plan.
        rank: whose side.
        device: where the tensors must be.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        source, destination = plan.source, plan.destination
        self.plan = plan
        self.rank = rank
        self.device = device
        self.source_shape = source.local_shape(rank) if rank in source.mesh else None
        self.source_dtype = torch_dtype(source.element_type)
        self.destination_shape = destination.local_shape(rank) if rank in destination.mesh else None
        self.destination_dtype = torch_dtype(destination.element_type)

    def check_source(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor as the runtime takes it (detached, lazy conjugation resolved), or None off the source mesh.

        Raises:
            SpecError: missing on a source rank, given elsewhere, or of another kind, shape, dtype or device.
        """
        if torch._C._are_functorch_transforms_active():
            raise SpecError(IN_A_TRANSFORM)
        if self.source_shape is None:
            if tensor is not None:
                raise SpecError(
                    f"rank {self.rank} gave a tensor of shape {_shape(tensor)} but is not on the source mesh "
                    f"{self.plan.source.mesh}; pass None there"
                )
            return None
        if tensor is None:
            raise SpecError(
                f"rank {self.rank} is on the source mesh {self.plan.source.mesh} and gave no tensor; "
                f"pass its shard of shape {self.source_shape} and dtype {self.plan.source.dtype}"
            )
        self._check("the tensor", tensor, self.source_shape, self.source_dtype)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        return tensor.detach() if tensor.requires_grad else tensor

    def check_out(self, out: torch.Tensor | None, source: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor that receives the result: ``out`` if it is given and fits, else a new one; None off the
        destination mesh.

        Raises:
            SpecError: given off the destination mesh, of another shape, dtype or device, or sharing memory with
                the source or with itself.
        """
        if self.destination_shape is None:
            if out is not None:
                raise SpecError(
                    f"rank {self.rank} gave out of shape {_shape(out)} but is not on the destination mesh "
                    f"{self.plan.destination.mesh}; pass None there"
                )
            return None
        if out is None:
            return _empty(self.destination_shape, self.destination_dtype, self.device)
        self._check("out", out, self.destination_shape, self.destination_dtype)
        if out.is_conj() or out.is_neg():
            raise SpecError(f"out of rank {self.rank} is a lazy conjugate or negative; pass a plain tensor")
        if out.requires_grad and torch.is_grad_enabled():
            raise SpecError(
                f"out of rank {self.rank} requires grad and would be written in place; call under torch.no_grad() or "
                "pass out.detach()"
            )
        if not out.is_contiguous() and has_shared_elements(out):
            raise SpecError(
                f"out of rank {self.rank} is expanded or overlaps itself (strides {out.stride()}), so several elements "
                "share memory; pass a tensor of its own, e.g. out.contiguous()"
            )
        if source is not None and share_memory(source, out):
            raise SpecError(
                f"out of rank {self.rank} shares memory with its source tensor, which must stay untouched; "
                "pass another tensor or leave out=None"
            )
        return out.detach() if out.requires_grad else out

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        rank = self.rank
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ArgumentError(
                f"{name} of rank {rank} is a {type(tensor).__name__}, and a plain dense torch.Tensor is expected; "
                "pass its local data (tensor.to_local() for a DTensor)"
            )
        if tensor.shape != shape:
            raise SpecError(
                f"{name} of rank {rank} has shape {tuple(tensor.shape)}, and its spec gives it {shape}; "
                "pass the shard that spec.local_shape(rank) describes"
            )
        if tensor.dtype != dtype:
            raise SpecError(
                f"{name} of rank {rank} has dtype {tensor.dtype}, and its spec says {dtype}; "
                f"pass tensor.to({dtype}) or change the spec"
            )
        if tensor.device != self.device:
            raise SpecError(
                f"{name} of rank {rank} is on {tensor.device}, and this call works on {self.device}; "
                f"move it with .to({str(self.device)!r}) or pass device={str(tensor.device)!r}"
            )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor to be filled. In deterministic mode torch fills it too, which it cannot for types of bare bits."""
    word = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)
    if word is None or dtype_name(dtype) not in OPAQUE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=word, device=device).view(dtype)


def describe_transform() -> str | None:
    """Say that a transform of torch.func is at work, in which a tensor has no memory to move; None if none is."""
    return IN_A_TRANSFORM if torch._C._are_functorch_transforms_active() else None


def check_casts(plan: Plan) -> None:
    """Refuse a cast that this torch does not have.

    Raises:
        SpecError: torch cannot cast the source's dtype to the destination's.
    """
    source, destination = plan.source.element_type, plan.destination.element_type
    if source == destination:
        return
    try:
        torch.empty(1, dtype=torch_dtype(source)).to(torch_dtype(destination))
    except (RuntimeError, NotImplementedError) as error:
        raise SpecError(
            f"this torch {torch.__version__} cannot cast {source} to {destination} ({error}); cast the tensor yourself"
        ) from error


def _shape(tensor: object) -> object:
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
