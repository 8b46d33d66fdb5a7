"""The kernels. Triton is imported here and in the other ``jit_`` modules only, and these only inside of functions.

Every one moves boxes from strided places to strided places, so the same kernel packs and unpacks: what differs is
which side the table says is read. Rows are laid out as ``layout`` says. Where the kernels promise an alignment
(``tl.multiple_of``), the builder of the table has checked it; without the promise Triton would move bytes.
"""

import triton
import triton.language as tl

from tricomm.kernels import layout
from tricomm.kernels.jit_casts import cast, cast_lines
from tricomm.kernels.jit_shifted import move_shifted
from tricomm.kernels.jit_table import (
    RUN,
    TOTAL,
    WORD_LOG2,
    column,
    found,
    offsets_of,
)

_ANY = tl.constexpr(layout.ANY)
_IN_RUNS = tl.constexpr(layout.IN_RUNS)
_ACROSS = tl.constexpr(layout.ACROSS)
_READ_STRIDE = tl.constexpr(layout.READ_STRIDE)
_WRITE_STRIDE = tl.constexpr(layout.WRITE_STRIDE)
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
        bases: addresses of both sides, or those of each word; multiples of the word.
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
    if source.type.is_block():
        source, target = source[:, None], target[:, None]
    value = tl.load(source + (read * LANES)[:, None] + lanes[None, :], mask=there)
    if FROM != TO:
        value = cast(value, FROM, TO, SATURATES, NATIVE)
    tl.store(target + (write * LANES)[:, None] + lanes[None, :], value, mask=there)


@triton.jit
def _copy_tile(
    tile,
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
):
    row, bases, tile = found(tile, rows, tiles, magic, shift, read_base, write_base, False)
    log2 = column(row, WORD_LOG2)
    if KIND >= _IN_RUNS:
        move_shifted(bases, row, tile, tl.uint8 if KIND == _IN_RUNS else tl.uint16, WORDS, RANK)
    elif KIND == _ANY and column(row, RUN) > 0:
        if log2 == 1:
            move_shifted(bases, row, tile, tl.uint16, WORDS, RANK)
        else:
            move_shifted(bases, row, tile, tl.uint8, WORDS, RANK)
    else:
        index = tile * WORDS + tl.arange(0, WORDS)
        inside = index < column(row, TOTAL)
        offsets = offsets_of(index, row, RANK)
        if KIND == _ANY:
            # The same number of words a thread in each branch keeps the registers of the whole low.
            if log2 == 4:
                _move_bits(bases, offsets, inside, 4)
            elif log2 == 3:
                _move_bits(bases, offsets, inside, 3)
            elif log2 == 2:
                _move_bits(bases, offsets, inside, 2)
            elif log2 == 1:
                _move_bits(bases, offsets, inside, 1)
            else:
                _move_bits(bases, offsets, inside, 0)
        else:
            _move_bits(bases, offsets, inside, KIND)


@triton.jit
def _move_bits(bases, offsets, inside, LOG2: tl.constexpr):
    """Words of 2**LOG2 bytes."""
    element: tl.constexpr = tl.int8 if LOG2 == 0 else (tl.int16 if LOG2 == 1 else tl.int32)
    lanes: tl.constexpr = 1 << max(LOG2 - 2, 0)
    _move(bases, offsets, inside, element, element, lanes, "", "", False, False)


