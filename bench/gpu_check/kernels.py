"""The kernels on a GPU: bit for bit what the torch reference does there."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.gpu_check.parts import Outcome, Setting, guarded
from tricomm.kernels import layout, reference
from tricomm.kernels.boxes import Boxes, boxes_in_order
from tricomm.kernels.device import current_target
from tricomm.kernels.pack import Table, pack, runs_kernels, unpack
from tricomm.kernels.variants import Variant, compiled

RANDOM_SCENES = 400
REHEARSED_SCENES = 25
MAX_COMPILERS = 8
GUARD_NBYTES = 64
FLOAT32_PATTERNS = 1 << 26
REHEARSED_FLOAT32_PATTERNS = 1 << 12
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex128, torch.bool)


def boxes(setting: Setting) -> Iterator[Outcome]:
    """The part "boxes"."""
    device, scenes = torch.device(setting.device), setting.scaled(RANDOM_SCENES, REHEARSED_SCENES)
    yield guarded("random boxes", lambda: check_random_boxes(device, scenes))
    yield guarded("shifted runs", lambda: check_shifted_runs(device, scenes))


def casts(setting: Setting) -> Iterator[Outcome]:
    """The part "casts": each by itself, as each is compiled by itself."""
    device, count = torch.device(setting.device), setting.scaled(FLOAT32_PATTERNS, REHEARSED_FLOAT32_PATTERNS)
    for source in layout.FORMATS:
        for target in layout.FORMATS:
            if source != target:
                yield guarded(f"{source} to {target}", partial(check_cast, source, target, device, count))


def graphs(setting: Setting) -> Iterator[Outcome]:
    """The part "graphs"."""
    device = torch.device(setting.device)
    yield guarded("moved tensors", lambda: check_moved_tensors(device))
    if setting.is_rehearsal:
        yield Outcome("graphs", None, "there are no CUDA graphs on a CPU")
        return
    yield guarded("graphs", lambda: check_graph(device))


def random_tensor(dice: random.Random, device: torch.device) -> torch.Tensor:
    """Random bytes under a random dtype, order of dims, steps and offset."""
    dtype = dice.choice(DTYPES)
    shape = [dice.choice((1, 2, 3, 5, 8, 16, 33, 64)) for _ in range(dice.randint(0, 5))]
    while int(np.prod(shape)) > 1 << 20:
        shape.pop()
    steps = [dice.choice((1, 1, 2)) for _ in shape]
    offset = dice.choice((0, 0, 1, 2, 8))
    order = dice.sample(range(len(shape)), len(shape))
    numel = int(np.prod([n * step for n, step in zip(shape, steps, strict=True)])) + offset
    memory = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8, device=device)
    if dtype != torch.bool:
        memory.random_(0, 256)
    room = memory.view(dtype)[offset:].view([shape[dim] * steps[dim] for dim in order])
    stepped = room[tuple(slice(None, None, steps[dim]) for dim in order)]
    return stepped.permute([order.index(dim) for dim in range(len(shape))])


def random_boxes(dice: random.Random, tensors: list[torch.Tensor]) -> tuple[Boxes, int]:
    """One box inside of each tensor."""
    rank = max(tensor.ndim for tensor in tensors)
    starts, shapes = (np.full((len(tensors), rank), fill, np.int64) for fill in (0, 1))
    for index, tensor in enumerate(tensors):
        for dim, extent in enumerate(tensor.shape, rank - tensor.ndim):
            starts[index, dim] = dice.choice((0, 0, dice.randrange(extent)))
            shapes[index, dim] = extent - starts[index, dim]
    return boxes_in_order(tensors, np.arange(len(tensors)), starts, shapes)


def zeros_strided_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros with the strides of a tensor, and zeros between them."""
    found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(found.untyped_storage()).zero_()
    return found


def bytes_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether every byte is, also of those between elements."""
    return torch.equal(
        *(torch.tensor([], dtype=torch.uint8, device=t.device).set_(t.untyped_storage()) for t in (first, second))
    )


def random_scene(seed: int, device: torch.device) -> tuple[list[torch.Tensor], Table, int]:
    """Random boxes of random tensors, with and without a limit of multiprocessors, and the bytes that they fill."""
    dice = random.Random(seed)
    tensors = [random_tensor(dice, device) for _ in range(dice.randint(1, 4))]
    some, nbytes = random_boxes(dice, tensors)
    return tensors, Table(some, multiprocessors=dice.choice((None, None, 3))), nbytes


def compile_at_once(device: torch.device, scenes: int) -> None:
    """Compile what random scenes need into Triton's cache, by several processes: one would take longer than to move."""
    variants = set()
    for seed in range(scenes):
        tensors, table, _ = random_scene(seed, device)
        addresses = list(map(torch.Tensor.data_ptr, tensors))
        for packs in (True, False):
            every = table.rows(packs, addresses, [0] if packs else [0, 0])
            variants |= {table.variant(rows, packs) for rows in every}
    processes = max(min(os.cpu_count() or 1, MAX_COMPILERS), 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, variant, current_target()) for variant in variants]:
            done.result()


def compile_one(variant: Variant, target: Any) -> None:
    """In a process of its own, which cannot give back what it has compiled."""
    compiled(variant, target)


