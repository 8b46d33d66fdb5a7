"""Instructions per 512 bytes of every kernel variant, without a GPU: ``python -m bench.kernels.instructions``.

What counts is what one warp executes for its part of a full tile, from the first instruction to the last (of a program
that loops over tiles: one turn), over the bytes of payload that it moves, in units of 512; a cast's payload is the mean
of what it reads and what it writes, so that a unit is 1,024 bytes of memory traffic always. ``sass`` says how the way
through the code is found. The budget is how many a GPU can issue while its memory moves such a unit.

Classes: memory (all loads and stores, the table's and shared memory too), integer (addresses, divisions, and those
parts of a cast that are done on integers), predicate (comparisons, selects, branches, barriers), conversion (floating
point).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.kernels.sass import CLASSES, Tile, disassembled, tiles, usage
from tricomm.kernels import layout
from tricomm.kernels.tiles import (
    FEW_VECTORS,
    LARGE_SQUARES,
    MANY_VECTORS,
    PERSISTENT,
    VECTORS_LOG2,
    VECTORS_OF_ONE,
)
from tricomm.kernels.variants import Variant, compiled

UNIT_NBYTES = 512
SHIFTED_NBYTES = 8
MAP_LOADS = 1
"""Where a tile's row is not found by division."""
BUDGET = 132 * 4 * 1.7e9 / (2.15e12 / UNIT_NBYTES)
"""Instructions that the 132 x 4 schedulers of an H100 issue at 1.7 GHz while its memory reads and writes a unit, at
2.15e12 bytes of payload a second: about 214.
"""
IN_LINES, SHIFTED, WITH_ENDS = "in lines", "shifted", "shifted, with ends"
COPIED = (3, 2, 1, layout.IN_RUNS + 1)
"""Kinds of words that are copied by themselves, but for those of 16 bytes."""
LARGE: dict[str, Any] = {"side": layout.LARGE_SIDE, "program": LARGE_SQUARES, "kind": 1, "is_shared": True}
"""What is of a transpose in large squares."""
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclass(frozen=True, slots=True)
class Count:
    """One way through one variant for one target.

    Attributes:
        variant: as ``variant_name`` says.
        target: one of TARGETS.
        word_nbytes: what each thread writes by one instruction.
        how: "" for each word by itself; IN_LINES for narrow ones side by side, so that they share the finding of their
            place; SHIFTED for words of 8 bytes out of two of them; WITH_ENDS for a tile that moves ends of runs, too.
        read_nbytes, written_nbytes: by a warp in a full tile.
        executed: instructions of that warp, by class.
        registers: of a thread, of the whole variant.
        spilled_nbytes: of a thread.
    """

    variant: str
    target: str
    word_nbytes: int
    how: str
    read_nbytes: int
    written_nbytes: int
    executed: dict[str, int]
    registers: int
    spilled_nbytes: int

    def per_unit(self, kind: str | None = None) -> float:
        """Instructions per 512 bytes of payload, of one class or all."""
        number = sum(self.executed.values()) if kind is None else self.executed.get(kind, 0)
        return number * UNIT_NBYTES / ((self.read_nbytes + self.written_nbytes) / 2)


def every_variant() -> list[Variant]:
    """All that a table may ask for, casts at rank 4 only; their integer parts at other ranks differ as copies do."""
    names = list(layout.FORMATS)
    return [
        *(Variant(rank) for rank in (2, 4, 6)),
        *(Variant(rank, kind=kind, is_shared=True) for rank in (2, 4, 6) for kind in COPIED),
        *(Variant(rank, program=VECTORS_OF_ONE[0], kind=VECTORS_LOG2, is_shared=True) for rank in (2, 4, 6)),
        *(Variant(program=program, kind=VECTORS_LOG2) for program in (*MANY_VECTORS, FEW_VECTORS[0])),
        Variant(4, persistent=True, program=PERSISTENT[0]),
        *(Variant(transposed_nbytes=nbytes, side=layout.tile_side(nbytes)) for nbytes in (8, 4, 2, 1)),
        *(Variant(transposed_nbytes=nbytes, **LARGE) for nbytes in (2, 1)),
        *(Variant(rank, transposed_nbytes=1) for rank in (4, 6)),
        *(
            Variant(4, formats=(source, to), saturates=to == "float8_e4m3fn")
            for source in names
            for to in names
            if source != to
        ),
    ]