@triton.jit
def _copy_tiles(
    program,
    rows,
    tiles,
    magic,
    shift,
    read_base,
    write_base,
    count,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    """Tiles side by side, so that as many small boxes are on their way."""
    word = tl.arange(0, TILES * WORDS)
    tile = program * TILES + word // WORDS
    row, bases, of_box = found(tl.minimum(tile, count - 1), rows, tiles, magic, shift, read_base, write_base, True)
    index = of_box * WORDS + word % WORDS
    inside = (tile < count) & (index < column(row, TOTAL))
    _move_bits(bases, offsets_of(index, row, RANK), inside, KIND)


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
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    """Copy the bits of boxes, in words of 16 to 1 bytes.

    Args:
        rows: int32 (boxes, 32), the table; or, as 32 integers, the row of all boxes (``Rows.shared``).
        tiles: int32 (count,), the row of each tile, not read where magic is not 0; with a row of all boxes int64
            (boxes, 2), their places.
        magic, shift: int32, with which a tile's row is found by division (``Rows.each_magic``); 0 where it is not, and
            for an only box with the row of all, whose places are in the bases.
        read_base, write_base: int64, what places in the table count from on each side (0 if they are addresses).
        count: tiles.
        WORDS: of a tile.
        RANK: dims that the rows use, at least as many as any box has.
        PERSISTENT: whether a program goes on with the tile that is a whole grid further on, so that a small grid,
            which leaves multiprocessors to others, does all of them. (A while loop is not pipelined: staging the
            rows would cost more than it hides.)
        KIND: what kind all words are of, or that they are of several (``Rows.kind``).
        TILES: that a program does; where there are several, words are of one kind and in no runs.
    """
    tile = tl.program_id(0)
    if PERSISTENT:
        while tile < count:
            _copy_tile(tile, rows, tiles, magic, shift, read_base, write_base, WORDS, RANK, KIND)
            tile += tl.num_programs(0)
    elif TILES > 1:
        _copy_tiles(tile, rows, tiles, magic, shift, read_base, write_base, count, WORDS, RANK, KIND, TILES)
    else:
        _copy_tile(tile, rows, tiles, magic, shift, read_base, write_base, WORDS, RANK, KIND)


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
    KIND: tl.constexpr,
):
    row, bases, tile = found(tile, rows, tiles, magic, shift, read_base, write_base, False)
    log2 = column(row, WORD_LOG2)
    if KIND == _ANY and column(row, RUN) > 0:
        cast_lines(bases, row, tile, READ, WRITE, WORDS // 32, RANK, FROM, TO, SATURATES, NATIVE)
    else:
        index = tile * WORDS + tl.arange(0, WORDS)
        inside = index < column(row, TOTAL)
        offsets = offsets_of(index, row, RANK)
        if KIND != _ANY:
            _move(bases, offsets, inside, READ, WRITE, 1 << KIND, FROM, TO, SATURATES, NATIVE)
        else:
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
    KIND: tl.constexpr,
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
                KIND,
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
            KIND,
        )


@triton.jit
def _transposed_square(
    row, bases, y, x, TYPE: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, NBYTES: tl.constexpr
):
    """Move a square: read along x, written along y. With LANES > 1 extents, strides and bases are multiples of it."""
    read_base, write_base = bases
    source = tl.multiple_of(read_base.to(tl.pointer_type(TYPE)), NBYTES)
    target = tl.multiple_of(write_base.to(tl.pointer_type(TYPE)), NBYTES)
    read_stride = column(row, _READ_STRIDE) // LANES * LANES
    write_stride = column(row, _WRITE_STRIDE) // LANES * LANES
    rows_y = y + tl.arange(0, SIDE)
    columns_x = x + tl.arange(0, SIDE)
    is_y = rows_y < column(row, TOTAL) // LANES * LANES
    is_x = columns_x < column(row, _ACROSS) // LANES * LANES
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
    KIND: tl.constexpr,
):
    nbytes: tl.constexpr = TYPE.primitive_bitwidth // 8
    row, places, tile = found(tile, rows, tiles, magic, shift, read_base, write_base, False)
    read_at, write_at = places
    # Unsigned division takes two thirds of the instructions of signed.
    left = tile.to(tl.uint32, bitcast=True)
    tiles_x = column(row, _TILES_X).to(tl.uint32, bitcast=True)
    x = (left % tiles_x).to(tl.int32, bitcast=True) * SIDE
    left = left // tiles_x
    if RANK == 2:
        y = left.to(tl.int32, bitcast=True) * SIDE
    else:
        tiles_y = column(row, _TILES_Y).to(tl.uint32, bitcast=True)
        y = (left % tiles_y).to(tl.int32, bitcast=True) * SIDE
        left = left // tiles_y
    for dim in tl.static_range(RANK - 2):
        extent = column(row, _OUTER_EXTENTS + dim).to(tl.uint32, bitcast=True)
        index = (left % extent).to(tl.int64)
        read_at += index * column(row, _OUTER_READ + dim) * nbytes
        write_at += index * column(row, _OUTER_WRITE + dim) * nbytes
        left = left // extent
    if KIND == 1 or (KIND == _ANY and column(row, WORD_LOG2) == 1):
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
    KIND: tl.constexpr,
):
    """As ``copy_boxes``, for boxes whose unit stride is on one dim where they are read and on another where they are
    written; units are of one size, TYPE, and LANES of them are 16 bytes. Squares go through shared memory.
    """
    tile = tl.program_id(0)
    if PERSISTENT:
        while tile < count:
            _transpose_tile(tile, rows, tiles, magic, shift, read_base, write_base, TYPE, LANES, SIDE, RANK, KIND)
            tile += tl.num_programs(0)
    else:
        _transpose_tile(tile, rows, tiles, magic, shift, read_base, write_base, TYPE, LANES, SIDE, RANK, KIND)
