"""Which Resharder a rank means, as the ranks compare it: its fields, and which of those with equal fields it is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from tricomm.plan.plan import digest_of
from tricomm.transport.coordination.intent import Intent

NUMBER = "<number>"
"""Stands in labels for the number of a Resharder that is counted."""

NUMBER_FIELD = "which Resharder of this layout and name it is (a name=... of its own for each needs no counting)"

CALL_FIELD = "which call of the Resharder it is (all count anew from here, as after connect())"


class Counts(Protocol):
    """How many of each digest this rank has made."""

    def count(self, digest: str) -> int:
        """Return the number of one more."""

    def uncount(self, digest: str, number: int) -> None:
        """The last one never met anybody, so that the next one gets its number."""


class Identity:
    """What tells a Resharder apart from others on all its ranks, so that bytes of one are never taken for another's.

    Args:
        counts: of this rank.
        fields: what the ranks compare, by name.
        label: the Resharder in words, for errors; of one that is counted, with NUMBER in its place.
        is_counted: whether it is the n-th of its fields on this rank, by which it is told apart from others like it.
        meets_always: whether the ranks meet in every call, so that its calls need no count.

    Attributes:
        digest: what it has in common with others of its fields.
        label: in words, with the number that it has by now.

    Example:
        >>> class Made(dict):
        ...     def count(self, digest):
        ...         self[digest] = self.get(digest, 0) + 1
        ...         return self[digest]
        >>> made = Made()
        >>> first, second = (Identity(made, {"name": "keys"}, f"Resharder {NUMBER}", is_counted=True) for _ in range(2))
        >>> first.label, second.label, first.digest == second.digest, str(first) == str(second)
        ('Resharder number 1', 'Resharder number 2', True, False)
    """

    def __init__(
        self, counts: Counts, fields: Mapping[str, str], label: str, *, is_counted: bool, meets_always: bool = False
    ) -> None:
        self._counts = counts
        self._fields = dict(fields)
        self._words = label
        self._is_counted = is_counted
        self._meets_always = meets_always
        self.digest = digest_of(self._fields)
        self.label, self._number = label, 0
        self.count()

    def __str__(self) -> str:
        return f"{self.digest}/{self._number}"

    def count(self) -> None:
        """Number it, unless it has its number."""
        if self._is_counted and not self._number:
            self._number_it(self._counts.count(self.digest))

    def uncount(self) -> None:
        """Nobody has met it: a rank that failed to make it will make another, which gets its number."""
        if self._is_counted and self._number:
            self._counts.uncount(self.digest, self._number)
            self._number_it(0)

    def _number_it(self, number: int) -> None:
        self._number = number
        self.label = self._words.replace(NUMBER, f"number {number}")

    def intent(self, participants: Sequence[int], channel: str, number: int, of_call: Mapping[str, str]) -> Intent:
        """What the ranks compare before a call.

        Args:
            participants, channel: who, and on which channel.
            number: of the call; 0 is the connecting by itself.
            of_call: what they compare of this call alone.
        """
        fields = dict(self._fields)
        if self._is_counted:
            fields[NUMBER_FIELD] = f"number {self._number}"
        counter = "" if self._meets_always else CALL_FIELD
        if counter:
            fields[CALL_FIELD] = f"call {number}" if number else "connect()"
        digest = f"{self}/{0 if self._meets_always else number}"
        if number:
            fields |= of_call
            digest += "".join(f"/{value}" for value in of_call.values())
        call = f"call {number} of {self.label}" if number else f"the connecting of {self.label}"
        return Intent(tuple(participants), fields, digest, channel, call, counter, str(self))
