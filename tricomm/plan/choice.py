"""Which strategy is fastest, without working out those that cannot be.

Auto takes the strategy with the least simulated time. To route and to simulate all of them is what a plan of many
replicas would mostly cost, so each is first bounded: by its assignments alone, then by its messages.
"""

from collections.abc import Sequence
from functools import cached_property

from tricomm.layout.topology import Topology
from tricomm.plan.cost import MessageColumns, busiest_seconds, simulated_seconds
from tricomm.plan.routes.chunks import Message, RouteContext, Unicasts
from tricomm.plan.routes.rounds import Hop, schedule
from tricomm.plan.routes.strategies import Strategy
from tricomm.plan.senders.policy import Assignment, FanOut, by_host

WORTH_IT = 0.03
"""By how much a strategy with more messages must be faster for Auto to take it: the model does not know all costs."""

ROUNDING = 1e-9
"""By how much a bound may be above a simulated time because sums are rounded."""


class Routed:
    """What a strategy would send, made as far as somebody looks.

    Args:
        strategy: one of Auto's, or the only one.
        assignments: as a balance chose them for its fan-out.
        context: what the strategy may know.
        participants: all ranks of either mesh, sorted.
        rank: leave out the messages that this rank is no part of.
    """

    def __init__(
        self,
        strategy: Strategy,
        assignments: Sequence[Assignment],
        context: RouteContext,
        participants: Sequence[int],
        rank: int | None,
    ) -> None:
        self.strategy, self._assignments = strategy, assignments
        self._context, self._participants, self._rank = context, participants, rank

    @cached_property
    def messages(self) -> Sequence[Message]:
        """Of the strategy."""
        messages = self.strategy.route(self._assignments, self._context)
        if self._rank is None:
            return messages
        if isinstance(messages, Unicasts):
            return messages.touching(self._rank)
        return tuple(message for message in messages if self._rank in message.chain)

    @cached_property
    def hops(self) -> Sequence[Hop]:
        """Of the messages."""
        return schedule(self.messages, self._participants, self._context.topology)

    @cached_property
    def _columns(self) -> MessageColumns:
        return MessageColumns.of(self.messages)

    @cached_property
    def seconds(self) -> float:
        """The simulated time."""
        return simulated_seconds(self._columns, self.hops, self._context.itemsize, self._context.topology)

    @cached_property
    def bound_of_messages(self) -> float:
        """A time that ``seconds`` is not below."""
        return busiest_seconds(self._columns, self._context.itemsize, self._context.topology) * (1 - ROUNDING)

    @cached_property
    def bound_of_assignments(self) -> float:
        """A time that ``seconds`` is not below, without routing."""
        fan_out, topology = self.strategy.fan_out, self._context.topology
        return assigned_seconds(self._assignments, self._context.itemsize, topology, fan_out) * (1 - ROUNDING)

    def is_worth_it(self, best: "Routed") -> bool:
        """Whether this is so much faster than the best so far that it should be taken."""
        if "seconds" not in vars(best):
            limit = best.bound_of_assignments * (1 - WORTH_IT)
            if self.bound_of_assignments < limit and self.seconds < limit:
                return True
        limit = best.seconds * (1 - WORTH_IT)
        return self.bound_of_assignments < limit and self.bound_of_messages < limit and self.seconds < limit


def assigned_seconds(assignments: Sequence[Assignment], itemsize: int, topology: Topology, fan_out: FanOut) -> float:
    """What none of Auto's strategies with this fan-out can beat: the NIC whose ranks send longest, without what they
    forward; the last byte's way along a chain, which leads through all receivers, or all of one host; or, where the
    ranks of a host hand parts around, the rank that posts most sends.
    """
    each = topology.overhead_seconds + topology.latency_seconds
    nic_seconds: dict[int, float] = {}
    handed: set[tuple[int, tuple[int, ...]]] = set()
    longest = 0
    hosts_of: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
    for assignment in assignments:
        receivers = assignment.receivers
        hosts = hosts_of.get(receivers) or hosts_of.setdefault(receivers, by_host(receivers, topology))
        here = topology.host(assignment.sender)
        remote = [len(ranks) for ranks in hosts if topology.host(ranks[0]) != here]
        copies, links = sum(remote), 1
        if fan_out is FanOut.EVERY_HOST:
            copies, links = len(remote), max(map(len, hosts))
            # With so many elements no part is empty. Equal senders and receivers share messages.
            handed.update((assignment.sender, ranks) for ranks in hosts if assignment.numel >= 2 * len(ranks))
        elif fan_out is FanOut.ONCE:
            # A chain enters the sender's own host only if it has receivers there: then others may forward it.
            copies, links = int(len(remote) == len(hosts)), len(receivers)
        nic = topology.nic(assignment.sender)
        seconds = copies * assignment.numel * itemsize / topology.nic_rate(nic).send_bytes_per_second
        nic_seconds[nic] = nic_seconds.get(nic, 0.0) + seconds
        longest = max(longest, links)
    posts: dict[int, int] = {}
    for sender, ranks in handed:
        posts[sender] = posts.get(sender, 0) + len(ranks)
        for rank in ranks:
            posts[rank] = posts.get(rank, 0) + len(ranks) - 1
    posting = max(posts.values(), default=0) * topology.overhead_seconds
    return max(max(nic_seconds.values(), default=0.0), longest * each, posting)
