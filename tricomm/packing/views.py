"""The items of a plan by rules, as strided views of the tensors that a caller gives."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import NamedTuple

import torch

from tricomm.packing.binding import NOTHING, Copies, copies_of, several
from tricomm.packing.holdings import Tensors, tensors_of_rank
from tricomm.packing.selection import Planned
from tricomm.plan.ends.ends import Fill, Named
from tricomm.rules.boxes import Piece
from tricomm.rules.meet import within
from tricomm.rules.views.view import Placed, View


class Taken(NamedTuple):
    """Which elements of a tensor an item is on this rank.

    Attributes:
        tensor: its number among those that are given.
        placed: where; None for all of the tensor.
    """

    tensor: int
    placed: Placed | None


class FilledBox(NamedTuple):
    """Elements of a destination that are one value.

    Attributes:
        tensor: its number among those that are given.
        piece: where in the rank's shard.
    """

    tensor: int
    piece: Piece


class ItemViews:
    """What one rank's tensors are as items; kept for the tensors of the last call.

    Args:
        plan: with rules.
        rank: whose.
    """

    def __init__(self, plan: Planned, rank: int) -> None:
        sources, destinations = tensors_of_rank(plan, rank)
        held, needed = ({number: at for at, number in enumerate(numbers)} for numbers in (sources, destinations))
        known: dict[object, Placed | None] = {}

        def taken(at: int, view: View | None, named: Named) -> Taken:
            key = (view, id(named.spec))
            if key not in known:
                known[key] = None if view is None else view.placed(named.spec.holding(rank))
            return Taken(at, known[key])

        self._read: list[Taken] = []
        self._written: list[Taken] = []
        for item in plan.items:
            assert item.part is not None, "a plan with rules knows of each item of which tensors it is"
            source, destination, views = item.part
            read, written = views or (None, None)
            if rank in item.source.mesh:
                self._read.append(taken(held[source], read, plan.ends.sources[source]))
            if rank in item.destination.mesh:
                self._written.append(taken(needed[destination], written, plan.ends.destinations[destination]))
        self._fills = [
            one
            for fill in plan.ends.fills
            if fill.tensor in needed
            for one in _filled(fill, needed[fill.tensor], plan.ends.destinations[fill.tensor], rank)
        ]
        self._last: _Kept | None = None

    def of(self, sources: Tensors, destinations: Tensors) -> tuple[Tensors, Tensors, Copies]:
        """The items that are read and those that are written, and what fills the rest of the destinations."""
        last = self._last
        if last is None or not last.is_of((*sources, *destinations)):
            last = self._last = self._made(sources, destinations)
        return last.sources, last.destinations, last.fills

    def unfilled(self, destinations: Tensors) -> list[int]:
        """Which of the destinations, by their place, have something else where rules fill them."""
        return sorted({one.tensor for one in self._fills if not _is_filled(destinations[one.tensor], one.piece)})

    def _made(self, sources: Tensors, destinations: Tensors) -> "_Kept":
        read, written = ([tensor.detach() for tensor in tensors] for tensors in (sources, destinations))
        fills = [_fill(written[one.tensor], one.piece) for one in self._fills]

        def forget(_: object) -> None:
            self._last = None

        return _Kept(
            [(weakref.ref(one, forget), one.data_ptr(), one.stride()) for one in (*sources, *destinations)],
            [_view(read[one.tensor], one.placed) for one in self._read],
            [_view(written[one.tensor], one.placed) for one in self._written],
            several(fills) if fills else NOTHING,
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """The items of the tensors of the last call, which it does not keep alive."""

    tensors: Sequence[tuple["weakref.ref[torch.Tensor]", int, tuple[int, ...]]]
    sources: Tensors
    destinations: Tensors
    fills: Copies

    def is_of(self, tensors: Tensors) -> bool:
        """Whether these are the same tensors in the same place."""
        return len(tensors) == len(self.tensors) and all(
            reference() is tensor and tensor.data_ptr() == address and tensor.stride() == strides
            for tensor, (reference, address, strides) in zip(tensors, self.tensors, strict=True)
        )


def _view(tensor: torch.Tensor, placed: Placed | None) -> torch.Tensor:
    if placed is None:
        return tensor
    offset, strides = placed.strided(tensor.stride())
    return tensor.as_strided(placed.shape, strides, tensor.storage_offset() + offset)


def _filled(fill: Fill, at: int, named: Named, rank: int) -> list[FilledBox]:
    """The boxes of a rank's shard that a fill is."""
    boxes = []
    offsets = [accumulate([high - low for low, high in held], initial=0) for held in named.spec.holding(rank)]
    places = [zip(held, offset, strict=False) for held, offset in zip(named.spec.holding(rank), offsets, strict=True)]
    for chosen in product(*places):  # each on its own, as a rank may hold an element several times
        shift = [offset - low for (low, _), offset in chosen]
        for part in within(fill.piece, tuple([(interval,) for interval, _ in chosen])):
            start = tuple([at_dim + by for at_dim, by in zip(part.start, shift, strict=True)])
            boxes.append(FilledBox(at, replace(part, start=start)))
    return boxes


def _fill(tensor: torch.Tensor, piece: Piece) -> Copies:
    return copies_of((_box_and_value(tensor, piece),))


def _is_filled(tensor: torch.Tensor, piece: Piece) -> bool:
    """By bits: not every dtype can be compared, and no NaN."""
    box, value = _box_and_value(tensor.detach(), piece)
    bits, expected = (one.contiguous().reshape(-1).view(torch.uint8) for one in (box, value.expand(box.shape)))
    return torch.equal(bits, expected)


def _box_and_value(tensor: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    offset, strides = piece.strided(tensor.stride())
    assert piece.value is not None
    value = torch.full((), piece.value, dtype=torch.float64, device=tensor.device).to(tensor.dtype)
    return tensor.as_strided(piece.shape, strides, tensor.storage_offset() + offset), value
