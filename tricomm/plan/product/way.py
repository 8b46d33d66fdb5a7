"""A way that a product move may go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tricomm.plan.choice import WORTH_IT
from tricomm.plan.parts import PartGroups
from tricomm.plan.product.sharing import Sharing
from tricomm.plan.routes.chunks import RouteContext, chunk_counts, cut_where
from tricomm.plan.routes.cuts import Chunks, even_pattern, stepped_pattern


@dataclass(frozen=True, slots=True)
class Way:
    """How a product move may go, and what that should take: from the largest tiles alone, so equal on every rank.

    Attributes:
        context: what a strategy may know.
        children: 0 if each replica hears from holders; 1 if pieces go from host to host in chains, 2 in trees,
            FROM_SENDER if a sender gives them to every host by itself, BY_LOAD if those do that have little to post.
        sharing: of what holders send.
        by_replica: whether as much enters at each replica, and not on each host; see Visits.
        skewed: whether pieces of the next turn enter a host later; see Visits.
        by_cell: whether holders share each cell by itself, also where no host has ranks of both meshes; see Cutting.
        aside: whether pieces enter behind the hosts that have holders of others, and come to those last.
        least_heard: whether pieces enter at the replicas that have heard least, and not where they lie in their tile.
        chunks: into how many chunks a message is cut if it is not too small or too large for that.
        limit_nbytes: the largest chunk that the staging budget allows.
        tiny_nbytes: smaller chunks cost more than they save.
        chunk_bytes: the size of chunks, where a strategy says so.
        seconds: what it should take.
        uneven_seconds: for which the busiest NIC of the source sends longer than if all sent the same.
    """

    context: RouteContext
    children: int
    sharing: Sharing
    chunks: int
    limit_nbytes: int
    tiny_nbytes: int
    chunk_bytes: int | None
    seconds: float
    uneven_seconds: float
    skewed: bool = False
    by_replica: bool = False
    by_cell: bool = False
    aside: bool = False
    least_heard: bool = False

    def chunks_of(self, parts: PartGroups) -> Mapping[int, Chunks]:
        """The chunks of those messages that have more than one, given their parts."""
        nbytes = parts.nbytes
        if self.chunk_bytes is not None:
            most = max(self.chunk_bytes, parts.itemsize)
            return cut_where(parts, -(-nbytes // most), lambda kinds, _: stepped_pattern(kinds, most))
        return cut_where(parts, chunk_counts(nbytes, self.chunks, self.limit_nbytes, self.tiny_nbytes), even_pattern)


def best_way(ways: Sequence[Way], delay: Callable[[Way], float]) -> Way:
    """The fastest with its delay of others, the plainest one that is about as fast."""
    seconds = [way.seconds + delay(way) for way in ways]
    best = 0
    for number in range(1, len(ways)):
        if seconds[number] < seconds[best] * (1 - WORTH_IT):
            best = number
    return ways[best]
