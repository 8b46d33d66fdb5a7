"""What a warp executes to move a tile, read from the machine code that Triton's own nvdisasm prints.

Nothing is run. The code is a graph of blocks; a full tile takes the longest way through it on which so many words of
the width in question are stored. On that way every instruction counts, also one that a predicate switches off: it takes
a turn of the scheduler all the same. A predicated EXIT is passed, or ends the way if everything is stored by then.
Where a program loops over tiles, one turn of the loop is counted instead.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

MEMORY, INTEGER, PREDICATE, CONVERSION = "memory", "integer", "predicate", "conversion"
CLASSES = (MEMORY, INTEGER, PREDICATE, CONVERSION)
OPCODES = {
    MEMORY: "LDG STG LDS STS LDSM STSM LDC ULDC LDCU LD ST",
    PREDICATE: "ISETP UISETP FSETP HSETP2 PLOP3 UPLOP3 P2R R2P BRA BRX BRXU EXIT BSSY BSYNC BREAK BAR "
    "WARPSYNC SEL USEL FSEL NOP DEPBAR ELECT",
    CONVERSION: "F2F F2FP I2F I2FP F2I MUFU FADD FMUL FFMA FMNMX HADD2 HMUL2 HFMA2 HMNMX2",
    INTEGER: "IMAD UIMAD IADD3 UIADD3 IADD UIADD VIADD VIADDMNMX VIMNMX UIMNMX IMNMX LEA ULEA LOP3 ULOP3 SHF "
    "USHF SHL SHR PRMT UPRMT SGXT USGXT IABS IDP MOV UMOV MOV64 UMOV64 CS2R S2R S2UR CS2UR R2UR BMSK FLO POPC UFLO",
}
CLASS_OF = {opcode: name for name, opcodes in OPCODES.items() for opcode in opcodes.split()}
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)$")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"\.L_\w+")
_WIDTHS = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


class Instruction(NamedTuple):
    """One instruction: its predicate ("" if none), its opcode with what qualifies it, and the rest of the line."""

    predicate: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """The opcode alone."""
        return self.opcode.partition(".")[0]

    @property
    def stored_nbytes(self) -> int:
        """What each thread writes to global memory."""
        if self.kind != "STG":
            return 0
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels that it jumps to."""
        return tuple(_TARGET.findall(self.operands)) if self.kind in ("BRA", "BRX", "BRXU") else ()

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow it."""
        if self.kind == "EXIT":
            return bool(self.predicate)
        if self.kind == "BRA":
            # `BRA.U UP0, label` has its predicate among the operands.
            return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))
        return self.kind not in ("BRX", "BRXU")


class Tile(NamedTuple):
    """What one warp executes for its part of a full tile.

    Attributes:
        word_nbytes: of each store, of the widest ones where a way has several.
        stores: how many of them.
        counts: instructions by class.
        loads: from global memory, of the table too.
        narrow_stores: of words that are not as wide: the ends of runs.
    """

    word_nbytes: int
    stores: int
    counts: Counter[str]
    loads: int
    narrow_stores: int = 0

    @property
    def stored_nbytes(self) -> int:
        """By all threads of the warp, in its widest words."""
        return 32 * self.word_nbytes * self.stores

    @property
    def total(self) -> int:
        """Instructions."""
        return self.counts.total()


Ways = dict[tuple[int, int, int, int], Tile]
"""The longest of each width, and numbers of stores and loads."""


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow; or none, where it ends."""

    instructions: tuple[Instruction, ...]
    following: tuple[int, ...]

    @property
    def ends(self) -> bool:
        """Whether a warp may be done here."""
        return not self.following or self.instructions[-1].kind == "EXIT"


