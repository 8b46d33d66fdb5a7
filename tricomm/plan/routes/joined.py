"""Messages of several kinds one after the other, as one sequence: what a move sends that is routed in groups."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tricomm.errors import PlanError
from tricomm.layout.columns import Lazy, numbers, offsets_of
from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.rounds import Hop, Hops, hop_table
from tricomm.plan.routes.strategies import Strategy

GROUP_STRIDE = 1 << 50
"""Round numbers of one group of messages."""

MAX_GROUPS = 1 << 12


class Routes(NamedTuple):
    """How the stacks of a group go: see the fields of Move."""

    strategy: Strategy
    messages: Sequence[Message]
    hops: Sequence[Hop]


class JoinedMessages(Lazy[Message]):
    """The messages of several groups.

    Attributes:
        groups: of messages.
        offsets: group i has the messages offsets[i] to offsets[i + 1].
    """

    __slots__ = ("groups", "offsets")

    def __init__(self, groups: tuple[Sequence[Message], ...]) -> None:
        self.groups = groups
        self.offsets = offsets_of(numbers(map(len, groups), len(groups)))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def _items(self, rows: np.ndarray) -> Iterator[Message]:
        groups = np.searchsorted(self.offsets, rows, side="right") - 1
        for group, row in zip(groups.tolist(), rows.tolist(), strict=True):
            yield self.groups[group][row - int(self.offsets[group])]


def joined(routes: Sequence[Routes]) -> tuple[Sequence[Message], Sequence[Hop]]:
    """The messages and hops of several groups, one group's rounds behind those of the one before.

    Raises:
        PlanError: more than 4096 groups.
    """
    if len(routes) == 1:
        return routes[0].messages, routes[0].hops
    if len(routes) > MAX_GROUPS:
        raise PlanError(
            f"the tensors fall into {len(routes)} groups that are routed apart, and a plan has at most {MAX_GROUPS}; "
            "move them in several calls"
        )
    messages = JoinedMessages(tuple(one.messages for one in routes))
    tables = []
    for group, one in enumerate(routes):
        table = hop_table(one.hops).copy()
        table[:, Hop._fields.index("round")] += group * GROUP_STRIDE
        table[:, Hop._fields.index("message")] += messages.offsets[group]
        tables.append(table)
    return messages, Hops(np.concatenate([np.zeros((0, len(Hop._fields)), np.int64), *tables]))
