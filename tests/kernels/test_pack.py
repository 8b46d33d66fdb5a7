"""Pack and unpack, in the interpreter and in torch, against the definition."""

import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import cases
from tests.kernels.interpreted import launch
from tests.kernels.scenes import Scene, deterministic, moved, noise, scenes
from tests.kernels.test_casts import one_run
from tests.oracle import WORDS, pick, require_equal, source_and_result
from tricomm import LocalTransport, make_plan
from tricomm.kernels import layout
from tricomm.kernels import pack as pack_module
from tricomm.kernels import rows as rows_module
from tricomm.kernels.boxes import PACKED_ALIGNMENT_NBYTES, boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.kernels.table import StridedBox, widened
from tricomm.kernels.tiles import COPIES, PERSISTENT, Program, Rows, fitting_program, magic_numbers

EXAMPLES = 60


def check(scene: Scene, packs: bool, with_kernels: bool) -> None:
    expected = moved(scene, packs)
    table = Table(scene.boxes, multiprocessors=scene.multiprocessors)
    if with_kernels:
        launch(table, packs, scene.tensors, scene.buffers, scene.words_per_tile)
    elif packs:
        pack(scene.tensors, table, scene.buffers)
    else:
        unpack(scene.buffers, table, scene.tensors)
    written = scene.buffer_memories if packs else scene.memories
    for index, (found, wanted) in enumerate(zip(written, expected, strict=True)):
        require_equal(found, wanted, f"{'buffer' if packs else 'tensor'} {index}")


@pytest.mark.parametrize("packs", [True, False])
@settings(deterministic, max_examples=EXAMPLES)
@given(data=st.data())
def test_kernels_move_every_byte_and_no_other(packs: bool, data: Any) -> None:
    check(data.draw(scenes(may_expand=packs)), packs, with_kernels=True)


@pytest.mark.parametrize("packs", [True, False])
@settings(deterministic, max_examples=EXAMPLES)
@given(data=st.data())
def test_torch_moves_every_byte_and_no_other(packs: bool, data: Any) -> None:
    check(data.draw(scenes(may_expand=packs)), packs, with_kernels=False)


def first_dim_dropped(rows: Callable[..., Any]) -> Callable[..., Any]:
    def broken(sides: Any, *arguments: Any) -> Any:
        made = rows(sides, *arguments)
        made.rows[:, layout.READ_JUMPS + 1] = 0
        return made

    return broken


def one_less(magic: Callable[..., Any]) -> Callable[..., Any]:
    def broken(divisors: Any) -> Any:
        numbers, shifts = magic(divisors)
        return numbers - 1, shifts

    return broken


def twice_as_wide(word: Callable[..., Any]) -> Callable[..., Any]:
    return lambda sides, units: np.minimum(word(sides, units) + 1, 4)


