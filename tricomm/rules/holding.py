"""What a rank holds of a piece: where maps meet the layouts of either side."""

from tricomm.layout.intervals import Region
from tricomm.rules.boxes import Piece, cut


def within(piece: Piece, region: Region) -> list[Piece]:
    """The parts of a piece that lie in a region of the destination, each within one interval of every dim.

    Args:
        piece: of a bound tensor.
        region: per dim of the destination, intervals of global coordinates: a holding of its ``ShardingSpec``.

    >>> from tricomm.rules import Rules, source
    >>> bound = Rules({"w": source("w", (4, 6)).permute(1, 0)}).bind()
    >>> [part.shape for part in within(bound.tensors[0].pieces[0], (((0, 2), (5, 6)), ((0, 4),)))]
    [(2, 4), (4,)]
    """
    return [part.exchanged() for part in within_source(piece.exchanged(), region)]


def within_source(piece: Piece, region: Region) -> list[Piece]:
    """The parts of a piece, not of a fill, that lie in a region of the source tensor that it reads.

    Together with :func:`within`, the box that one rank of the source sends to one of the destination.
    """
    parts = [piece]
    for dim, intervals in enumerate(region):
        parts = [found for part in parts for start, stop in intervals for found in _between(part, dim, start, stop)]
    return parts


def _between(piece: Piece, dim: int, start: int, stop: int) -> list[Piece]:
    near, _ = cut(piece, dim, stop - piece.source_start[dim])
    return [part for one in near for part in cut(one, dim, start - one.source_start[dim])[1]]
