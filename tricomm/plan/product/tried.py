"""Moves of few ranks and few messages: ways are simulated, which costs little and is right where an estimate is not."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tricomm.layout.topology import Topology
from tricomm.plan.cost import MessageColumns, busiest_nic_seconds, simulated_seconds
from tricomm.plan.routes.joined import Routes

SIMULATED_RANKS = 64
"""Up to so many ranks ways are simulated; one rank's part of more shall cost little, and loads differ less there."""

SIMULATED_HOPS = 1 << 14
"""So many hops in all ways together: twenty or forty milliseconds."""

WORTH_A_CHANGE = 0.01
"""By how much a way must be faster than those that were expected to be; or if as fast, its busiest NIC less busy."""

Way = TypeVar("Way")
Tried = TypeVar("Tried")


def fastest(
    ways: Sequence[Way],
    seconds_of: Callable[[Way], float],
    delay_of: Callable[[Way], float],
    routes_of: Callable[[Way], Routes],
    topology: Topology,
) -> Way:
    """Simulate ways, those first that should be fast, until there are too many hops; the fastest, or the first.

    Of those that are about as fast, it is one whose busiest NIC is least busy.

    Every rank finds the same, as it simulates what all ranks do.

    Args:
        ways: at least one, plain ones first.
        seconds_of: what each should take.
        delay_of: by how much each keeps others back.
        routes_of: what all ranks do.
        topology: hosts and rates.
    """
    ordered = sorted(ways, key=lambda way: seconds_of(way) + delay_of(way))
    tried: list[tuple[float, float, Way]] = []
    hops = 0
    for way in ordered:
        routes = routes_of(way)
        hops += len(routes.hops)
        if hops > SIMULATED_HOPS:
            break
        columns = MessageColumns.of(routes.messages)
        seconds = simulated_seconds(columns, routes.hops, topology) + delay_of(way)
        tried.append((seconds, busiest_nic_seconds(columns, topology), way))
    if not tried:
        return ordered[0]
    fast = [(busiest, way) for seconds, busiest, way in _least(tried, lambda one: one[0])]
    return _least(fast, lambda one: one[0])[0][1]


def _least(ways: Sequence[Tried], seconds_of: Callable[[Tried], float]) -> list[Tried]:
    """Those that take about as long as the fastest, in their order."""
    limit = min(map(seconds_of, ways)) * (1 + WORTH_A_CHANGE)
    return [way for way in ways if seconds_of(way) <= limit]
