"""How the holders of a tile share what is sent of it: in how many parts, and whose each is."""

from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import counts_of, spread

WHOLE = 0
BY_TURNS = -1
"""In the place of a number of shares: cells stay whole, and the holders of a tile take turns in sending them."""

ALLOTTED = -2
"""The same, but each cell is sent by the holder that has least to do; see ``allotted``."""

LEVELLED = {ALLOTTED: -3, WHOLE: -4}
"""As such a one, but where NICs send more than others, some cells are cut, and others send a part of them."""

BY_ALLOTMENT = (ALLOTTED, *LEVELLED.values())
"""What each holder sends is told by an Allotment."""

UNITS = 1 << 16
"""Of a cell, in which what each holder sends of it is told."""


class Sharing(NamedTuple):
    """Some holders of a tile, spread evenly over all of them, send equally many equal parts each.

    Fewer senders send fewer messages: where they keep the receivers' NICs busy, more of them only cost time.

    Attributes:
        senders: of a tile's holders, how many send.
        shares: how many parts each sends; WHOLE, BY_TURNS and ALLOTTED leave cells whole, and LEVELLED most; all
            holders send.
        is_by_nic: whether NICs, not holders, send equal parts: the fewer ranks use a NIC, the more each sends.

    Example:
        Two of six holders, three parts each; of the next tile the holders behind them:

        >>> sharing = Sharing(senders=2, shares=3)
        >>> part = np.arange(sharing.parts)
        >>> sharing.holders(part, turns=0, holders=6).tolist()
        [0, 0, 0, 3, 3, 3]
        >>> sharing.holders(part, turns=1, holders=6).tolist()
        [1, 1, 1, 4, 4, 4]
    """

    senders: int
    shares: int
    is_by_nic: bool = False

    @property
    def each(self) -> int:
        """Parts of a sender."""
        return max(self.shares, 1)

    @property
    def parts(self) -> int:
        """Parts of a line that is shared."""
        return self.senders * self.each

    def _turn(self, turns: np.ndarray | int, holders: int) -> np.ndarray:
        """By how many places the senders of some tiles are moved on: not so far that they meet the next."""
        return np.asarray(turns) % max(holders // self.senders, 1)

    def holders(self, part: np.ndarray, turns: np.ndarray | int, holders: int) -> np.ndarray:
        """Which of its tile's holders sends each part.

        Args:
            part: its number.
            turns: of its tile or cell; neighbouring ones have other senders.
            holders: of a tile.
        """
        found: np.ndarray = part // self.each * holders // self.senders + self._turn(turns, holders)
        return found % holders

    def of_holder(self, holder: int, turns: np.ndarray, holders: int) -> tuple[np.ndarray, np.ndarray]:
        """(the first part that a holder sends, the last one), which is before the first one where it sends none."""
        ahead = (holder - self._turn(turns, holders)) % holders
        number = -(-ahead * self.senders // holders)
        sends = (number < self.senders) & (number * holders // self.senders == ahead)
        first = number * self.each
        return first, np.where(sends, first + self.each, first) - 1


class Ends(NamedTuple):
    """Where the parts of lines end that holders with unequal NICs share, in units that divide all parts.

    Attributes:
        units: int array (tiles,): of each source tile's line.
        ends: int array (tiles, parts): where each part ends.

    Example:
        The third of three holders has a NIC of its own, and the others share one:

        >>> ends = Ends.of(np.array([[1, 1, 2]]), Sharing(senders=3, shares=1, is_by_nic=True))
        >>> ends.units.tolist(), ends.ends.tolist()
        ([4], [[1, 2, 4]])
        >>> ends.find(np.zeros(4, np.int64), np.arange(4)).tolist()
        [0, 1, 2, 2]
    """

    units: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, units: np.ndarray, sharing: Sharing) -> "Ends":
        """From the units that each holder of each tile sends, (tiles, holders)."""
        ends = np.cumsum(units.repeat(sharing.each, 1), 1)
        return cls(ends[:, -1], ends)

    def find(self, tiles: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The part in which each of some units is, given its tile and its place in the tile's line."""
        stride = int(self.units.max()) + 1
        ends = self.ends + np.arange(len(self.ends))[:, None] * stride
        found: np.ndarray = np.searchsorted(ends.reshape(-1), tiles * stride + at, side="right")
        found -= tiles * self.ends.shape[1]
        return found

    def spans(self, tiles: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the first unit, the one behind the last) of some parts."""
        return np.where(parts > 0, self.ends[tiles, parts - 1], 0), self.ends[tiles, parts]


class Allotment(NamedTuple):
    """What each holder sends of each cell to each replica, where that follows from no rule.

    Attributes:
        shape: cells of each dim, replicas: a delivery is a place in it.
        offsets: (deliveries + 1,), where the parts of each begin.
        holders: (parts,), which of its tile's holders sends each.
        stops: (parts,), where each ends, in UNITS of the cell.
    """

    shape: tuple[int, ...]
    offsets: np.ndarray
    holders: np.ndarray
    stops: np.ndarray

    def parts(self, rows: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(which of the rows, holder, where it begins, where it ends) of each part of some cells for some replicas.

        Args:
            rows: the cells, (deliveries, dims).
            copies: the replicas, (deliveries,).
        """
        number = np.ravel_multi_index((*rows.T, copies), self.shape)
        row, at = np.arange(len(rows)).repeat(counts_of(self.offsets)[number]), spread(self.offsets, number)
        is_first = np.ones(len(at), bool)
        is_first[1:] = row[1:] != row[:-1]
        return row, self.holders[at], np.where(is_first, 0, self.stops[at - 1]), self.stops[at]


def turns_of(numbers: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Whose turn it is, of so many, for each of some numbers: level for those that are neighbours, and for those that
    are ``count``, or a power of it, apart. The sum of a number's digits to the base ``count``, but for multiples of it.

    Example:
        >>> turns = turns_of(np.arange(8), 2) % 2
        >>> turns.tolist(), turns[::2].tolist(), turns[::4].tolist()
        ([0, 1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 0], [0, 1])
    """
    count = np.broadcast_to(count, numbers.shape)
    found = np.zeros_like(numbers)
    numbers = np.where(count > 1, numbers, 0)
    while numbers.any():
        found += numbers
        numbers = numbers // count
    return found
