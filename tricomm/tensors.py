"""Local tensors against their specs: the last check before anything is sent."""

import torch

from tricomm.errors import SpecError
from tricomm.packing import torch_dtype
from tricomm.plan import Plan


def check_local(plan: Plan, rank: int, tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The tensor as the runtime takes it (detached, lazy conjugation resolved), or None off the source mesh.

    Raises:
        SpecError: missing on a source rank, given elsewhere, or of another kind, shape, dtype or device.
    """
    source = plan.source
    if rank not in source.mesh:
        if tensor is not None:
            raise SpecError(
                f"rank {rank} gave a tensor of shape {_shape(tensor)} but is not on the source mesh {source.mesh}; "
                "pass None there"
            )
        return None
    expected = source.local_shape(rank)
    if tensor is None:
        raise SpecError(
            f"rank {rank} is on the source mesh {source.mesh} and gave no tensor; "
            f"pass its shard of shape {expected} and dtype {source.dtype}"
        )
    _check_tensor("the tensor", tensor, rank, expected, source.element_type, device)
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.detach()


def check_out(
    plan: Plan,
    rank: int,
    out: torch.Tensor | None,
    source: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """The tensor that receives the result: ``out`` if it is given and fits, else a new one; None off the
    destination mesh.

    Raises:
        SpecError: given off the destination mesh, of another shape, dtype or device, or sharing memory with
            the source or with itself.
    """
    destination = plan.destination
    if rank not in destination.mesh:
        if out is not None:
            raise SpecError(
                f"rank {rank} gave out of shape {_shape(out)} but is not on the destination mesh {destination.mesh}; "
                "pass None there"
            )
        return None
    if out is None:
        return new_shard(plan, rank, device)
    expected = destination.local_shape(rank)
    _check_tensor("out", out, rank, expected, destination.element_type, device)
    if out.is_conj() or out.is_neg():
        raise SpecError(f"out of rank {rank} is a lazy conjugate or negative; pass a plain tensor")
    if out.requires_grad and torch.is_grad_enabled():
        raise SpecError(
            f"out of rank {rank} requires grad and would be written in place; call under torch.no_grad() or pass "
            "out.detach()"
        )
    if any(stride == 0 and extent > 1 for stride, extent in zip(out.stride(), out.shape, strict=True)):
        raise SpecError(
            f"out of rank {rank} is expanded (strides {out.stride()}), so several elements share memory; "
            "pass a tensor of its own, e.g. out.contiguous()"
        )
    if source is not None and _share_memory(source, out):
        raise SpecError(
            f"out of rank {rank} shares memory with its source tensor, which must stay untouched; "
            "pass another tensor or leave out=None"
        )
    return out.detach()


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


def new_shard(plan: Plan, rank: int, device: torch.device) -> torch.Tensor:
    """An uninitialised shard of the destination."""
    return torch.empty(
        plan.destination.local_shape(rank),
        dtype=torch_dtype(plan.destination.element_type),
        device=device,
    )


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    rank: int,
    shape: tuple[int, ...],
    dtype: str,
    device: torch.device,
) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise SpecError(
            f"{name} of rank {rank} is a {type(tensor).__name__}, and a plain dense torch.Tensor is expected; "
            "pass its local data (tensor.to_local() for a DTensor)"
        )
    if tuple(tensor.shape) != shape:
        raise SpecError(
            f"{name} of rank {rank} has shape {tuple(tensor.shape)}, and its spec gives it {shape}; "
            "pass the shard that spec.local_shape(rank) describes"
        )
    if tensor.dtype != torch_dtype(dtype):
        raise SpecError(
            f"{name} of rank {rank} has dtype {tensor.dtype}, and its spec says {dtype}; "
            f"pass tensor.to(torch.{dtype}) or change the spec"
        )
    if tensor.device != device:
        raise SpecError(
            f"{name} of rank {rank} is on {tensor.device}, and this call works on {device}; "
            f"move it with .to({str(device)!r}) or pass device={str(tensor.device)!r}"
        )


def _share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the byte ranges that two tensors span meet."""
    if not first.numel() or not second.numel():
        return False
    (a, b), (c, d) = (_byte_range(tensor) for tensor in (first, second))
    return first.device == second.device and a < d and c < b


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _shape(tensor: object) -> object:
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
