"""Staging: where the chunks of a rank's program stand while they travel, in a buffer of its own or in arenas.

The ranks of a pair that share an arena both compute where a transfer stands there. A rank sees its own strides, and not
those of its peer. So the place depends on what both know: the rounds in which the pair has any, in their order, and the
bytes of each. A few slots, each as large as the largest of those rounds, are used in turn: when a slot's turn comes
again, what stood there has been waited for.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from tricomm.kernels.table import StridedBox

ALIGNMENT_NBYTES = 64
PLACE_NBYTES = 256
"""At a multiple of which each transfer begins."""

Direction = tuple[bool, int]
"""(whether this rank sends, the other rank)."""


class TensorBox(NamedTuple):
    """A box of a tensor and of a packed chunk, or of another tensor.

    Attributes:
        tensor: its number among those of its side.
        box: where it lies in both, in words.
        packed: dtype of the elements on the wire, or of the other tensor.
        other: number of the other tensor.
    """

    tensor: int
    box: StridedBox
    packed: torch.dtype
    other: int = 0


class StagedTransfer(NamedTuple):
    """A transfer with its place.

    Attributes:
        peer, key, nbytes: as in Transfer.
        direct: (number of the local tensor, byte of it) where the chunk begins, or None if it is staged.
        staging_offset: byte of the staging buffer where the chunk begins, or None if it is not staged.
        boxes: how to pack or unpack a staged chunk.
        relay: whether this is a send of what was received, or is sent in the same round before, under the same key.
        group: see Transfer.
        place: byte of the pair's arena where the chunk crosses, or None if it has none.
        is_in_arena: whether it is packed there, or unpacked from there, and not staged.
    """

    peer: int
    key: tuple[int, int]
    nbytes: int
    direct: tuple[int, int] | None
    staging_offset: int | None
    boxes: tuple[TensorBox, ...]
    relay: bool
    group: tuple[int, ...] = ()
    place: int | None = None
    is_in_arena: bool = False

    @property
    def packed_place(self) -> int:
        """The byte where it begins of what it is packed into: the arena, or staging."""
        return (self.place if self.is_in_arena else self.staging_offset) or 0


def lay_out(sends: list[list[StagedTransfer]], receives: list[list[StagedTransfer]], ahead: int, window: int) -> int:
    """Give every staged chunk a place in the staging buffer for the rounds in which it is alive; return its size.

    A receive is alive from the round in which it is posted until its round, and that of the last send that
    relays it, has been retired, ``window`` rounds later.
    """
    last_relay: dict[tuple[int, int], int] = {}
    for index, step in enumerate(sends):
        for transfer in step:
            if transfer.relay:
                last_relay[transfer.key] = index
    alive: list[tuple[int, int, int, list[StagedTransfer], int]] = []
    for index in range(len(sends)):
        for at, transfer in enumerate(receives[index]):
            if transfer.staging_offset is not None:
                last = max(index, last_relay.get(transfer.key, 0)) + window
                alive.append((max(0, index - ahead), last, transfer.nbytes, receives[index], at))
        for at, transfer in enumerate(sends[index]):
            if transfer.staging_offset is not None:
                alive.append((index, index + window, transfer.nbytes, sends[index], at))
    alive.sort(key=lambda item: item[:2])
    taken: list[tuple[int, int, int]] = []
    size, now = 0, -1
    refused = 0  # if not 0, no gap is as large as this
    for first, last, exact_nbytes, step, at in alive:
        nbytes = -(-exact_nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
        if first != now:
            now, refused = first, 0
            taken = [(start, stop, until) for start, stop, until in taken if until >= first]
        offset = taken[-1][1] if taken else 0
        place = len(taken)
        if not refused or nbytes < refused:
            place, offset = _first_gap(taken, nbytes)
            refused = nbytes if place == len(taken) else refused
        taken.insert(place, (offset, offset + nbytes, last))
        step[at] = step[at]._replace(staging_offset=offset)
        size = max(size, offset + nbytes)
    return size


def _first_gap(taken: Sequence[tuple[int, int, int]], nbytes: int) -> tuple[int, int]:
    """(index among what is taken, byte) of the first place that is large enough; behind everything if no gap is."""
    offset = 0
    for index, (start, stop, _) in enumerate(taken):
        if start - offset >= nbytes:
            return index, offset
        offset = stop
    return len(taken), offset


def use_arenas(
    sends: list[list[StagedTransfer]], receives: list[list[StagedTransfer]], arenas: Collection[Direction], window: int
) -> dict[Direction, int]:
    """Give chunks their places in arenas, and let those that would be staged be packed there; returns what each arena
    must have. What is relayed later is staged, as it goes on from there.
    """
    relayed = {t.key for step in sends for t in step if t.relay}
    found: dict[Direction, int] = {}
    for steps, is_send in ((sends, True), (receives, False)):
        places = places_of(steps, is_send, arenas, window)
        found |= places.nbytes
        for step, of_step in zip(steps, places.of_rounds, strict=True):
            for at, place in enumerate(of_step):
                if place is not None:
                    one = step[at]
                    is_there = one.staging_offset is not None and (is_send or one.key not in relayed)
                    staging = None if is_there else one.staging_offset
                    step[at] = one._replace(place=place, is_in_arena=is_there, staging_offset=staging)
    return found


class _Transfer(Protocol):
    @property
    def peer(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Transfer)


class Places(NamedTuple):
    """Of the transfers of one rank in one direction.

    Attributes:
        of_rounds: per round and transfer, the byte of its arena at which it begins; None if it goes another way.
        nbytes: that each arena must have, by direction.
    """

    of_rounds: tuple[tuple[int | None, ...], ...]
    nbytes: dict[Direction, int]


def places_of(rounds: Sequence[Sequence[T]], is_send: bool, arenas: Collection[Direction], window: int) -> Places:
    """Give every transfer whose direction has an arena a place in it.

    Args:
        rounds: what this rank sends in each round, or receives.
        is_send: which of both.
        arenas: the directions that have one.
        window: how many rounds later a transfer may still be in flight.
    """
    turns: dict[int, int] = {}
    slots: dict[int, int] = {}
    found: list[list[tuple[int, int, int] | None]] = []
    for step in rounds:
        used: dict[int, int] = {}
        placed: list[tuple[int, int, int] | None] = []
        for transfer in step:
            peer = transfer.peer
            if (is_send, peer) not in arenas:
                placed.append(None)
                continue
            placed.append((peer, turns.get(peer, 0) % (window + 1), used.get(peer, 0)))
            used[peer] = used.get(peer, 0) + -(-transfer.nbytes // PLACE_NBYTES) * PLACE_NBYTES
        for peer, nbytes in used.items():
            turns[peer] = turns.get(peer, 0) + 1
            slots[peer] = max(slots.get(peer, 0), nbytes)
        found.append(placed)
    of_rounds = tuple(
        tuple(None if one is None else one[1] * slots[one[0]] + one[2] for one in placed) for placed in found
    )
    of_arenas = {(is_send, peer): min(turns[peer], window + 1) * slot for peer, slot in slots.items()}
    return Places(of_rounds, of_arenas)
