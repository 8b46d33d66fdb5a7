"""What to do about a tensor that is not what a plan moves: one that is read may be a copy, one that is written not."""

from collections.abc import Iterator

import torch

MOVED = ("cpu", "cuda")
"""Types of devices on which tensors move."""


def of_kind(tensor: object, role: str) -> str:
    """Say how to come from a tensor that is not plain and dense, or from no tensor, to one that is.

    Args:
        tensor: what was given.
        role: "source" or "out".

    Example:
        >>> of_kind(torch.eye(2).to_sparse(), "source")
        'pass tensor.to_dense()'
        >>> of_kind([1.0, 2.0], "source")
        'pass torch.as_tensor(...) of it'
    """
    if isinstance(tensor, torch.nn.Module):
        return "pass one of its parameters, as module.weight.detach()"
    if not isinstance(tensor, torch.Tensor):
        return "pass torch.as_tensor(...) of it" if role == "source" else "pass a tensor, or leave out=None"
    if hasattr(tensor, "to_local"):
        return "pass its local data, tensor.to_local()"
    if role == "out":
        return "pass a dense tensor made by torch.empty(...), or leave out=None and convert the result"
    if tensor.is_nested:
        return "pass tensor.to_padded_tensor(0), or the tensors of tensor.unbind() one by one"
    if tensor.layout != torch.strided:
        return "pass tensor.to_dense()"
    if tensor.is_quantized:
        return "pass tensor.dequantize(), or tensor.int_repr() for its integers"
    return "pass tensor.as_subclass(torch.Tensor) if it has memory of its own, else the plain tensors that it wraps"


def of_shape(role: str) -> str:
    """Say which tensor to pass instead of one of another shape."""
    if role == "source":
        return "pass the shard that spec.local_shape(rank) describes"
    return "pass one made by torch.empty(spec.local_shape(rank), ...), or leave out=None"


def of_dtype(dtype: torch.dtype, role: str) -> str:
    """Say what to do about a tensor of another dtype than the expected one."""
    if role == "source":
        return f"pass tensor.to({dtype}) or change the spec"
    return f"pass one of dtype {dtype}, leave out=None, or change the destination's dtype: the move casts on the way"


def of_device(there: torch.device, here: torch.device, role: str) -> str:
    """Say what to do about a tensor that is not on the device where a call works."""
    if there.type == "meta":
        return f"a meta tensor has no data: pass one that was made on {str(here)!r}"
    move = f"move it with .to({str(here)!r})" if role == "source" else f"pass one made with device={str(here)!r}"
    return f"{move} or pass device={str(there)!r}" if there.type in MOVED else move


def of_tied(kept: str, left_out: str) -> str:
    """Say how to move two names of one memory, of which nobody here knows whether they get the same bytes."""
    return (
        f"if both are one weight, leave {left_out!r} out on all ranks, of both layouts and of what is passed, as in "
        f"{{name: tensor for name, tensor in state.items() if name != {left_out!r}}}, and it has what {kept!r} gets; "
        "else pass another tensor, or leave out=None"
    )


def of_many(given: object) -> str:
    """Say how to pass many tensors.

    Example:
        >>> of_many(torch.nn.Linear(2, 2).named_parameters())
        'pass {name: tensor}, as dict(...) of it is'
    """
    if isinstance(given, torch.nn.Module):
        return "pass {name: tensor}, as its state_dict() is"
    return f"pass {{name: tensor}}{', as dict(...) of it is' if isinstance(given, Iterator) else ''}"
