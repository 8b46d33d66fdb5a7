"""Parts: regions of the tensors of a move, counted in bytes, so that tensors of any dtypes share messages.

A move has *stacks*: equal tensors that lie one behind the other along a new dim 0 (see ``stacks``). A part is a region
of one of them.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import Groups, Rows
from tricomm.layout.intervals import Piece, Region, cut_shapes, region_numel, region_shape


class Part(NamedTuple):
    """A region of a stack.

    Attributes:
        stack: its number in the move.
        itemsize: bytes of an element on the wire.
        region: global coordinates, per dim.

    Example:
        >>> part = Part(0, 4, (((0, 4),), ((0, 8), (16, 24))))
        >>> part.shape, part.numel, part.nbytes
        ((4, 16), 64, 256)
    """

    stack: int
    itemsize: int
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, one per dim."""
        return region_shape(self.region)

    @property
    def numel(self) -> int:
        """Count the elements."""
        return region_numel(self.region)

    @property
    def nbytes(self) -> int:
        """Count the bytes on the wire."""
        return self.itemsize * region_numel(self.region)


def nbytes_of(parts: Sequence[Part]) -> int:
    """Count the bytes of some parts."""
    return sum([part.nbytes for part in parts])


def in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Some parts stack after stack: so larger elements come first, and each lies at a multiple of its size."""
    return tuple(sorted(parts, key=attrgetter("stack")))


class PartGroups(Rows[tuple[Part, ...]]):
    """Several parts each, all of one stack, as columns.

    Attributes:
        stack, itemsize: of all parts.
        groups: the regions.
    """

    __slots__ = ("groups", "itemsize", "stack")

    def __init__(self, stack: int, itemsize: int, groups: Groups) -> None:
        self.stack, self.itemsize, self.groups = stack, itemsize, groups

    @property
    def nbytes(self) -> np.ndarray:
        """Bytes of each group."""
        nbytes: np.ndarray = self.groups.numel * self.itemsize
        return nbytes

    def take(self, groups: np.ndarray) -> "PartGroups":
        """Some of them."""
        return PartGroups(self.stack, self.itemsize, self.groups.take(groups))

    def __len__(self) -> int:
        return len(self.groups)

    def _items(self, rows: np.ndarray) -> Iterator[tuple[Part, ...]]:
        stack, itemsize = self.stack, self.itemsize
        for regions in self.groups._items(rows):
            yield tuple([Part(stack, itemsize, region) for region in regions])


def cut_parts(parts: Sequence[Part], unit: int, points: Sequence[int], slack: int) -> list[tuple[Part, ...]]:
    """Cut some parts, taken one after the other and row-major, into consecutive ones; elements stay whole.

    Args:
        parts: what to cut; none is empty.
        unit: bytes in which points and slack count; it divides every itemsize.
        points: where, ascending; n points give n + 1 results.
        slack: how far a cut may move from its point so that it falls between parts, or between rows.

    Example:
        >>> cut_parts([Part(0, 4, (((0, 4),),))], 4, [1], 0)
        [(Part(stack=0, itemsize=4, region=(((0, 1),),)),), (Part(stack=0, itemsize=4, region=(((1, 4),),)),)]
    """
    weights = [part.itemsize // unit for part in parts]
    pieces = cut_shapes([part.shape for part in parts], weights, points, slack)
    return [taken(cut, parts) for cut in pieces]


def taken(pieces: Sequence[Piece], parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts that some pieces of parts are."""
    return tuple([Part(*parts[piece.region][:2], piece.of(parts[piece.region].region)) for piece in pieces])
