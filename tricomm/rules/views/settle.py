"""Cut pieces until what any rank holds of them is a box, on both sides."""

from collections.abc import Iterable, Sequence

from tricomm.errors import SpecError
from tricomm.layout.intervals import Intervals
from tricomm.layout.part_table import part_table
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.boxes import Piece, cut
from tricomm.rules.views.places import places
from tricomm.rules.views.view import View


def settled(piece: Piece, source: ShardingSpec, destination: ShardingSpec) -> list[Piece]:
    """Cut a piece, not of a fill, into parts of which each rank holds a box that is one walk through its shard.

    Cuts at multiples of what a digit steps over need none of this, and no layout of the field needs more than a few.

    Args:
        piece: of a bound map.
        source, destination: the layouts of its tensors.

    Raises:
        SpecError: a rank of the destination holds elements several times, in places that no walk joins.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> from tricomm.rules import Rules, source
        >>> piece = Rules({"w": source("w", (6, 4)).flatten()}).bind().tensors[0].pieces[0]
        >>> rows = ShardingSpec(Mesh([0, 1, 2], ("x",)), (Shard(0),), (6, 4))
        >>> flat = ShardingSpec(Mesh([0, 1, 2, 3], ("x",)), (Shard(0),), (24,))
        >>> [part.shape for part in settled(piece, rows, flat)]
        [(2,), (2,), (4,), (2,), (2, 4), (2,), (4,)]
    """
    read, written = held_lists(source), held_lists(destination)
    open_pieces, done = [piece], []
    while open_pieces:
        one = open_pieces.pop()
        parts = _parted(one, read) or _parted(one.exchanged(), written, exchanged=True)
        if parts is None:
            done.append(one)
        else:
            open_pieces += parts
    return done


def held_lists(spec: ShardingSpec) -> list[tuple[Intervals, ...]]:
    """Per dim, the distinct lists of intervals that ranks hold."""
    if spec.holdings is not None:
        return [tuple(dict.fromkeys(held)) for held in zip(*spec.holdings, strict=True)]
    return [tuple(lists) for lists in part_table(spec).parts]


def _parted(piece: Piece, held: Sequence[Iterable[Intervals]], exchanged: bool = False) -> list[Piece] | None:
    """A piece cut in two where a list of its source dims asks for it; None if it needs no cut."""
    view = View.of(piece, True)
    for dim, lists in enumerate(held):
        digits = view.along(dim)
        for intervals in lists:
            if len(intervals) <= 1 and len(digits) <= 1:
                continue
            steps = tuple([(view.walks[index].size, view.walks[index].step) for index in digits])
            if places(view.start[dim], steps, intervals, once=not exchanged) is not None:
                continue
            parts = _cut(piece, dim, intervals)
            if parts is None:
                raise SpecError(
                    f"a rank of the destination holds coordinates {intervals} of dim {dim}, some of them several "
                    "times, and a rule cannot write all of these places at once; let the rule repeat them, by "
                    "stack() or expand(), and hold each once"
                )
            return [part.exchanged() for part in parts] if exchanged else parts
    return None


def _cut(piece: Piece, dim: int, intervals: Intervals) -> list[Piece] | None:
    """A piece in parts at an edge of the intervals of a source dim; None if none of them lies inside of it."""
    found: list[Piece] | None = None
    for edge in dict.fromkeys(edge for interval in intervals for edge in interval):
        near, far = cut(piece, dim, edge - piece.source_start[dim])
        # An edge between places of the longest digit may need no cut, once the others are made.
        if near and far and (found is None or len(near + far) > len(found)):
            found = near + far
    return found
