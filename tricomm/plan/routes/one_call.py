"""Messages that go to all their receivers in one call of the transport, where it has such: by a broadcast.

A hop is a hop also there, from the sender to each receiver, and all hops of a chunk are in one round. So whoever has no
such calls sends to one after the other, and proof and programs are those of any plan.
"""

from collections.abc import Iterable, Sequence

from tricomm.plan.routes.chunks import Message, MessageTable
from tricomm.plan.routes.joined import JoinedMessages

MAX_GROUPS = 8
"""Among how many sets of ranks the calls of a plan go, and of a channel at a time: each keeps memory and a stream of
the device. What is of another one is sent to each receiver by itself."""

Group = tuple[int, ...]
"""Who takes part in a broadcast, the sender first."""


def members(group: Group) -> tuple[int, ...]:
    """Who takes part, sorted: groups of the same members share a communicator."""
    return tuple(sorted(group))


def groups_of(messages: Sequence[Message]) -> tuple[Group, ...]:
    """The groups that broadcast messages, each once, in order; equal on all ranks that know all messages.

    Example:
        >>> from tricomm.plan.parts import Part
        >>> from tricomm.plan.routes.chunks import in_one_call
        >>> chunk = (Part(0, 4, (((0, 4),),)),)
        >>> groups_of([in_one_call(Message((0, 2, 3), (chunk,))), Message((1, 2), (chunk,))])
        ((0, 2, 3),)
    """
    if isinstance(messages, JoinedMessages):
        return tuple(dict.fromkeys(group for part in messages.groups for group in groups_of(part)))
    if isinstance(messages, MessageTable):
        return ()
    return tuple(dict.fromkeys(message.chain for message in messages if message.in_one_call))


def groups_of_moves(moves: Iterable[Sequence[Message]]) -> tuple[Group, ...]:
    """Those of the messages of a plan's moves that have a communicator: of MAX_GROUPS sets of ranks, the first ones."""
    found = dict.fromkeys(group for messages in moves for group in groups_of(messages))
    sets = [*dict.fromkeys(map(members, found))][:MAX_GROUPS]
    return tuple(group for group in found if members(group) in sets)
