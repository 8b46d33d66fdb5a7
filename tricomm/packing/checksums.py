"""Checksums: whether what has come is what was given, compared by all ranks after a call."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Self

import torch

from tricomm.errors import TransportError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.digests import Digests
from tricomm.packing.holdings import Tensors
from tricomm.packing.selection import Selection

UNFILLED = -1
"""In the place of a holder: elements that no rank sends are not what rules fill in."""


class Checksums:
    """Compares digests of both sides, themselves moved by two Resharders; see :mod:`tricomm.packing.digests`.

    Args:
        digests: of this rank.
        device: where its tensors are.
        make: the Resharder between two layouts, given what it is for in words.
    """

    def __init__(
        self, digests: Digests, device: torch.device, make: Callable[[ShardingSpec, ShardingSpec, str], Any]
    ) -> None:
        self._digests, self._device, self._is_whole = digests, device, True
        holders, receivers = Mesh(digests.holders, ("holder",)), Mesh(digests.receivers, ("receiver",))
        everybody = Mesh(sorted({*digests.holders, *digests.receivers}), ("rank",))
        tensors = digests.plan.ends.destinations
        self._names = [name for name, _ in tensors]
        shape = (holders.size, receivers.size, len(tensors))
        told = ShardingSpec(receivers, (Shard(0),), (receivers.size, 3), "int64")
        given = ShardingSpec(holders, (Shard(0),), shape, "int64")
        self._exchange = make(given, ShardingSpec(receivers, (Shard(1),)), "digests")
        self._tell = make(told, ShardingSpec(everybody, (Replicate(),)), "what digests say")

    @property
    def movers(self) -> tuple[Any, ...]:
        """The two Resharders; those of a selection are its plan's."""
        return (self._exchange, self._tell) if self._is_whole else ()

    def only(self, selection: Selection) -> Self:
        """Those of some tensors; all ranks of the plan compare them."""
        made = copy(self)
        made._digests, made._is_whole = self._digests.only(selection), False
        return made

    def check(
        self,
        sources: Tensors,
        destinations: Tensors,
        unfilled: Callable[[], Sequence[str]],
        *,
        in_background: bool = False,
    ) -> None:
        """Compare, on all ranks, after a move of items.

        Args:
            sources, destinations: the items that this rank holds, and those that it needs, as they are now.
            unfilled: gives the names of tensors of this rank in which something else stands than rules fill in.
            in_background: whether this is the thread of the ranks' channel, inside of a run that was started.

        Raises:
            TransportError: on all ranks, that of a tensor something else has come than was given.
        """
        expected = self._moved(self._exchange, lambda: self._sent(sources), in_background)
        told = self._moved(self._tell, lambda: self._verdict(expected, destinations, unfilled), in_background)
        assert told is not None
        for receiver, (count, holder, tensor) in zip(self._digests.receivers, told.tolist(), strict=True):
            if count:
                sender = None if holder == UNFILLED else self._digests.holders[holder]
                raise TransportError(_describe(receiver, sender, self._names[tensor], count))

    @staticmethod
    def _moved(mover: Any, make: Callable[[], torch.Tensor | None], in_background: bool) -> torch.Tensor | None:
        """Move what is made; if that fails, the others wait for it no longer."""
        try:
            given = make()
        except Exception as error:
            mover._tell(error)
            raise
        moved: torch.Tensor | None = mover._run_here(given) if in_background else mover(given)
        return moved

    def _sent(self, sources: Tensors) -> torch.Tensor | None:
        digests = self._digests
        return digests.sent(sources).to(self._device) if digests.rank in digests.holders else None

    def _verdict(
        self, expected: torch.Tensor | None, destinations: Tensors, unfilled: Callable[[], Sequence[str]]
    ) -> torch.Tensor | None:
        """(1, 3): how much is wrong here, and the holder and the tensor of the first."""
        digests = self._digests
        if digests.rank not in digests.receivers:
            return None
        assert expected is not None
        wrong = (digests.come(destinations).to(self._device) != expected)[:, 0].nonzero()
        empty = unfilled()
        first = wrong[0].tolist() if len(wrong) else [UNFILLED, self._names.index(empty[0]) if empty else 0]
        return torch.tensor([[len(wrong) + len(empty), *first]], dtype=torch.int64, device=self._device)


def _describe(receiver: int, holder: int | None, name: str, count: int) -> str:
    what = f"tensor {name!r}" if name else "the tensor"
    more = f" (and {count - 1} more pairs of tensors and ranks)" if count > 1 else ""
    other = "what its rule fills in" if holder is None else f"what rank {holder} has: their digests differ"
    return (
        f"{what} on rank {receiver} is not {other}{more}; what was written is garbage. A tensor was changed during the "
        "call, or bytes were lost: call again, and report it if it recurs"
    )
