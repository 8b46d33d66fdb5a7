"""How much of a move stays visible beside compute on one GPU.

Two processes take turns on a GPU, so a receiver that spins slows the sender's products whatever the transport does.
Two measurements know that. In one process: packing, a stand-in for the wire on the copy engine and unpacking, on a side
stream as the transport has it. Between two ranks: the products beside a receiver that spins are the base, and
what they take longer when their rank also sends is the move's.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.transport import ranks_of
from tricomm import Mesh, Replicate, Resharder, ShardingSpec
from tricomm.kernels.boxes import boxes_in_order
from tricomm.kernels.pack import Table, pack, unpack
from tricomm.launch import Ranks
from tricomm.transport.accelerator import accelerator_of
from tricomm.transport.streams import stream_context_of

REPEATS = 5
ROUNDS = 4


def visible(setting: Setting) -> Iterator[Outcome]:
    """The part "overlap"."""
    yield guarded("one process", partial(in_one_process, setting))
    with ranks_of(setting, 2) as ranks:
        yield guarded("two ranks", partial(between_two, ranks, setting))


class Products:
    """Matrix products of random numbers (of zeros they are faster)."""

    def __init__(self, setting: Setting) -> None:
        side = setting.scaled(4096, 64)
        dtype = torch.float32 if setting.is_rehearsal else torch.bfloat16
        self.left, self.right, self.out = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(3))

    def run(self, count: int) -> None:
        """Queue so many."""
        for _ in range(count):
            torch.mm(self.left, self.right, out=self.out)


def finish(setting: Setting) -> None:
    """Wait for the device."""
    if not setting.is_rehearsal:
        torch.cuda.synchronize(setting.device)


def median_seconds(setting: Setting, work: Callable[[], object]) -> float:
    """Of some runs, after one that is not counted, each to its end."""
    samples = []
    for _ in range(1 + REPEATS):
        finish(setting)
        begin = time.perf_counter()
        work()
        finish(setting)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[1:])


def in_one_process(setting: Setting) -> tuple[str, dict[str, Any]]:
    """Pack, copy to the host and back, unpack, in rounds on a side stream, beside products twice as long."""
    device = torch.device(setting.device)
    rows = setting.scaled(1 << 14, 1 << 6)
    tensor = torch.randn(rows, 2048, device=device)
    starts, shapes = np.array([[0, 0]]), np.array([[rows, 1024]])
    boxes, nbytes = boxes_in_order([tensor], np.zeros(1, np.int64), starts, shapes)
    table = Table(boxes)
    staging = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    wire = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=not setting.is_rehearsal)
    context, products = stream_context_of(accelerator_of(device), device), Products(setting)

    def move() -> Any:
        with context.after([context.record_event()], tensor):
            for _ in range(ROUNDS):
                pack([tensor], table, staging)
                wire.copy_(staging, non_blocking=True)
                staging.copy_(wire, non_blocking=True)
                unpack(staging, table, [tensor])
            return context.record_end()

    def both(count: int) -> None:
        event = move()
        products.run(count)
        context.wait_event(event)

    moving = median_seconds(setting, move)
    one = median_seconds(setting, lambda: products.run(1))
    count = max(1, round(2 * moving / one))
    computing = median_seconds(setting, lambda: products.run(count))
    return told(moving, computing, median_seconds(setting, lambda: both(count)), "beside products")


def told(moving: float, computing: float, together: float, beside: str) -> tuple[str, dict[str, Any]]:
    """In words, and as figures."""
    text = (
        f"{max(0.0, together - computing) / moving:.0%} of a move of {moving * 1e3:.1f} ms is visible {beside} of "
        f"{computing * 1e3:.1f} ms"
    )
    return text, {"moving_seconds": moving, "computing_seconds": computing, "together_seconds": together}


def between_two(ranks: Ranks, setting: Setting) -> tuple[str, dict[str, Any]]:
    """As rank 0 saw it."""
    moving, alone, spinning, together = ranks.run(seconds_of, setting)[0]
    text, figures = told(moving, spinning, together, "beside products, slowed down by a receiver that spins,")
    return f"{text}; alone they take {alone * 1e3:.1f} ms", figures | {"alone_seconds": alone}


def seconds_of(rank: int, setting: Setting) -> tuple[float, float, float, float]:
    """Seconds of (a move, products alone, products beside a posted receive, products beside the move), on rank 0.

    Rank 0 sends and computes, rank 1 receives; runs on both.
    """
    shape = (setting.scaled(1 << 14, 1 << 6), 1024)
    source, destination = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), shape, "float32") for one in range(2))
    mover = Resharder(source, destination, device=setting.device, timeout_seconds=0.5 * setting.seconds)
    tensor, out = (torch.randn(shape, device=setting.device) if rank == one else None for one in range(2))
    products = Products(setting)

    def move() -> None:
        mover.start(tensor, out=out).wait()

    moving = median_seconds(setting, move)
    count, alone = 0, 0.0
    if rank == 0:
        count = max(1, round(2 * moving / median_seconds(setting, lambda: products.run(1))))
        alone = median_seconds(setting, lambda: products.run(count))
    samples: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        spinning = _beside_a_receive(rank, setting, mover, tensor, out, lambda: products.run(count))
        dist.barrier()
        finish(setting)
        begin = time.perf_counter()
        handle = mover.start(tensor, out=out)
        if rank == 0:
            products.run(count)
        handle.wait()
        finish(setting)
        samples.append((spinning, time.perf_counter() - begin))
    first, second = (statistics.median(column) for column in zip(*samples, strict=True))
    return moving, alone, first, second


def _beside_a_receive(
    rank: int,
    setting: Setting,
    mover: Resharder,
    tensor: torch.Tensor | None,
    out: torch.Tensor | None,
    compute: Callable[[], None],
) -> float:
    """Rank 1 posts a receive; then rank 0 computes, to the end, and only then sends. Seconds of the computation."""
    dist.barrier()
    finish(setting)
    handle = mover.start(tensor, out=out) if rank == 1 else None
    while handle is not None and not setting.is_rehearsal and not handle.done():
        time.sleep(1e-4)  # until it is queued
    dist.barrier()
    begin = time.perf_counter()
    if rank == 0:
        compute()
        finish(setting)
    seconds = time.perf_counter() - begin
    (handle or mover.start(tensor, out=out)).wait()
    finish(setting)
    return seconds
