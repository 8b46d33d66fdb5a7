"""What sectors allow, of boxes that are counted by hand, and byte by byte."""

import numpy as np
import pytest
import torch

from bench.kernels.sectors import READ_NBYTES, WRITE_NBYTES, traffic
from tricomm.kernels.boxes import Boxes, boxes_in_order


def half_columns(nbytes: int, rows: int = 64) -> Boxes:
    """The second half of rows of twice as many bytes."""
    tensor = torch.empty((rows, 2 * nbytes), dtype=torch.uint8)
    return boxes_in_order([tensor], np.zeros(1, np.int64), np.array([[0, nbytes]]), np.array([[rows, nbytes]]))[0]


@pytest.mark.parametrize(
    ("nbytes", "pack", "unpack"), [(128, 1, 1), (64, 1, 1), (32, 2 / 3, 1), (16, 2 / 3, 2 / 5), (2, 2 / 3, 2 / 5)]
)
def test_runs_below_a_sector_are_read_and_written_with_what_is_beside_them(
    nbytes: int, pack: float, unpack: float
) -> None:
    boxes = half_columns(nbytes)
    assert traffic(boxes, True).share == pytest.approx(pack)
    assert traffic(boxes, False).share == pytest.approx(unpack)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("shape", "start", "box"),
    [
        ((7, 9, 57), (1, 1, 1), (5, 7, 55)),
        ((300,), (3,), (290,)),
        ((40, 3), (0, 1), (40, 1)),
        ((4, 50, 33), (0, 0, 0), (4, 50, 33)),
    ],
)
def test_sectors_are_those_that_hold_a_byte_of_the_box(
    shape: tuple[int, ...], start: tuple[int, ...], box: tuple[int, ...], packs: bool
) -> None:
    tensor = torch.zeros(shape, dtype=torch.int16)
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), np.array([start]), np.array([box]))
    tensor[tuple(slice(s, s + n) for s, n in zip(start, box, strict=True))] = -1
    packed = torch.zeros(nbytes, dtype=torch.uint8)
    packed[: 2 * int(np.prod(box))] = 255
    sides = [tensor.reshape(-1).view(torch.uint8).numpy(), packed.numpy()]
    read, write = sides if packs else sides[::-1]
    found = traffic(boxes, packs)
    assert found.read == of_granules(read, READ_NBYTES)[0]
    touched, part = of_granules(write, WRITE_NBYTES)
    assert (found.written, found.filled) == (touched, part)


def of_granules(memory: np.ndarray, nbytes: int) -> tuple[int, int]:
    """Bytes of those that hold a byte that is set, and of those of which not all are."""
    rows = np.pad(memory, (0, -len(memory) % nbytes)).reshape(-1, nbytes) != 0
    touched = int(rows.any(1).sum())
    return touched * nbytes, (touched - int(rows.all(1).sum())) * nbytes


def test_nothing_is_allowed_everything() -> None:
    assert traffic(half_columns(64, 0), True) == (0, 0, 0, 0)
    assert traffic(half_columns(64, 0), True).share == 1.0


def test_alike_boxes_are_counted_together_and_a_part_stands_for_many_runs() -> None:
    tensor = torch.empty((1 << 20, 64), dtype=torch.uint8, device="meta")
    whole, _ = boxes_in_order([tensor], np.zeros(1, np.int64), np.array([[0, 16]]), np.array([[1 << 20, 16]]))
    assert traffic(whole, False) == (1 << 24, 1 << 24, 1 << 25, 1 << 25)
    starts = np.stack([np.arange(0, 1 << 20, 1024), np.full(1024, 16)], axis=1)
    cut, _ = boxes_in_order([tensor], np.zeros(1024, np.int64), starts, np.array([[1024, 16]] * 1024))
    assert traffic(cut, False) == traffic(whole, False)
