"""Describe a plan as a page of text."""

from typing import Protocol

from tricomm.layout.intervals import Region
from tricomm.layout.mesh import format_ranks
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology
from tricomm.plan.move import Move
from tricomm.plan.reduction import Reduction

MAX_ROWS = 12


class Described(Protocol):
    """What a page of text says of a Plan."""

    @property
    def source(self) -> ShardingSpec:
        """Where the tensor is."""

    @property
    def destination(self) -> ShardingSpec:
        """Where it goes."""

    @property
    def topology(self) -> Topology:
        """The network that it was planned for."""

    @property
    def balance(self) -> object:
        """The sender policy; its repr is shown."""

    @property
    def rank(self) -> int | None:
        """The only rank that was planned for, or None."""

    @property
    def reduction(self) -> Reduction | None:
        """What happens between the two moves of a Partial source, else None."""

    @property
    def moves(self) -> tuple[Move, ...]:
        """One or two."""

    @property
    def wire_nbytes(self) -> int:
        """Bytes between ranks."""

    @property
    def minimum_nbytes(self) -> int:
        """The least of them that any plan sends."""

    def lower_bound_seconds(self) -> float:
        """The least time that any plan takes."""

    def simulated_seconds(self) -> float:
        """The time that this one should take."""


def format_nbytes(nbytes: float) -> str:
    """Write bytes as a person reads them.

    Example:
        >>> format_nbytes(8_388_608)
        '8.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """Write seconds as a person reads them.

    Example:
        >>> format_seconds(0.0012)
        '1.2 ms'
    """
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def describe(plan: Described) -> str:
    """Describe the whole plan: what it moves, how, what it costs, and its first messages."""
    lines = [
        "reshard",
        f"  from  {plan.source}",
        f"  to    {plan.destination}",
    ]
    if plan.rank is not None:
        lines.append(f"  (only what rank {plan.rank} touches)")
    elif plan.moves:
        lines.append(f"  over  {plan.topology}")
        lines.append(
            f"  wire  {format_nbytes(plan.wire_nbytes)} (minimum {format_nbytes(plan.minimum_nbytes)}), "
            f"NIC bound {format_seconds(plan.lower_bound_seconds())}, "
            f"expected {format_seconds(plan.simulated_seconds())}"
        )
    for index, move in enumerate(plan.moves):
        title = ""
        if plan.reduction is not None:
            n = plan.reduction.stacked_source.global_shape[0]
            title = (
                f"bring {n} contributions together and take their {_operation(plan.reduction)}: "
                if index == 0
                else "then move the reduced tensor: "
            )
        lines.extend(_describe_move(move, title, repr(plan.balance)))
    return "\n".join(lines)


def _operation(reduction: Reduction) -> str:
    """What is taken of the contributions."""
    if reduction.op == "sum" and reduction.divisor > 1:
        return f"sum, divided by {reduction.divisor}"
    return reduction.op


def _describe_move(move: Move, title: str, balance: str) -> list[str]:
    rounds = len({hop.round for hop in move.hops})
    local = sum(len(set(task.holders) & set(task.receivers)) for task in move.tasks)
    cast = ""
    if move.source.dtype != move.destination.dtype:
        where = "receiver" if move.wire_dtype == move.source.dtype else "sender"
        cast = f", cast to {move.destination.dtype} on the {where}"
    lines = [
        f"  {title}{move.strategy!r}, {balance}: {len(move.tasks)} tasks, {len(move.messages)} messages, "
        f"{len(move.hops)} hops in {rounds} round{'' if rounds == 1 else 's'}, {local} local copies{cast}"
    ]
    for message in move.messages[:MAX_ROWS]:
        arrow = " -> ".join(format_ranks([rank]) for rank in message.chain)
        chunks = len(message.chunks)
        first = format_region(message.chunks[0][0])
        more = sum(len(chunk) for chunk in message.chunks) - 1
        lines.append(
            f"    {arrow}   {message.numel} elements in {chunks} chunk{'s' if chunks > 1 else ''}: {first}"
            + (f" and {more} more" if more else "")
        )
    if len(move.messages) > MAX_ROWS:
        lines.append(f"    ... and {len(move.messages) - MAX_ROWS} more messages")
    return lines


def format_region(region: Region) -> str:
    """Write a region as slices; ``[]`` is the element of a 0-d tensor.

    Example:
        >>> format_region((((0, 4), (8, 12)), ((0, 16),)))
        '[0:4|8:12, 0:16]'
    """
    return "[" + ", ".join("|".join(f"{start}:{stop}" for start, stop in intervals) for intervals in region) + "]"
