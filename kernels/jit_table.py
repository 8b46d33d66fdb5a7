"""What the kernels read of the table: which row, and where its words lie on both sides."""

import triton
import triton.language as tl

from tricomm.kernels import layout

ROW = tl.constexpr(layout.ROW_INTS)
TOTAL = tl.constexpr(layout.TOTAL)
FIRST_TILE = tl.constexpr(layout.FIRST_TILE)
WORD_LOG2 = tl.constexpr(layout.WORD_LOG2)
READ_JUMPS = tl.constexpr(layout.READ_JUMPS)
WRITE_JUMPS = tl.constexpr(layout.WRITE_JUMPS)
MAGICS = tl.constexpr(layout.MAGICS)
SHIFTS = tl.constexpr(layout.SHIFTS)
RUN = tl.constexpr(layout.RUN)
RUN_JUMPS = tl.constexpr(layout.RUN_JUMPS)


@triton.jit
def column(row, COLUMN: tl.constexpr):
    """What a row has in a column: a row in memory, or one that came with the launch."""
    if isinstance(row, tl.tensor):
        return tl.load(row + COLUMN)
    else:
        return row[COLUMN]


@triton.jit
def found(tile, rows, tiles, magic, shift, read_base, write_base, SEVERAL: tl.constexpr):
    """What a tile is of: the row; the addresses of the first word of its box on both sides; which of the box's tiles.

    Which box is found by division where all have as many tiles (``Rows.each_magic``), else in the map, whose reading
    every program would wait for before it can read its row. A row that came with the launch is every box's, and memory
    has their places alone; those of an only box are in the bases.
    """
    if isinstance(rows, tl.tensor):
        if magic == 0:  # noqa: SIM108 - of several tiles, one by one
            index = tl.load(tiles + tile)
        else:
            index = _quotient(2 * tile, magic, shift)
        row = rows + index * ROW
        places = row.to(tl.pointer_type(tl.int64))
        return row, (read_base + tl.load(places), write_base + tl.load(places + 1)), tile - tl.load(row + FIRST_TILE)
    elif SEVERAL:
        index = _quotient(2 * tile, magic, shift)
        places = tiles.to(tl.pointer_type(tl.int64)) + 2 * index
        bases = read_base + tl.load(places), write_base + tl.load(places + 1)
        return rows, bases, tile - index * rows[FIRST_TILE]
    else:
        if magic != 0:
            index = _quotient(2 * tile, magic, shift)
            places = tiles.to(tl.pointer_type(tl.int64)) + 2 * index
            read_base += tl.load(places)
            write_base += tl.load(places + 1)
            tile -= index * rows[FIRST_TILE]
        return rows, (read_base, write_base), tile


@triton.jit
def _quotient(number, magic, shift):
    """By what ``rows.magic_numbers`` made the two of."""
    high = tl.umulhi(number.to(tl.uint32, bitcast=True), magic.to(tl.uint32, bitcast=True))
    return (high >> shift.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def quotient_of(index, row, DIM: tl.constexpr):
    """Of the words ``index`` by the extents of the dims inside of DIM."""
    return _quotient(index, column(row, MAGICS + (DIM - 1)), column(row, SHIFTS + (DIM - 1)))


@triton.jit
def offsets_of(index, row, RANK: tl.constexpr):
    """Places of the words ``index`` of a box on both sides, in words from the first.

    Products may wrap; their sum does not, nor its multiple by the lanes of a word: the builder keeps the reach of a
    row below 2**31 lanes (``rows.reach_words``).
    """
    read = index * column(row, READ_JUMPS)
    write = index * column(row, WRITE_JUMPS)
    for dim in tl.static_range(1, RANK):
        quotient = quotient_of(index, row, dim)
        read += quotient * column(row, READ_JUMPS + dim)
        write += quotient * column(row, WRITE_JUMPS + dim)
    return read, write
