"""The Resharders of a feed, one for each tensor, started together."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from tricomm.errors import SpecError, TricommError
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
        self._movers = {
            name: Resharder(spec, destinations[name], **replace(options, name=f"{options.name}{name}").given())
            for name, spec in sorted(sources.items())
        }

    def start(
        self, tensors: Mapping[str, torch.Tensor | None], out: Mapping[str, torch.Tensor | None]
    ) -> tuple[Handle, ...]:
        """Start all moves; what is written is in place.

        All are started even if one is refused, as the other ranks wait for each; that one tells them itself.

        Raises:
            SpecError: a tensor does not fit, is missing or is none of the feed.
        """
        handles: list[Handle] = []
        errors: list[TricommError] = []
        for name, mover in self._movers.items():
            place = out.get(name)
            if place is None and mover.rank in mover.plan.destination.mesh:
                place = torch.empty(0)  # refused, as it must be, rather than a new tensor that nobody sees
            try:
                handles.append(mover.start(tensors.get(name), out=place))
            except TricommError as error:
                errors.append(error)
        surplus = [name for name in (*tensors, *out) if name not in self._movers]
        if surplus:
            errors.append(SpecError(f"tensor {surplus[0]!r} is none of {list(self._movers)[:20]}; leave it out"))
        if errors:
            raise errors[0]
        return tuple(handles)

    def close(self) -> None:
        """Give back what they hold."""
        for mover in self._movers.values():
            mover.close()
