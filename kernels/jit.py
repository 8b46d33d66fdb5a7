"""The kernels. Triton is imported here and in the other ``jit_`` modules only, and these only inside of functions.

Every one moves boxes from strided places to strided places, so the same kernel packs and unpacks: what differs is
which side the table says is read. Rows are laid out as ``layout`` says. Where the kernels promise an alignment
(``tl.multiple_of``), the builder of the table has checked it; without the promise Triton would move bytes.
"""

import triton
import triton.language as tl

from tricomm.kernels import layout
from tricomm.kernels.jit_casts import cast
from tricomm.kernels.jit_shifted import move_shifted
from tricomm.kernels.jit_table import (
    FIRST_TILE,
    RUN,
    RUN_JUMPS,
    TOTAL,
    WORD_LOG2,
    bases_of,
    offsets_of,
    quotient_of,
    row_of,
)

_ACROSS = tl.constexpr(layout.ACROSS)
_READ_STRIDE = tl.constexpr(layout.READ_STRIDE)
_WRITE_STRIDE = tl.constexpr(layout.WRITE_STRIDE)
_LINE = tl.constexpr(layout.LINE_UNITS)
_TILES_Y = tl.constexpr(layout.TILES_Y)
_TILES_X = tl.constexpr(layout.TILES_X)
_OUTER_EXTENTS = tl.constexpr(layout.OUTER_EXTENTS)
_OUTER_READ = tl.constexpr(layout.OUTER_READ)
_OUTER_WRITE = tl.constexpr(layout.OUTER_WRITE)


