"""Describe a plan as a page of text."""

from collections.abc import Sequence
from typing import Protocol

from tricomm.layout.intervals import Region
from tricomm.layout.mesh import format_ranks
from tricomm.layout.topology import Topology
from tricomm.plan.ends.ends import Ends
from tricomm.plan.move import Move
from tricomm.plan.reduction import Reduction
from tricomm.plan.stacks import Alike, Item, Stack

MAX_ROWS = 12

ASSUMED = "(assumed; say otherwise with topology=)"
"""Of the network, where nobody has said what it is."""


class Described(Protocol):
    """What a page of text says of a Plan."""

    @property
    def classes(self) -> tuple[Alike, ...]:
        """The tensors, equal ones together."""

    @property
    def is_mapping(self) -> bool:
        """Whether they have names."""

    @property
    def items(self) -> tuple[Item, ...]:
        """Each of them."""

    @property
    def ends(self) -> Ends:
        """What is named on both sides."""

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
    lines = ["reshard"]
    if plan.is_mapping:
        lines[0] += f" {len(plan.items)} tensors" if plan.ends.bound is None else f" {_by_rules(plan)}"
    for one in plan.classes[:MAX_ROWS]:
        if plan.is_mapping:
            others = f" and {len(one.items) - 1} like it" if len(one.items) > 1 else ""
            lines.append(f"  {plan.items[one.items[0]].name}{others}")
        lines += [f"  from  {one.source}", f"  to    {one.destination}"]
    if len(plan.classes) > MAX_ROWS:
        lines.append(f"  ... and {len(plan.classes) - MAX_ROWS} more kinds of tensors")
    if plan.rank is not None:
        lines.append(f"  (only what rank {plan.rank} touches)")
    elif plan.moves:
        lines.append(f"  over  {plan.topology}{_assumed(plan.topology)}")
        lines.append(
            f"  wire  {format_nbytes(plan.wire_nbytes)} (minimum {format_nbytes(plan.minimum_nbytes)}), "
            f"NIC bound {format_seconds(plan.lower_bound_seconds())}, "
            f"expected {format_seconds(plan.simulated_seconds())}"
        )
    titles = [""] if len(plan.moves) == 1 else [f"{_reducing(plan.classes)}: ", "then move the reduced tensor: "]
    for move, title in zip(plan.moves, titles, strict=True):
        lines.extend(_describe_move(move, title, repr(plan.balance)))
    return "\n".join(lines)


def _assumed(topology: Topology) -> str:
    return f" {ASSUMED}" if topology == Topology.flat(len(topology.hosts)) else ""


def describe_layouts(plan: Described) -> str:
    """What a plan moves from where to where, in a line."""
    if plan.ends.bound is not None:
        first_named = plan.ends.destinations[0]
        return f"{_by_rules(plan)}, such as {first_named.name!r}: {first_named.spec}"
    first = plan.items[0]
    if not plan.is_mapping:
        return f"{first.source} -> {first.destination}"
    return f"{len(plan.items)} tensors such as {first.name!r}: {first.source} -> {first.destination}"


def _by_rules(plan: Described) -> str:
    """What rules lead from and to."""
    ends, pieces = plan.ends, len(plan.items)
    return (
        f"{len(ends.sources)} tensors to {len(ends.destinations)} by rules, in {pieces} "
        f"piece{'' if pieces == 1 else 's'}"
    )


def _reducing(classes: Sequence[Alike]) -> str:
    """What the first of two moves is for."""
    reductions = [one.reduction for one in classes if one.reduction is not None]
    numbers = sorted({one.stacked_source.global_shape[0] for one in reductions})
    operations = dict.fromkeys(map(_operation, reductions))
    return f"bring {' or '.join(map(str, numbers))} contributions together and take their {' or '.join(operations)}"


def _operation(reduction: Reduction) -> str:
    """What is taken of the contributions."""
    if reduction.op == "sum" and reduction.divisor > 1:
        return f"sum, divided by {reduction.divisor}"
    return reduction.op


def _cast(stack: Stack) -> str:
    """Where the elements of a stack are cast."""
    before, after = stack.source.dtype, stack.destination.dtype
    if before == after:
        return ""
    return f", cast to {after} on the {'receiver' if stack.wire_dtype == before else 'sender'}"


def counted_as(count: int, what: str) -> str:
    """Write how many there are of something.

    Example:
        >>> counted_as(1, "hop"), counted_as(3, "hop")
        ('1 hop', '3 hops')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def _describe_move(move: Move, title: str, balance: str) -> list[str]:
    rounds = len({hop.round for hop in move.hops})
    local = sum(len(set(task.holders) & set(task.receivers)) for task in move.tasks)
    cast = "".join(dict.fromkeys(map(_cast, move.stacks)))
    strategies = " and ".join(dict.fromkeys(map(repr, move.strategies)))
    counts = {"task": len(move.tasks), "message": len(move.messages), "hop": len(move.hops)}
    counted = ", ".join(counted_as(count, what) for what, count in counts.items())
    copies = "1 local copy" if local == 1 else f"{local} local copies"
    lines = [f"  {title}{strategies}, {balance}: {counted} in {counted_as(rounds, 'round')}, {copies}{cast}"]
    for message in move.messages[:MAX_ROWS]:
        arrow = " -> ".join(format_ranks([rank]) for rank in message.chain)
        if message.in_one_call:
            arrow = f"{format_ranks(message.chain[:1])} => {format_ranks(message.chain[1:])}"
        chunks = len(message.chunks)
        first = format_region(message.chunks[0][0].region)
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
