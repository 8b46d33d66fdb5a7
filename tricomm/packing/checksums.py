"""Checksums: whether what has come is what was given, compared by all ranks after a call."""

from collections.abc import Callable
from typing import Any

import torch

from tricomm.errors import TransportError
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.digests import Digests
from tricomm.packing.holdings import Tensors

NOT_STARTED_TEXT = (
    "checksum=True compares what has come when a call ends, and start() returns before; call the Resharder, or leave "
    "checksum out"
)


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
        self._digests, self._device = digests, device
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
    def movers(self) -> tuple[Any, Any]:
        """The two Resharders."""
        return self._exchange, self._tell

    def check(self, sources: Tensors, destinations: Tensors) -> None:
        """Compare, on all ranks, after a move of items.

        Args:
            sources, destinations: the items that this rank holds, and those that it needs, as they are now.

        Raises:
            TransportError: on all ranks, that of a tensor something else has come than was given.
        """
        digests, rank = self._digests, self._digests.rank
        given = digests.sent(sources).to(self._device) if rank in digests.holders else None
        expected = self._exchange(given)
        verdict = None
        if rank in digests.receivers:
            assert expected is not None
            wrong = (digests.come(destinations).to(self._device) != expected)[:, 0].nonzero()
            first = wrong[0].tolist() if len(wrong) else [0, 0]
            verdict = torch.tensor([[len(wrong), *first]], dtype=torch.int64, device=self._device)
        told = self._tell(verdict)
        assert told is not None
        for receiver, (count, holder, tensor) in zip(digests.receivers, told.tolist(), strict=True):
            if count:
                raise TransportError(self._text(receiver, digests.holders[holder], self._names[tensor], count))

    @staticmethod
    def _text(receiver: int, holder: int, name: str, count: int) -> str:
        what = f"tensor {name!r}" if name else "the tensor"
        more = f" (and {count - 1} more pairs of tensors and ranks)" if count > 1 else ""
        return (
            f"{what} on rank {receiver} is not what rank {holder} has: their digests differ{more}; what was written is "
            "garbage. A tensor was changed during the call, or bytes were lost: call again, and report it if it recurs"
        )
