"""Narrow words that are moved by runs, shifted or in lines: against the definition, with guards around all writes."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.kernels.interpreted import launch
from tests.kernels.scenes import GUARD_NBYTES, Scene, moved, noise
from tests.oracle import WORDS, require_equal
from tricomm.kernels import layout
from tricomm.kernels.boxes import boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.kernels.tiles import Rows

BOXES = {
    "one run": ((1000,), (3,), (901,)),
    "rows of a line and a little": ((9, 131), (1, 0), (7, 129)),
    "rows of one line": ((9, 141), (1, 5), (8, 128)),
    "rows shorter than two lines": ((6, 301), (0, 1), (6, 255)),
    "rows of two lines": ((5, 301), (2, 7), (3, 256)),
    "three dims": ((3, 4, 203), (0, 1, 2), (3, 3, 199)),
    "four dims": ((2, 3, 3, 203), (0, 0, 1, 2), (2, 2, 2, 150)),
    "five dims": ((2, 2, 3, 3, 203), (0, 0, 0, 1, 2), (2, 1, 2, 2, 150)),
    "many tiles": ((40, 401), (1, 1), (38, 399)),
    "long runs": ((5, 701), (1, 3), (4, 697)),
    "the shortest runs": ((40, 99), (1, 1), (39, 97)),
    "too short": ((9, 101), (1, 1), (7, 31)),
}


def scene(dtype: torch.dtype, shape: Sequence[int], start: Sequence[int], box: Sequence[int], words: int) -> Scene:
    """One box, packed at an odd element of its buffer, both within guards."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = noise(nbytes + 2 * GUARD_NBYTES, 5)
    tensor = memory[GUARD_NBYTES : GUARD_NBYTES + nbytes].view(dtype).view(*shape)
    boxes, packed = boxes_in_order([tensor], np.zeros(1, np.int64), np.array([start]), np.array([box]))
    room = GUARD_NBYTES + dtype.itemsize
    held = noise(packed + room + GUARD_NBYTES, 7)
    return Scene([memory], [tensor], boxes, [held], [held[room : room + packed]], words, None)


def in_runs(rows: Rows) -> bool:
    return bool((rows.rows[:, layout.RUN] > 0).all())


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("name", BOXES)
def test_shifted_words_move_every_byte_and_no_other(name: str, dtype: torch.dtype, packs: bool) -> None:
    made = scene(dtype, *BOXES[name], 128)
    table = Table(made.boxes)
    (rows,) = table.rows(packs, [made.tensors[0].data_ptr()], [made.buffers[0].data_ptr()])
    assert in_runs(rows) == (BOXES[name][2][-1] * dtype.itemsize >= layout.MIN_SHIFTED_NBYTES)
    assert (rows.rows[:, layout.WORD_LOG2] == dtype.itemsize - 1).all()
    expected = moved(made, packs)
    launch(table, packs, made.tensors, made.buffers, made.words_per_tile)
    require_equal((made.buffer_memories if packs else made.memories)[0], expected[0], "memory")


@pytest.mark.parametrize("room", range(1, 34, 3))
@pytest.mark.parametrize("width", [96, 97, 255, 263])
def test_runs_are_shifted_by_any_distance(width: int, room: int) -> None:
    tensor = noise(3 * 300, 3).view(3, 300)
    boxes, nbytes = boxes_in_order(
        [tensor], np.zeros(1, np.int64), np.array([[1, 300 - width]]), np.array([[2, width]])
    )
    table = Table(boxes)
    found, expected = noise(nbytes + 40, 9), noise(nbytes + 40, 9)
    launch(table, True, [tensor], [found[room : room + nbytes]], 128)
    pack([tensor], table, expected[room : room + nbytes])
    require_equal(found, expected, "packed")
    back, other = noise(900, 4).view(3, 300), noise(900, 4).view(3, 300)
    launch(table, False, [back], [found[room : room + nbytes]], 128)
    unpack(expected[room : room + nbytes], table, [other])
    require_equal(back, other, "unpacked")


@pytest.mark.parametrize("stride", [0, 1, 7, 8])
def test_runs_that_share_bytes_where_they_are_read(stride: int) -> None:
    tensor = noise(500, 3).as_strided((4, 100), (stride, 1), 9)
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), np.zeros((1, 2)), np.array([[4, 100]]))
    table = Table(boxes)
    found, expected = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    (rows,) = table.rows(True, [tensor.data_ptr()], [found.data_ptr()])
    assert in_runs(rows) == (stride >= 8)
    launch(table, True, [tensor], [found], 128)
    pack([tensor], table, expected)
    require_equal(found, expected, "packed")


@pytest.mark.parametrize("in_twos", [False, True])
@pytest.mark.parametrize(("source", "target"), [("float32", "bfloat16"), ("float8_e5m2", "float16")])
def test_narrow_casts_go_in_lines_of_elements(source: str, target: str, in_twos: bool) -> None:
    read, write = getattr(torch, source), getattr(torch, target)
    last = 302 if in_twos else 301
    tensor = (torch.arange(2 * 3 * last) % 15).to(read).view(2, 3, last)
    start, shape = ([0, 1, 2], [2, 2, 298]) if in_twos else ([0, 1, 2], [2, 2, 299])
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), np.array([start]), np.array([shape]), write)
    table = Table(boxes, cast=(read, write))
    found, expected = (torch.zeros(nbytes // write.itemsize, dtype=write) for _ in range(2))
    (rows,) = table.rows(True, [tensor.data_ptr()], [found.data_ptr()])
    assert in_runs(rows)
    assert rows.rows[0, layout.WORD_LOG2] == 0
    assert rows.rows[0, layout.RUN] == shape[-1]
    launch(table, True, [tensor], [found], 128)
    pack([tensor], table, expected)
    require_equal(found, expected, "packed")
    back, other = torch.zeros_like(tensor), torch.zeros_like(tensor)
    other[0:2, 1:3, 2 : 2 + shape[-1]] = tensor[0:2, 1:3, 2 : 2 + shape[-1]]
    launch(table, False, [back], [found], 128)
    require_equal(back.view(WORDS[read.itemsize]), other.view(WORDS[read.itemsize]), "unpacked")
