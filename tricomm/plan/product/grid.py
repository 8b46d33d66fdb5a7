"""Grids: the ranks of a product layout by tile, and the replicas of a tile host by host."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tricomm.layout.mesh import Mesh
from tricomm.layout.placement import Partial
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The ranks of a layout in which each mesh axis cuts one dim or replicates.

    A *tile* is what ranks hold that agree on all cutting axes: one part of each dim. Its number counts the parts of the
    dims, the last dim fastest.

    Attributes:
        parts: per dim, how many parts its axes cut it into.
        ranks: int array (tiles, replicas): who holds each tile, in mesh order.
    """

    parts: tuple[int, ...]
    ranks: np.ndarray

    @property
    def replicas(self) -> int:
        """Ranks that hold a tile."""
        return int(self.ranks.shape[1])

    def find(self, rank: int) -> tuple[int, int] | None:
        """(tile, replica) of a rank, or None."""
        found = np.argwhere(self.ranks == rank)
        return None if not len(found) else (int(found[0, 0]), int(found[0, 1]))

    def parts_of(self, tile: int) -> tuple[int, ...]:
        """Per dim, which part a tile is.

        Example: with parts (2, 3), tile 4 is part 1 of dim 0 and part 1 of dim 1.
        """
        return tuple(int(part) for part in np.unravel_index(tile, self.parts))


def is_product(spec: ShardingSpec) -> bool:
    """Whether mesh axes say all that a spec says."""
    return spec.holdings is None and not any(isinstance(placement, Partial) for placement in spec.placements)


def grid_of(spec: ShardingSpec) -> Grid:
    """The grid of a product layout."""
    axes = tuple(spec.cutting_axes(dim) for dim in range(len(spec.global_shape)))
    return _grid(spec.mesh, axes)


@lru_cache(maxsize=64)
def _grid(mesh: Mesh, axes: tuple[tuple[int, ...], ...]) -> Grid:
    cutting = [axis for of_dim in axes for axis in of_dim]
    replicating = [axis for axis in range(mesh.ndim) if axis not in cutting]
    ranks = np.array(mesh.ranks, np.int64).reshape(mesh.shape).transpose(cutting + replicating)
    parts = tuple(int(np.prod([mesh.shape[axis] for axis in of_dim], dtype=np.int64)) for of_dim in axes)
    return Grid(parts, ranks.reshape(int(np.prod(parts, dtype=np.int64)), -1))


@dataclass(frozen=True, slots=True, eq=False)
class Rings:
    """The replicas of each tile in the order in which a chain visits them: host by host.

    Attributes:
        ranks: int array (tiles, hosts, replicas of the tile on a host).
    """

    ranks: np.ndarray

    @property
    def hosts(self) -> int:
        """Hosts that have replicas of a tile."""
        return int(self.ranks.shape[1])

    @property
    def of_host(self) -> int:
        """Replicas of a tile on one host."""
        return int(self.ranks.shape[2])

    @property
    def length(self) -> int:
        """Replicas of a tile."""
        return self.hosts * self.of_host

    def at(self, tiles: np.ndarray, entries: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The ranks at some places of chains that enter their tiles' rings at some entries.

        Entries go through the hosts first and then through the replicas on a host: a chain visits the hosts one after
        the other, on each all replicas, and both circles begin where it enters.
        """
        host = (entries + places // self.of_host) % self.hosts
        replica = (entries // self.hosts + places) % self.of_host
        ranks: np.ndarray = self.ranks[tiles, host, replica]
        return ranks


def rings_of(grid: Grid, topology: Topology) -> Rings | None:
    """The rings of a grid; None where hosts do not all have equally many replicas of a tile."""
    hosts = topology.host_numbers[grid.ranks]
    order = np.lexsort((grid.ranks, hosts), axis=-1)
    hosts, ranks = np.take_along_axis(hosts, order, -1), np.take_along_axis(grid.ranks, order, -1)
    of_host = int((hosts[0] == hosts[0, 0]).sum())
    if grid.replicas % of_host:
        return None
    by_host = hosts.reshape(len(hosts), -1, of_host)
    alike = (by_host == by_host[:, :, :1]).all() and (by_host[:, 1:, 0] != by_host[:, :-1, 0]).all()
    return Rings(ranks.reshape(by_host.shape)) if alike else None
