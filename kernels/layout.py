"""How a row of the table is laid out: what the builder (numpy) writes and the kernels (Triton) read.

A row is one box in 32 int32, one 128-byte line of the cache. The rest of it is unused.
"""

ROW_INTS = 32
MAX_RANK = 6
"""Dims of a box in a row; a box of more is several rows."""

# int64 columns of the row seen as int64: bytes from the base of each side to the first word.
READ_PLACE, WRITE_PLACE = 0, 1

# int32 columns of every row.
TOTAL = 4
"""Words of the box; of a transposing row the extent that is unit-stride where it is written."""
FIRST_TILE = 5
WORD_LOG2 = 6
"""Units in a word, as a power of 2; of a transposing row 1 if both sides take whole vectors, else 0."""

ANY = -1
"""Kind of the words of boxes that have not all the same; else it is WORD_LOG2, and IN_RUNS more of words in runs."""
IN_RUNS = 8

# A word's index i has quotients q0 = i and qk = i // (extents 0 to k-1), innermost first; its place is the sum of qk
# times a jump, and jump k is stride k less what the dim inside of it has gone through (extent times stride of k-1).
READ_JUMPS = 8
WRITE_JUMPS = READ_JUMPS + MAX_RANK
MAGICS = WRITE_JUMPS + MAX_RANK
SHIFTS = MAGICS + MAX_RANK - 1

# int32 columns of a row of narrow words in runs: of lines, single elements that are cast side by side, or of shifted
# words, 8 bytes made of the two that they are in where they are read. Shifted rows count in bytes.
RUN = 7
"""Elements, or bytes, of a run; 0 in rows of no such runs."""
RUN_JUMPS = 30
"""Two, as above, of a line's place in its run; of a shifted row the first, being 8 always, is instead the bytes from
the read place to behind the last byte of the box."""
LINE_UNITS = 128
"""Elements of a line."""
MIN_SHIFTED_NBYTES = 96
"""Of a run whose words are shifted. Of shorter ones the ends take longer than the words save."""
LONG_RUN_NBYTES = 256
"""From here on the words of a run begin at a multiple of 32 bytes, and are a multiple of four."""

# int32 columns of a transposing row: y is unit-stride where it is written, x where it is read.
ACROSS = 7
"""Extent of x."""
READ_STRIDE, WRITE_STRIDE = 8, 9
"""Of y where it is read, of x where it is written."""
TILES_Y, TILES_X = 10, 11
OUTER_DIMS = MAX_RANK - 2
OUTER_EXTENTS = 12
OUTER_READ = OUTER_EXTENTS + OUTER_DIMS
OUTER_WRITE = OUTER_READ + OUTER_DIMS

FORMATS = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Element types that the kernels cast between, and their bytes."""

VECTOR_NBYTES = 16
"""The widest word."""


LARGE_SIDE = 128
"""Units along each side of a large transposing tile, of one or two bytes: 32 KiB of shared memory or less."""


def tile_side(unit_nbytes: int) -> int:
    """Units along each side of other ones, which are 16 KiB of shared memory or less."""
    return 32 if unit_nbytes == 8 else 64
