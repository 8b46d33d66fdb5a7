"""Casts between element types in the kernels, on raw elements: unsigned integers of their size.

They go through float32 but for some short ones, and where Triton's own differ from torch's, or its interpreter's are
wrong, they are done on integers: to nearest, ties to even. GPUs that round to float8 by themselves do so where NATIVE,
which the interpreter cannot: only a GPU shows it (``make gpu-check``, over all bits). What torch makes of values beyond
the largest float8_e4m3fn, which has no infinity, depends on its version: NaN up to 2.11, the largest value in 2.13.
"""

import triton
import triton.language as tl

from tricomm.kernels import layout
from tricomm.kernels.jit_table import RUN, RUN_JUMPS, TOTAL, column, offsets_of, quotient_of

_LINE = tl.constexpr(layout.LINE_UNITS)


@triton.jit
def _decoded(raw, FORMAT: tl.constexpr):
    """The float32 values of raw elements (unsigned integers of their size)."""
    if FORMAT == "float32":
        return raw.to(tl.float32, bitcast=True)
    elif FORMAT == "float16":
        return raw.to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "bfloat16":
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "float8_e5m2":
        return (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(FORMAT == "float8_e4m3fn")
        # As a float32 of the same bits it is 2**120 times smaller, subnormal ones too, and NaN would be 480.
        bits = (raw.to(tl.int8, bitcast=True).to(tl.int32).to(tl.uint32, bitcast=True) << 20) & 0x87F00000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        bits = tl.where(tl.abs(value) > 448.0, 0x7FF00000, value.to(tl.uint32, bitcast=True))
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _float8(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """float8 elements of float32 values: ``MANTISSA`` bits, ``BIAS`` of the exponent, ``LARGEST`` for all beyond it,
    and NaN all ones.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Added to this power of 2, a value below the smallest normal one is rounded to the last place of a subnormal.
    anchor: tl.constexpr = (128 - BIAS + 23 - MANTISSA) << 23
    anchored = magnitude.to(tl.float32, bitcast=True) + tl.full((1, 1), anchor, tl.uint32).to(tl.float32, bitcast=True)
    subnormal = anchored.to(tl.uint32, bitcast=True) - anchor
    odd = (magnitude >> (23 - MANTISSA)) & 1
    rounding: tl.constexpr = (1 << (22 - MANTISSA)) - 1
    normal = (magnitude - ((127 - BIAS) << 23) + rounding + odd) >> (23 - MANTISSA)
    result = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    result = tl.where(result > LARGEST, LARGEST, result)
    result = tl.where(magnitude > 0x7F800000, 0x7F, result)
    return (result | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _short_float8(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """As ``_float8``, of values of 11 bits or less, which lose nothing that matters when they are so much smaller that
    the exponent of the result is that of the float32: only what is below a quarter of the smallest subnormal.
    """
    small: tl.constexpr = 2.0 ** (BIAS - 127)
    bits = (tl.abs(value) * small).to(tl.uint32, bitcast=True)
    odd = (bits >> (23 - MANTISSA)) & 1
    rounding: tl.constexpr = (1 << (22 - MANTISSA)) - 1
    result = tl.minimum((bits + rounding + odd) >> (23 - MANTISSA), LARGEST)
    if LARGEST != 0x7F:
        result = tl.where(value != value, 0x7F, result)  # noqa: PLR0124 - one instruction less than of its bits
    return (result | ((value.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _half_as_float8_e5m2(raw):
    """Raw float8_e5m2 elements of raw float16 ones, which have the same exponent."""
    bits = raw.to(tl.uint32)
    rounded = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    return tl.where((bits & 0x7FFF) > 0x7C00, 0x7F, rounded).to(tl.uint8)


@triton.jit
def _float8_e4m3fn_as_e5m2(raw):
    """Raw float8_e5m2 elements of raw float8_e4m3fn ones, by way of float16, which has all of both."""
    bits = (raw.to(tl.int8, bitcast=True).to(tl.int16).to(tl.uint16, bitcast=True) << 7) & 0xBF80
    half = (bits.to(tl.float16, bitcast=True) * 256.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    rounded = (half + 0x7F + ((half >> 8) & 1)) >> 8
    return tl.where((half & 0x7FFF) > 0x5F00, 0x7F, rounded).to(tl.uint8)


@triton.jit
def _native_float8(value, TO: tl.constexpr, SATURATES: tl.constexpr):
    """float8 elements of float32 values. The GPU gives the largest finite one for all beyond it, and NaN no sign."""
    sign = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
    if TO == "float8_e5m2":
        result = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
        result = tl.where(tl.abs(value) >= 61440.0, 0x7C, result)
    else:
        result = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        if not SATURATES:
            result = tl.where(tl.abs(value) > 464.0, 0x7F, result)
    return result.to(tl.uint8) | sign.to(tl.uint8)


@triton.jit
def _to_float8(raw, FROM: tl.constexpr, TO: tl.constexpr, SATURATES: tl.constexpr, NATIVE: tl.constexpr):
    """Raw float8 elements, as ``cast``."""
    if NATIVE:
        return _native_float8(_decoded(raw, FROM), TO, SATURATES)
    elif TO == "float8_e5m2" and FROM == "float16":
        return _half_as_float8_e5m2(raw)
    elif TO == "float8_e5m2" and FROM == "float8_e4m3fn":
        return _float8_e4m3fn_as_e5m2(raw)
    elif TO == "float8_e5m2":
        value = _decoded(raw, FROM)
        return _float8(value, 2, 15, 0x7C) if FROM == "float32" else _short_float8(value, 2, 15, 0x7C)
    else:
        tl.static_assert(TO == "float8_e4m3fn")
        value = _decoded(raw, FROM)
        largest: tl.constexpr = 0x7E if SATURATES else 0x7F
        return _float8(value, 3, 7, largest) if FROM == "float32" else _short_float8(value, 3, 7, largest)


@triton.jit
def cast(raw, FROM: tl.constexpr, TO: tl.constexpr, SATURATES: tl.constexpr, NATIVE: tl.constexpr):
    """Raw elements of one type from those of another; with SATURATES float8_e4m3fn has no NaN but those of NaN."""
    if TO == "float32":
        return _decoded(raw, FROM).to(tl.uint32, bitcast=True)
    elif TO == "float16":
        return _decoded(raw, FROM).to(tl.float16).to(tl.uint16, bitcast=True)
    elif TO == "bfloat16":
        bits = _decoded(raw, FROM).to(tl.uint32, bitcast=True)
        if raw.dtype.primitive_bitwidth == 8:
            return (bits >> 16).to(tl.uint16)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).to(tl.uint16)
    else:
        return _to_float8(raw, FROM, TO, SATURATES, NATIVE)


@triton.jit
def cast_lines(
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
    index = tl.minimum(tile * LINES + tl.arange(0, LINES), column(row, TOTAL) - 1)
    read, write = offsets_of(index, row, RANK)
    begins = index * column(row, RUN_JUMPS) + quotient_of(index, row, 1) * column(row, RUN_JUMPS + 1)
    back = tl.minimum(column(row, RUN) - _LINE - begins, 0)
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
