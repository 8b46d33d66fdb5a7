"""Casts in the kernels: those of torch, bit for bit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import CAST_DTYPES
from tests.kernels.interpreted import launch
from tests.kernels.scenes import deterministic
from tests.oracle import WORDS, require_equal
from tricomm.kernels import layout
from tricomm.kernels.boxes import Boxes, boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.kernels.tiles import Rows

CAST = [name for name in CAST_DTYPES if name in layout.FORMATS]


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a type; of float32 those around every value of the others and what rounds to them."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = [patterns(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16")]
    values[2:] = [value[::7] for value in values[2:]]
    bits = torch.cat([value.float() for value in values]).view(torch.int32)
    halves = [0, 0x1000, 0x8000, 0x80000, 0x100000]
    return torch.cat([bits + half + near for half in halves for near in (-1, 0, 1)]).view(torch.float32)


@pytest.mark.parametrize("source", CAST)
@pytest.mark.parametrize("target", CAST)
def test_casts_are_those_of_torch(source: str, target: str) -> None:
    if source == target:
        with pytest.raises(ValueError, match="no kernel casts"):
            Table(one_run(torch.zeros(4), 4, None), cast=(torch.float32, torch.float32))
        return
    read, write = getattr(torch, source), getattr(torch, target)
    values = patterns(read)
    values = values[: len(values) // 16 * 16]
    expected = values.to(write)
    table = Table(one_run(values, len(values), write), cast=(read, write))
    found = torch.zeros_like(expected)
    launch(table, True, [values], [found], 8192)
    require_same_values(found, expected)
    # And unpacking: the buffer holds what is cast to the tensor's type.
    back = torch.zeros_like(values)
    launch(table, False, [back], [expected], 8192)
    require_same_values(back, expected.to(read))


def one_run(values: torch.Tensor, numel: int, packed: torch.dtype | None) -> Boxes:
    return boxes_in_order([values], np.zeros(1, np.int64), np.zeros((1, 1), np.int64), np.array([[numel]]), packed)[0]


def require_same_values(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit but for NaN, whose payload differs between processors too."""
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    word = WORDS[expected.dtype.itemsize]
    wrong = ((found.view(word) != expected.view(word)) & ~nan).nonzero()
    assert not len(wrong), f"{found[wrong[0]]} instead of {expected[wrong[0]]} at {wrong[0]}"


@settings(deterministic, max_examples=25)
@given(data=st.data())
def test_strided_casts(data: Any) -> None:
    """Values that every type has, in words of every width."""
    read, write = (getattr(torch, data.draw(st.sampled_from(CAST))) for _ in range(2))
    if read == write:
        return
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=4))
    room = [extent + data.draw(st.sampled_from([0, 1, 4])) for extent in shape]
    tensor = (torch.arange(math.prod(room)) % 15).to(read).reshape(room)
    start = [data.draw(st.integers(0, big - small)) for big, small in zip(room, shape, strict=True)]
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), np.array([start]), np.array([shape]), write)
    table = Table(boxes, cast=(read, write))
    found, expected = (torch.zeros(nbytes // write.itemsize, dtype=write) for _ in range(2))
    launch(table, True, [tensor], [found])
    pack([tensor], table, expected)
    require_equal(found, expected, "packed")
    view = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    require_equal(expected[: view.numel()], view.to(write).reshape(-1), "definition")
    back, other = torch.zeros_like(tensor), torch.zeros_like(tensor)
    launch(table, False, [back], [found])
    unpack(found, table, [other])
    require_equal(back, other, "unpacked")


def addresses_read(rows: Rows, lanes: int, nbytes: int) -> list[int]:
    """Where the kernels read each word of some rows, in bytes from the base, by their int32 arithmetic."""
    found: list[int] = []
    for row in rows.rows:
        index = np.arange(row[layout.TOTAL], dtype=np.int32)
        words = index * row[layout.READ_JUMPS]
        for dim in range(1, rows.rank):
            magic, shift = (int(row[at + dim - 1]) & 0xFFFFFFFF for at in (layout.MAGICS, layout.SHIFTS))
            quotient = ((index.astype(np.uint64) * np.uint64(magic)) >> np.uint64(32)) >> np.uint64(shift)
            words = words + quotient.astype(np.int32) * row[layout.READ_JUMPS + dim]
        assert words.dtype == np.int32
        found += (
            int(row.view(np.int64)[layout.READ_PLACE]) + (words * np.int32(lanes)).astype(np.int64) * nbytes
        ).tolist()
    return sorted(found)


@pytest.mark.parametrize(
    ("source", "target", "lanes"),
    [("bfloat16", "float8_e4m3fn", 8), ("float8_e4m3fn", "float8_e5m2", 16), ("float32", "bfloat16", 4)],
)
def test_wide_casts_reach_no_further_than_int32_lanes(source: str, target: str, lanes: int) -> None:
    """Three rows of 64 elements, a stride of 2**31 + 64 elements apart: with 8 or 16 lanes a word, words that are far
    below the 2**29 of other rows overflow. Nothing of the tensor is touched, so it need not be there.
    """
    read, write = getattr(torch, source), getattr(torch, target)
    stride = 2**31 + 64
    tensor = torch.empty_strided((3, 64), (stride, 1), dtype=read, device="meta")
    boxes, _ = boxes_in_order([tensor], np.zeros(1, np.int64), np.zeros((1, 2), np.int64), np.array([[3, 64]]), write)
    (rows,) = Table(boxes, cast=(read, write)).rows(True, [0], [0])
    assert set(rows.rows[:, layout.WORD_LOG2].tolist()) == {lanes.bit_length() - 1}
    wanted = [(row * stride + word * lanes) * read.itemsize for row in range(3) for word in range(64 // lanes)]
    assert addresses_read(rows, lanes, read.itemsize) == wanted
