"""From boxes to the rows of a table: canonical dims, the widest word, magic numbers. All boxes at once, in numpy.

Where a box is read or written does not matter here: callers say which side is which.
"""

from collections.abc import Iterator

import numpy as np

from tricomm.kernels import layout
from tricomm.kernels.boxes import Columns
from tricomm.kernels.sides import Mask, Sides, canonical, has_run, padded
from tricomm.kernels.tiles import (
    COPIES,
    FEW_VECTORS,
    MANY_TILES,
    MANY_VECTORS,
    PERSISTENT,
    VECTORS_LOG2,
    VECTORS_OF_ONE,
    WIDE_CASTS,
    Integers,
    Program,
    Rows,
    fitting_program,
    magic_numbers,
    square,
)

MAX_REACH_WORDS = 2**29
"""A row reaches fewer words than this on either side, so that offsets are int32 in the kernels, which count in the
lanes of a word: 4 of them at most where bits are moved. See reach_words for casts.
"""
MAX_NARROW_LOG2 = 1
"""Of the words that do not go by themselves if they make up runs. Wider ones take the kernels less time each than the
memory takes."""
MIN_TRANSPOSED_EXTENT = 16
"""Along both unit-stride dims; smaller boxes leave most of a square empty."""


def make_rows(
    sides: Sides,
    itemsize: Columns,
    cast: tuple[int, int] | None,
    persistent: bool = False,
    words_per_tile: int | None = None,
) -> tuple[Rows, ...]:
    """The rows of all boxes: those that keep their order, then those to be transposed, by the size of their units.

    Args:
        sides: strides in bytes.
        itemsize: (n,), bytes of an element where none is cast.
        cast: bytes of an element where it is read and where it is written, if elements are cast.
        persistent: whether a small grid does all tiles.
        words_per_tile: None is what fits.

    Raises:
        ValueError: an element of a cast is not at a multiple of its size, or elements are written to one place.
    """
    kept = (sides.extents > 0).all(0)
    if not kept.all():
        sides, itemsize = sides.pick(kept), itemsize[kept]
    if not len(itemsize):
        return ()
    shared = ((sides.write == 0) & (sides.extents > 1)).any(0)
    if shared.any():
        box = int(np.flatnonzero(shared)[0])
        raise ValueError(
            f"box {box} is written with strides {sides.write[::-1, box].tolist()}, so several of its elements share "
            "one place; give a tensor that is not expanded"
        )
    if cast is None:
        ones = np.ones((1, len(itemsize)), np.int64)
        extents, read, write = (
            np.concatenate([inner, outer])
            for inner, outer in ((itemsize[None], sides.extents), (ones, sides.read), (ones, sides.write))
        )
        sides = sides._replace(extents=extents, read=read, write=write)
        units = (1, 1)
    else:
        units = cast
        _check_elements(sides, units)
        sides = sides._replace(read=sides.read // units[0], write=sides.write // units[1])
    sides, log2 = in_words(canonical(sides), units)
    sides, log2 = within_reach(sides, log2, units, reach_words(log2, cast is not None))
    turned, across = _transposable(sides, log2) if cast is None else (np.zeros(len(log2), np.bool_), log2)
    results = []
    if not turned.all():
        results.append(_rows(sides.pick(~turned), log2[~turned], cast, persistent, words_per_tile))
    for unit_log2 in np.unique(log2[turned]).tolist():
        chosen = turned & (log2 == unit_log2)
        results.append(_transposing_rows(sides.pick(chosen), across[chosen], 1 << unit_log2, persistent))
    return tuple(results)


def in_words(sides: Sides, units: tuple[int, int]) -> tuple[Sides, Columns]:
    """The boxes in words instead of bytes, or elements, and the base-2 logarithm of each box's word."""
    log2 = widest_word(sides, units)
    check_words(sides, log2, units)
    is_run = has_run(sides)
    extents, read, write = sides.extents.copy(), sides.read >> log2, sides.write >> log2
    extents[0] = np.where(is_run, extents[0] >> log2, extents[0])
    read[0] = np.where(is_run, 1, read[0])
    write[0] = np.where(is_run, 1, write[0])
    # A run of one word is no dim any more.
    gone = is_run & (extents[0] == 1)
    if gone.any():
        columns = []
        for column, fill in ((extents, 1), (read, 0), (write, 0)):
            column[:, gone] = np.concatenate([column[1:, gone], np.full((1, int(gone.sum())), fill)])
            columns.append(column)
        extents, read, write = columns
    return sides._replace(extents=extents, read=read, write=write), log2


def widest_word(sides: Sides, units: tuple[int, int]) -> Columns:
    """The base-2 logarithm of the widest word, in units, that addresses, strides and the run are multiples of, and
    that is 16 bytes at most on the wider side.
    """
    read_at, write_at = sides.addresses
    bits = (read_at // units[0]) | (write_at // units[1]) | (layout.VECTOR_NBYTES // max(units))
    is_run = has_run(sides)
    bits |= np.where(is_run, sides.extents[0], 1)
    for read, write in zip(sides.read[1:], sides.write[1:], strict=True):
        bits |= read | write
    lowest = bits & -bits
    return (lowest > 1).astype(np.int64) + (lowest > 2) + (lowest > 4) + (lowest > 8)


def check_words(sides: Sides, log2: Columns, units: tuple[int, int]) -> None:
    """Raise unless every address, stride and run is a multiple of the word: a kernel that is promised more than is
    true faults, or moves something else.
    """
    mask = (1 << log2) - 1
    read_at, write_at = sides.addresses
    off = (read_at % (units[0] << log2)) | (write_at % (units[1] << log2))
    off |= np.where(has_run(sides), sides.extents[0], 0) & mask
    off |= np.where(has_run(sides), 0, sides.read[0] | sides.write[0]) & mask
    for read, write in zip(sides.read[1:], sides.write[1:], strict=True):
        off |= (read | write) & mask
    if off.any():
        box = int(np.flatnonzero(off)[0])
        raise AssertionError(
            f"box {box} would move in words of {1 << int(log2[box])} units of {units} bytes, and its address, strides "
            f"or run are no multiples of that; this is an error in tricomm.kernels.rows, please report it"
        )


def _check_elements(sides: Sides, units: tuple[int, int]) -> None:
    for side, at, strides, unit in zip(
        ("read", "written"), sides.addresses, (sides.read, sides.write), units, strict=True
    ):
        off = (at % unit != 0) | (strides % unit != 0).any(0)
        if off.any():
            box = int(np.flatnonzero(off)[0])
            raise ValueError(
                f"box {box} is {side} at address {int(at[box])} with strides {strides[:, box].tolist()} bytes, no "
                f"multiples of its elements' {unit} bytes, so it cannot be cast; place it at a multiple"
            )


def reach_words(log2: Columns, is_cast: bool) -> Columns:
    """How many words a row of each box must not reach. The lanes of a word that is cast are its elements: of the
    narrowest types there are 16, so that such a row may reach a quarter of what others may.
    """
    return MAX_REACH_WORDS >> (np.maximum(log2 - 2, 0) if is_cast else np.zeros_like(log2))


def within_reach(sides: Sides, log2: Columns, units: tuple[int, int], below_words: Columns) -> tuple[Sides, Columns]:
    """Boxes of more dims than a row has, or that reach too far for int32 offsets, as several boxes each."""
    fits = (sides.extents[layout.MAX_RANK :] == 1).all(0)
    for strides in (sides.read, sides.write):
        fits &= ((sides.extents - 1) * strides).sum(0) < below_words
    if fits.all():
        return padded(sides._replace(**_cut(sides)), 2), log2
    parts = [sides.pick(fits)]
    logs = [log2[fits]]
    for box in np.flatnonzero(~fits).tolist():
        nbytes = (units[0] << int(log2[box]), units[1] << int(log2[box]))
        pieces = list(_pieces(sides.pick(slice(box, box + 1)), nbytes, int(below_words[box])))
        parts += pieces
        logs.append(np.full(len(pieces), log2[box]))
    joined = Sides(*(np.concatenate(columns, axis=-1) for columns in zip(*parts, strict=True)))
    return padded(joined._replace(**_cut(joined)), 2), np.concatenate(logs)


def _cut(sides: Sides) -> dict[str, Columns]:
    """The columns without dims that no box has."""
    rank = max(int((sides.extents > 1).sum(0).max()), 1)
    return {name: getattr(sides, name)[:rank] for name in ("extents", "read", "write")}


def _pieces(box: Sides, nbytes: tuple[int, int], below_words: int) -> Iterator[Sides]:
    """One box cut along a dim until every piece fits into a row."""
    extents = box.extents[:, 0]
    if int((extents > 1).sum()) > layout.MAX_RANK:
        dim = int(np.argmin(np.where(extents > 1, extents, np.iinfo(np.int64).max)))
        length = 1
    elif any(int(((extents - 1) * strides[:, 0]).sum()) >= below_words for strides in (box.read, box.write)):
        dim = int(np.argmax((extents - 1) * np.maximum(box.read, box.write)[:, 0]))
        length = -(-int(extents[dim]) // 2)
    else:
        yield box
        return
    extent = int(extents[dim])
    for start in range(0, extent, length):
        shorter = box.extents.copy()
        shorter[dim] = min(length, extent - start)
        piece = box._replace(
            extents=shorter,
            read_place=box.read_place + start * box.read[dim] * nbytes[0],
            write_place=box.write_place + start * box.write[dim] * nbytes[1],
        )
        yield from _pieces(_without_units(piece), nbytes, below_words)


def _without_units(box: Sides) -> Sides:
    """One box with its dims of extent 1 outermost."""
    order = np.argsort(box.extents[:, 0] == 1, kind="stable")
    return box._replace(extents=box.extents[order], read=box.read[order], write=box.write[order])


def _in_lines(sides: Sides, log2: Columns) -> tuple[Sides, Columns, Columns, Columns]:
    """The boxes of cast elements whose narrow words make up runs of a line or more, with lines as their innermost dim.

    Elements go by one in a line, not by words of two. A run that is no multiple of a line ends with one that is moved
    back into it by the kernels.

    Args:
        sides: as the kernels would have them otherwise, strides in words.
        log2: (n,), of each box's word, in elements.

    Returns:
        The boxes; their words; elements in a run, 0 where words are no lines; and (n, 2) how far into its run a line
        begins: so many elements for each line, and for each run.
    """
    length = layout.LINE_UNITS
    chosen = has_run(sides) & (log2 <= MAX_NARROW_LOG2) & (sides.extents[0] << log2 >= length)
    run = np.where(chosen, sides.extents[0] << log2, 0)
    if not chosen.any():
        return sides, log2, run, np.zeros((len(run), 2), np.int64)
    lines = -(-run // length)
    scale = np.where(chosen, log2, 0)
    extents, read, write = sides.extents.copy(), sides.read << scale, sides.write << scale
    extents[0] = np.where(chosen, lines, extents[0])
    read[0] = np.where(chosen, length, read[0])
    write[0] = np.where(chosen, length, write[0])
    jumps = np.where(chosen & (lines > 1), np.stack([np.full_like(lines, length), -lines * length]), 0)
    # A run of one line is no dim any more.
    gone = lines == 1
    if gone.any():
        for column, fill in ((extents, 1), (read, 0), (write, 0)):
            column[:, gone] = np.concatenate([column[1:, gone], np.full((1, int(gone.sum())), fill)])
    log2 = np.where(chosen, 0, log2)
    return sides._replace(extents=extents, read=read, write=write), log2, run, jumps.T


def _shifted(sides: Sides, log2: Columns) -> tuple[Sides, Columns, Columns, Columns]:
    """The boxes whose narrow words make up runs, with words of 8 bytes as their innermost dim, and strides in bytes.

    Args:
        sides: as the kernels would have them otherwise, strides in words.
        log2: (n,), of each box's word, in bytes.

    Returns:
        The boxes; their words as they were; bytes in a run, 0 where words are not shifted; and (n, 2) bytes from the
        read place to behind the last byte, and how far back the first word of a run is from the last's end.
    """
    run = sides.extents[0] << log2
    chosen = has_run(sides) & (log2 <= MAX_NARROW_LOG2) & (run >= layout.MIN_SHIFTED_NBYTES)
    # Only the last run may end within a word of the last byte that is read: the kernels see to that one apart.
    chosen &= ((sides.read[1:] << log2 >= 8) | (sides.extents[1:] == 1)).all(0)
    run = np.where(chosen, run, 0)
    if not chosen.any():
        return sides, log2, run, np.zeros((len(run), 2), np.int64)
    scale = np.where(chosen, log2, 0)
    extents, read, write = sides.extents.copy(), sides.read << scale, sides.write << scale
    end = ((extents[1:] - 1) * read[1:]).sum(0) + run
    # The first may begin before the run, by up to what is less than its alignment.
    long = run >= layout.LONG_RUN_NBYTES
    words = np.where(long, (run + 62) // 32 * 4, (run + 14) // 8)
    extents[0] = np.where(chosen, words, extents[0])
    read[0], write[0] = (np.where(chosen, 8, strides[0]) for strides in (read, write))
    jumps = np.where(chosen, np.stack([end, -8 * words]), 0)
    return sides._replace(extents=extents, read=read, write=write), log2, run, jumps.T


def _transposable(sides: Sides, log2: Columns) -> tuple[Mask, Columns]:
    """Which boxes have unit stride on one dim where they are read and on another where they are written, and on which
    dim it is where they are read.
    """
    is_across = (sides.read[1:] == 1) & (sides.extents[1:] >= MIN_TRANSPOSED_EXTENT)
    across = np.argmax(is_across, axis=0) + 1
    turned = is_across.any(0) & (sides.write[0] == 1) & (sides.extents[0] >= MIN_TRANSPOSED_EXTENT) & (log2 <= 3)
    return turned, across


def _programs(kind: int, total: Columns, is_cast: bool, persistent: bool) -> tuple[Program, ...]:
    """Those that there are for boxes of ``total`` words of a kind, those of the most words first."""
    if persistent:
        return PERSISTENT
    if is_cast:
        return COPIES if kind == layout.ANY else WIDE_CASTS
    if kind != VECTORS_LOG2:
        return COPIES
    if (-(-total // FEW_VECTORS[0].words)).sum() < MANY_TILES:
        return FEW_VECTORS
    return VECTORS_OF_ONE if len(total) == 1 else MANY_VECTORS


def _kind(log2: Columns, run: Columns, cast: tuple[int, int] | None) -> int:
    """The kind of the words of all boxes, if it is one that is compiled by itself: of casts the widest, of copies those
    of more than a byte.
    """
    kinds = log2 + np.where(run > 0, layout.IN_RUNS, 0)
    widest = None if cast is None else (layout.VECTOR_NBYTES // max(cast)).bit_length() - 1
    kind = int(kinds[0])
    is_one = (kinds == kind).all() and (kind % layout.IN_RUNS > 0 if widest is None else kind == widest)
    return kind if is_one else layout.ANY


def _rows(
    sides: Sides, log2: Columns, cast: tuple[int, int] | None, persistent: bool, words_per_tile: int | None
) -> Rows:
    is_cast = cast is not None
    sides, log2, run, run_jumps = _in_lines(sides, log2) if is_cast else _shifted(sides, log2)
    used, count = sides.extents.shape
    total = sides.extents.prod(0)
    # A warp moves a line at a time, where it moves 32 words of other rows.
    at_once = np.where(is_cast & (run > 0), 32, 1)
    nbytes = np.ones_like(log2) if is_cast else np.where(run > 0, 8, 1 << log2)
    kind = layout.ANY if persistent else _kind(log2, run, cast)
    programs: tuple[Program, ...] = (Program(words_per_tile or 0, 4),)
    if words_per_tile is None:
        programs = _programs(kind, total, is_cast, persistent)
    program = fitting_program(total * at_once, nbytes, programs)
    rows, first = _heads(sides, total, np.maximum(program.words // at_once, 1))
    rows[:, layout.WORD_LOG2] = log2
    rows[:, layout.RUN] = run
    rows[:, layout.RUN_JUMPS : layout.RUN_JUMPS + 2] = run_jumps
    inner = np.ones(count, np.int64)
    for dim in range(used):
        is_dim = sides.extents[dim] > 1
        read, write = sides.read[dim], sides.write[dim]
        if dim:
            read = np.where(is_dim, read - sides.extents[dim - 1] * sides.read[dim - 1], 0)
            write = np.where(is_dim, write - sides.extents[dim - 1] * sides.write[dim - 1], 0)
            magic, shift = magic_numbers(np.where(is_dim, inner, 2))
            rows[:, layout.MAGICS + dim - 1] = np.where(is_dim, magic, 0).astype(np.uint32).view(np.int32)
            rows[:, layout.SHIFTS + dim - 1] = np.where(is_dim, shift, 0)
        rows[:, layout.READ_JUMPS + dim] = read
        rows[:, layout.WRITE_JUMPS + dim] = write
        inner = inner * sides.extents[dim]
    return Rows(rows, first, 2 * -(-used // 2), 0, program, 0, kind, persistent)


def _heads(
    sides: Sides, total: Columns, per_tile: Columns | int, tiles: Columns | None = None
) -> tuple[Integers, Integers]:
    """Rows with places, total and first tile filled in, and the row of each tile."""
    if tiles is None:
        tiles = -(-total // per_tile)
    rows = np.zeros((len(total), layout.ROW_INTS), np.int32)
    places = rows.view(np.int64)
    places[:, layout.READ_PLACE], places[:, layout.WRITE_PLACE] = sides.read_place, sides.write_place
    rows[:, layout.TOTAL] = total
    rows[:, layout.FIRST_TILE] = np.cumsum(tiles) - tiles
    return rows, np.repeat(np.arange(len(total), dtype=np.int32), tiles)


def _transposing_rows(sides: Sides, across: Columns, unit_nbytes: int, persistent: bool) -> Rows:
    rank, count = sides.extents.shape
    lanes = layout.VECTOR_NBYTES // unit_nbytes
    boxes = np.arange(count)
    extent_y, extent_x = sides.extents[0], sides.extents[across, boxes]
    read_y, write_x = sides.read[0], sides.write[across, boxes]
    bits = extent_y | extent_x | read_y | write_x
    outer = []
    for dim in range(1, rank - 1):
        source = np.where(dim < across, dim, dim + 1)
        extent, read, write = (column[source, boxes] for column in (sides.extents, sides.read, sides.write))
        outer.append((extent, read, write))
        bits = bits | read | write
    for at in sides.addresses:
        bits = bits | at // unit_nbytes
    kind = 1 if (bits % lanes == 0).all() and not persistent else layout.ANY
    program, side = square(unit_nbytes, extent_y, extent_x, kind == 1 and count == 1)
    tiles_y, tiles_x = -(-extent_y // side), -(-extent_x // side)
    tiles = tiles_y * tiles_x
    for extent, _, _ in outer:
        tiles = tiles * extent
    rows, of_tiles = _heads(sides, extent_y, side, tiles)
    rows[:, layout.WORD_LOG2] = bits % lanes == 0
    rows[:, layout.ACROSS] = extent_x
    rows[:, layout.READ_STRIDE], rows[:, layout.WRITE_STRIDE] = read_y, write_x
    rows[:, layout.TILES_Y], rows[:, layout.TILES_X] = tiles_y, tiles_x
    rows[:, layout.OUTER_EXTENTS : layout.OUTER_EXTENTS + layout.OUTER_DIMS] = 1
    for dim, columns in enumerate(outer):
        for place, column in zip((layout.OUTER_EXTENTS, layout.OUTER_READ, layout.OUTER_WRITE), columns, strict=True):
            rows[:, place + dim] = column
    return Rows(rows, of_tiles, 2 * -(-max(rank, 2) // 2), unit_nbytes, program, side, kind, persistent)
