"""What takes the tiles of a launch: rows that come with it, kernels of one kind of words, programs of several tiles."""

import numpy as np
import pytest
import torch

from tests.kernels.interpreted import launch
from tests.kernels.scenes import GUARD_NBYTES, noise
from tests.oracle import require_equal
from tricomm.kernels import layout
from tricomm.kernels.boxes import Boxes, boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.kernels.tiles import (
    COPIES,
    FEW_VECTORS,
    LARGE_SQUARES,
    MANY_VECTORS,
    PERSISTENT,
    SQUARES,
    VECTORS_OF_ONE,
    WIDE_CASTS,
    Program,
    Rows,
)


def one_of_each(
    *shapes: tuple[int, int], dtype: torch.dtype = torch.int16, packed: torch.dtype | None = None
) -> tuple[list[torch.Tensor], Boxes]:
    """Tensors without memory and 32 columns less of each, from the 16th on."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    starts = np.array([[0, 16]] * len(shapes))
    boxes, _ = boxes_in_order(tensors, np.arange(len(shapes)), starts, np.array(shapes) - [[0, 32]], packed)
    return tensors, boxes


def rows_of(tensors: list[torch.Tensor], boxes: Boxes, cast: tuple[torch.dtype, torch.dtype] | None = None) -> Rows:
    (rows,) = Table(boxes, cast=cast).rows(True, [0] * len(tensors), [0])
    return rows


@pytest.mark.parametrize(
    ("shapes", "program", "is_shared"),
    [
        ([(100_000, 288)], VECTORS_OF_ONE[0], True),
        ([(30_000, 288)], FEW_VECTORS[0], True),
        ([(50_000, 288)] * 2, MANY_VECTORS[0], True),
        ([(50_000, 288), (50_001, 288)], MANY_VECTORS[0], False),
        ([(1, 544)] * 9, Program(64, 2, 2), True),
        ([(1, 544)] * 20_001, Program(64, 2, 2), True),
        ([(1, 544), (1, 528)], Program(64, 2, 2), False),
        ([(1, 1056)] * 9, Program(128, 1), True),
    ],
)
def test_words_of_16_bytes_go_by_programs_of_their_own(
    shapes: list[tuple[int, int]], program: Program, is_shared: bool
) -> None:
    rows = rows_of(*one_of_each(*shapes))
    assert (rows.program, rows.kind, rows.shared is not None) == (program, 4, is_shared)


@pytest.mark.parametrize(
    ("dtype", "width", "kind"),
    [
        (torch.int16, 33, 1),
        (torch.int16, 333, layout.IN_RUNS + 1),
        (torch.int32, 35, 2),
        (torch.int32, 34, 3),
        (torch.int8, 47, layout.ANY),
        (torch.int8, 333, layout.ANY),
    ],
)
def test_narrow_words_are_compiled_alone_if_they_have_more_than_a_byte(
    dtype: torch.dtype, width: int, kind: int
) -> None:
    tensors, boxes = one_of_each((5000, width), dtype=dtype)
    rows = rows_of(tensors, boxes)
    assert (rows.program, rows.kind) == (COPIES[0], kind)
    assert rows.shared is not None
    (rows,) = Table(boxes, multiprocessors=3).rows(True, [0], [0])
    assert (rows.program, rows.kind, rows.shared) == (PERSISTENT[0], layout.ANY, None)


def test_boxes_of_several_kinds_of_words_share_a_kernel_of_all() -> None:
    rows = rows_of(*one_of_each((5000, 288), (5000, 289)))
    assert (rows.kind, rows.shared) == (layout.ANY, None)
    assert rows.program in COPIES


@pytest.mark.parametrize(
    ("width", "program", "kind"), [(288, WIDE_CASTS[0], 2), (289, COPIES[0], layout.ANY), (290, COPIES[0], layout.ANY)]
)
def test_casts_of_the_widest_words_are_compiled_alone(width: int, program: Program, kind: int) -> None:
    cast = torch.float32, torch.bfloat16
    rows = rows_of(*one_of_each((5000, width), dtype=cast[0], packed=cast[1]), cast)
    assert (rows.program, rows.kind) == (program, kind)


@pytest.mark.parametrize(
    ("dtype", "shape", "side", "kind"),
    [
        (torch.int8, (256, 384), 128, 1),
        (torch.int16, (256, 384), 128, 1),
        (torch.int16, (64, 192), 64, 1),
        (torch.int16, (255, 384), 64, layout.ANY),
        (torch.int32, (256, 384), 64, 1),
        (torch.int64, (256, 384), 32, 1),
    ],
)
def test_squares_of_transposes_are_large_where_they_are_full(
    dtype: torch.dtype, shape: tuple[int, int], side: int, kind: int
) -> None:
    memory = noise(shape[0] * shape[1] * dtype.itemsize, 3).view(dtype)
    tensor = memory.view(shape).T
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), np.zeros((1, 2)), np.array([shape[::-1]]))
    table = Table(boxes)
    found = torch.zeros(nbytes, dtype=torch.uint8)
    (rows,) = table.rows(True, [tensor.data_ptr()], [found.data_ptr()])
    assert (rows.side, rows.kind, rows.program) == (side, kind, LARGE_SQUARES if side == 128 else SQUARES)
    launch(table, True, [tensor], [found])
    require_equal(found.view(dtype), tensor.reshape(-1), "packed")
    back = torch.zeros_like(memory).view(shape).T
    launch(table, False, [back], [found])
    require_equal(back, tensor, "unpacked")


@pytest.mark.parametrize("several", [False, True], ids=["one tensor", "a tensor for each"])
@pytest.mark.parametrize("widths", [(512,) * 7, (512, 504, 8, 512, 512), (512,), (256,) * 5])
def test_small_boxes_go_two_at_a_time(widths: tuple[int, ...], several: bool) -> None:
    """With guards on both sides, by rows in memory and by a row of all, and where the last program has but one."""
    memories = [noise(len(widths) * 2048 + 2 * GUARD_NBYTES, seed) for seed in (3, 4, 4)]
    wholes = [m[GUARD_NBYTES : len(m) - GUARD_NBYTES].view(torch.int16).view(len(widths), 1024) for m in memories]
    tensors = [[*whole] if several else [whole] for whole in wholes]
    count = np.arange(len(widths))
    starts = np.full((len(widths), 1), 16) if several else np.stack([count, np.full_like(count, 16)], 1)
    shapes = np.array(widths)[:, None] if several else np.array([(1, width) for width in widths])
    boxes, nbytes = boxes_in_order(tensors[0], count if several else count * 0, starts, shapes)
    table = Table(boxes)
    (rows,) = table.rows(True, [tensor.data_ptr() for tensor in tensors[0]], [0])
    assert rows.program.tiles == 2
    assert (rows.shared is not None) == (len(set(widths)) == 1)
    found, expected = (noise(nbytes + 2 * GUARD_NBYTES, 9) for _ in range(2))
    launch(table, True, tensors[0], [found[GUARD_NBYTES:-GUARD_NBYTES]])
    pack(tensors[0], table, expected[GUARD_NBYTES:-GUARD_NBYTES])
    require_equal(found, expected, "packed")
    launch(table, False, tensors[1], [found[GUARD_NBYTES:-GUARD_NBYTES]])
    unpack(expected[GUARD_NBYTES:-GUARD_NBYTES], table, tensors[2])
    require_equal(memories[1], memories[2], "unpacked")


def test_tiles_are_found_by_places_alone_where_boxes_are_alike() -> None:
    """More tiles than one each, of narrow words, on both sides of more than one buffer."""
    tensors = [noise(3000, seed).view(30, 100) for seed in range(3)]
    starts, shapes = np.array([[1, 3]] * 3), np.array([[29, 90]] * 3)
    boxes, nbytes = boxes_in_order(tensors, np.arange(3), starts, shapes)
    table = Table(boxes)
    found, expected = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    (rows,) = table.rows(True, [tensor.data_ptr() for tensor in tensors], [found.data_ptr()], 128)
    assert rows.shared is not None
    assert rows.shared[layout.FIRST_TILE] > 1
    launch(table, True, tensors, [found], 128)
    pack(tensors, table, expected)
    require_equal(found, expected, "packed")
