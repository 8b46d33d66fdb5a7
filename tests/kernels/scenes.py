"""What Hypothesis draws for pack and unpack, and their definition: byte by byte, by address."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.cases import MOVED_DTYPES
from tests.oracle import WORDS
from tricomm.kernels.boxes import Boxes, boxes_in_order

GUARD_NBYTES = 48
deterministic = settings(
    deadline=None,
    database=None,
    derandomize=True,
    print_blob=True,
    phases=[Phase.generate],  # the interpreter is too slow to shrink in
    suppress_health_check=list(HealthCheck),
)


class Scene(NamedTuple):
    """Tensors in guarded memory, boxes of them, and guarded buffers for these."""

    memories: list[torch.Tensor]
    tensors: list[torch.Tensor]
    boxes: Boxes
    buffer_memories: list[torch.Tensor]
    buffers: list[torch.Tensor]
    words_per_tile: int
    multiprocessors: int | None


def noise(nbytes: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8))


@st.composite
def strided(draw: Any, may_expand: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory, a tensor in it): any rank, order of dims, steps and offset, with guard bytes on both sides."""
    dtype = getattr(torch, draw(st.sampled_from(MOVED_DTYPES)))
    if draw(st.integers(0, 5)) == 0:
        shape = [draw(st.integers(16, 40)), draw(st.integers(16, 40)), draw(st.integers(1, 2))]
    else:
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]), max_size=5))
        while math.prod(shape) > 600:
            shape[shape.index(max(shape))] = 2
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in order:
        step *= draw(st.sampled_from([1, 1, 1, 2]))
        strides[dim] = step
        step *= shape[dim]
        step += draw(st.sampled_from([0, 0, 0, 1, 8]))
    if may_expand and shape and draw(st.integers(0, 5)) == 0:
        strides[draw(st.integers(0, len(shape) - 1))] = 0
    offset = draw(st.sampled_from([0, 0, 1, 2, 3, 8]))
    item = dtype.itemsize
    nbytes = (offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) * item
    memory = noise(nbytes + 2 * GUARD_NBYTES, draw(st.integers(0, 99)))
    inner = memory[GUARD_NBYTES : GUARD_NBYTES + nbytes].view(WORDS.get(item, torch.complex128))
    return memory, inner.as_strided(shape, strides, inner.storage_offset() + offset).view(dtype) if item in WORDS else (
        inner.as_strided(shape, strides, inner.storage_offset() + offset)
    )


@st.composite
def scenes(draw: Any, may_expand: bool) -> Scene:
    """Up to three tensors, up to three boxes of each that do not overlap, and one or two buffers."""
    memories, tensors = zip(*(draw(strided(may_expand)) for _ in range(draw(st.integers(1, 3)))), strict=True)
    rank = max(tensor.ndim for tensor in tensors)
    which, starts, shapes = [], [], []
    for index, tensor in enumerate(tensors):
        lead = rank - tensor.ndim
        dim = draw(st.integers(0, tensor.ndim - 1)) if tensor.ndim else -1
        edges = [0, 0] if dim < 0 else [0, *sorted(draw(st.lists(st.integers(0, tensor.shape[dim]), max_size=2)))]
        edges = edges if dim < 0 else [*edges, tensor.shape[dim]]
        for low, high in pairwise(edges):
            start, shape = [0] * rank, [1] * rank
            for other, extent in enumerate(tensor.shape):
                first, last = (low, high) if other == dim else (0, extent)
                cut = draw(st.integers(0, 2)) if last - first > 2 else 0
                start[lead + other], shape[lead + other] = first + cut // 2, last - first - cut
            which.append(index)
            starts.append(start)
            shapes.append(shape)
    columns = (np.array(column, np.int64).reshape(len(which), rank) for column in (starts, shapes))
    boxes, nbytes = boxes_in_order(tensors, np.array(which, np.int64), *columns)
    boxes = draw(rearranged(boxes))
    count = draw(st.integers(1, 2))
    if count == 2:
        boxes = replaced(boxes, buffer=np.arange(len(boxes), dtype=np.int64) % 2)
    shift = draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8]))
    room = GUARD_NBYTES + shift
    held = [noise(nbytes + room + GUARD_NBYTES, 7 + index) for index in range(count)]
    buffers = [memory[room : room + nbytes] for memory in held]
    return Scene(
        list(memories),
        list(tensors),
        boxes,
        held,
        buffers,
        draw(st.sampled_from([128, 1024])),
        draw(st.sampled_from([None, None, None, 2])),
    )


def replaced(boxes: Boxes, **columns: np.ndarray) -> Boxes:
    return Boxes(*(columns.get(name, getattr(boxes, name)) for name in Boxes.__slots__))


@st.composite
def rearranged(draw: Any, boxes: Boxes) -> Boxes:
    """The packed side column-major instead, or as it is."""
    if draw(st.integers(0, 3)):
        return boxes
    strides = np.empty_like(boxes.packed_strides)
    step = boxes.packed_itemsize.copy()
    for dim in range(strides.shape[1]):
        strides[:, dim] = step
        step = step * boxes.shape[:, dim]
    return replaced(boxes, packed_strides=strides)


def byte_places(place: int, shape: list[int], strides: list[int], itemsize: int) -> np.ndarray:
    """The places of all bytes of a box, in the order of its elements."""
    found = np.array([place])
    for extent, stride in zip(shape, strides, strict=True):
        found = (found[:, None] + np.arange(extent) * stride).reshape(-1)
    return (found[:, None] + np.arange(itemsize)).reshape(-1)


def moved(scene: Scene, packs: bool) -> list[torch.Tensor]:
    """THE DEFINITION: what the memories of the written side hold afterwards, guards and all."""
    boxes = scene.boxes
    results = [memory.clone() for memory in (scene.buffer_memories if packs else scene.memories)]
    for index in range(len(boxes)):
        tensor, buffer = int(boxes.tensor[index]), int(boxes.buffer[index])
        of_tensor = scene.tensors[tensor].data_ptr() - scene.memories[tensor].data_ptr()
        of_buffer = scene.buffers[buffer].data_ptr() - scene.buffer_memories[buffer].data_ptr()
        shape, item = boxes.shape[index].tolist(), int(boxes.tensor_itemsize[index])
        at = byte_places(of_tensor + int(boxes.tensor_place[index]), shape, boxes.tensor_strides[index].tolist(), item)
        to = byte_places(of_buffer + int(boxes.packed_place[index]), shape, boxes.packed_strides[index].tolist(), item)
        if packs:
            results[buffer][to] = scene.memories[tensor][at]
        else:
            results[tensor][at] = scene.buffer_memories[buffer][to]
    return results
