"""Steps: what is bound to tensors and buffers, in the order in which it is posted, awaited and unpacked.

The order is COSTA's: receives first, then pack and send, local copies while the network works, and unpack in the order
of the rounds. What goes straight from tensors to tensors is told before all else, and pulled after the local copies.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tricomm.packing.binding import NOTHING, Binding, BoundTransfer, Copies, TorchCopies
from tricomm.transport.base import Operation

Completion = tuple[int | None, Callable[[], object] | None]
"""The work of a transfer, None if it has been awaited before or there is none, and what unpacks then, if anything."""

Send = tuple[Operation, Callable[[], object] | None]
"""A send, and what packs it, if anything does."""


class Step(NamedTuple):
    """What a run does between two pauses. Works count from 0 in the order in which they are posted.

    Attributes:
        relayed: works that are awaited first: what has come goes on from here.
        receives, sends: posted as one group.
        ended: rounds that are awaited and unpacked last, by their numbers; -1 for the local copies.
    """

    relayed: tuple[int, ...]
    receives: tuple[Operation, ...]
    sends: tuple[Send, ...]
    ended: tuple[tuple[int, tuple[Completion, ...]], ...]


class Bound(NamedTuple):
    """A binding as what a run does, made once.

    Attributes:
        steps: in order.
        sent, received: (messages, bytes) of a run.
        calls: how many calls end with it.
    """

    steps: tuple[Step, ...]
    sent: tuple[int, int]
    received: tuple[int, int]
    calls: int


class Pulled(NamedTuple):
    """What goes straight from tensors to tensors, bound: one transfer for each pair and direction.

    Attributes:
        receives, sends: posted before all else.
        copies: what pulls all that is received.
        received_nbytes, sent_nbytes: of a run.
    """

    receives: tuple[Operation, ...] = ()
    sends: tuple[Operation, ...] = ()
    copies: Copies = NOTHING
    received_nbytes: int = 0
    sent_nbytes: int = 0


NOTHING_PULLED = Pulled()


def schedule(binding: Binding, is_last: bool, pulled: Pulled = NOTHING_PULLED) -> Bound:
    """Return what every run of a binding does.

    Round ``index`` is started once what it forwards has come, and round ``index - rounds_open`` is waited for and
    unpacked, whereupon its places in the staging buffer are free. Receives are posted with the rounds before theirs, as
    far ahead as the transport likes.
    """
    program, count = binding.program, len(binding.sends)
    steps: list[Step] = []
    numbers = itertools.count(len(pulled.receives) + len(pulled.sends))
    received: list[list[int]] = []
    sent: list[list[int]] = []
    arrivals: dict[tuple[int, int], int] = {}
    awaited: set[int] = set()
    for index in range(max(count + program.rounds_open, 1)):
        relayed, receives, sends = list[int](), list[Operation](), list[Send]()
        ended: list[tuple[int, tuple[Completion, ...]]] = [] if index else [(-1, _local_of(binding))]
        if index < count:
            # What several get in one call was not received: it is what the first of these sends packs.
            keys = (one.key for one in program.sends[index] if one.relay and one.key in arrivals)
            relayed += sorted({arrivals[key] for key in keys} - awaited)
            awaited.update(relayed)
            for early in range(len(received), min(index + program.receives_ahead + 1, count)):
                received.append([next(numbers) for _ in program.receives[early]])
                arrivals.update(zip((one.key for one in program.receives[early]), received[early], strict=True))
                receives += (_operation(False, one) for one in binding.receives[early])
            sent.append([next(numbers) for _ in program.sends[index]])
            sends += ((_operation(True, one), _run_of(one.copies)) for one in binding.sends[index])
        done = index - program.rounds_open
        if 0 <= done < count:
            of_receives = zip(received[done], binding.receives[done], strict=True)
            completions = [(None if number in awaited else number, _run_of(one.copies)) for number, one in of_receives]
            ended.append((done, (*completions, *((number, None) for number in sent[done]))))
            awaited.update(received[done])
        if index == 0 or relayed or receives or sends:
            steps.append(Step(tuple(relayed), tuple(receives), tuple(sends), tuple(ended)))
        else:
            steps[-1] = steps[-1]._replace(ended=(*steps[-1].ended, *ended))
    if pulled is not NOTHING_PULLED:
        steps = _with_pulled(steps, pulled)
    return Bound(
        tuple(steps),
        _counted(binding.sends, pulled.sends, pulled.sent_nbytes),
        _counted(binding.receives, pulled.receives, pulled.received_nbytes),
        int(is_last),
    )


def _with_pulled(steps: Sequence[Step], pulled: Pulled) -> list[Step]:
    """Tell all that may be pulled first; pull after the local copies, when all is there; and end when all was pulled
    of this rank.
    """
    (number, local), *ended = steps[0].ended
    count = len(pulled.receives)
    coming: list[Completion] = [(at, None) for at in range(count)]
    if coming:
        coming[-1] = count - 1, _run_of(pulled.copies)
    first = Step((), pulled.receives, tuple((one, None) for one in pulled.sends), ((number, (*local, *coming)),))
    found = [first, steps[0]._replace(ended=tuple(ended)), *steps[1:]]
    (*before, (number, completions)) = found[-1].ended or found[-2].ended
    waits = tuple((count + at, None) for at in range(len(pulled.sends)))
    last = -1 if found[-1].ended else -2
    found[last] = found[last]._replace(ended=(*before, (number, (*completions, *waits))))
    return found


def _operation(is_send: bool, one: BoundTransfer) -> Operation:
    return Operation(is_send, one.peer, one.buffer, one.runs, one.group, one.place)


def _counted(
    rounds: Sequence[Sequence[BoundTransfer]], pulled: Sequence[Operation], pulled_nbytes: int
) -> tuple[int, int]:
    packed_nbytes = sum(one.buffer.numel() for step in rounds for one in step)
    return sum(map(len, rounds)) + len(pulled), packed_nbytes + pulled_nbytes


def _local_of(binding: Binding) -> tuple[Completion, ...]:
    return () if binding.local is NOTHING else ((None, binding.local.run),)


def _run_of(copies: Copies) -> Callable[[], object] | None:
    if copies is NOTHING:
        return None
    if isinstance(copies, TorchCopies) and len(copies.pairs) == 1:
        ((into, out_of),) = copies.pairs
        return partial(into.copy_, out_of)
    return copies.run
