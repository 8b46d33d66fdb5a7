"""View: one side of a piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tricomm.layout.intervals import Intervals, Region, length
from tricomm.rules.boxes import REPEATED, Piece
from tricomm.rules.views.places import NOWHERE, Places, places


class Walk(NamedTuple):
    """How a dim of the box walks through the tensor.

    Attributes:
        size: places along the tensor.
        dim: of the tensor; REPEATED where it stays.
        step: coordinates from one place to the next.
        is_copies: whether all places are copies of one element, which moves once.
    """

    size: int
    dim: int
    step: int
    is_copies: bool


class Placed(NamedTuple):
    """A box in a shard: shape, and where its first element is and how each dim walks, in coordinates of the shard.

    Attributes:
        shape: of the box.
        start: per dim of the shard.
        walks: per dim of the box, (dim of the shard, step); the dim is REPEATED where it stays.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    walks: tuple[tuple[int, int], ...]

    def strided(self, strides: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Offset, and stride per dim of the box, in a shard with those strides (in elements)."""
        offset = sum([at * stride for at, stride in zip(self.start, strides, strict=True)])
        return offset, tuple([0 if dim == REPEATED else step * strides[dim] for dim, step in self.walks])


@dataclass(frozen=True, slots=True)
class View:
    """One side of a piece: a box of elements of a tensor.

    Attributes:
        start: the coordinates of its first element.
        walks: per dim of the box.
        is_read: whether it is of the source, where a rank that holds an element several times reads the first.

    Example:
        >>> from tricomm.rules import Rules, source
        >>> piece = Rules({"w": source("w", (4, 6)).permute(1, 0)}).bind().tensors[0].pieces[0]
        >>> read, written = View.of(piece, True), View.of(piece, False)
        >>> read.placed((((2, 4),), ((0, 6),))).strided((6, 1))
        (0, (1, 6))
    """

    start: tuple[int, ...]
    walks: tuple[Walk, ...]
    is_read: bool

    @classmethod
    def of(cls, piece: Piece, is_read: bool) -> "View":
        """The side of a piece that is read, or the one that is written."""
        digits = piece.digits
        if is_read:
            read = [Walk(one.size, one.source_dim, one.source_step, one.source_dim == REPEATED) for one in digits]
            return cls(piece.source_start, tuple(read), True)
        written = [Walk(one.size, one.dim, one.step, one.source_dim == REPEATED) for one in digits]
        return cls(piece.start, tuple(written), False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box; copies of one element count as one."""
        return tuple([1 if walk.is_copies else walk.size for walk in self.walks])

    def along(self, dim: int) -> list[int]:
        """Which dims of the box walk along a dim of the tensor."""
        return [index for index, walk in enumerate(self.walks) if walk.dim == dim]

    def places(self, dim: int, held: Intervals) -> Places | None:
        """The places that a rank holds with these intervals of a dim of the tensor; see :func:`places`."""
        digits = tuple([(walk.size, walk.step) for walk in self.walks if walk.dim == dim])
        return places(self.start[dim], digits, held, once=self.is_read)

    def region(self, holding: Region) -> Region | None:
        """What a rank holds of the box, if it is settled; None if it holds nothing."""
        found = self._places(holding)
        return None if found is None else tuple([found[index][0] for index in range(len(self.walks))])

    def placed(self, holding: Region) -> Placed:
        """Where the box stands in the shard of a rank; that of a rank that holds none of it is empty."""
        found = self._places(holding)
        if found is None:
            return Placed((0,) * len(self.walks), (0,) * len(holding), ((REPEATED, 0),) * len(self.walks))
        firsts = [self.places(dim, held) for dim, held in enumerate(holding)]
        shape = tuple([length(found[index][0]) for index in range(len(self.walks))])
        walks = tuple([(walk.dim, found[index][1]) for index, walk in enumerate(self.walks)])
        return Placed(shape, tuple([one.first for one in firsts if one is not None]), walks)

    def _places(self, holding: Region) -> dict[int, tuple[Intervals, int]] | None:
        """By dim of the box, the intervals that are held and the step in the shard."""
        result: dict[int, tuple[Intervals, int]] = {
            index: (((0, 1),), 0) for index, walk in enumerate(self.walks) if walk.dim == REPEATED
        }
        for dim, held in enumerate(holding):
            found = self.places(dim, held)
            assert found is not None, "a piece is settled before it is planned"
            if found is NOWHERE:
                return None
            for index, intervals, step in zip(self.along(dim), found.of_digits, found.steps, strict=True):
                if not intervals:
                    return None
                if self.walks[index].is_copies:
                    intervals = ((0, 1),) * length(intervals)
                result[index] = intervals, step
        return result
