"""Layouts that follow from another tensor's: that of a padded one, or of one whose elements are blocks."""

from collections.abc import Sequence

from tricomm.errors import SpecError
from tricomm.layout.intervals import Region
from tricomm.layout.placement import Partial, Placement, Shard
from tricomm.layout.spec_checks import checked_shape

Shape = tuple[int, ...]


def checked_blocks(blocks: object, ndim: int | None) -> Shape:
    """The size of a block along each dim, of which there may be known how many there are.

    Raises:
        SpecError: not one of at least 1 for each dim; an ArgumentError where they are not integers.
    """
    sizes = checked_shape(blocks)
    if ndim not in (None, len(sizes)) or min(sizes, default=1) < 1:
        dims = "each dim" if ndim is None else f"each of {ndim} dims"
        raise SpecError(f"blocks={sizes} is no size of a block for {dims}; write (128, 128) for a matrix")
    return sizes


def checked_inside(shape: object, padded: Shape) -> Shape:
    """A shape inside of a padded one.

    Raises:
        SpecError: it is not; an ArgumentError where it is no shape.
    """
    smaller = checked_shape(shape)
    if len(smaller) != len(padded) or any(a > b for a, b in zip(smaller, padded, strict=False)):
        raise SpecError(f"shape={smaller} does not fit into the padded {padded}; give the sizes without what pads them")
    return smaller


def trimmed_region(held: Region, shape: Shape) -> Region:
    """What is left of a rank's part of a padded tensor."""
    return tuple(
        [
            tuple([(start, min(stop, extent)) for start, stop in intervals if start < extent])
            for intervals, extent in zip(held, shape, strict=True)
        ]
    )


def in_blocks(
    placements: Sequence[Placement], shape: Shape, sizes: object, is_explicit: bool
) -> tuple[tuple[Placement, ...], Shape, Shape]:
    """The same placements of a tensor whose elements are the blocks, its shape, and the sizes of a block.

    Raises:
        SpecError: a segment is no whole number of blocks, or the layout is Partial or explicit.
    """
    blocks = checked_blocks(sizes, len(shape))
    if is_explicit:
        raise SpecError("explicit holdings say their cuts themselves; write them with starts and stops on blocks")
    found: list[Placement] = []
    for placement in placements:
        if isinstance(placement, Partial):
            raise SpecError(f"{placement!r} cuts nothing that could fall on blocks; reduce first")
        if isinstance(placement, Shard) and placement.segments is not None:
            block = blocks[placement.dim]
            if any(size % block for size in placement.segments):
                raise SpecError(
                    f"{placement!r}: a segment is no whole number of blocks of {block}; choose blocks that divide "
                    "the segments, or pad these"
                )
            placement = Shard(placement.dim, tuple([size // block for size in placement.segments]))
        found.append(placement)
    return tuple(found), tuple([-(-extent // block) for extent, block in zip(shape, blocks, strict=True)]), blocks


def of_blocks(held: Region, blocks: Shape, shape: Shape) -> Region:
    """The elements of some blocks; the last block of a dim may be smaller."""
    grown = [
        tuple([(start * block, stop * block) for start, stop in intervals])
        for intervals, block in zip(held, blocks, strict=True)
    ]
    return trimmed_region(tuple(grown), shape)


def first_cut_inside(held: Region, blocks: Shape, shape: Shape) -> tuple[int, int] | None:
    """(dim, coordinate) of a cut that falls inside of a block; None if there is none."""
    for dim, (intervals, block, extent) in enumerate(zip(held, blocks, shape, strict=True)):
        for edge in (edge for interval in intervals for edge in interval):
            if edge % block and edge != extent:
                return dim, edge
    return None
