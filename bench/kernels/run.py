"""Pack and unpack against what torch has: ``python -m bench.kernels [--json PATH] [--scale N]``.

On a CUDA device: GPU seconds (events around one call, after the L2 cache was flushed) and host seconds (until the
call returns), the first call and warm ones, as a share of a plain device copy of the same bytes measured beside them.
Without one only the torch reference is run, on small tensors, against the same baselines. No time is asserted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kernels.cases import CASES, Case
from bench.kernels.sectors import traffic
from bench.overhead import describe_hardware
from tricomm.kernels.boxes import Boxes
from tricomm.kernels.pack import Table, pack, unpack

FLUSH_NBYTES = 256 << 20
HOST_SCALE = 64
ALIGNMENT_NBYTES = 512
BUSY_CYCLES = 500_000
"""A quarter of a millisecond: a call for 160 tensors takes the host 80 us."""
OURS = ("pack", "unpack", "copy")
"""What must work; torch may not have its ways for every type."""
MAX_TORCH_BOXES = 1000
"""With more, torch's ways are not measured: they take a call, and a view made in Python, for each."""


@dataclass(frozen=True)
class Timing:
    """Medians. On a machine without a GPU both are of the host."""

    device_seconds: float
    host_seconds: float


@dataclass(frozen=True)
class Row:
    """One geometry: its payload in bytes read and written, the timings by method, which of torch's raised what, and
    what share of a plain copy's speed its sectors allow to pack and to unpack.
    """

    name: str
    boxes: int
    moved_nbytes: int
    build_seconds: float
    first_seconds: float
    timings: dict[str, Timing]
    refused: dict[str, str]
    allowed: dict[str, float]

    def share(self, method: str) -> float:
        """Of the speed of the plain copy."""
        return self.timings["copy"].device_seconds / self.timings[method].device_seconds

    def share_of_allowed(self, method: str) -> float:
        """Of what its sectors allow."""
        return self.share(method) / self.allowed[method]


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """The median of some calls after one that is not counted, each with a cold L2 cache."""
    call()
    seconds, host = [], []
    flush = torch.empty(FLUSH_NBYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(repeats):
        if device.type != "cuda":
            begin = time.perf_counter()
            call()
            seconds.append(max(time.perf_counter() - begin, 1e-9))  # the clock may not have moved
            continue
        flush.zero_()
        torch.cuda.synchronize()
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The device is kept busy while the host begins to issue launches, so that gaps between them count only where
        # the host does not keep up.
        torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
        begin_event.record()
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)
        end_event.record()
        torch.cuda.synchronize()
        seconds.append(begin_event.elapsed_time(end_event) / 1e3)
    return Timing(statistics.median(seconds), statistics.median(host or seconds))


