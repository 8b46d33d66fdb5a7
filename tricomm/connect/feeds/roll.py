"""Who of some ranks has answered: one addition to an integer of 64 bits on a store, and none is a mere number."""

from collections.abc import Sequence
from typing import Any

from tricomm.layout.mesh import format_ranks

WORD_BITS = 62
"""Ranks that share an integer of the store."""


class RollCall:
    """The answers of some ranks to one question, under a key of a store.

    Each rank sets its own bit by an addition, so that one message answers, shows whose answer is the last, and leaves
    who is missing to be read by anybody. Of more than WORD_BITS ranks each word's last one is counted as well.

    Args:
        store: torch's, with ``find``.
        key: of the question.
        ranks: who is asked, in an order that all share.
    """

    def __init__(self, store: Any, key: str, ranks: Sequence[int]) -> None:
        self._store = store
        self._key = key
        self._ranks = ranks
        self._words = -(-len(ranks) // WORD_BITS)

    def answer(self, rank: int) -> bool:
        """Answer, once, as a rank; whether all have now, by this one."""
        word, bit = divmod(self._ranks.index(rank), WORD_BITS)
        is_full = self._store.add(f"{self._key}/{word}", 1 << bit) == self._full(word)
        return is_full and (self._words == 1 or self._store.add(self._key, 1) == self._words)

    def is_complete(self) -> bool:
        """Whether all have answered."""
        if self._words == 1:
            return self._word(0) == self._full(0)
        return int(self._store.find(self._key) or 0) == self._words

    def describe_missing(self, answer: str) -> str:
        """Say who has not answered, where the others "are ready" or have done what else was asked; "" if all have."""
        words = [self._word(word) for word in range(self._words)]
        missing = [
            rank for place, rank in enumerate(self._ranks) if not words[place // WORD_BITS] >> place % WORD_BITS & 1
        ]
        if not missing:
            return ""
        count = len(self._ranks)
        who = "rank" if len(missing) == 1 else "ranks"
        return f"{count - len(missing)} of {count} ranks {answer}, but not {who} {format_ranks(missing)}"

    def clear(self) -> None:
        """Forget the question."""
        for word in range(self._words):
            self._store.delete_key(f"{self._key}/{word}")
        self._store.delete_key(self._key)

    def _word(self, word: int) -> int:
        return int(self._store.find(f"{self._key}/{word}") or 0)

    def _full(self, word: int) -> int:
        return (1 << min(WORD_BITS, len(self._ranks) - word * WORD_BITS)) - 1