def check_random_boxes(device: torch.device, scenes: int = RANDOM_SCENES) -> str:
    """Pack and unpack random boxes, one and several buffers."""
    if runs_kernels(device):
        compile_at_once(device, scenes)
    for seed in range(scenes):
        tensors, table, nbytes = random_scene(seed, device)
        size = nbytes + 2 * GUARD_NBYTES
        found, wanted = (torch.full((size,), 0xA5, dtype=torch.uint8, device=device) for _ in range(2))
        inner = [memory[GUARD_NBYTES : GUARD_NBYTES + nbytes] for memory in (found, wanted)]
        pack(tensors, table, inner[0])
        reference.pack(tensors, table, inner[1:])
        if not torch.equal(found, wanted):
            raise ValueError(f"scene {seed}: packed bytes differ")
        backs = [[zeros_strided_like(tensor) for tensor in tensors] for _ in range(2)]
        # Buffers by pointer: the same memory as two of them, though only the first has boxes.
        unpack([inner[0], found], table, backs[0])
        reference.unpack(inner[1:], table, backs[1])
        if not all(bytes_equal(a, b) for a, b in zip(*backs, strict=True)):
            raise ValueError(f"scene {seed}: unpacked bytes differ")
    return f"{scenes} random scenes, both directions"


def check_shifted_runs(device: torch.device, scenes: int = RANDOM_SCENES) -> str:
    """Pack and unpack runs of any length, at any distance, in tensors that end where the last one does."""
    for seed in range(scenes):
        dice = random.Random(seed)
        dtype = dice.choice((torch.uint8, torch.bfloat16))
        rows, width = dice.randint(1, 40), dice.choice((96, 97, 127, dice.randint(60, 3000)))
        pitch, offset = width + dice.randint(0, 40), dice.randint(0, 33)
        numel = offset + (rows - 1) * pitch + width
        memories = [torch.empty(numel, dtype=dtype, device=device) for _ in range(3)]
        for memory in memories:
            memory.view(torch.uint8).random_(0, 256)
        memories[2].copy_(memories[1])
        tensors = [memory.as_strided((rows, width), (pitch, 1), offset) for memory in memories]
        some, nbytes = boxes_in_order(
            tensors[:1], np.zeros(1, np.int64), np.zeros((1, 2), np.int64), np.array([[rows, width]])
        )
        room = dice.randint(0, 33) * dtype.itemsize
        found, wanted = (torch.full((room + nbytes,), 0xA5, dtype=torch.uint8, device=device) for _ in range(2))
        table = Table(some, multiprocessors=dice.choice((None, None, 3)))
        pack(tensors[:1], table, found[room:])
        reference.pack(tensors[:1], table, [wanted[room:]])
        unpack(wanted[room:], table, tensors[1:2])
        reference.unpack([wanted[room:]], table, tensors[2:])
        if not torch.equal(found, wanted):
            raise ValueError(f"scene {seed}: packed bytes differ")
        if not bytes_equal(*memories[1:]):
            raise ValueError(f"scene {seed}: unpacked bytes differ")
    return f"{scenes} scenes, both directions"


def patterns(dtype: torch.dtype, device: torch.device, float32_count: int = FLOAT32_PATTERNS) -> torch.Tensor:
    """Every bit pattern of a type; of float32 a regular sample."""
    if dtype.itemsize == 4:
        step = (1 << 32) // float32_count
        return (torch.arange(-(1 << 31), 1 << 31, step, device=device) + step // 3).to(torch.int32).view(dtype)
    count = 1 << 8 * dtype.itemsize
    word = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return torch.arange(count, device=device).to(word).view(dtype)


def check_cast(source: str, target: str, device: torch.device, float32_count: int) -> str:
    """A cast of the kernels against torch's on the same device: all bits, but any NaN for a NaN (counted)."""
    read, write = getattr(torch, source), getattr(torch, target)
    values = patterns(read, device, float32_count)
    start, shape = np.zeros((1, 1), np.int64), np.array([[values.numel()]])
    one_box, _ = boxes_in_order([values], np.zeros(1, np.int64), start, shape, write)
    expected, found = values.to(write), torch.zeros_like(values, dtype=write)
    pack([values], Table(one_box, cast=(read, write)), found)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[write.itemsize]
    differs = found.view(word) != expected.view(word)
    both_nan = found.float().isnan() & expected.float().isnan()
    wrong = (differs & ~both_nan).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} of {values.numel()} values; {values[at]} became {found[at]}, torch says {expected[at]}"
        )
    return f"{values.numel()} values; {int((differs & both_nan).sum())} NaNs with another payload than torch's"


def _scene(device: torch.device) -> tuple[list[torch.Tensor], Table, torch.Tensor, torch.Tensor]:
    """Tensors, boxes of them, and two buffers."""
    tensors = [torch.randn(256, 512, device=device) for _ in range(3)]
    some, nbytes = random_boxes(random.Random(1), tensors)
    out, wanted = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return tensors, Table(some), out, wanted


def check_moved_tensors(device: torch.device) -> str:
    """A table follows tensors that move between calls."""
    tensors, table, out, wanted = _scene(device)
    pack(tensors, table, out)
    moved = [tensor.clone().add_(1) for tensor in tensors]
    pack(moved, table, out)
    reference.pack(moved, table, [wanted])
    if not torch.equal(out, wanted):
        raise ValueError("after tensors moved, the old ones were packed")
    return "the new ones are packed"


def check_graph(device: torch.device) -> str:
    """No synchronisation when warm, and capture in a graph."""
    tensors, table, out, wanted = _scene(device)
    pack(tensors, table, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack(tensors, table, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack(tensors, table, out)
    for tensor in tensors:
        tensor.normal_()
    out.zero_()
    graph.replay()
    reference.pack(tensors, table, [wanted])
    if not torch.equal(out, wanted):
        raise ValueError("a replayed graph packs something else")
    return "no synchronisation when warm, and a replayed graph packs what is there then"
