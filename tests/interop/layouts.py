"""Random layouts in torch's words, and shards of them as torch itself cuts them."""

import math
import random
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tricomm import Mesh

EXTENTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13)


def random_mesh(choose: random.Random, most: int) -> Mesh:
    """1 to 3 axes over some ranks in any order."""
    shape: list[int] = []
    for _ in range(choose.randint(1, 3)):
        shape.append(choose.randint(1, max(1, most // math.prod(shape))))
    ranks = choose.sample(range(most), math.prod(shape))
    nested = torch.tensor(ranks).reshape(shape).tolist()
    return Mesh(nested, tuple("abc"[: len(shape)]))


def random_placements(choose: random.Random, ndim: int, dims: int) -> tuple[Placement, ...]:
    """One per mesh axis, strided ones among them, which may describe an order of cuts or not."""
    found: list[Placement] = []
    for _ in range(ndim):
        kind = choose.choice(("shard", "shard", "strided", "replicate"))
        dim = choose.randrange(dims)
        if kind == "shard":
            found.append(Shard(dim))
        elif kind == "strided":
            found.append(_StridedShard(dim, split_factor=choose.choice((2, 2, 3, 4))))
        else:
            found.append(Replicate())
    return tuple(found)


def cut_word_by_word(full: torch.Tensor, mesh: Mesh, placements: Any, rank: int) -> torch.Tensor:
    """THE DEFINITION, by torch's own splitting: each placement cuts what those before it left."""
    shard = full
    for axis, index in enumerate(mesh.coordinate(rank)):
        placement = placements[axis]
        if isinstance(placement, Shard | _StridedShard):
            parts, _ = placement._split_tensor(shard, mesh.shape[axis], with_padding=False)
            shard = parts[index]
    return shard


def cut_in_order(full: torch.Tensor, mesh: Mesh, order: Any, rank: int) -> torch.Tensor:
    """THE DEFINITION of torch's shard order: per tensor dim, ordinary cuts by mesh axes, one after the other."""
    shard = full
    coordinate = mesh.coordinate(rank)
    for entry in order:
        for axis in entry.mesh_dims:
            parts, _ = Shard(entry.tensor_dim)._split_tensor(shard, mesh.shape[axis], with_padding=False)
            shard = parts[coordinate[axis]]
    return shard
