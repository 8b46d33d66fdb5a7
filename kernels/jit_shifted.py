"""Runs that are aligned to one or two bytes only, moved eight bytes at a time.

Where they are written whole words are written, at multiples of eight; what belongs there is shifted out of the two
words that it lies in where it is read. A word's place is found once for eight bytes, and not for each one or two, and
memory sees few and full accesses. What is left over at both ends of a run goes by itself.
"""

import triton
import triton.language as tl

from tricomm.kernels import layout
from tricomm.kernels.jit_table import RUN, RUN_JUMPS, TOTAL, column, offsets_of, quotient_of

_LONG_RUN = tl.constexpr(layout.LONG_RUN_NBYTES)


@triton.jit
def move_shifted(bases, row, tile, UNIT: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr):
    """Move a tile of words of 8 bytes. Of a run, the first begins where it is written or up to 7 bytes before; in long
    ones up to 31, so that a sector of memory is written by one warp at once. Rows count in bytes.

    Args:
        bases: addresses of both sides; multiples of the unit.
        tile: which of the box.
        UNIT: an unsigned integer of the size that everything is a multiple of.
    """
    read_base, write_base = bases
    run, total = column(row, RUN), column(row, TOTAL)
    read_end, back = column(row, RUN_JUMPS), column(row, RUN_JUMPS + 1)
    read_low, write_low = (read_base & 7).to(tl.int32), (write_base & 31).to(tl.int32)
    aligned = tl.where(run >= _LONG_RUN, 31, 7)
    index = tile * WORDS + tl.arange(0, WORDS)
    read, write = offsets_of(index, row, RANK)
    begin = index * 8 + quotient_of(index, row, 1) * back
    early = (write + write_low - begin) & aligned
    begin -= early
    read += read_low - early
    shift = read & 7
    # At least one byte of each of both words that are read lies within the box; behind its last byte there may be
    # nothing, so that what needs a word there is left to the end of this. No number is negative where all is well.
    there = begin | (run - 8 - begin) | (read_end + read_low - 16 - (read - shift)) | (total - 1 - index)
    source = (read_base - read_low).to(tl.pointer_type(tl.uint64)) + (read >> 3)
    low = tl.load(source, mask=there >= 0)
    high = tl.load(source + 1, mask=there >= 0)
    target = (write_base - write_low).to(tl.pointer_type(tl.uint64)) + ((write + write_low - early) >> 3)
    tl.store(target, _between(low, high, shift), mask=there >= 0)
    # The ends of the runs whose first word is in this tile.
    first, words = tile * WORDS, back // -8
    last = tl.minimum(first + WORDS, total) - 1
    first_run, last_run = quotient_of(first + words - 1, row, 1), quotient_of(last, row, 1)
    if first_run <= last_run:
        _move_ends(bases, row, first_run, last_run, words, run, UNIT, WORDS // 4, RANK)
    if last == total - 1:
        _, written = offsets_of(total - words, row, RANK)
        _move_last(bases, read_end - 16, written + run - 16, UNIT)


@triton.jit
def _between(low, high, shift):
    """The 8 bytes that begin ``shift`` bytes into the first of two words.

    They are made in halves, as a GPU shifts 32 bits out of 64 by one instruction; the compiler knows it by this form.
    """
    first, second, third = low.to(tl.uint32), (low >> 32).to(tl.uint32), high.to(tl.uint32)
    by_half = shift >= 4
    fourth = (high >> 32).to(tl.uint32)
    begin, middle, end = (
        tl.where(by_half, second, first),
        tl.where(by_half, third, second),
        tl.where(by_half, fourth, third),
    )
    bits = ((shift & 3) * 8).to(tl.uint32, bitcast=True)
    lower = (begin >> bits) | ((middle << 1) << (bits ^ 31))
    upper = (middle >> bits) | ((end << 1) << (bits ^ 31))
    return lower.to(tl.uint64) | (upper.to(tl.uint64) << 32)


@triton.jit
def _move_ends(bases, row, first_run, last_run, words, run, UNIT: tl.constexpr, ENDS: tl.constexpr, RANK: tl.constexpr):
    """Move what whole words leave of some runs: up to 7 bytes at both ends.

    ENDS, a quarter of the words of a tile, are enough for two of each run, as runs have 9 words or more.
    """
    nbytes: tl.constexpr = UNIT.primitive_bitwidth // 8
    read_base, write_base = bases
    end = tl.arange(0, ENDS)
    which = first_run + (end >> 1)
    read, write = offsets_of(which * words, row, RANK)
    at = (write_base & 7).to(tl.int32) + write
    is_tail = (end & 1) > 0
    count = tl.where(is_tail, at + run, -at) & 7
    count = tl.where(which <= last_run, count, 0)
    begin = tl.where(is_tail, run - count, 0)
    source = read_base.to(tl.pointer_type(UNIT)) + (read + begin) // nbytes
    target = write_base.to(tl.pointer_type(UNIT)) + (write + begin) // nbytes
    # All are read before any is written, as one wait is enough.
    value = tl.full((ENDS,), 0, tl.uint64)
    for unit in tl.static_range(8 // nbytes - 1):
        part = tl.load(source + unit, mask=unit * nbytes < count, other=0)
        value |= part.to(tl.uint64) << (unit * nbytes * 8)
    for unit in tl.static_range(8 // nbytes - 1):
        tl.store(target + unit, (value >> (unit * nbytes * 8)).to(UNIT), mask=unit * nbytes < count)


@triton.jit
def _move_last(bases, read, write, UNIT: tl.constexpr):
    """Move 16 bytes, unit by unit."""
    nbytes: tl.constexpr = UNIT.primitive_bitwidth // 8
    read_base, write_base = bases
    unit = tl.arange(0, 16 // nbytes)
    value = tl.load((read_base + read).to(tl.pointer_type(UNIT)) + unit)
    tl.store((write_base + write).to(tl.pointer_type(UNIT)) + unit, value)
