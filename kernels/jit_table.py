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
def row_of(tile, rows, tiles, magic, shift):
    """Of a tile: by division where every row has as many tiles (``rows.each_magic``), else from the map, whose reading
    every program would wait for before it can read its row.
    """
    if magic == 0:
        index = tl.load(tiles + tile)
    else:
        twice = (2 * tile).to(tl.uint32, bitcast=True)
        quotient = tl.umulhi(twice, magic.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32, bitcast=True)
        index = quotient.to(tl.int32, bitcast=True)
    return rows + index * ROW


@triton.jit
def bases_of(row, read_base, write_base):
    """The addresses of the first word of a box where it is read and where it is written."""
    places = row.to(tl.pointer_type(tl.int64))
    return read_base + tl.load(places), write_base + tl.load(places + 1)


@triton.jit
def quotient_of(index, row, DIM: tl.constexpr):
    """Of the words ``index`` by the extents of the dims inside of DIM."""
    magic = tl.load(row + MAGICS + (DIM - 1)).to(tl.uint32, bitcast=True)
    shift = tl.load(row + SHIFTS + (DIM - 1)).to(tl.uint32, bitcast=True)
    return (tl.umulhi(index.to(tl.uint32, bitcast=True), magic) >> shift).to(tl.int32, bitcast=True)


@triton.jit
def offsets_of(index, row, RANK: tl.constexpr):
    """Places of the words ``index`` of a box on both sides, in words from the first.

    Products may wrap; their sum does not, nor its multiple by the lanes of a word: the builder keeps the reach of a
    row below 2**31 lanes (``rows.reach_words``).
    """
    read = index * tl.load(row + READ_JUMPS)
    write = index * tl.load(row + WRITE_JUMPS)
    for dim in tl.static_range(1, RANK):
        quotient = quotient_of(index, row, dim)
        read += quotient * tl.load(row + READ_JUMPS + dim)
        write += quotient * tl.load(row + WRITE_JUMPS + dim)
    return read, write
