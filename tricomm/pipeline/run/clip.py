"""Clipping of gradients by their norm over all stages of a pipeline."""

from collections.abc import Callable, Iterator
from math import prod

import torch

from tricomm.errors import SpecError, TransportError
from tricomm.kinds import explains_missing, refuse_wrong_kinds
from tricomm.layout.placement import Placement, Replicate
from tricomm.layout.spec import ShardingSpec
from tricomm.pipeline.run.executor import Executor
from tricomm.transport.coordination.store import awaited_note, post_note

LayoutOf = Callable[[int, str], tuple[Placement, ...]]
"""Of a stage's index and the name of one of its parameters: its layout, one placement per axis of the stage's mesh."""

EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""

HEADER = 2
"""Before its sums of squares each rank tells whether it refuses the call, and the norm that it was given."""

TOLERANCE = 0.05
"""Sums of squares that ranks hold copies of may differ by this part; shares of a gradient differ by far more."""


@explains_missing
def clip_gradients(executor: Executor, max_norm: float, *, layout_of: LayoutOf | None = None) -> torch.Tensor:
    """Scale the gradients of all stages together so that their norm is at most ``max_norm``.

    What ``torch.nn.utils.clip_grad_norm_`` does for a model in one process. Every rank calls it, after a step and
    before its optimiser's. Parameters without a gradient are left alone, and of tied copies one counts.

    >>> import torch
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> from tricomm import Mesh, Replicate
    >>> from tricomm.pipeline import Executor, Schedule, Stage, WithLoss
    >>> module = WithLoss(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss)
    >>> stage = Stage(Mesh([0], ("x",)), ("x", "y"), ("loss",), module, (Replicate(),))
    >>> with Executor(Schedule.parse(["0F0 0B0"]), [stage], {}) as executor:
    ...     module.module.weight.grad = torch.full((1, 1), -4.0)
    ...     clip_gradients(executor, 1.0), module.module.weight.grad
    (tensor(4., dtype=torch.float64), tensor([[-1.0000]]))
    >>> dist.destroy_process_group()

    Args:
        executor: whose stages they are.
        max_norm: of all gradients together, above 0.
        layout_of: how the ranks of a stage share a parameter; None says that each holds all of it. Gradients must
            be complete: those of copies summed over the ranks that saw different data.

    Returns:
        The norm before, a float64 scalar, the same on all ranks.

    Raises:
        SpecError: a norm that is not positive or not the same on all ranks, a layout that does not fit its mesh or is
            Partial, or ranks that are said to hold the same gradients and do not. No gradient is changed.
        TransportError: another rank refused or failed.
    """
    refuse_wrong_kinds(clip_gradients, executor=executor)
    if not executor.runs:
        _check_norm(max_norm, layout_of)
        return torch.zeros((), dtype=torch.float64, device="cpu")
    row = torch.zeros(HEADER + 1 + len(executor.stages), dtype=torch.float64, device=executor.device)
    problem: Exception | None = None
    try:
        _check_norm(max_norm, layout_of)
        row[1] = float(max_norm)
        row[HEADER:] = _sums_of_squares(executor, layout_of)
    except Exception as error:  # whatever it is, the other ranks wait for this one
        problem, row[0] = error, 1.0
        post_note(executor.context.store, _refusal_key(executor, executor.rank), f"{type(error).__name__}: {error}")
    table = executor.gather(row)
    if problem is not None:
        raise problem
    _check_agreement(executor, table)
    table = table[:, HEADER:]
    _check_copies(executor, table)
    norm = table[:, 0].sum().sqrt()
    factor = torch.clamp(float(max_norm) / (norm + EPSILON), max=1.0)
    for _, _, gradient in _gradients(executor):
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _check_norm(max_norm: float, layout_of: LayoutOf | None) -> None:
    refuse_wrong_kinds(clip_gradients, max_norm=max_norm, layout_of=layout_of)
    if not max_norm > 0:
        raise SpecError(f"max_norm={max_norm!r} must be above 0; it is the largest norm that gradients may have")


def _refusal_key(executor: Executor, rank: int) -> str:
    """Name where a rank says why it refused the call."""
    return f"executor/{executor.unique}/refused to clip/{rank}"


def _check_agreement(executor: Executor, table: torch.Tensor) -> None:
    """Raise what another rank refused, or where the ranks were given different norms."""
    for rank, (refused, max_norm) in zip(executor.ranks, table[:, :HEADER].tolist(), strict=True):
        if refused:
            absent = f"rank {rank} refused to clip gradients"
            reason = awaited_note(
                executor.context.store, _refusal_key(executor, rank), executor.timeout_seconds, absent
            )
            raise TransportError(f"rank {rank} refused to clip gradients: {reason}")
        if max_norm != float(table[0, 1]):
            raise SpecError(
                f"rank {executor.ranks[0]} was given max_norm={float(table[0, 1]):.17g} and rank {rank} "
                f"max_norm={max_norm:.17g}; clip by one norm on all ranks, or they train different models"
            )


def _sums_of_squares(executor: Executor, layout_of: LayoutOf | None) -> torch.Tensor:
    """Return this rank's part of the sum of squares, then for each stage that of what all its ranks hold copies of."""
    row = torch.zeros(1 + len(executor.stages), dtype=torch.float64, device=executor.device)
    for index, name, gradient in _gradients(executor):
        mesh = executor.stages[index].mesh
        layout = (Replicate(),) * mesh.ndim if layout_of is None else tuple(layout_of(index, name))
        spec = ShardingSpec(mesh, layout, (1,) * gradient.ndim, "float64")
        if spec.partial_axes:
            raise SpecError(
                f"the gradient of {name!r} in stage {index} is laid out as {layout}; sum it over the ranks that hold "
                "a part of it (after_backward), and say Replicate() for their axis"
            )
        copies = prod(mesh.shape[axis] for axis, one in enumerate(layout) if isinstance(one, Replicate))
        if _is_later_copy(executor, index, name):
            continue
        squares = gradient.detach().double().square().sum()
        row[0] += squares / copies
        if copies == mesh.size:
            row[1 + index] += squares
    return row


def _gradients(executor: Executor) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield (stage, parameter, gradient) of this rank, each gradient once."""
    seen: set[int] = set()
    for index, run in executor.runs.items():
        for name, parameter in run.module.named_parameters():
            if parameter.grad is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield index, name, parameter.grad


def _is_later_copy(executor: Executor, index: int, name: str) -> bool:
    """Whether an earlier stage counts this tied parameter."""
    return any(index != min(one.parts) and one.parts.get(index, ("",))[0] == name for one in executor.tied)


def _check_copies(executor: Executor, table: torch.Tensor) -> None:
    """Refuse ranks of a stage that are said to hold the same gradients, with sums of squares that differ."""
    for index, stage in enumerate(executor.stages):
        rows = [executor.ranks.index(rank) for rank in stage.mesh.ranks]
        found = table[rows, 1 + index]
        least, most = int(found.argmin()), int(found.argmax())
        if float(found[most] - found[least]) > TOLERANCE * float(found[most]):
            ranks = stage.mesh.ranks
            raise SpecError(
                f"ranks {ranks[least]} and {ranks[most]} of stage {index} are said to hold the same gradients, and the "
                f"norms of theirs are {float(found[least]) ** 0.5:.6g} and {float(found[most]) ** 0.5:.6g}; pass "
                "layout_of=, which says what is cut over which axis, or sum the gradients first"
            )