@cache
def usage(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of a thread's memory that registers are spilled to)."""
    text = _printed("cuobjdump", ("-res-usage",), cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers: {text!r}; has its output changed?")
    return int(found[1]), int(found[2])


@cache
def disassembled(cubin: bytes) -> str:
    """The machine code of a kernel as nvdisasm prints it, with labels."""
    return _printed("nvdisasm", ("-c",), cubin)


def _printed(tool: str, options: Sequence[str], cubin: bytes) -> str:
    from triton import knobs

    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [getattr(knobs.nvidia, tool).path, *options, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def tiles(text: str) -> list[Tile]:
    """What a warp executes for a full tile, once for each width, and numbers of stores and loads, that a way through
    the code has; the widest first.

    Raises:
        ValueError: an opcode of no known class, or code of another shape than one loop at most.
    """
    blocks = _blocks(text)
    order, turns = _ordered(blocks)
    heads = {head for _, head in turns}
    if len(heads) > 1:
        raise ValueError(f"the code has {len(heads)} loops, where the only one should be over tiles; count them apart")
    best: dict[int, Ways] = {}
    for at in order:
        ends = any(tail == at for tail, _ in turns) if heads else blocks[at].ends
        ways = [best[next_at] for next_at in blocks[at].following if (at, next_at) not in turns]
        best[at] = _longest(blocks[at].instructions, ways, ends)
    return sorted((tile for tile in best[next(iter(heads), 0)].values() if tile.stores), reverse=True)


def _longest(instructions: Sequence[Instruction], ways: Sequence[Ways], ends: bool) -> Ways:
    """The longest ways from a block on, given those from the next ones on."""
    own = _of(instructions)
    found = {_key(own): own} if ends else {}
    for way in ways:
        for rest in way.values():
            tile = _joined(own, rest)
            key = _key(tile)
            if key not in found or tile.total > found[key].total:
                found[key] = tile
    return found


def _key(tile: Tile) -> tuple[int, int, int, int]:
    return tile.word_nbytes, tile.stores, tile.loads, tile.narrow_stores


def _joined(first: Tile, second: Tile) -> Tile:
    """One after the other."""
    widest = max(first.word_nbytes, second.word_nbytes)
    stores = sum(tile.stores for tile in (first, second) if tile.word_nbytes == widest)
    narrow = first.stores + second.stores - stores + first.narrow_stores + second.narrow_stores
    return Tile(widest, stores, first.counts + second.counts, first.loads + second.loads, narrow)


def _of(instructions: Sequence[Instruction]) -> Tile:
    counts: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.kind not in CLASS_OF:
            raise ValueError(f"instruction {instruction.opcode} is of no class in OPCODES; say there what it is")
        counts[CLASS_OF[instruction.kind]] += 1
    stored = [each.stored_nbytes for each in instructions if each.stored_nbytes]
    widest = max(stored, default=0)
    loads = sum(each.kind == "LDG" for each in instructions)
    return Tile(widest, stored.count(widest), counts, loads, len(stored) - stored.count(widest))


def _blocks(text: str) -> list[Block]:
    """The graph of the code; the first block is entered first."""
    pieces: list[list[Instruction]] = [[]]
    places: dict[str, int] = {}
    for item in _parsed(text):
        if isinstance(item, str):
            if pieces[-1]:
                pieces.append([])
            places[item] = len(pieces) - 1
            continue
        pieces[-1].append(item)
        if item.targets or item.kind == "EXIT" or not item.goes_on:
            pieces.append([])
    found = []
    for at, piece in enumerate(pieces):
        last = piece[-1] if piece else None
        following = [places[label] for label in last.targets] if last else []
        if (last is None or last.goes_on) and at + 1 < len(pieces):
            following.append(at + 1)
        found.append(Block(tuple(piece), tuple(dict.fromkeys(following))))
    return found


def _parsed(text: str) -> Iterator[Instruction | str]:
    """Instructions, and labels as they are written."""
    for line in text.splitlines():
        if label := _LABEL.match(line):
            yield label[1]
        elif (found := _LINE.match(line)) is not None:
            yield Instruction(found[1] or "", found[2], found[3])


def _ordered(blocks: Sequence[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """(blocks that are reached, each behind all that follow it; jumps back, as (from, to))."""
    order: list[int] = []
    turns: set[tuple[int, int]] = set()
    open_blocks: dict[int, Iterator[int]] = {0: iter(blocks[0].following)}
    while open_blocks:
        at = next(reversed(open_blocks))
        next_at = next(open_blocks[at], None)
        if next_at is None:
            del open_blocks[at]
            order.append(at)
        elif next_at in open_blocks:
            turns.add((at, next_at))
        elif next_at not in order:
            open_blocks[next_at] = iter(blocks[next_at].following)
    return order, turns