def variant_name(variant: Variant) -> str:
    """As it is printed."""
    of_all = f", rank {variant.rank}" + (", persistent" if variant.persistent else "")
    if variant.transposed_nbytes:
        large = ", large" if variant.side == layout.LARGE_SIDE else ""
        return f"transpose of {variant.transposed_nbytes} B{of_all}{large}"
    if variant.formats is not None:
        return " to ".join(variant.formats) + of_all
    if variant.kind == layout.ANY:
        return "copy" + of_all
    only = f" of {1 << variant.kind % layout.IN_RUNS} B only"
    tiles = f", {variant.program.tiles} tiles of {variant.program.words} words" if variant.program.tiles > 1 else ""
    return "copy" + (" of runs" if variant.kind >= layout.IN_RUNS else "") + only + of_all + tiles


def full_tiles(variant: Variant, found: Sequence[Tile]) -> list[tuple[Tile, str]]:
    """The longest tiles that are full, the widest words first, and how their words go.

    What skips a store is the way of a tile that is not full. A shifted word is read from two; what reads still more is
    the way of ends that are there and are not stored.
    """
    threads, words = 32 * variant.program.warps, variant.program.words * variant.program.tiles
    whole = [tile for tile in found if tile.word_nbytes == SHIFTED_NBYTES and not tile.narrow_stores]
    once = min((tile.loads for tile in whole), default=0)
    twice = min((tile.loads for tile in whole if tile.loads >= once + tile.stores), default=0)
    if variant.kind != layout.ANY:
        twice = once if variant.kind >= layout.IN_RUNS else 0
    longest: dict[tuple[int, str], Tile] = {}
    for tile in found:
        how = ""
        if variant.transposed_nbytes:
            stores = variant.side**2 * variant.transposed_nbytes // tile.word_nbytes
        elif variant.formats is not None and tile.stores > words // threads:
            how, stores = IN_LINES, words // 32 * layout.LINE_UNITS
        else:
            stores = words
            if tile.narrow_stores:
                how = WITH_ENDS
            elif tile in whole and tile.loads >= twice > 0:
                how = SHIFTED
                stores *= tile.loads <= twice + MAP_LOADS
        key = (tile.word_nbytes, how)
        if tile.stores * threads == stores and (key not in longest or tile.total > longest[key].total):
            longest[key] = tile
    return [(tile, how) for (_, how), tile in longest.items()]


def count(variant: Variant, target: str) -> list[Count]:
    """What a variant executes, the widest words first.

    Args:
        variant: which.
        target: one of TARGETS.
    """
    from triton.backends.compiler import GPUTarget

    cubin = compiled(variant, GPUTarget("cuda", TARGETS[target], 32)).asm["cubin"]
    registers, spilled_nbytes = usage(cubin)
    source, to = (1, 1) if variant.formats is None else (layout.FORMATS[name] for name in variant.formats)
    return [
        Count(
            variant_name(variant),
            target,
            tile.word_nbytes,
            how,
            tile.stored_nbytes * source // to,
            tile.stored_nbytes,
            dict(tile.counts),
            registers,
            spilled_nbytes,
        )
        for tile, how in full_tiles(variant, tiles(disassembled(cubin)))
    ]


def table(counts: Iterable[Count]) -> str:
    """In Markdown, what is over budget in bold."""
    lines = [
        f"| variant | target | word | {' | '.join(CLASSES)} | all, of {BUDGET:.0f} | registers | spilled |",
        "|---" * (6 + len(CLASSES)) + "|",
    ]
    for each in counts:
        total = f"{each.per_unit():.0f}"
        if each.per_unit() > BUDGET:
            total = f"**{total}**"
        classes = " | ".join(f"{each.per_unit(kind):.0f}" for kind in CLASSES)
        word = f"{each.word_nbytes} B {each.how}".strip()
        what = f"{each.variant} | {each.target} | {word}"
        lines.append(f"| {what} | {classes} | {total} | {each.registers} | {each.spilled_nbytes} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.instructions", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="which GPUs; sm_90 if none is given")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name has it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the counts")
    options = parser.parse_args(arguments)
    chosen = [variant for variant in every_variant() if options.only in variant_name(variant)]
    counts = [each for name in options.target or ["sm_90"] for variant in chosen for each in count(variant, name)]
    print(table(counts))
    if options.json is not None:
        options.json.write_text(json.dumps({"budget": BUDGET, "counts": [asdict(each) for each in counts]}, indent=1))


if __name__ == "__main__":
    main()
