"""What ``bench.planner`` plans: pairs of layouts that grow with ranks, and the tensors of two models."""

from collections.abc import Iterator

import numpy as np

from tricomm import Mesh, Replicate, Shard, ShardingSpec, Topology

Pair = tuple[ShardingSpec, ShardingSpec]
Placement = Replicate | Shard
RANKS_OF_A_HOST = 8
WHOLE = Replicate()


def mesh(first: int, **axes: int) -> Mesh:
    """Ranks from ``first`` on, row-major on the named axes."""
    shape = tuple(axes.values())
    size = int(np.prod(shape))
    return Mesh(np.arange(first, first + size).reshape(shape).tolist(), tuple(axes))


def rails(ranks: int) -> Topology:
    """Hosts of eight ranks, each with a NIC of its own."""
    return Topology(tuple(f"host{rank // RANKS_OF_A_HOST}" for rank in range(ranks)), nics_per_host=RANKS_OF_A_HOST)


def rows_to_columns(ranks: int) -> Pair:
    """Every rank meets every other."""
    shape = (2 * ranks, 2 * ranks)
    source = ShardingSpec(mesh(0, x=ranks), (Shard(0),), shape, "float32")
    return source, ShardingSpec(mesh(ranks, x=ranks), (Shard(1),), shape, "float32")


