"""The definition that every test compares with: fill by global coordinate, move, compare exactly.

Nothing here uses the planner: a full tensor is built from its coordinates, and a shard is picked out of it by
the coordinates of the holding, one dim at a time.
"""

import math
import random
from collections.abc import Mapping
from typing import TypeVar

import torch

from tricomm import ShardingSpec

T = TypeVar("T")

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 97


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def coded(shape: tuple[int, ...], dtype: str, salt: int = 0) -> torch.Tensor:
    """Every element a different bit pattern (as far as its size allows), NaN payloads and all."""
    numel = math.prod(shape)
    target = torch_dtype(dtype)
    index = torch.arange(numel, dtype=torch.int64) + salt
    if dtype == "bool":
        return (index * 7 % 3 == 1).reshape(shape)
    if target.itemsize == 16:
        halves = torch.stack([index * 0x9E3779B97F4A7C1, ~index], dim=-1)
        return halves.view(torch.complex128).reshape(shape)
    bits = (index * 0x5BD1E995 + 12345).to(WORDS[target.itemsize])
    return bits.view(target).reshape(shape)


def valued(shape: tuple[int, ...], dtype: str, salt: int = 0) -> torch.Tensor:
    """Elements with values that a cast to any other dtype defines."""
    index = torch.arange(math.prod(shape), dtype=torch.int64) + salt
    target = torch_dtype(dtype)
    values = (index * 31 % SMALL).to(torch.float64)
    if target.is_floating_point:
        values = values + (index % 4) * 0.25
    if target.is_complex:
        return torch.complex(values, (index % 5).to(torch.float64)).to(target).reshape(shape)
    return values.to(target).reshape(shape)


def small_integers(shape: tuple[int, ...], dtype: str, salt: int) -> torch.Tensor:
    """Elements whose sums every dtype holds exactly."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    values = ((index * 5 + salt * 3) % (2 if dtype == "bool" else 4)).to(torch.float64)
    return values.to(torch_dtype(dtype)).reshape(shape)


def pick(full: torch.Tensor, spec: ShardingSpec, rank: int) -> torch.Tensor:
    """The shard of a rank, coordinate by coordinate."""
    shard = full
    for dim, intervals in enumerate(spec.holding(rank)):
        coordinates = [i for start, stop in intervals for i in range(start, stop)]
        index = torch.tensor(coordinates, dtype=torch.int64)
        shard = bits(shard).index_select(dim, index).view(full.dtype)
    return shard.clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its size, so that nothing but bits moves."""
    return tensor.view(WORDS.get(tensor.element_size(), tensor.dtype))


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise unless shape, dtype and every bit are equal."""
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    assert found.dtype == expected.dtype, f"{what}: dtype {found.dtype}, expected {expected.dtype}"
    if found.numel() == 0:
        return
    a = found.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    b = expected.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    if not torch.equal(a, b):
        first = int((a != b).nonzero()[0]) // found.element_size()
        raise AssertionError(
            f"{what}: element {first} is {found.reshape(-1)[first]}, expected {expected.reshape(-1)[first]}"
        )


def contribution_index(spec: ShardingSpec, rank: int) -> int:
    """Which of the contributions a rank holds: row-major over the Partial axes."""
    coordinate = spec.mesh.coordinate(rank)
    index = 0
    for axis in spec.partial_axes:
        index = index * spec.mesh.shape[axis] + coordinate[axis]
    return index


def contribution_count(spec: ShardingSpec) -> int:
    return math.prod(spec.mesh.shape[axis] for axis in spec.partial_axes)


def filled(source: ShardingSpec, destination: ShardingSpec) -> torch.Tensor:
    """The full source, of which each element tells where it is, as far as a cast leaves that."""
    shape, dtype = source.global_shape, source.element_type
    make = coded if destination.dtype in (None, dtype) else valued
    return make(shape, dtype)


def source_and_result(
    source: ShardingSpec, destination: ShardingSpec, only: int | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """({source rank: shard}, the full tensor in the destination's dtype) of a case, from the definition; ``only`` one
    rank's shard, if it has one.
    """
    ranks = [rank for rank in source.mesh.ranks if only in (None, rank)]
    shape, dtype = source.global_shape, source.element_type
    target = torch_dtype(destination.dtype or dtype)
    if not source.partial_axes:
        full = filled(source, destination)
        return {rank: pick(full, source, rank) for rank in ranks}, full.to(target)
    ops = [(source.placements[axis].op, source.mesh.shape[axis]) for axis in source.partial_axes]
    divisor = math.prod(extent for op, extent in ops if op == "avg")
    op = "avg" if divisor > 1 else ops[0][0]
    parts = [small_integers(shape, dtype, salt) for salt in range(contribution_count(source))]
    shards = {rank: pick(parts[contribution_index(source, rank)], source, rank) for rank in ranks}
    return shards, reduced(parts, op, divisor).to(target)


def reduced(parts: list[torch.Tensor], op: str, divisor: int | None = None) -> torch.Tensor:
    """The reduction of small integers, exactly, rounded to the dtype once."""
    dtype = parts[0].dtype
    exact = torch.stack([part.to(torch.complex128) for part in parts])
    if op in ("sum", "avg"):
        total = exact.sum(0)
        if op == "avg":
            wide = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
            wide = torch.complex64 if dtype == torch.complex32 else wide
            narrow = total.to(wide) if dtype.is_complex else total.real.to(wide)
            return narrow.div(len(parts) if divisor is None else divisor).to(dtype)
    else:
        real = exact.real
        total = (real.amax(0) if op == "max" else real.amin(0)).to(torch.complex128)
    return (total if dtype.is_complex else total.real).to(dtype)


def as_written_by(rank: int, mapping: Mapping[str, T]) -> dict[str, T]:
    """The same in another order on each rank, as ranks build mappings from what they hold, or from a set."""
    names = list(mapping)
    random.Random(rank).shuffle(names)
    return {name: mapping[name] for name in names}