@triton.jit
def _move(
    bases,
    offsets,
    inside,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    LANES: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SATURATES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Move words of ``LANES`` elements each, and cast them unless FROM and TO are the same.

    Args:
        bases: addresses of both sides; multiples of the word.
        offsets: of the words on both sides, in words.
        inside: which of the words there are.
        READ, WRITE: types of the elements, integers.
    """
    read_base, write_base = bases
    read, write = offsets
    lanes = tl.arange(0, LANES)
    there = inside[:, None] & (lanes < LANES)[None, :]
    source = tl.multiple_of(read_base.to(tl.pointer_type(READ)), LANES * (READ.primitive_bitwidth // 8))
    target = tl.multiple_of(write_base.to(tl.pointer_type(WRITE)), LANES * (WRITE.primitive_bitwidth // 8))
    value = tl.load(source + (read * LANES)[:, None] + lanes[None, :], mask=there)
    if FROM != TO:
        value = cast(value, FROM, TO, SATURATES, NATIVE)
    tl.store(target + (write * LANES)[:, None] + lanes[None, :], value, mask=there)


@triton.jit
def _move_lines(
    bases,
    row,
    tile,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    LINES: tl.constexpr,
    RANK: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SATURATES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Cast a tile of narrow words, of one element each, in lines: 128 side by side, 4 by each of 32 threads.

    Finding the place of an element takes more instructions than a GPU has time for; here that is done once a line.
    Nothing is masked: the last line of a run is moved back until it ends with the run, and what comes behind the last
    line of a box is that line once more, so that some elements are written twice, with the same.

    Args:
        bases: addresses of both sides; multiples of the elements.
        tile: which of the box.
        READ, WRITE: types of the elements, integers.
        LINES: of a tile.
    """
    read_base, write_base = bases
    index = tl.minimum(tile * LINES + tl.arange(0, LINES), tl.load(row + TOTAL) - 1)
    read, write = offsets_of(index, row, RANK)
    begins = index * tl.load(row + RUN_JUMPS) + quotient_of(index, row, 1) * tl.load(row + RUN_JUMPS + 1)
    back = tl.minimum(tl.load(row + RUN) - _LINE - begins, 0)
    lanes = tl.arange(0, 32)[None, :]
    source = tl.multiple_of(read_base.to(tl.pointer_type(READ)), READ.primitive_bitwidth // 8)
    target = tl.multiple_of(write_base.to(tl.pointer_type(WRITE)), WRITE.primitive_bitwidth // 8)
    source += (read + back)[:, None] + lanes
    target += (write + back)[:, None] + lanes
    # All are read before any is written, as one wait is enough. (With a third dim for the four, Triton 3.6 would give
    # the warps to it, and each of them the places of all lines to find.)
    tl.static_assert(_LINE == 4 * 32)
    first, second, third, fourth = tl.load(source), tl.load(source + 32), tl.load(source + 64), tl.load(source + 96)
    tl.store(target, cast(first, FROM, TO, SATURATES, NATIVE))
    tl.store(target + 32, cast(second, FROM, TO, SATURATES, NATIVE))
    tl.store(target + 64, cast(third, FROM, TO, SATURATES, NATIVE))
    tl.store(target + 96, cast(fourth, FROM, TO, SATURATES, NATIVE))


@triton.jit
def _copy_tile(tile, rows, tiles, magic, shift, read_base, write_base, WORDS: tl.constexpr, RANK: tl.constexpr):
    row = row_of(tile, rows, tiles, magic, shift)
    bases = bases_of(row, read_base, write_base)
    tile -= tl.load(row + FIRST_TILE)
    log2 = tl.load(row + WORD_LOG2)
    if tl.load(row + RUN) > 0:
        if log2 == 1:
            move_shifted(bases, row, tile, tl.uint16, WORDS, RANK)
        else:
            move_shifted(bases, row, tile, tl.uint8, WORDS, RANK)
    else:
        index = tile * WORDS + tl.arange(0, WORDS)
        inside = index < tl.load(row + TOTAL)
        offsets = offsets_of(index, row, RANK)
        # The same number of words a thread in each branch keeps the registers of the whole low.
        if log2 == 4:
            _move(bases, offsets, inside, tl.int32, tl.int32, 4, "", "", False, False)
        elif log2 == 3:
            _move(bases, offsets, inside, tl.int32, tl.int32, 2, "", "", False, False)
        elif log2 == 2:
            _move(bases, offsets, inside, tl.int32, tl.int32, 1, "", "", False, False)
        elif log2 == 1:
            _move(bases, offsets, inside, tl.int16, tl.int16, 1, "", "", False, False)
        else:
            _move(bases, offsets, inside, tl.int8, tl.int8, 1, "", "", False, False)


@triton.jit
def copy_boxes(
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    count,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Copy the bits of boxes, in words of 16 to 1 bytes.

    Args:
        rows: int32 (boxes, 32), the table.
        tiles: int32 (count,), the row of each tile; not read where magic is not 0.
        magic, shift: int32, with which a tile's row is found by division (``rows.each_magic``); 0 where it is not.
        read_base, write_base: int64, what places in the table count from on each side (0 if they are addresses).
        count: tiles.
        WORDS: of a tile.
        RANK: dims that the rows use, at least as many as any box has.
        PERSISTENT: whether a program goes on with the tile that is a whole grid further on, so that a small grid,
            which leaves multiprocessors to others, does all of them. (A while loop is not pipelined: staging the
            rows would cost more than it hides.)
    """
    tile = tl.program_id(0)
    if PERSISTENT:
        while tile < count:
            _copy_tile(tile, rows, tiles, magic, shift, read_base, write_base, WORDS, RANK)
            tile += tl.num_programs(0)
    else:
        _copy_tile(tile, rows, tiles, magic, shift, read_base, write_base, WORDS, RANK)


@triton.jit
def _cast_tile(
    tile,
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SATURATES: tl.constexpr,
    NATIVE: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    WIDEST_LOG2: tl.constexpr,
):
    row = row_of(tile, rows, tiles, magic, shift)
    bases = bases_of(row, read_base, write_base)
    tile -= tl.load(row + FIRST_TILE)
    log2 = tl.load(row + WORD_LOG2)
    if tl.load(row + RUN) > 0:
        _move_lines(bases, row, tile, READ, WRITE, WORDS // 32, RANK, FROM, TO, SATURATES, NATIVE)
    else:
        index = tile * WORDS + tl.arange(0, WORDS)
        inside = index < tl.load(row + TOTAL)
        offsets = offsets_of(index, row, RANK)
        for level in tl.static_range(WIDEST_LOG2 + 1):
            if log2 == level:
                _move(bases, offsets, inside, READ, WRITE, 1 << level, FROM, TO, SATURATES, NATIVE)


@triton.jit
def cast_boxes(
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    count,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SATURATES: tl.constexpr,
    NATIVE: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    WIDEST_LOG2: tl.constexpr,
):
    """As ``copy_boxes``, casting elements FROM one type TO another; a word is 2**0 to 2**WIDEST_LOG2 elements, of which
    the wider ones are 16 bytes (with more, the two sides would exchange through shared memory).
    """
    tile = tl.program_id(0)
    if PERSISTENT:
        while tile < count:
            _cast_tile(
                tile,
                rows,
                tiles,
                magic,
                shift,
                read_base,
                write_base,
                WORDS,
                RANK,
                FROM,
                TO,
                SATURATES,
                NATIVE,
                READ,
                WRITE,
                WIDEST_LOG2,
            )
            tile += tl.num_programs(0)
    else:
        _cast_tile(
            tile,
            rows,
            tiles,
            magic,
            shift,
            read_base,
            write_base,
            WORDS,
            RANK,
            FROM,
            TO,
            SATURATES,
            NATIVE,
            READ,
            WRITE,
            WIDEST_LOG2,
        )


@triton.jit
def _transposed_square(
    row, bases, y, x, TYPE: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, NBYTES: tl.constexpr
):
    """Move a square: read along x, written along y. With LANES > 1 extents, strides and bases are multiples of it."""
    read_base, write_base = bases
    source = tl.multiple_of(read_base.to(tl.pointer_type(TYPE)), NBYTES)
    target = tl.multiple_of(write_base.to(tl.pointer_type(TYPE)), NBYTES)
    read_stride = tl.load(row + _READ_STRIDE) // LANES * LANES
    write_stride = tl.load(row + _WRITE_STRIDE) // LANES * LANES
    rows_y = y + tl.arange(0, SIDE)
    columns_x = x + tl.arange(0, SIDE)
    is_y = rows_y < tl.load(row + TOTAL) // LANES * LANES
    is_x = columns_x < tl.load(row + _ACROSS) // LANES * LANES
    there = is_y[:, None] & is_x[None, :]
    value = tl.load(source + (rows_y * read_stride)[:, None] + columns_x[None, :], mask=there)
    tl.store(target + (columns_x * write_stride)[None, :] + rows_y[:, None], value, mask=there)


@triton.jit
def _transpose_tile(
    tile,
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    TYPE: tl.constexpr,
    LANES: tl.constexpr,
    SIDE: tl.constexpr,
    RANK: tl.constexpr,
):
    nbytes: tl.constexpr = TYPE.primitive_bitwidth // 8
    row = row_of(tile, rows, tiles, magic, shift)
    read_at, write_at = bases_of(row, read_base, write_base)
    # Unsigned division takes two thirds of the instructions of signed.
    left = (tile - tl.load(row + FIRST_TILE)).to(tl.uint32, bitcast=True)
    tiles_x = tl.load(row + _TILES_X).to(tl.uint32, bitcast=True)
    x = (left % tiles_x).to(tl.int32, bitcast=True) * SIDE
    left = left // tiles_x
    if RANK == 2:
        y = left.to(tl.int32, bitcast=True) * SIDE
    else:
        tiles_y = tl.load(row + _TILES_Y).to(tl.uint32, bitcast=True)
        y = (left % tiles_y).to(tl.int32, bitcast=True) * SIDE
        left = left // tiles_y
    for dim in tl.static_range(RANK - 2):
        extent = tl.load(row + _OUTER_EXTENTS + dim).to(tl.uint32, bitcast=True)
        index = (left % extent).to(tl.int64)
        read_at += index * tl.load(row + _OUTER_READ + dim) * nbytes
        write_at += index * tl.load(row + _OUTER_WRITE + dim) * nbytes
        left = left // extent
    if tl.load(row + WORD_LOG2) == 1:
        _transposed_square(row, (read_at, write_at), y, x, TYPE, LANES, SIDE, 16)
    else:
        _transposed_square(row, (read_at, write_at), y, x, TYPE, 1, SIDE, nbytes)


@triton.jit
def transpose_boxes(
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    count,
    SIDE: tl.constexpr,
    RANK: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """As ``copy_boxes``, for boxes whose unit stride is on one dim where they are read and on another where they are
    written; units are of one size, TYPE, and LANES of them are 16 bytes. Squares go through shared memory.
    """
    tile = tl.program_id(0)
    if PERSISTENT:
        while tile < count:
            _transpose_tile(tile, rows, tiles, magic, shift, read_base, write_base, TYPE, LANES, SIDE, RANK)
            tile += tl.num_programs(0)
    else:
        _transpose_tile(tile, rows, tiles, magic, shift, read_base, write_base, TYPE, LANES, SIDE, RANK)