FAULTS = {
    "a dropped dim": ("_rows", first_dim_dropped, "expected"),
    "an off-by-one in the division": ("magic_numbers", one_less, "expected"),
    "a word wider than the alignment": ("widest_word", twice_as_wide, "no multiples of that"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, breaks, says = FAULTS[name]
    monkeypatch.setattr(rows_module, function, breaks(getattr(rows_module, function)))

    @settings(deterministic, max_examples=EXAMPLES, report_multiple_bugs=False)
    @given(data=st.data())
    def run(data: Any) -> None:
        check(data.draw(scenes(may_expand=True)), True, with_kernels=True)

    with pytest.raises(AssertionError, match=says):
        run()


@pytest.mark.parametrize("each", [1, 2, 3, 7, 512, 99991])
def test_a_row_is_found_by_division_where_all_have_as_many_tiles(each: int) -> None:
    count = max(1_000_000 // each, 1)
    rows = np.zeros((count, layout.ROW_INTS), np.int32)
    rows[:, layout.FIRST_TILE] = np.arange(count) * each
    tiles = np.repeat(np.arange(count, dtype=np.int32), each)
    magic, shift = Rows(rows, tiles, 2, 0).each_magic
    twice = 2 * np.arange(len(tiles), dtype=np.uint64)
    found = (twice * np.uint64(np.uint32(magic & 0xFFFFFFFF)) >> np.uint64(32)) >> np.uint64(shift)
    assert (found == tiles).all()
    assert Rows(rows, np.append(tiles, np.int32(count - 1)), 2, 0).each_magic == (0, 0)


def test_a_row_is_read_from_the_map_where_one_has_more_tiles_than_another() -> None:
    rows = np.zeros((2, layout.ROW_INTS), np.int32)
    rows[1, layout.FIRST_TILE] = 3
    assert Rows(rows, np.array([0, 0, 0, 1], np.int32), 2, 0).each_magic == (0, 0)


@pytest.mark.parametrize(
    ("words", "nbytes", "tile"),
    [
        ([64] * 100, 8, 128),
        ([256] * 100, 8, 256),
        ([400] * 3, 8, 512),
        ([10_000, 3], 1, 512),
        ([10_000, 3], 16, 256),
        ([3], 1, 128),
        ([130], 4, 256),
        ([64] * 100 + [10**6], 8, 512),
    ],
)
def test_small_boxes_and_wide_words_take_small_tiles(words: list[int], nbytes: int, tile: int) -> None:
    sizes = np.full(len(words), nbytes)
    assert fitting_program(np.array(words), sizes, COPIES).words == tile
    assert fitting_program(np.array(words), sizes, PERSISTENT) == Program(2048, 16)


def test_division_by_magic_numbers_is_exact() -> None:
    divisors = np.concatenate([np.arange(2, 3000), 2 ** np.arange(1, 30), 2 ** np.arange(2, 30) - 1])
    divisors = np.concatenate([divisors, 2 ** np.arange(1, 30) + 1, np.array([2**29, 2**31 - 1, 50257, 12288])])
    magic, shift = magic_numbers(divisors)
    assert magic.max() < 2**32
    for multiple in (1, 2, 3, 7, 1000, 65535, 2**20):
        for near in (-1, 0, 1):
            values = divisors * multiple + near
            numbers = np.where(values < 2**31, values, 2**31 - 1 - multiple).astype(np.uint64)
            found = (numbers * magic.astype(np.uint64) >> np.uint64(32)) >> shift.astype(np.uint64)
            assert (found == numbers // divisors.astype(np.uint64)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 80), (67, 2, 3, 41)])
def test_transposing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Whole vectors and odd extents, with dims outside of both."""
    numel = math.prod(shape)
    memory = noise(numel * dtype.itemsize, 3).view(WORDS[dtype.itemsize])
    tensor = memory.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    boxes, nbytes = boxes_in_order(
        [tensor], np.zeros(1, np.int64), np.zeros((1, len(shape)), np.int64), np.array([shape])
    )
    table = Table(boxes)
    found = torch.zeros(nbytes // dtype.itemsize, dtype=memory.dtype)
    (rows,) = table.rows(True, [tensor.data_ptr()], [found.data_ptr()])
    assert rows.transposed_nbytes == dtype.itemsize
    assert bool(rows.rows[0, layout.WORD_LOG2]) == (shape == (64, 80))
    assert launch(table, True, [tensor], [found]) == 1
    require_equal(found[:numel], tensor.reshape(-1), "packed")
    back = torch.zeros_like(memory).reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    assert launch(table, False, [back], [found]) == 1
    require_equal(back, tensor, "unpacked")


def test_addresses_that_fit_into_32_bits() -> None:
    """As all of a small heap do in a Python that is not position-independent; 0x40 is MAP_32BIT on x86-64."""
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40)
    low = torch.frombuffer(memory, dtype=torch.int32)
    tensor, found = low[:512], low[512:]
    tensor[:] = torch.arange(512)
    table = Table(one_run(tensor, 512, None))
    launch(table, True, [tensor], [found])
    require_equal(found, torch.arange(512, dtype=torch.int32), "packed")
    tensor.zero_()
    launch(table, False, [tensor], [found])
    require_equal(tensor, torch.arange(512, dtype=torch.int32), "unpacked")


def test_boxes_that_reach_too_far_or_have_too_many_dims_become_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_REACH_WORDS", 40)
    tensor = torch.arange(3 * 2 * 3 * 2 * 3 * 2 * 3 * 2 * 5).reshape(3, 2, 3, 2, 3, 2, 3, 2, 5)
    view = tensor[:, :1].expand(3, 2, 3, 2, 3, 2, 3, 2, 5)[:2, :, ::2, :, :2, :, :2, :, ::2]
    boxes, nbytes = boxes_in_order(
        [view], np.zeros(1, np.int64), np.zeros((1, 9), np.int64), np.array([tuple(view.shape)])
    )
    table = Table(boxes)
    found = torch.zeros(nbytes // 8, dtype=torch.int64)
    (rows,) = table.rows(True, [view.data_ptr()], [found.data_ptr()])
    assert len(rows.rows) > 8
    launch(table, True, [view], [found], 16)
    require_equal(found[: view.numel()], view.reshape(-1), "packed")


def test_packed_boxes_begin_at_multiples_of_16_bytes_in_order() -> None:
    tensors = [torch.zeros(5, dtype=torch.int8), torch.zeros(3, 3, dtype=torch.float64), torch.zeros(())]
    starts, shapes = np.array([[0, 1], [1, 0], [0, 0]]), np.array([[1, 3], [2, 2], [1, 1]])
    boxes, nbytes = boxes_in_order(tensors, np.arange(3), starts, shapes)
    assert boxes.packed_place.tolist() == [0, 16, 48]
    assert nbytes == 48 + PACKED_ALIGNMENT_NBYTES
    assert boxes.reach_nbytes(packed=False) == [4, 64, 4]
    assert boxes.reach_nbytes(packed=True) == [52]


def test_the_widest_integers_are_taken() -> None:
    assert widened(StridedBox((4, 8), 16, (32, 1), 0, (8, 1), 2), 16) == StridedBox((4, 2), 4, (8, 1), 0, (2, 1), 8)
    assert widened(StridedBox((4, 4), 16, (32, 1), 0, (4, 1), 2), 16) == StridedBox((4,), 4, (8,), 0, (1,), 8)
    assert widened(StridedBox((4, 6), 16, (32, 1), 0, (6, 1), 2), 16).word_nbytes == 4
    assert widened(StridedBox((4, 8), 16, (32, 1), 0, (8, 1), 2), 2).word_nbytes == 2
    assert widened(StridedBox((4, 8), 16, (1, 32), 0, (8, 1), 2), 16).word_nbytes == 2
    assert widened(StridedBox((4, 8), 16, (32, 1), 0, (8, 1), 0), 16).word_nbytes == 0


def column(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


HALVES = torch.zeros(8, dtype=torch.float16)
FLOATS = torch.zeros(8)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "cast": (lambda: Table(one_run(FLOATS, 8, None), cast=(torch.int32, torch.float32)), "no kernel casts torch.int32"),
    "no multiprocessor": (
        lambda: Table(one_run(FLOATS, 8, None), multiprocessors=0),
        "multiprocessors=0 must be at least 1",
    ),
    "out of the tensor": (
        lambda: boxes_in_order([FLOATS], column(0), column(3).reshape(1, 1), column(6).reshape(1, 1)),
        r"box 0 from \(3,\) of shape \(6,\) reaches out of tensor 0 of shape \(8,\); give boxes inside",
    ),
    "a short buffer": (lambda: pack([FLOATS], Table(one_run(FLOATS, 8, None)), FLOATS[:7]), "buffer 0 spans 28 bytes"),
    "no tensor": (lambda: pack([], Table(one_run(FLOATS, 8, None)), FLOATS), "boxes of 1 tensors, and 0 were given"),
    "another dtype": (
        lambda: pack([FLOATS], Table(one_run(HALVES, 8, torch.float32), cast=(torch.float16, torch.float32)), FLOATS),
        "tensor 0 is torch.float32, and the table casts torch.float16; give that",
    ),
    "elsewhere": (
        lambda: pack([FLOATS.to("meta")], Table(one_run(FLOATS, 8, None)), FLOATS),
        "tensor 0 is on meta and buffer 0 on cpu",
    ),
    "expanded where it is written": (
        lambda: launch(Table(one_run(FLOATS[:1].expand(8), 8, None)), False, [FLOATS], [FLOATS]),
        r"written with strides \[0\], so several of its elements share one place",
    ),
    "an odd element": (
        lambda: launch(
            Table(one_run(FLOATS, 4, torch.float16), cast=(torch.float32, torch.float16)),
            True,
            [FLOATS],
            [torch.zeros(32, dtype=torch.uint8)[1:]],
        ),
        "no multiples of its elements' 2 bytes, so it cannot be cast",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, says = REFUSALS[name]
    with pytest.raises(ValueError, match=says):
        call()


@settings(deterministic, max_examples=6)
@given(case=cases())
def test_a_reshard_with_kernels(case: Any) -> None:
    """What a CUDA device does, on host memory: one launch a round and direction."""
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    shards, result = source_and_result(case.source, case.destination)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "runs_kernels", lambda _: True)
        patch.setattr(Table, "launch", launch)
        outputs, sent = LocalTransport().run_counted(plan, shards)
    for rank, output in outputs.items():
        require_equal(output, pick(result, case.destination, rank), f"rank {rank}")
    assert sum(sent.values()) == plan.wire_nbytes
