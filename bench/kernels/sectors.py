"""What share of a plain copy's speed a geometry can have, as memory reads and writes no less than a sector at once.

Bytes are found from the places of runs; what follows from them was measured on an H100 and an H200: a run of 32 bytes
in every 64 takes as long to read as all 64, and 16 bytes written in every 32 take as long as to read these 32 and write
them. Boxes that are small beside the L2 cache may be faster, as what is written stays there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tricomm.kernels.boxes import Boxes, Columns

READ_NBYTES = 64
"""What memory reads at least: two sectors of the L2 cache. (Where a process asks the driver to fetch 32, by
cudaLimitMaxL2FetchGranularity, these runs of 32 bytes went from 67 to 85 % of the copy on an H200.)
"""
WRITE_NBYTES = 32
"""A sector. One that is written in part is read, and written whole."""
MAX_RUNS = 1 << 18
"""Of one box that are looked at; of a box of more, its first ones stand for all."""


class Traffic(NamedTuple):
    """Bytes through memory of one direction."""

    payload: int
    read: float
    written: float
    filled: float

    @property
    def share(self) -> float:
        """The most of a plain copy's speed that is possible."""
        moved = self.read + self.written + self.filled
        return 2 * self.payload / moved if moved else 1.0


def traffic(boxes: Boxes, packs: bool) -> Traffic:
    """Of a pack or an unpack of some boxes, each of which begins at a multiple of a sector if its place does."""
    tensor = (boxes.tensor_place, boxes.tensor_strides, boxes.tensor_itemsize)
    packed = (boxes.packed_place, boxes.packed_strides, boxes.packed_itemsize)
    source, target = (tensor, packed) if packs else (packed, tensor)
    volume = boxes.shape.prod(1)
    payload = int((volume * (boxes.tensor_itemsize + boxes.packed_itemsize)).sum()) // 2
    read = written = filled = 0.0
    for where, is_read in ((source, True), (target, False)):
        for kind, count in _kinds(boxes.shape, *where):
            whole, part = _touched(*kind, READ_NBYTES if is_read else WRITE_NBYTES)
            if is_read:
                read += count * (whole + part)
            else:
                written += count * (whole + part)
                filled += count * part
    return Traffic(payload, read, written, filled)


Kind = tuple[Sequence[int], int, Sequence[int], int]


def _kinds(shape: Columns, place: Columns, strides: Columns, itemsize: Columns) -> list[tuple[Kind, int]]:
    """Boxes that lie alike, and how many there are."""
    rank, some = shape.shape[1], (shape > 0).all(1)
    shape, place, strides, itemsize = shape[some], place[some], strides[some], itemsize[some]
    columns = np.concatenate([shape, strides, (place % READ_NBYTES)[:, None], itemsize[:, None]], axis=1)
    rows, counts = np.unique(columns, axis=0, return_counts=True)
    return [
        ((row[:rank], row[-2], row[rank : 2 * rank], row[-1]), count)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    ]


def _touched(
    shape: Sequence[int], place: int, strides: Sequence[int], itemsize: int, granule: int
) -> tuple[float, float]:
    """(bytes of the granules of which a box has all bytes, and of those of which it has some)."""
    run, starts, factor = itemsize, np.array([place]), 1.0
    for stride, extent in sorted((stride, extent) for stride, extent in zip(strides, shape, strict=True) if extent > 1):
        if len(starts) == 1 and stride == run:
            run *= extent
            continue
        taken = max(min(extent, MAX_RUNS // len(starts)), 1)
        factor *= extent / taken
        starts = (np.arange(taken)[:, None] * stride + starts).reshape(-1)
    ends = starts + run
    # Runs that touch the same granule, the last of one and the first of the next, share it.
    touched = (ends - 1) // granule - starts // granule + 1
    shared = starts[1:] // granule == (ends[:-1] - 1) // granule
    nbytes = np.zeros(int(touched.sum()) - int(shared.sum()), np.int64)
    first = np.cumsum(touched) - touched - np.concatenate([[0], np.cumsum(shared)])
    np.add.at(nbytes, first, np.minimum(ends, (starts // granule + 1) * granule) - starts)
    several = touched > 1
    np.add.at(nbytes, (first + touched - 1)[several], (ends - (ends - 1) // granule * granule)[several])
    inner = int((touched - 2).clip(0).sum())
    filled = int((nbytes >= granule).sum())
    return (inner + filled) * granule * factor, (len(nbytes) - inner - filled) * granule * factor
