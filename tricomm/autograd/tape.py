"""Gradients between ranks that hold different things: a chain of moves, which one backward runs to its end.

Autograd knows of one process. A move between meshes has its input on some ranks and its output on others, so a backward
that starts where the loss is would never reach the rest. So every differentiable move, on every rank of either mesh, is
a node with a *tie* beside its tensor: an empty tensor that the node before it gave and that it gives to the next. The
last tie reaches every node, and each node runs after those that were made later. If all ranks make their moves in one
order, they run the gradients in the reverse of it, and nobody waits for one that does not come.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from tricomm.compiled.outside import eagerly
from tricomm.errors import ArgumentError, SpecError, TransportError
from tricomm.kinds import explains_missing, refuse_wrong_kinds
from tricomm.transport.group import context_of, resolve_group


class Mover(Protocol):
    """What gradients ask of a Resharder."""

    @property
    def label(self) -> str:
        """It in words."""
        ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """All that take part."""
        ...

    def _forward(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Move what is detached."""
        ...

    def _check_second_backward(self) -> None:
        """Refuse gradients of gradients if other ranks would not take part."""
        ...

    def _backward(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Move a gradient back."""
        ...

    def _tell_of_gradient(self, error: BaseException) -> None:
        """Tell those who wait for a gradient of this mover that it does not come."""
        ...

    def _forget_gradient(self) -> None:
        """Begin anew with what moves gradients: the ranks have not made equally many calls of it."""
        ...


class Tape:
    """The differentiable moves of one thread of this rank on one channel, since the last backward."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.moves: list[Mover] = []
        self.tie: torch.Tensor | None = None
        self._task = -1
        self._left = 0
        """How many moves the backward that is under way has still to run."""

    @property
    def is_stale(self) -> bool:
        """Whether a backward has begun to run it and has ended without telling."""
        return self._task not in (-1, _current_task())

    def record(self, mover: Mover, tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """Make a move and its node."""
        tie = torch.zeros(0, device=device, requires_grad=True) if self.tie is None else self.tie
        moved, after = Move.apply(tie, tensor, mover, self)  # type: ignore[no-untyped-call]
        self.tie = after
        result: torch.Tensor | None = moved
        return result

    def begin(self, number: int) -> None:
        """A backward comes to a move.

        Raises:
            SpecError: it has passed over a later one.
        """
        if not self.moves:
            raise SpecError(
                "a backward of these moves has failed, so that ranks may have run different ones; make the moves again"
            )
        if self._task != _current_task():
            self._task, self._left = _current_task(), len(self.moves)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)
        if number != self._left - 1:
            raise self._missed()

    def ran(self, number: int) -> None:
        """A move's gradient has been moved."""
        self._left = number

    def _end(self) -> None:
        """A backward that ran at least one move ends."""
        if self._left:
            error = self._missed()
            self.fail(error)
            raise error
        self._task, self.tie = -1, None

    def _missed(self) -> SpecError:
        return SpecError(
            f"this backward does not run the gradient of {self.moves[self._left - 1].label}, move {self._left} of "
            f"{len(self.moves)} since the last backward, for which other ranks wait; call tricomm.backward(*losses), "
            "which runs all of them, on every rank, also on those without a loss"
        )

    def fail(self, error: BaseException) -> None:
        """End what is left, and tell those who wait for it: once for all moves between the same ranks."""
        left = self.moves[: self._left if self._task != -1 else len(self.moves)]
        # Who takes part in the move that failed knows of a failed transport already.
        told = {left[-1].ranks} if left and isinstance(error, TransportError) else set()
        for mover in reversed(left):
            if mover.ranks not in told:
                told.add(mover.ranks)
                mover._tell_of_gradient(error)
        for mover in left:
            mover._forget_gradient()
        self._task, self._left, self.moves, self.tie = -1, 0, [], None


class Move(torch.autograd.Function):
    """A move and its gradient, which is the move back."""

    @staticmethod
    def forward(ctx: Any, tie: torch.Tensor, tensor: torch.Tensor | None, mover: Mover, tape: Tape) -> Any:
        """Move."""
        moved = mover._forward(None if tensor is None else tensor.detach())
        ctx.mover, ctx.tape, ctx.number = mover, tape, len(tape.moves)
        ctx.tie_device, ctx.has_tensor = tie.device, tensor is not None
        tape.moves.append(mover)
        return moved, torch.zeros(0, device=tie.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Move back."""
        gradient, _ = gradients
        try:
            ctx.tape.begin(ctx.number)
            if torch.is_grad_enabled():
                ctx.mover._check_second_backward()
            moved = ctx.mover._backward(gradient)
        except BaseException as error:
            ctx.tape.fail(error)
            raise
        ctx.tape.ran(ctx.number)
        return torch.zeros(0, device=ctx.tie_device), moved if ctx.has_tensor else None, None, None


def _current_task() -> int:
    """Number of the backward that runs on this thread, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def is_in_backward() -> bool:
    """Whether this thread is in a backward: what is computed now with gradients is a recomputation."""
    return _current_task() != -1


def tape_of(tapes: dict[str, Any], channel: str) -> Tape:
    """The tape of this thread on a channel.

    Raises:
        SpecError: another thread has moves on it that no backward has run.
    """
    tape: Tape | None = tapes.get(channel)
    if tape is None or tape.tie is None or tape.is_stale:
        tape = tapes[channel] = Tape()
    if tape.thread != threading.get_ident():
        raise SpecError(
            f"{len(tape.moves)} differentiable moves of another thread stand on channel {channel!r}, and the order of "
            "gradients would not be known; run their backward first, or give each thread a channel of its own"
        )
    return tape


def _tapes_here(group: Any, channels: Sequence[str] | None) -> Iterator[Tape]:
    tapes = context_of(group).tapes
    for channel in list(tapes) if channels is None else channels:
        tape = tapes.get(channel)
        if tape is not None and tape.tie is not None and tape.thread == threading.get_ident() and not tape.is_stale:
            yield tape


@explains_missing
def backward(
    *losses: torch.Tensor,
    group: Any = None,
    channels: Sequence[str] | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> None:
    """Run the backward of losses and of all differentiable moves since the last one. All ranks of their meshes call it.

    A rank without a loss calls ``tricomm.backward()``. Gradients of results that nobody used are zeros. Where the
    losses of every rank reach its last move, ``loss.backward()`` does the same.

    Args:
        losses: this rank's, scalars; none, one or several.
        group: as of the moves.
        channels: those whose moves are meant; None is all on which this thread has made some.
        retain_graph, create_graph: as in torch.autograd.backward. Gradients of gradients need all ranks on both meshes.

    Raises:
        SpecError: a limit of gradients between ranks, which the message names; others get a TransportError at once.

    Example:
        >>> import torch.distributed as dist
        >>> import tricomm
        >>> from tricomm import Mesh, Replicate, Shard, ShardingSpec
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> rows = ShardingSpec(Mesh([0], ("tp",)), (Shard(0),), (2, 3), "float32")
        >>> whole = ShardingSpec(Mesh([0], ("tp",)), (Replicate(),))
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> y = tricomm.reshard(x, rows, whole, differentiable=True)
        >>> tricomm.backward((2 * y).sum())
        >>> x.grad
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
        >>> dist.destroy_process_group()
    """
    if torch.compiler.is_compiling():
        how = {"channels": channels, "retain_graph": retain_graph, "create_graph": create_graph}
        eagerly(backward, *losses, group=group, **how)
        return
    # Whatever is wrong here, those that wait for this rank's gradients hear of it.
    is_named = isinstance(channels, list | tuple) and all(isinstance(channel, str) for channel in channels)
    tapes = list(_tapes_here(resolve_group(group), channels if is_named else None))
    edges = [torch.autograd.graph.get_gradient_edge(tape.tie) for tape in tapes if tape.tie is not None]
    nothing = [torch.zeros(0, device=tape.tie.device) for tape in tapes if tape.tie is not None]
    roots: list[Any] = [*losses, *edges]
    try:
        refuse_wrong_kinds(backward, channels=channels, retain_graph=retain_graph, create_graph=create_graph)
        for loss in losses:
            if not isinstance(loss, torch.Tensor):
                raise ArgumentError(f"a loss of type {type(loss).__name__} is not a tensor; pass losses, or none")
        if not roots:
            return
        torch.autograd.backward(roots, [*(None for _ in losses), *nothing], retain_graph, create_graph)
    except BaseException as error:
        for tape in tapes:
            tape.fail(error)
        raise
