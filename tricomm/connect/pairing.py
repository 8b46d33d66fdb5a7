"""What Publisher and Subscriber have in common: ranks of one side that decide together, and feeds to another side."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

from tricomm.connect.agreement import Gathered
from tricomm.connect.feeds.feed import Feed
from tricomm.connect.world import World
from tricomm.layout.spec import ShardingSpec


class Paired(ABC):
    """A rank of a job whose ranks have met each other, and then meet those of others.

    Args:
        gathered: the ranks of this side.
        specs: of the tensors, on these ranks.
    """

    def __init__(self, gathered: Gathered, specs: Mapping[str, ShardingSpec]) -> None:
        self._connect, self._agreement, self._options = gathered
        self._specs = dict(specs)

    def _feed_between(
        self, world: World, source: str, destination: str, seconds: float | None = None, before: Feed | None = None
    ) -> Feed:
        """Tell the other side the layouts and the rules of this one, and make the feed.

        Args:
            world: of both sides.
            source, destination: the sides.
            seconds: for the exchange; None is the world's.
            before: the feed of the epoch before.

        Raises:
            SpecError, PlanError: the sides do not fit each other.
            TransportError: the other side is gone, or tells other rules.
        """
        own = self._options.rules
        told = world.exchange(self._specs, seconds, rules=None if own is None else {(source, destination): own})
        return Feed(world, told, source=source, destination=destination, before=before, **self._options.given())

    @abstractmethod
    def close(self) -> None:
        """Leave in peace.

        ::

            publisher.close()  # or use it as ``with Publisher(...) as publisher:``
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
