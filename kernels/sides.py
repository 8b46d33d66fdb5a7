"""Boxes between two places, and the fewest dims that say the same. All boxes at once, in numpy."""

from typing import Any, NamedTuple

import numpy as np

from tricomm.kernels.boxes import Columns

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Sides(NamedTuple):
    """n boxes between two places. Dims are the first index, innermost first; strides are in the unit at hand.

    Attributes:
        extents: (rank, n); 1 where there is no dim.
        read, write: (rank, n), strides; 0 where there is no dim.
        read_place, write_place: (n,), bytes from the base of each side to the first element.
        read_base, write_base: (n,), the bases' addresses, or their last bits, so that words can be aligned.
    """

    extents: Columns
    read: Columns
    write: Columns
    read_place: Columns
    write_place: Columns
    read_base: Columns
    write_base: Columns

    def pick(self, chosen: Any) -> "Sides":
        """Some of the boxes."""
        return Sides(*(column[..., chosen] for column in self))

    @property
    def addresses(self) -> tuple[Columns, Columns]:
        """Of the first elements, as far as the bases are known."""
        return self.read_place + self.read_base, self.write_place + self.write_base


def canonical(sides: Sides) -> Sides:
    """The same elements with as few dims as possible, ordered by the strides with which they are written."""
    sides = _merged(sides)
    wrong = ((sides.write[1:] < sides.write[:-1]) & (sides.extents[1:] > 1)).any(0)
    if not wrong.any():
        return sides
    some = sides.pick(wrong)
    order = np.argsort(np.where(some.extents > 1, some.write, np.iinfo(np.int64).max), axis=0, kind="stable")
    some = some._replace(
        **{name: np.take_along_axis(getattr(some, name), order, 0) for name in ("extents", "read", "write")}
    )
    some = _merged(some)
    rank = max(len(sides.extents), len(some.extents))
    sides = padded(sides, rank)
    for whole, part in zip(sides[:3], padded(some, rank)[:3], strict=True):
        whole[:, wrong] = part
    return sides


def padded(sides: Sides, rank: int) -> Sides:
    """With no-dims outside, up to at least a rank."""
    missing = ((0, max(rank - len(sides.extents), 0)), (0, 0))
    return sides._replace(
        extents=np.pad(sides.extents, missing, constant_values=1),
        read=np.pad(sides.read, missing),
        write=np.pad(sides.write, missing),
    )


def _merged(sides: Sides) -> Sides:
    """Without dims of extent 1, and with a dim joined to the one inside where both sides go on at its end."""
    rank, count = sides.extents.shape
    extents = np.ones((rank, count), np.int64)
    read, write = np.zeros((rank, count), np.int64), np.zeros((rank, count), np.int64)
    top_extent, top_read, top_write = extents[0].copy(), read[0].copy(), write[0].copy()
    used = np.zeros(count, np.int64)
    boxes = np.arange(count)
    for extent, a, b in zip(sides.extents, sides.read, sides.write, strict=True):
        is_dim = extent != 1
        joins = is_dim & (used > 0) & (a == top_extent * top_read) & (b == top_extent * top_write)
        pushed = is_dim & ~joins
        top_extent = np.where(joins, top_extent * extent, np.where(pushed, extent, top_extent))
        top_read, top_write = np.where(pushed, a, top_read), np.where(pushed, b, top_write)
        used += pushed
        at = np.maximum(used - 1, 0)
        extents[at, boxes], read[at, boxes], write[at, boxes] = top_extent, top_read, top_write
    most = max(int(used.max()), 1)
    return sides._replace(extents=extents[:most], read=read[:most], write=write[:most])


def has_run(sides: Sides) -> Mask:
    """Whether the innermost dim is contiguous on both sides."""
    is_run: Mask = (sides.read[0] == 1) & (sides.write[0] == 1)
    return is_run
