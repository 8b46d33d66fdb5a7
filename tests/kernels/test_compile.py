"""Every variant compiles for every target, moves 16 bytes at a time, and keeps everything in registers. No GPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from tests.kernels.binaries import TARGETS, VARIANTS, Binary, compile_for
from tricomm.kernels import layout
from tricomm.kernels.variants import Variant

pytestmark = pytest.mark.processes

Binaries = dict[tuple[Variant, str], "Future[Binary]"]
MAX_REGISTERS = {"copy": 40, "cast": 64, "transpose": 72}
"""Of a thread. With 40 a multiprocessor of 65,536 registers holds 12 programs of 128 threads, 96 KiB in flight."""


@pytest.fixture(scope="module")
def binaries() -> Iterator[Binaries]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {(variant, name): pool.submit(compile_for, variant, name) for variant in VARIANTS for name in TARGETS}


def kind(variant: Variant) -> str:
    if variant.transposed_nbytes:
        return "transpose"
    return "copy" if variant.formats is None else "cast"


def vectors(variant: Variant) -> tuple[bool, bool]:
    """Whether the widest read, and write, is of 16 bytes: those of the wider type of a cast are."""
    if variant.formats is None:
        return True, True
    sizes = [layout.FORMATS[name] for name in variant.formats]
    return sizes[0] == max(sizes), sizes[1] == max(sizes)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_compiles_to_what_it_should(variant: Variant, name: str, binaries: Binaries) -> None:
    binary = binaries[variant, name].result()
    assert binary.spilled == 0
    assert binary.registers <= MAX_REGISTERS[kind(variant)]
    assert (binary.shared_nbytes > 0) == (variant.transposed_nbytes > 0), "only transposing goes through shared memory"
    reads, writes = vectors(variant)
    counts = binary.instructions
    if name == "gfx942":
        # The rows of the table may be read by vectors too, so of reads only a lower bound is known.
        per_thread = 2
        assert not reads or counts.get("global_load_dwordx4", 0) >= (1 if variant.transposed_nbytes else per_thread)
        assert not writes or counts.get("global_store_dwordx4", 0) >= (1 if variant.transposed_nbytes else per_thread)
        return
    if variant.transposed_nbytes:
        wide = "v2.b64" if variant.transposed_nbytes == 8 else "v4.b32"
        threads = 32 * variant.num_warps
        count = layout.tile_side(variant.transposed_nbytes) ** 2 * variant.transposed_nbytes // layout.VECTOR_NBYTES
        assert counts[f"ld.global.{wide}"] == counts[f"st.global.{wide}"] == count // threads
        return
    # Four words a thread, each by one instruction, whatever their width.
    assert counts.get("ld.global.v4.b32", 0) == (4 if reads else 0)
    assert counts.get("st.global.v4.b32", 0) == (4 if writes else 0)
    if variant.formats is None:
        for width in ("v2.b32", "b32", "b16", "b8"):
            assert counts[f"st.global.{width}"] == 4, width
