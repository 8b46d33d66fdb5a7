"""The kernels on a GPU: bit for bit what the torch reference does there, then the throughput table. For gpu_check."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.kernels.cases import CASES
from bench.kernels.run import as_json, format_rows, measure
from bench.parts import Outcome
from tricomm.kernels import layout, reference
from tricomm.kernels.boxes import Boxes, boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack

RANDOM_SCENES = 400
GUARD_NBYTES = 64
FLOAT32_PATTERNS = 1 << 26
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex128, torch.bool)


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


def check_random_boxes(device: torch.device, scenes: int = RANDOM_SCENES) -> str:
    """Pack and unpack random boxes, one and several buffers, with and without a limit of multiprocessors."""
    for seed in range(scenes):
        dice = random.Random(seed)
        tensors = [random_tensor(dice, device) for _ in range(dice.randint(1, 4))]
        boxes, nbytes = random_boxes(dice, tensors)
        table = Table(boxes, multiprocessors=dice.choice((None, None, 3)))
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


def patterns(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every bit pattern of a type; of float32 a regular sample."""
    if dtype.itemsize == 4:
        step = (1 << 32) // FLOAT32_PATTERNS
        return (torch.arange(-(1 << 31), 1 << 31, step, device=device) + step // 3).to(torch.int32).view(dtype)
    count = 1 << 8 * dtype.itemsize
    word = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return torch.arange(count, device=device).to(word).view(dtype)


def check_casts(device: torch.device) -> str:
    """Every cast of the kernels against torch's on the same GPU: all bits, but any NaN for a NaN (counted)."""
    payloads = 0
    for source, target in ((a, b) for a in layout.FORMATS for b in layout.FORMATS if a != b):
        read, write = getattr(torch, source), getattr(torch, target)
        values = patterns(read, device)
        start, shape = np.zeros((1, 1), np.int64), np.array([[values.numel()]])
        boxes, _ = boxes_in_order([values], np.zeros(1, np.int64), start, shape, write)
        expected, found = values.to(write), torch.zeros_like(values, dtype=write)
        pack([values], Table(boxes, cast=(read, write)), found)
        word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[write.itemsize]
        differs = found.view(word) != expected.view(word)
        both_nan = found.float().isnan() & expected.float().isnan()
        if bool((differs & ~both_nan).any()):
            at = int((differs & ~both_nan).nonzero()[0])
            raise ValueError(f"{source} to {target}: {values[at]} became {found[at]}, torch says {expected[at]}")
        payloads += int((differs & both_nan).sum())
    return f"20 casts; {payloads} NaNs with another payload than torch's"


def check_graph_and_moves(device: torch.device) -> str:
    """No synchronisation when warm, capture in a graph, and tensors that move between calls."""
    tensors = [torch.randn(256, 512, device=device) for _ in range(3)]
    boxes, nbytes = random_boxes(random.Random(1), tensors)
    table = Table(boxes)
    out, wanted = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
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
    moved = [tensor.clone().add_(1) for tensor in tensors]
    pack(moved, table, out)
    reference.pack(moved, table, [wanted])
    if not torch.equal(out, wanted):
        raise ValueError("after tensors moved, the old ones were packed")
    return "no synchronisation, graph replay, moved tensors"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "random boxes": check_random_boxes,
    "casts": check_casts,
    "graphs and moves": check_graph_and_moves,
}


def kernels_part(device: torch.device) -> Iterator[Outcome]:
    """The kernels' part of gpu_check."""
    for name, check in CHECKS.items():
        try:
            yield Outcome(f"kernels: {name}", True, check(device))
        except (ValueError, RuntimeError) as error:
            yield Outcome(f"kernels: {name}", False, str(error))
    rows = [measure(case, device, 1, 10) for case in CASES]
    print(format_rows(rows), flush=True)
    worst = min(rows, key=lambda row: row.share("pack"))
    text = f"{len(rows)} geometries; slowest pack is {worst.share('pack'):.0%} of the copy ({worst.name})"
    yield Outcome("kernels: throughput", True, text, as_json(rows, device))
