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
    """One reshard without arithmetic.

    Attributes:
        source, destination: resolved specs of one global shape.
        wire_dtype: dtype between ranks: the smaller of the two, so a cast happens where fewer bytes travel.
        strategy: the strategy that routed the messages (never Auto).
        tasks, messages, hops: the plan, from what to when.
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
        """Bytes over all hops."""
        numel = sum(message.numel * (len(message.chain) - 1) for message in self.messages)
        return numel * ITEMSIZE[self.wire_dtype]

    @property
    def minimum_nbytes(self) -> int:
        """Bytes that any move of this source to this destination must put on the wire: what each rank needs
        and does not hold.
        """
        return sum(task.numel * len(task.remote_receivers) for task in self.tasks) * ITEMSIZE[self.wire_dtype]
