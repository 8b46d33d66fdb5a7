"""Move: one reshard without arithmetic, from what to when."""

from collections.abc import Sequence
from dataclasses import dataclass

from tricomm.layout.dtype import ITEMSIZE
from tricomm.layout.spec import ShardingSpec
from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.rounds import Hop
from tricomm.plan.routes.strategies import Strategy
from tricomm.plan.tasks import Task


@dataclass(frozen=True, slots=True)
class Move:
    """A reshard without arithmetic: what has to move, along which chains, and when.

    Attributes:
        source, destination: resolved specs of one global shape.
        wire_dtype: dtype between ranks: the smaller of the two, so a cast happens where fewer bytes travel.
        strategy: the strategy that routed the messages (never Auto).
        tasks: what has to move, and which ranks hold and need it.
        messages: what travels along each chain of ranks.
        hops: when each chunk of a message passes from a rank to the next.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, make_plan
        >>> rows = ShardingSpec.from_dims(Mesh([0, 1], ("dp",)), ["S0", "R"], (8, 4), "float32")
        >>> columns = ShardingSpec.from_dims(Mesh([2, 3], ("tp",)), ["R", "S0"])
        >>> move = make_plan(rows, columns).moves[0]
        >>> move.tasks[0]
        Task(regions=((((0, 4),), ((0, 2),)),), holders=(0,), receivers=(2,))
        >>> move.messages[0]
        Message(chain=(0, 2), chunks=(((((0, 4),), ((0, 2),)),),))
        >>> move.hops[0]
        Hop(round=0, source=0, destination=2, message=0, chunk=0)
    """

    source: ShardingSpec
    destination: ShardingSpec
    wire_dtype: str
    strategy: Strategy
    tasks: Sequence[Task]
    messages: Sequence[Message]
    hops: Sequence[Hop]

    @property
    def wire_nbytes(self) -> int:
        """Count the bytes of all hops."""
        numel = sum(message.numel * (len(message.chain) - 1) for message in self.messages)
        return numel * ITEMSIZE[self.wire_dtype]

    @property
    def minimum_nbytes(self) -> int:
        """Count the bytes that every move with these specs sends: what each rank needs and does not hold."""
        return sum(task.numel * len(task.remote_receivers) for task in self.tasks) * ITEMSIZE[self.wire_dtype]