def views(tensors: Sequence[torch.Tensor], boxes: Boxes) -> list[torch.Tensor]:
    """The boxes as views."""
    found = []
    for index in range(len(boxes)):
        tensor, item = tensors[int(boxes.tensor[index])], int(boxes.tensor_itemsize[index])
        strides = (boxes.tensor_strides[index] // item).tolist()
        offset = tensor.storage_offset() + int(boxes.tensor_place[index]) // item
        found.append(tensor.as_strided(boxes.shape[index].tolist(), strides, offset))
    return found


def methods(
    case: Case, tensors: list[torch.Tensor], boxes: Boxes, buffer: torch.Tensor, multiprocessors: int | None
) -> tuple[dict[str, Callable[[], object]], Table]:
    """What to time, by name."""
    cast = None if case.packed is None else (tensors[0].dtype, case.packed)
    table = Table(boxes, cast=cast, multiprocessors=multiprocessors)
    # Random bytes too, as a copy of zeros may be faster, and both at multiples of a line, as else it is slower.
    half = -(-moved_nbytes(boxes) // 2 // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
    plain = torch.empty(2, half, dtype=torch.uint8, device=buffer.device).random_(0, 64)
    found: dict[str, Callable[[], object]] = {
        "pack": lambda: pack(tensors, table, buffer),
        "unpack": lambda: unpack(buffer, table, tensors),
        "copy": lambda: plain[0].copy_(plain[1]),
    }
    if len(boxes) <= MAX_TORCH_BOXES:
        found |= torch_methods(case, tensors, boxes, buffer)
    return found, table


def torch_methods(
    case: Case, tensors: list[torch.Tensor], boxes: Boxes, buffer: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """The ways that torch has to pack, by name."""
    dtype = case.packed or tensors[0].dtype
    sources = views(tensors, boxes)
    flat = buffer.view(dtype)
    places = (boxes.packed_place // dtype.itemsize).tolist()
    targets = [
        flat[place : place + source.numel()].view(source.shape) for place, source in zip(places, sources, strict=True)
    ]

    def copies() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    found: dict[str, Callable[[], object]] = {
        "copy_": copies,
        "foreach": lambda: torch._foreach_copy_(targets, sources),
        "cat": lambda: torch.cat([source.reshape(-1) for source in sources]),
    }
    if len(tensors) == 1 and case.packed is None and is_split(boxes, tensors[0]):
        sizes = [int(n) for n in boxes.shape[:, -1]]
        outs = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources]
        found["split"] = lambda: torch.split_with_sizes_copy(tensors[0], sizes, dim=tensors[0].ndim - 1, out=outs)
    return found


def moved_nbytes(boxes: Boxes) -> int:
    """Bytes that a pack reads and writes."""
    return int((boxes.shape.prod(1) * (boxes.tensor_itemsize + boxes.packed_itemsize)).sum())


def is_split(boxes: Boxes, tensor: torch.Tensor) -> bool:
    """Whether the boxes are a split of the tensor's last dim."""
    return int(boxes.shape[:, -1].sum()) == tensor.shape[-1] and bool(
        (boxes.shape[:, :-1] == list(tensor.shape[:-1])).all()
    )


def measure(case: Case, device: torch.device, scale: int, repeats: int, multiprocessors: int | None = None) -> Row:
    """Time one geometry."""
    tensors = case.tensors(device, scale)
    begin = time.perf_counter()
    boxes, nbytes = case.boxes(tensors)
    build_seconds = time.perf_counter() - begin
    buffer = torch.zeros(max(nbytes, 16), dtype=torch.uint8, device=device)
    calls, _ = methods(case, tensors, boxes, buffer, multiprocessors)
    begin = time.perf_counter()
    calls["pack"]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_seconds = time.perf_counter() - begin
    timings: dict[str, Timing] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            timings[name] = timed(call, device, repeats)
        except RuntimeError as error:  # of which NotImplementedError is one: not every way has every dtype
            if name in OURS:
                raise
            refused[name] = str(error)
    allowed = {name: traffic(boxes, packs).share for name, packs in (("pack", True), ("unpack", False))}
    return Row(case.name, len(boxes), moved_nbytes(boxes), build_seconds, first_seconds, timings, refused, allowed)


def format_rows(rows: Sequence[Row]) -> str:
    """The table: per cent of the plain copy's speed, those of pack and unpack also of what their sectors allow; then
    host times of a warm and of the first pack.
    """
    columns = ("pack", "unpack", "copy_", "foreach", "cat", "split")
    lines = [
        f"{'':<38}{'boxes':>7}{'MB':>8}"
        + "".join(f"{name + ' %':>10}" for name in columns)
        + f"{'of allowed %':>14}{'host us':>9}{'first ms':>10}"
    ]
    for row in rows:
        shares = "".join(f"{row.share(n) * 100:>10.1f}" if n in row.timings else f"{'':>10}" for n in columns)
        lines.append(
            f"{row.name:<38}{row.boxes:>7}{row.moved_nbytes / 2e6:>8.1f}{shares}"
            f"{row.share_of_allowed('pack') * 100:>8.0f}{row.share_of_allowed('unpack') * 100:>6.0f}"
            f"{row.timings['pack'].host_seconds * 1e6:>9.1f}{row.first_seconds * 1e3:>10.2f}"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    hardware = describe_hardware()
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {"hardware": hardware, "device": device.type, "rows": [asdict(row) for row in rows]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every geometry, print the table, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Pack and unpack against torch.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every figure to this file")
    parser.add_argument("--repeats", type=int, default=None, help="calls of each method (20 on a GPU, 3 without)")
    parser.add_argument("--scale", type=int, default=None, help="divide the first dim of tensors by this")
    parser.add_argument("--multiprocessors", type=int, default=None, help="limit the kernels to so many")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = options.scale or (1 if device.type == "cuda" else HOST_SCALE)
    repeats = options.repeats or (20 if device.type == "cuda" else 3)
    if device.type == "cpu":
        print(
            f"no CUDA device: the torch reference on host memory, tensors 1/{scale} of their size; no kernel is timed"
        )
    rows = []
    for case in CASES:
        rows.append(measure(case, device, scale, repeats, options.multiprocessors))
    print(format_rows(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(rows, device), indent=2) + "\n")
