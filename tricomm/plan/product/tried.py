"""Moves of few ranks and few messages: ways are simulated, which costs little and is right where an estimate is not."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

from tricomm.layout.topology import Topology
from tricomm.plan.choice import ROUNDING
from tricomm.plan.cost import MessageColumns, busiest_end_seconds, busiest_nic_seconds, simulated_seconds
from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.rounds import Hop

SIMULATED_RANKS = 64
"""Up to so many ranks ways are simulated; one rank's part of more shall cost little, and loads differ less there."""

SIMULATED_HOPS = 1 << 14
"""So many hops in all ways together: twenty or forty milliseconds."""

WORTH_A_CHANGE = 0.01
"""By how much a way must be faster than those that were expected to be; or if as fast, its busiest NIC less busy."""

EQUAL = 0.001
"""Ways that differ by less are as fast as each other: only then it matters what the busiest NIC does the other way."""

Way = TypeVar("Way")
Tried = TypeVar("Tried")


class Candidate(NamedTuple, Generic[Way]):
    """A way before it is simulated.

    Attributes:
        way: which.
        columns: what all ranks send.
        delay_seconds: by which it keeps others back.
        bound_seconds: with the delay, that a simulation does not find less than.
        expected_seconds: with the delay, what it should take.
    """

    way: Way
    columns: MessageColumns
    delay_seconds: float
    bound_seconds: float
    expected_seconds: float


class Trial(NamedTuple, Generic[Way]):
    """How ways are simulated.

    Attributes:
        messages_of, hops_of: what all ranks do by a way.
        topology: hosts and rates.
    """

    messages_of: Callable[[Way], Sequence[Message]]
    hops_of: Callable[[Way], Sequence[Hop]]
    topology: Topology

    def seconds(self, way: Way, columns: MessageColumns) -> float:
        """What a way takes; ``columns`` has its messages."""
        return simulated_seconds(columns, self.hops_of(way), self.topology)


def plainest(ways: Sequence[Way], trial: Trial[Way]) -> Way:
    """Simulate ways of which each has more hops than the one before: the first that is about as fast as the fastest."""
    tried: list[tuple[float, Way]] = []
    for way in ways:
        columns = MessageColumns.of(trial.messages_of(way))
        if tried and columns.hops > SIMULATED_HOPS:
            break
        tried.append((trial.seconds(way, columns), way))
    return _least(tried, itemgetter(0))[0][1]


def fastest(
    ways: Sequence[Way], seconds_of: Callable[[Way], float], delay_of: Callable[[Way], float], trial: Trial[Way]
) -> Way:
    """Simulate ways, those first that should be fast, until there are too many hops; the fastest, or the first.

    Of those that are about as fast, it is the fastest of those whose busiest NIC is least busy. An estimate may be
    wrong, so no way is expected to take less than its messages say.

    Every rank finds the same, as it simulates what all ranks do.

    Args:
        ways: at least one, plain ones first.
        seconds_of: what each should take.
        delay_of: by how much each keeps others back.
        trial: simulates them.
    """
    topology = trial.topology
    found: list[Candidate[Way]] = []
    for way in ways:
        columns, delay = MessageColumns.of(trial.messages_of(way)), delay_of(way)
        bound = busiest_end_seconds(columns, topology) * (1 - ROUNDING) + delay
        found.append(Candidate(way, columns, delay, bound, max(bound, seconds_of(way) + delay)))
    ordered = sorted(found, key=lambda one: one.expected_seconds)
    tried: list[tuple[float, tuple[float, float], Way]] = []
    hops = 0
    for one in ordered:
        if tried and one.bound_seconds > min(tried, key=itemgetter(0))[0] * (1 + WORTH_A_CHANGE):
            continue
        if hops + one.columns.hops > SIMULATED_HOPS:
            continue
        hops += one.columns.hops
        seconds = trial.seconds(one.way, one.columns) + one.delay_seconds
        loads = busiest_nic_seconds(one.columns, topology)
        tried.append((seconds, (max(loads), min(loads)), one.way))
    if not tried:
        return ordered[0].way
    fast = _least(tried, itemgetter(0))
    level = _least(fast, lambda one: one[1][0])
    return _least(_least(level, itemgetter(0), EQUAL), lambda one: one[1][1])[0][2]


def _least(ways: Sequence[Tried], seconds_of: Callable[[Tried], float], more: float = WORTH_A_CHANGE) -> list[Tried]:
    """Those that take about as long as the fastest, in their order."""
    limit = min(map(seconds_of, ways)) * (1 + more)
    return [way for way in ways if seconds_of(way) <= limit]
