"""A move as an operator of torch, ``tricomm::move``, so that a graph can hold it; and what breaks a graph instead.

Imported only while something is compiled, exported, traced with fake tensors, or checkpointed selectively: the
decorators below import torch._dynamo. The operator has an effect, in order: else a graph would merge equal moves, and
drop one whose result nobody uses, for which other ranks wait.

With ``create_selective_checkpoint_contexts([move_op])`` a checkpoint keeps the result instead of moving again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.effects import EffectType

from tricomm.compiled.registry import InGraph, find
from tricomm.interop import wrapper_types

WRAPPERS = wrapper_types()
"""Asked of directly: ``is_wrapped`` looks at the modules that are loaded, each of which a tracer wraps."""


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


run_eagerly: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _run,
    reason="tricomm talks to other ranks, which no graph can hold; the graph breaks around the call. With "
    "fullgraph=True make a Resharder outside of the compiled function and call it with a plain tensor (of to_local()), "
    "without out= and differentiable=",
)
"""``run_eagerly(function, *arguments, **options)``: call a function outside of the graph."""


@torch.library.custom_op("tricomm::move", mutates_args=())
def move(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """Reshard: this rank's shard in, its shard of the result out; empty ones off the meshes.

    Args:
        tensor: the shard.
        key: of the Resharder.
    """
    mover = find(key)
    facts: InGraph = mover.in_graph
    moved: torch.Tensor | None = mover._move_in_graph(tensor)
    return torch.empty(facts.shape, dtype=facts.dtype, device=facts.device) if moved is None else moved


@move.register_fake
def _(tensor: torch.Tensor, key: str) -> torch.Tensor:
    facts: InGraph = find(key).in_graph
    return tensor.new_empty(facts.shape, dtype=facts.dtype)


def _keep_key(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.key = inputs[1]


def _move_back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    mover = find(ctx.key)
    moved = move(gradient.contiguous(), mover.gradient().in_graph.key)
    scale = mover.gradient_scale
    return (moved if scale == 1.0 else moved * scale), None


move.register_autograd(_move_back, setup_context=_keep_key)
move.register_effect(EffectType.ORDERED)

move_op = torch.ops.tricomm.move.default
"""The operator, for policies of selective checkpoints and for passes over graphs."""


def call_in_graph(mover: Any, tensor: Any, out: Any) -> Any:
    """Call a Resharder where a graph is made: as the operator, or outside of the graph."""
    facts: InGraph | None = mover.in_graph
    # A graph holds no operator of ours on a DTensor, and cannot compare layouts.
    if facts is None or isinstance(tensor, WRAPPERS):
        return run_eagerly(mover, tensor, out=out)
    asks = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    if out is not None or facts.is_taped or (asks and not facts.has_gradient):
        return run_eagerly(mover, tensor, out=out)
    if tensor is None:
        tensor = torch.empty(0, dtype=facts.source_dtype, device=facts.device)
    moved: torch.Tensor = move(tensor, facts.key)
    return moved if facts.has_result else None
