"""What the kernels compile to, without a GPU: the instructions and the registers of one variant for one target."""

import re
from collections import Counter
from typing import NamedTuple

from triton.backends.compiler import GPUTarget

from bench.kernels.instructions import COPIED, LARGE, Count, count
from bench.kernels.sass import usage
from tricomm.kernels.tiles import (
    COPIES,
    FEW_VECTORS,
    MANY_VECTORS,
    PERSISTENT,
    VECTORS_LOG2,
    VECTORS_OF_ONE,
    WIDE_CASTS,
)
from tricomm.kernels.variants import Variant, compiled

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COUNTED = "sm_90"
"""What the budget of instructions is of."""
CASTS = [
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float8_e4m3fn"),
    ("float8_e4m3fn", "float8_e5m2"),
    ("float8_e5m2", "float16"),
]
VARIANTS = [
    *(Variant(rank) for rank in (2, 4, 6)),
    *(Variant(4, program=program) for program in COPIES[1:]),
    *(Variant(4, kind=kind, is_shared=True) for kind in COPIED),
    *(Variant(rank, kind=VECTORS_LOG2, is_shared=True, program=VECTORS_OF_ONE[0]) for rank in (2, 6)),
    Variant(kind=VECTORS_LOG2, is_shared=True, program=FEW_VECTORS[-1]),
    *(Variant(kind=VECTORS_LOG2, program=program) for program in (*MANY_VECTORS, FEW_VECTORS[0])),
    Variant(4, persistent=True, program=PERSISTENT[0]),
    Variant(4, formats=("float32", "bfloat16"), kind=2, is_shared=True, program=WIDE_CASTS[0]),
    Variant(transposed_nbytes=8, side=32),
    *(Variant(transposed_nbytes=nbytes, **LARGE) for nbytes in (1, 2)),
    *(Variant(4, formats=formats, saturates=formats[1] == "float8_e4m3fn") for formats in CASTS),
    *(Variant(transposed_nbytes=nbytes) for nbytes in (1, 2, 4)),
    Variant(6, transposed_nbytes=1),
]


class Binary(NamedTuple):
    """What matters of a compiled kernel; ``instructions`` counts those of global memory by their width, ``counts`` what
    a warp executes, if that is counted for the target.
    """

    registers: int
    spilled: int
    shared_nbytes: int
    instructions: dict[str, int]
    counts: tuple[Count, ...]
    flushes_subnormals: bool


def compile_for(variant: Variant, name: str) -> Binary:
    kernel = compiled(variant, TARGETS[name])
    if name.startswith("sm_"):
        text = kernel.asm["ptx"]
        found = Counter(re.findall(r"\b((?:ld|st)\.global)(?:\.\w+)*?\.(v\d\.b\d+|b\d+)", text))
        counts = Counter({f"{op}.{width}": n for (op, width), n in found.items()})
        registers, stack = usage(kernel.asm["cubin"])
        counted = tuple(count(variant, name)) if name == COUNTED else ()
        return Binary(registers, stack, kernel.metadata.shared, dict(counts), counted, ".ftz" in text)
    text = kernel.asm["amdgcn"]
    counts = Counter(re.findall(r"\b(global_(?:load|store)_dwordx4)\b", text))
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    spilled = sum(int(n) for n in re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    flushes = re.search(r"\.amdhsa_float_denorm_mode_(?:32|16_64) [^3]", text) is not None
    return Binary(registers, spilled, kernel.metadata.shared, dict(counts), (), flushes)
