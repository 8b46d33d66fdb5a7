"""Choose the fastest strategy without working out those that cannot be.

Auto takes the strategy with the least simulated time. To route and to simulate all of them is what a plan of many
replicas would mostly cost, so the time of each is first bounded from below: by its assignments alone, then by its
messages.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from tricomm.layout.topology import Topology
from tricomm.plan.cost import MessageColumns, busiest_seconds, simulated_seconds
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import HostsOf, other_hosts
from tricomm.plan.network.nic_seconds import NicSeconds
from tricomm.plan.routes.chunks import Message, RouteContext, Unicasts
from tricomm.plan.routes.one_call import MAX_GROUPS, groups_of, members
from tricomm.plan.routes.rounds import Hop, schedule
from tricomm.plan.routes.strategies import Broadcast, Strategy
from tricomm.plan.senders.policy import Assignment

WORTH_IT = 0.03
"""By how much a strategy with more messages must be faster for Auto to take it: the model does not know all costs."""

WORTH_A_COMMUNICATOR = 0.1
"""The same for one that broadcasts in one call, for which communicators are made and kept."""

ROUNDING = 1e-9
"""By how much a lower bound may exceed a simulated time because sums are rounded."""


class Candidate:
    """A candidate of Auto: what it would send, worked out as far as somebody looks.

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

    @property
    def _is_in_one_call(self) -> bool:
        return isinstance(self.strategy, Broadcast) and self.strategy.one_call

    @cached_property
    def messages(self) -> Sequence[Message]:
        """What the strategy sends, without what ``rank`` is no part of."""
        messages = self.strategy.route(self._assignments, self._context)
        if self._rank is None:
            return messages
        if isinstance(messages, Unicasts):
            return messages.touching(self._rank)
        return tuple(message for message in messages if self._rank in message.chain)

    @cached_property
    def hops(self) -> Sequence[Hop]:
        """When each chunk of the messages passes from a rank to the next."""
        return schedule(self.messages, self._participants, self._context.topology)

    @cached_property
    def _columns(self) -> MessageColumns:
        return MessageColumns.of(self.messages)

    @cached_property
    def seconds(self) -> float:
        """The simulated time."""
        return simulated_seconds(self._columns, self.hops, self._context.topology)

    @cached_property
    def bound_of_messages(self) -> float:
        """A lower bound of ``seconds``, from the messages."""
        if self._is_in_one_call:
            return 0.0  # the busiest link of a ring is not that of its hops
        return busiest_seconds(self._columns, self._context.topology) * (1 - ROUNDING)

    @cached_property
    def bound_of_assignments(self) -> float:
        """A lower bound of ``seconds``, from the assignments, without routing."""
        if self._is_in_one_call:
            return 0.0
        fan_out, topology = self.strategy.fan_out, self._context.topology
        return assigned_seconds(self._assignments, topology, fan_out) * (1 - ROUNDING)

    def is_worth_it(self, best: "Candidate") -> bool:
        """True if this is so much faster than the best so far that it should be taken."""
        if self._is_in_one_call and len({*map(members, groups_of(self.messages))}) > MAX_GROUPS:
            return False
        # To be below a bound of the best is enough, and then nobody need simulate the best.
        return self._is_below(best.bound_of_assignments) or self._is_below(best.seconds)

    def _is_below(self, seconds: float) -> bool:
        limit = seconds * (1 - (WORTH_A_COMMUNICATOR if self._is_in_one_call else WORTH_IT))
        return self.bound_of_assignments < limit and self.bound_of_messages < limit and self.seconds < limit


def assigned_seconds(assignments: Sequence[Assignment], topology: Topology, fan_out: FanOut) -> float:
    """Bound the time of every strategy with this fan-out from below, without routing.

    The largest of three times: that of the NIC whose ranks send longest, without what they forward; the last byte's
    way along the longest chain; and, where the ranks of a host hand parts around, that of the rank that posts most.
    """
    sending = NicSeconds(topology)
    hosts_of = HostsOf(topology)
    handed: set[tuple[int, tuple[int, ...]]] = set()
    longest = 0
    for assignment in assignments:
        sender, hosts = assignment.sender, hosts_of[assignment.receivers]
        sends = fan_out.least_sends(hosts, other_hosts(hosts, sender, topology))
        sending.add(topology.nic(sender), sends * assignment.nbytes)
        longest = max(longest, fan_out.chain_links(hosts))
        if fan_out is FanOut.EVERY_HOST:
            # With so many elements no part is empty. Equal senders and receivers share messages.
            numel = sum(part.numel for part in assignment.parts)
            handed.update((sender, ranks) for ranks in hosts if numel >= 2 * len(ranks))
    along = longest * (topology.overhead_seconds + topology.latency_seconds)
    return max(sending.busiest, along, _most_posts(handed) * topology.overhead_seconds)


def _most_posts(handed: Iterable[tuple[int, tuple[int, ...]]]) -> int:
    """Count what the busiest rank posts where each sender gives the ranks beside it a part each to hand around."""
    posts: Counter[int] = Counter()
    for sender, ranks in handed:
        posts[sender] += len(ranks)
        posts.update(dict.fromkeys(ranks, len(ranks) - 1))
    return max(posts.values(), default=0)
