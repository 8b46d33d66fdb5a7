"""The variants of the kernels: which constants each is compiled with, how, and for what."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tricomm.kernels import layout
from tricomm.kernels.tiles import COPIES, Program

MAX_REGISTERS = 40
"""Of a thread of a copy. The compiler keeps to it by itself but for rows of the most dims, where it would take a few
more and so leave fewer programs a place. From Hopper on it needs to spill nothing for that.
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compiled.

    Attributes:
        rank: dims that rows may use, 2, 4 or 6.
        persistent: whether a small grid does all tiles, for launches that must leave multiprocessors to others.
        formats: (read, written) element types, names in ``layout.FORMATS``, if elements are cast.
        saturates: whether a cast to float8_e4m3fn gives its largest value, not NaN, for all beyond it.
        transposed_nbytes: bytes of a unit (1, 2, 4 or 8), for the transposing kernel, else 0.
        program: what takes a tile at a time, or several. Boxes of a few words leave less of a small one idle.
        side: of the squares of a transpose, in units.
        kind: what words boxes have, if all have the same: only these are compiled then (``Rows.kind``).
        is_shared: whether the row of all boxes comes with the launch, so that no program waits for it.
    """

    rank: int = 2
    persistent: bool = False
    formats: tuple[str, str] | None = None
    saturates: bool = False
    transposed_nbytes: int = 0
    program: Program = COPIES[0]
    side: int = 64
    kind: int = layout.ANY
    is_shared: bool = False

    def kernel(self, jit: Any) -> Any:
        """The function of the module ``jit``."""
        if self.transposed_nbytes:
            return jit.transpose_boxes
        return jit.copy_boxes if self.formats is None else jit.cast_boxes

    def constants(self) -> dict[str, Any]:
        """Its constexpr arguments, in order, for the interpreter: NATIVE is what the target of a compilation has."""
        import triton.language as tl

        if self.transposed_nbytes:
            types = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
            return {
                "SIDE": self.side,
                "RANK": self.rank,
                "PERSISTENT": self.persistent,
                "TYPE": types[self.transposed_nbytes],
                "LANES": layout.VECTOR_NBYTES // self.transposed_nbytes,
                "KIND": self.kind,
            }
        constants = {"WORDS": self.program.words, "RANK": self.rank, "PERSISTENT": self.persistent}
        if self.formats is None:
            return {**constants, "KIND": self.kind, "TILES": self.program.tiles}
        types = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32}
        sizes = [layout.FORMATS[name] for name in self.formats]
        return {
            **constants,
            "FROM": self.formats[0],
            "TO": self.formats[1],
            "SATURATES": self.saturates,
            "NATIVE": False,
            "READ": types[sizes[0]],
            "WRITE": types[sizes[1]],
            "WIDEST_LOG2": (layout.VECTOR_NBYTES // max(sizes)).bit_length() - 1,
            "KIND": self.kind,
        }


@lru_cache(maxsize=1024)
def compiled(variant: Variant, target: Any, device_index: int = 0) -> Any:
    """The compiled kernel. ``[grid](rows, tiles, magic, shift, read_base, write_base, count, *constants)`` launches it.

    The signature is given rather than found out from arguments, so that there is one binary a variant whatever the
    arguments are, and a launch need not look at them.

    Args:
        variant: which.
        target: a triton GPUTarget; no such GPU need be there.
        device_index: a binary is loaded on one device.
    """
    import triton
    from triton.compiler import ASTSource

    from tricomm.kernels import jit

    constants = variant.constants()
    is_hopper = target.backend == "cuda" and target.arch >= 90
    if variant.formats is not None:
        constants["NATIVE"] = is_hopper
    arguments: dict[str, Any] = {"rows": "*i32", "tiles": "*i32", "magic": "i32", "shift": "i32"}
    if variant.is_shared:
        arguments["rows"] = ("i32",) * layout.ROW_INTS
    arguments |= {"read_base": "i64", "write_base": "i64", "count": "i32"}
    source = ASTSource(
        fn=variant.kernel(jit),
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in range(int(variant.is_shared), 2)},
    )
    options = {"num_warps": variant.program.warps}
    is_copy = variant.formats is None and not variant.transposed_nbytes
    if is_copy and variant.rank == layout.MAX_RANK and is_hopper:
        options["maxnreg"] = MAX_REGISTERS
    return triton.compile(source, target=target, options=options)
