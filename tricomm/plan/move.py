"""Move: one reshard without arithmetic, from what to when."""

from collections.abc import Sequence
from dataclasses import dataclass

from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.rounds import Hop
from tricomm.plan.routes.strategies import Strategy
from tricomm.plan.stacks import Stack
from tricomm.plan.tasks import Task, joined


@dataclass(frozen=True, slots=True)
class Move:
    """A reshard without arithmetic: what has to move, along which chains, and when.

    Attributes:
        stacks: the tensors, equal ones as one.
        refined: the tasks of each stack.
        strategies: those that routed the messages (never Auto): one for all of them, or one for each group.
        messages: what travels along each chain of ranks.
        hops: when each chunk of a message passes from a rank to the next.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> move = make_plan(rows, columns).moves[0]
        >>> move.tasks[0]
        Task(parts=(Part(stack=0, itemsize=4, region=(((0, 4),), ((0, 2),))),), holders=(0,), receivers=(2,))
        >>> move.messages[0]
        Message(chain=(0, 2), chunks=((Part(stack=0, itemsize=4, region=(((0, 4),), ((0, 2),))),),))
        >>> move.hops[0]
        Hop(round=0, source=0, destination=2, message=0, chunk=0)
    """

    stacks: tuple[Stack, ...]
    refined: tuple[Sequence[Task], ...]
    strategies: tuple[Strategy, ...]
    messages: Sequence[Message]
    hops: Sequence[Hop]

    @property
    def tasks(self) -> Sequence[Task]:
        """What has to move, and which ranks hold and need it."""
        return joined(self.refined)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank of some mesh, sorted."""
        meshes = {mesh for stack in self.stacks for mesh in (stack.source.mesh, stack.destination.mesh)}
        return tuple(sorted({rank for mesh in meshes for rank in mesh.ranks}))

    @property
    def wire_nbytes(self) -> int:
        """Count the bytes of all hops."""
        return sum(message.nbytes * (len(message.chain) - 1) for message in self.messages)

    @property
    def minimum_nbytes(self) -> int:
        """Count the bytes that every move with these specs sends: what each rank needs and does not hold."""
        return sum(task.nbytes * len(task.remote_receivers) for tasks in self.refined for task in tasks)
