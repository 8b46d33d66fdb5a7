"""Every variant compiles for every target, moves 16 bytes at a time, and keeps everything in registers. No GPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from bench.kernels.instructions import BUDGET, IN_LINES, SHIFTED, WITH_ENDS
from tests.kernels.binaries import COUNTED, TARGETS, VARIANTS, Binary, compile_for
from tricomm.kernels import layout
from tricomm.kernels.variants import Variant, compiled

pytestmark = pytest.mark.processes

Binaries = dict[tuple[Variant, str], "Future[Binary]"]
MAX_REGISTERS = {"copy": 40, "cast": 64, "transpose": 72}
"""Of a thread. With 40 a multiprocessor of 65,536 registers holds 12 programs of 128 threads, 96 KiB in flight."""
# What is over the budget of instructions for 512 bytes: (variant, bytes of a written word, how words go).
OVER_BUDGET = {
    ("copy, rank 2", 2, ""): 230,
    ("copy, rank 2", 1, ""): 440,
    ("copy, rank 4", 2, ""): 300,
    ("copy, rank 4", 1, ""): 585,
    ("copy, rank 6", 2, ""): 370,
    ("copy, rank 6", 1, ""): 720,
    ("copy, rank 6", 8, WITH_ENDS): 225,
    ("copy, rank 4, persistent", 2, ""): 330,
    ("copy, rank 4, persistent", 1, ""): 640,
    ("copy of 2 B only, rank 4", 2, ""): 285,
    ("transpose of 1 B, rank 2", 1, ""): 285,
    ("transpose of 1 B, rank 6", 16, ""): 230,
    ("transpose of 1 B, rank 6", 1, ""): 350,
    ("float32 to bfloat16, rank 4", 2, ""): 235,
    ("float16 to float8_e4m3fn, rank 4", 2, ""): 275,
    ("float16 to float8_e4m3fn, rank 4", 1, ""): 430,
    ("float8_e5m2 to float16, rank 4", 4, ""): 216,
    ("float8_e5m2 to float16, rank 4", 2, ""): 390,
    ("float8_e4m3fn to float8_e5m2, rank 4", 16, ""): 275,
    ("float8_e4m3fn to float8_e5m2, rank 4", 8, ""): 310,
    ("float8_e4m3fn to float8_e5m2, rank 4", 4, ""): 385,
    ("float8_e4m3fn to float8_e5m2, rank 4", 2, ""): 565,
    ("float8_e4m3fn to float8_e5m2, rank 4", 1, IN_LINES): 400,
    ("float8_e4m3fn to float8_e5m2, rank 4", 1, ""): 785,
}


@pytest.fixture(scope="module")
def binaries() -> Iterator[Binaries]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {(variant, name): pool.submit(compile_for, variant, name) for variant in VARIANTS for name in TARGETS}


def kind(variant: Variant) -> str:
    if variant.transposed_nbytes:
        return "transpose"
    return "copy" if variant.formats is None else "cast"


def sizes_of(variant: Variant) -> list[int]:
    """Bytes of what is read, and written, one by one."""
    return [1, 1] if variant.formats is None else [layout.FORMATS[name] for name in variant.formats]


def widest(variant: Variant) -> int:
    """The kind of its widest words."""
    return (layout.VECTOR_NBYTES // max(sizes_of(variant))).bit_length() - 1


def vectors(variant: Variant) -> tuple[bool, bool]:
    """Whether the widest read, and write, is of 16 bytes: those of the wider type of a cast are."""
    sizes = sizes_of(variant)
    return sizes[0] == max(sizes), sizes[1] == max(sizes)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_compiles_to_what_it_should(variant: Variant, name: str, binaries: Binaries) -> None:
    binary = binaries[variant, name].result()
    assert binary.spilled == 0
    # At rank 6 an A100 needs a few more. A multiprocessor holds 32 programs of one warp, whatever they take, and one of
    # those that loop is enough for it.
    limit = 64 if variant.program.warps == 1 or variant.persistent else MAX_REGISTERS[kind(variant)]
    assert binary.registers <= limit + 8 * (name == "sm_80" and variant.rank == 6)
    assert (binary.shared_nbytes > 0) == (variant.transposed_nbytes > 0), "only transposing goes through shared memory"
    reads, writes = vectors(variant)
    counts = binary.instructions
    if name == "gfx942":
        # The rows of the table may be read by vectors too, so of reads only a lower bound is known.
        per_thread = variant.program.words * variant.program.tiles // (64 * variant.program.warps)
        reads, writes = (vectors and variant.kind in (layout.ANY, widest(variant)) for vectors in (reads, writes))
        assert not reads or counts.get("global_load_dwordx4", 0) >= (1 if variant.transposed_nbytes else per_thread)
        assert not writes or counts.get("global_store_dwordx4", 0) >= (1 if variant.transposed_nbytes else per_thread)
        return
    if variant.transposed_nbytes:
        wide = "v2.b64" if variant.transposed_nbytes == 8 else "v4.b32"
        threads = 32 * variant.program.warps
        count = variant.side**2 * variant.transposed_nbytes // layout.VECTOR_NBYTES
        assert counts[f"ld.global.{wide}"] == counts[f"st.global.{wide}"] == count // threads
        return
    # Some words a thread, each by one instruction, whatever their width; of shifted ones the ends, and the last 16 B.
    words = variant.program.words * variant.program.tiles // (32 * variant.program.warps)
    has_vectors = variant.kind in (layout.ANY, widest(variant))
    assert counts.get("ld.global.v4.b32", 0) == (words if reads and has_vectors else 0)
    assert counts.get("st.global.v4.b32", 0) == (words if writes and has_vectors else 0)
    if variant.formats is None:
        ends = {layout.IN_RUNS: {"b8": 7 + 1, "b64": 4}, layout.IN_RUNS + 1: {"b16": 3 + 1, "b64": 4}}
        ends[layout.ANY] = {"b64": 4, "b16": 3 + 1, "b8": 7 + 1}
        for log2, width in enumerate(("b8", "b16", "b32", "v2.b32", "v4.b32", "b64")):
            wanted = words * (variant.kind in (layout.ANY, log2) and width != "b64")
            assert counts.get(f"st.global.{width}", 0) == wanted + ends.get(variant.kind, {}).get(width, 0), width


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_full_tile_stays_within_the_budget_of_instructions(variant: Variant, binaries: Binaries) -> None:
    """Every way through every kernel; those over the budget, which bench/README.md tells why, by what they take."""
    counts = binaries[variant, COUNTED].result().counts
    widths = [each.word_nbytes for each in counts if not each.how]
    others = [(each.word_nbytes, each.how) for each in counts if each.how]
    if variant.transposed_nbytes:
        assert widths == [16, variant.transposed_nbytes][: 1 if variant.kind == 1 else 2]
        assert not others
    elif variant.kind >= layout.IN_RUNS:
        assert not widths
        assert others == [(8, WITH_ENDS), (8, SHIFTED)]
    elif variant.kind != layout.ANY:
        assert widths == [1 << variant.kind if variant.formats is None else sizes_of(variant)[1] << variant.kind]
        assert not others
    elif variant.formats is None:
        assert widths == [16, 8, 4, 2, 1]
        assert others == [(8, WITH_ENDS), (8, SHIFTED)]
    else:
        sizes = sizes_of(variant)
        assert widths == [sizes[1] << level for level in reversed(range((16 // max(sizes)).bit_length()))]
        assert others == [(sizes[1], IN_LINES)]
    for each in counts:
        limit = OVER_BUDGET.get((each.variant, each.word_nbytes, each.how), BUDGET)
        assert each.per_unit() <= limit, each


@pytest.mark.parametrize("to", ["float8_e4m3fn", "float8_e5m2"])
def test_hopper_rounds_to_float8_by_itself(to: str) -> None:
    texts = {
        name: compiled(Variant(2, formats=("float32", to)), TARGETS[name]).asm["ptx"] for name in ("sm_80", "sm_90")
    }
    assert "cvt.rn.satfinite." not in texts["sm_80"]
    assert "cvt.rn.satfinite." in texts["sm_90"]


def test_no_cast_loses_subnormal_values(binaries: Binaries) -> None:
    for variant in VARIANTS:
        for name in TARGETS:
            assert variant.formats is None or not binaries[variant, name].result().flushes_subnormals, (variant, name)
