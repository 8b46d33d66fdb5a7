"""What a feed moves its tensors with: one Resharder for all of them, which writes in place."""

from collections.abc import Mapping
from typing import Any

import torch

from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options
from tricomm.resharder import Resharder
from tricomm.transport.handle import Handle


class Movers:
    """See above.

    Args:
        sources, destinations: layouts by name, on ranks of the group.
        options: of the moves; its name stands before those of the tensors.

    Raises:
        SpecError: layouts that contradict each other.
    """

    def __init__(
        self, sources: Mapping[str, ShardingSpec], destinations: Mapping[str, ShardingSpec], options: Options
    ) -> None:
        self._mover = Resharder(dict(sorted(sources.items())), dict(sorted(destinations.items())), **options.given())
        self._is_written = any(self._mover.rank in spec.mesh for spec in destinations.values())

    def start(
        self, tensors: Mapping[str, torch.Tensor | None], out: Mapping[str, torch.Tensor | None]
    ) -> tuple[Handle[Any], ...]:
        """Start the moves; what is written is in place.

        Raises:
            SpecError: a tensor does not fit, is missing or is none of the feed. The other ranks are told.
        """
        # On the destination nothing is made: a tensor that is missing must be refused, not returned where nobody looks.
        place = dict(out) if self._is_written else None
        return (self._mover.start(dict(tensors) or None, out=place),)

    def close(self) -> None:
        """Give back what they hold."""
        self._mover.close()
