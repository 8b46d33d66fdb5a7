"""How the holders of a tile share what is sent of it: in how many parts, and whose each is."""

from typing import NamedTuple

import numpy as np

WHOLE = 0
BY_TURNS = -1
"""In the place of a number of shares: cells stay whole, and the holders of a tile take turns in sending them."""


class Sharing(NamedTuple):
    """Some holders of a tile, spread evenly over all of them, send equally many equal parts each.

    Fewer senders send fewer messages: where they keep the receivers' NICs busy, more of them only cost time.

    Attributes:
        senders: of a tile's holders, how many send.
        shares: how many parts each sends; WHOLE and BY_TURNS leave cells whole, and all holders send.

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
