"""Tally: what the runs of one rank's plan have cost so far, and how far the one under way has come."""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from tricomm.layout.columns import counts_of, numbers
from tricomm.options import ProgressCallback
from tricomm.plan.program import BoxTransfers, RankProgram, Transfer
from tricomm.plan.stacks import Stack
from tricomm.stats import Progress
from tricomm.transport.moving.steps import Bound

MOST_NOTED = 256
"""Runs that are noted at a time."""


class Tally:
    """Sums over all runs; the loop that carries a run out adds to them as it goes.

    Attributes:
        calls: that were carried out whole.
        messages, nbytes: sent.
        received_messages, received_nbytes: likewise.
        bind_seconds, pack_seconds, post_seconds, wait_seconds, unpack_seconds: on this thread.
        staging_nbytes: the most that a run had in packed chunks.
        noted: runs that are over, as ``add`` takes them, and are to be added when somebody looks, or when these are
            many: a call of few bytes has no time for that. Look at all else after ``settled``.
    """

    __slots__ = (
        "bind_seconds",
        "calls",
        "messages",
        "nbytes",
        "noted",
        "pack_seconds",
        "post_seconds",
        "received_messages",
        "received_nbytes",
        "staging_nbytes",
        "unpack_seconds",
        "wait_seconds",
    )

    def __init__(self) -> None:
        self.calls = self.messages = self.nbytes = self.received_messages = self.received_nbytes = 0
        self.staging_nbytes = 0
        self.noted: list[tuple[Bound, float, float, float, float]] = []
        self.bind_seconds = self.pack_seconds = self.post_seconds = self.wait_seconds = self.unpack_seconds = 0.0

    def add(
        self,
        bound: Bound,
        packing_seconds: float = 0.0,
        posting_seconds: float = 0.0,
        unpacking_seconds: float = 0.0,
        waiting_seconds: float = 0.0,
    ) -> None:
        """Add a run that is over: all but what of its seconds has been added before."""
        _, sent, received, calls = bound
        self.calls += calls
        self.messages += sent[0]
        self.nbytes += sent[1]
        self.received_messages += received[0]
        self.received_nbytes += received[1]
        self.pack_seconds += packing_seconds
        self.post_seconds += posting_seconds
        self.unpack_seconds += unpacking_seconds
        self.wait_seconds += waiting_seconds

    def settled(self) -> "Tally":
        """Return this, with all that was noted added."""
        while self.noted:
            self.add(*self.noted.pop())
        return self

    def waited_since(self, began: float) -> float:
        """Add a wait that began then and is over; returns the time, of perf_counter."""
        now = perf_counter()
        self.wait_seconds += now - began
        return now


class Steps:
    """How much of a rank's part is done after each step: after the local copies of a move, and after each round.

    Attributes:
        tensors, nbytes: of each step, done by then. Bytes are those sent and those received.
        firsts: the step of each move's local copies.
    """

    __slots__ = ("firsts", "nbytes", "tensors")

    def __init__(self, programs: Sequence[RankProgram], stacks: Sequence[Sequence[Stack]]) -> None:
        counts = [1 + len(program.rounds) for program in programs]
        ends = np.cumsum(counts)
        self.firsts: list[int] = (ends - counts).tolist()
        per_step = np.zeros(int(ends[-1]), np.int64)
        items = [item for of_move in stacks for stack in of_move for item in stack.items]
        last = np.full(max(items) + 1, -1, np.int64)
        # Whoever holds or needs a tensor is done with it after the local copies of the last move at the earliest.
        for program, of_move in zip(programs, stacks, strict=True):
            for number in {*program.source_shapes, *program.destination_shapes}:
                last[list(of_move[number].items)] = self.firsts[-1]
        for first, program, of_move in zip(self.firsts, programs, stacks, strict=True):
            tensors = [numbers(stack.items, len(stack.items)) for stack in of_move]
            for step, one in enumerate(program.rounds, first + 1):
                for transfers in (one.sends, one.receives):
                    per_step[step] += _touched(transfers, tensors, last, step)
        held = last[last >= 0]
        self.tensors: list[int] = np.cumsum(np.bincount(held, minlength=len(per_step))).tolist()
        self.nbytes: list[int] = np.cumsum(per_step).tolist()

    def report_of(self, move: int, callback: ProgressCallback) -> Callable[[int], None]:
        """What a run of a move calls after the round of a number; -1 is after its local copies."""
        tensors, nbytes, first = self.tensors, self.nbytes, self.firsts[move] + 1

        def report(index: int) -> None:
            step = first + index
            callback(Progress(tensors[step], tensors[-1], nbytes[step], nbytes[-1]))

        return report


def _touched(transfers: Sequence[Transfer], tensors: Sequence[np.ndarray], last: np.ndarray, step: int) -> int:
    """Note the step of the tensors that some transfers touch; returns their bytes."""
    if isinstance(transfers, BoxTransfers):
        columns = transfers.columns
        of_stack, own = tensors[columns.stack], ~columns.relayed.repeat(counts_of(columns.firsts))
        boxes = zip(columns.starts[own, :1].tolist(), columns.shapes[own, :1].tolist(), strict=True)
        for start, shape in {(*start, *shape) for start, shape in boxes} if len(of_stack) > 1 else ((0, 1),):
            last[of_stack[start : start + shape]] = step
        return int(columns.nbytes.sum())
    for transfer in transfers:
        for region in transfer.regions:
            of_stack = tensors[region.stack]
            start = region.boxes[0].local_start[0] if len(of_stack) > 1 else 0
            last[of_stack[start : start + (region.shape[0] if len(of_stack) > 1 else 1)]] = step
    return sum(transfer.nbytes for transfer in transfers)