def retiled(ranks: int) -> Pair:
    """(n / 8, 8) tiles to (8, n / 8) tiles: a rank meets n / 64 others, or one."""
    shape = (8 * ranks, 8 * ranks)
    source = ShardingSpec(mesh(0, dp=ranks // 8, tp=8), (Shard(0), Shard(1)), shape, "float32")
    return source, ShardingSpec(mesh(ranks, tp=8, dp=ranks // 8), (Shard(0), Shard(1)), shape, "float32")


def uneven(ranks: int) -> Pair:
    """Rows that no mesh divides, to three quarters of the ranks: a rank meets two or three others."""
    shape = (10 * ranks + 7, 64)
    source = ShardingSpec(mesh(0, x=ranks), (Shard(0),), shape, "float32")
    return source, ShardingSpec(mesh(ranks, x=3 * ranks // 4), (Shard(0),), shape, "float32")


def replicated(ranks: int) -> Pair:
    """Rows held twice to columns needed twice: senders are chosen among all tasks, and chains have two receivers."""
    shape = (2 * ranks, 64)
    source = ShardingSpec(mesh(0, dp=2, tp=ranks // 2), (WHOLE, Shard(0)), shape, "float32")
    return source, ShardingSpec(mesh(ranks, dp=2, tp=ranks // 2), (WHOLE, Shard(1)), shape, "float32")


VOCABULARY = (50257, 12288)
"""A tensor whose rows no power of two divides."""


def fsdp_to_tensor_parallel(ranks: int) -> Pair:
    """Rows held once to columns on replicas of eight ranks."""
    source = ShardingSpec(mesh(0, fsdp=ranks), (Shard(0),), VOCABULARY, "bfloat16")
    return source, ShardingSpec(mesh(ranks, dp=ranks // 8, tp=8), (WHOLE, Shard(1)))


def hsdp_to_tensor_parallel(ranks: int) -> Pair:
    """Rows held eight times to columns on replicas of eight ranks."""
    source = ShardingSpec(mesh(0, replica=8, fsdp=ranks // 8), (WHOLE, Shard(0)), VOCABULARY, "bfloat16")
    return source, ShardingSpec(mesh(ranks, dp=ranks // 8, tp=8), (WHOLE, Shard(1)))


def tensor_parallel_to_fsdp(ranks: int) -> Pair:
    """Columns on replicas of eight ranks to rows held once."""
    source = ShardingSpec(mesh(0, dp=ranks // 8, tp=8), (WHOLE, Shard(1)), VOCABULARY, "bfloat16")
    return source, ShardingSpec(mesh(ranks, fsdp=ranks), (Shard(0),))


def stages_to_experts(ranks: int) -> Pair:
    """Columns on replicas of eight ranks to tiles that every rank of ``dp`` needs."""
    source = ShardingSpec(mesh(0, pp=4, dp=ranks // 32, tp=8), (WHOLE, WHOLE, Shard(1)), VOCABULARY, "bfloat16")
    return source, ShardingSpec(mesh(ranks, dp=ranks // 32, ep=4, tp=8), (WHOLE, Shard(0), Shard(1)))


def one_to_all(ranks: int) -> Pair:
    """One host's rows to every rank, whole."""
    source = ShardingSpec(mesh(0, x=8), (Shard(0),), VOCABULARY, "bfloat16")
    return source, ShardingSpec(mesh(8, dp=ranks), (WHOLE,))


FLEETS = {
    "FSDP -> dp x tp 8": fsdp_to_tensor_parallel,
    "HSDP -> dp x tp 8": hsdp_to_tensor_parallel,
    "dp x tp 8 -> FSDP": tensor_parallel_to_fsdp,
    "pp.dp.tp -> dp.ep.tp": stages_to_experts,
    "one -> all": one_to_all,
}
"""Replicas on a side at least, at the size of a fleet; by formulas where more than 32 ranks take part."""


def distinct_tensors(count: int) -> Iterator[Pair]:
    """Tensors whose shapes all differ, 16 to 8 ranks."""
    source, destination = mesh(0, dp=2, tp=8), mesh(16, tp=8)
    for index in range(count):
        shape = (1024 + 8 * index, 1024)
        yield (
            ShardingSpec(source, (Shard(1), Shard(0)), shape, "float32"),
            ShardingSpec(destination, (Shard(0),), shape, "float32"),
        )


Table = list[tuple[tuple[int, ...], int | None, int]]
"""(shape, dim that tensor parallelism cuts, how many such tensors)."""


def llama_70b() -> Table:
    """The 723 tensors of Llama 3 70B."""
    layers, hidden, inner, vocabulary, keys = 80, 8192, 28672, 128256, 1024
    return [
        ((hidden, hidden), 0, layers),
        ((keys, hidden), 0, 2 * layers),
        ((hidden, hidden), 1, layers),
        ((inner, hidden), 0, 2 * layers),
        ((hidden, inner), 1, layers),
        ((hidden,), None, 2 * layers + 1),
        ((vocabulary, hidden), 0, 2),
    ]


def sharded_tensors(table: Table, source: Mesh, destination: Mesh) -> Iterator[Pair]:
    """FSDP and tensor parallelism on ``source``; on ``destination`` tensor parallelism alone, replicated beside it."""
    for shape, dim, count in table:
        cut: Placement = WHOLE if dim is None else Shard(dim)
        placements: tuple[Placement, ...] = (cut,) if destination.ndim == 1 else (WHOLE, cut)
        for _ in range(count):
            yield (
                ShardingSpec(source, (Shard(0), cut), shape, "bfloat16", ("tp", "fsdp")),
                ShardingSpec(destination, placements, shape, "bfloat16"),
            )


def llama(replicas: int) -> Iterator[Pair]:
    """Llama 70B from 64 ranks (FSDP 8, tensor parallel 8) to 32 (so many replicas)."""
    destination = mesh(64, tp=32) if replicas == 1 else mesh(64, replica=replicas, tp=32 // replicas)
    return sharded_tensors(llama_70b(), mesh(0, fsdp=8, tp=8), destination)


def llama_to_a_fleet() -> Iterator[Pair]:
    """Llama 70B from 512 ranks of FSDP to 64 replicas of tensor parallelism 8."""
    source, destination = mesh(0, fsdp=512), mesh(512, replica=64, tp=8)
    for shape, dim, count in llama_70b():
        before = ShardingSpec(source, (Shard(0),), shape, "bfloat16")
        after = ShardingSpec(destination, (WHOLE, WHOLE if dim is None else Shard(dim)), shape, "bfloat16")
        yield from [(before, after)] * count


def mixture_of_experts(sources: int = 256, destinations: int = 128) -> Iterator[Pair]:
    """A model of 45,395 tensors in the shape of DeepSeek-V3.

    Its experts lie on 64 groups of ranks and go to whole ranks, two or one to each; all others are cut by FSDP and
    tensor parallelism 8 and go to replicas of tensor parallelism 8.
    """
    layers, dense, experts, hidden, inner = 61, 3, 256, 7168, 2048
    sparse = layers - dense
    table: Table = [
        ((1536, hidden), None, layers),
        ((1536,), None, layers),
        ((24576, 1536), 0, layers),
        ((576, hidden), None, layers),
        ((512,), None, layers),
        ((32768, 512), 0, layers),
        ((hidden, 16384), 1, layers),
        ((hidden,), None, 2 * layers + 1),
        ((experts, hidden), None, sparse),
        ((experts,), None, sparse),
        ((inner, hidden), 0, 2 * sparse),
        ((hidden, inner), 1, sparse),
        ((18432, hidden), 0, 2 * dense),
        ((hidden, 18432), 1, dense),
        ((129280, hidden), 0, 2),
    ]
    there = mesh(sources, replica=destinations // 8, tp=8)
    yield from sharded_tensors(table, mesh(0, fsdp=sources // 8, tp=8), there)
    group = sources // 64
    for expert in range(experts):
        first = expert // 4 * group
        source = Mesh(range(first, first + group), ("fsdp",))
        destination = Mesh([sources + expert * destinations // experts], ("expert",))
        for shape, count in (((inner, hidden), 2 * sparse), ((hidden, inner), sparse)):
            for _ in range(count):
                yield (
                    ShardingSpec(source, (Shard(0),), shape, "bfloat16"),
                    ShardingSpec(destination, (WHOLE,), shape, "bfloat16"),
                )
