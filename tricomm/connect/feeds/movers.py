"""What a feed moves its tensors with: one Resharder for all of them, which writes in place."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tricomm.connect.told.agreed import Told
from tricomm.errors import SpecError
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
        self._mover = Resharder(dict(sources), dict(destinations), **options.given())
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


def options_between(
    specs: Mapping[str, Mapping[str, ShardingSpec]], source: str, destination: str, given: Options
) -> Options:
    """Return the options of the moves from one side to another: by the rules that were told, unless others are given.

    They are confirmed, so that all ranks give up the same move and none waits for one that has done its part.

    Args:
        specs: what the sides told in an exchange.
        source, destination: the sides.
        given: of the feed.

    Raises:
        SpecError: a side told nothing, or has a tensor that the other has not and no rule makes.
    """
    absent = next((side for side in (source, destination) if side not in specs), None)
    if absent is not None:
        raise SpecError(f"specs have no side {absent!r}; pass what world.exchange(...) gave")
    rules = specs.rules.get((source, destination)) if given.rules is None and isinstance(specs, Told) else given.rules
    here, there = specs[source], specs[destination]
    odd = sorted(here.keys() ^ there.keys()) if rules is None else ()
    if odd:
        side = source if odd[0] in here else destination
        raise SpecError(
            f"only side {side!r} has tensor {odd[0]!r}; give both sides the same names, or let one of them say by "
            f"exchange(..., rules=) how the tensors of {destination!r} are made of those of {source!r}"
        )
    return replace(given, rules=rules, confirm=given.confirm is not False)
