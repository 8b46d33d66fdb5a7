"""Grids: the ranks of a product layout by tile, and the replicas of a tile host by host."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from tricomm.layout.columns import IntervalLists, offsets_of, positions
from tricomm.layout.mesh import Mesh
from tricomm.layout.part_table import part_table
from tricomm.layout.placement import Partial
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Topology


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The ranks of a layout that is a product: each of its mesh axes cuts one dim or replicates, or it is held so.

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


def grid_of(spec: ShardingSpec) -> Grid | None:
    """The grid of a layout; None of one that is none.

    Holdings that are told rank by rank make a grid too if each part of a dim meets each part of the others, on equally
    many ranks: a padded vocabulary that is trimmed, or cuts on whole blocks.
    """
    if any(isinstance(placement, Partial) for placement in spec.placements):
        return None
    if spec.holdings is not None:
        return _grid_of_holdings(spec)
    axes = tuple(spec.cutting_axes(dim) for dim in range(len(spec.global_shape)))
    return _grid(spec.mesh, axes)


def is_held_once(spec: ShardingSpec) -> bool:
    """Whether ranks provably hold disjoint elements, also where holdings that are told rank by rank make a grid."""
    if spec.exclusive or spec.holdings is None or not prod(spec.global_shape) or not spec.global_shape:
        return spec.exclusive
    grid = grid_of(spec)
    return grid is not None and grid.replicas == 1


@lru_cache(maxsize=256)
def _grid_of_holdings(spec: ShardingSpec) -> Grid | None:
    table = part_table(spec)
    counts = tuple(map(len, table.parts))
    tiles = prod(counts)
    if tiles > spec.mesh.size or not all(map(_tiles_a_dim, table.parts, spec.global_shape)):
        return None
    tile_of = np.ravel_multi_index(tuple(table.part_of.T), counts)
    held = np.bincount(tile_of, minlength=tiles)
    if (held != held[0]).any():
        return None
    ranks = ranks_of(spec.mesh)[np.argsort(tile_of, kind="stable")]
    return Grid(counts, ranks.reshape(tiles, -1))


def _tiles_a_dim(parts: IntervalLists, extent: int) -> bool:
    """Whether every coordinate of a dim is in one part of it."""
    starts, stops = np.sort(parts.starts), np.sort(parts.stops)
    edges = np.concatenate([[0], stops])
    return bool((starts == edges[:-1]).all()) and int(edges[-1]) == extent


@lru_cache(maxsize=64)
def ranks_of(mesh: Mesh) -> np.ndarray:
    """The ranks of a mesh, as an array."""
    return np.array(mesh.ranks, np.int64)


@lru_cache(maxsize=64)
def _grid(mesh: Mesh, axes: tuple[tuple[int, ...], ...]) -> Grid:
    cutting = [axis for of_dim in axes for axis in of_dim]
    replicating = [axis for axis in range(mesh.ndim) if axis not in cutting]
    ranks = ranks_of(mesh).reshape(mesh.shape).transpose(cutting + replicating)
    parts = tuple(int(np.prod([mesh.shape[axis] for axis in of_dim], dtype=np.int64)) for of_dim in axes)
    return Grid(parts, ranks.reshape(int(np.prod(parts, dtype=np.int64)), -1))


@dataclass(frozen=True, slots=True, eq=False)
class Rings:
    """The replicas of each tile in the order in which they hand pieces round: host by host.

    Attributes:
        ranks: int array (tiles, replicas).
        place: int array (tiles, replicas): on which of its tile's hosts each is, counted from 0.
        firsts: int array (tiles, hosts + 1): where the replicas on each host begin; behind its last host all replicas.
        hosts: int array (tiles,): how many hosts have replicas of a tile.
        host_numbers: int array (tiles, hosts): the topology's numbers of those hosts; -1 behind the last.
        number: int array (tiles,): how many of the tiles before it begin on the same host.
        of_host: the most replicas of a tile on one host.
        most_hosts: the most hosts that have replicas of a tile.
        tiles_of_nic: how many tiles the busiest NIC carries, if a tile's replicas on a host hear equal parts of it.
    """

    ranks: np.ndarray
    place: np.ndarray
    firsts: np.ndarray
    hosts: np.ndarray
    host_numbers: np.ndarray
    number: np.ndarray
    of_host: int
    most_hosts: int
    tiles_of_nic: float

    @classmethod
    def of(cls, grid: Grid, topology: Topology) -> "Rings":
        """Sort the replicas of each tile by host."""
        hosts = topology.host_numbers[grid.ranks]
        order = np.lexsort((grid.ranks, hosts), axis=-1)
        hosts, ranks = np.take_along_axis(hosts, order, -1), np.take_along_axis(grid.ranks, order, -1)
        begins = np.ones(hosts.shape, bool)
        begins[:, 1:] = hosts[:, 1:] != hosts[:, :-1]
        place = np.cumsum(begins, 1) - 1
        count = place[:, -1] + 1
        tile, at = np.nonzero(begins)
        most_hosts = int(count.max())
        firsts = np.full((len(ranks), most_hosts + 1), grid.replicas)
        firsts[tile, place[tile, at]] = at
        numbers = np.full((len(ranks), most_hosts), -1)
        numbers[tile, place[tile, at]] = hosts[tile, at]
        counts = np.diff(firsts, axis=1)
        parts = 1 / counts[np.arange(len(ranks))[:, None], place]
        of_nic = np.bincount(topology.nic_numbers[ranks].reshape(-1), parts.reshape(-1))
        number, of_host = times_before(numbers[:, 0]), int(counts.max())
        return cls(ranks, place, firsts, count, numbers, number, of_host, most_hosts, float(of_nic.max()))

    @property
    def entries(self) -> np.ndarray:
        """The replicas of each tile, (tiles, replicas): the first on each of its hosts, then the second on each."""
        turns = np.arange(self.replicas) - np.take_along_axis(self.firsts, self.place, 1)
        order: np.ndarray = np.lexsort((self.place, turns), axis=-1)
        return order

    @property
    def round(self) -> int:
        """The least number of turns that goes round every host, whatever its number of replicas."""
        counts = np.unique(np.diff(self.firsts, axis=1))
        return int(np.lcm.reduce(counts[counts > 0]))

    @property
    def is_ragged(self) -> bool:
        """Whether hosts have unequally many replicas of a tile."""
        return bool((self.hosts * self.of_host != self.replicas).any())

    @property
    def replicas(self) -> int:
        """Replicas of a tile."""
        return int(self.ranks.shape[1])

    def count(self, tiles: np.ndarray, places: np.ndarray) -> np.ndarray:
        """How many replicas of some tiles are on some of their hosts."""
        found: np.ndarray = self.firsts[tiles, places + 1] - self.firsts[tiles, places]
        return found

    def before(self, tiles: np.ndarray, places: np.ndarray) -> np.ndarray:
        """How many replicas are on the hosts before some, going on behind the last with the first."""
        laps, places = np.divmod(places, self.hosts[tiles])
        found: np.ndarray = laps * self.replicas + self.firsts[tiles, places]
        return found

    def at(self, tiles: np.ndarray, places: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The replicas of some tiles on some of their hosts, counted round the host."""
        ranks: np.ndarray = self.ranks[tiles, self.firsts[tiles, places] + turns % self.count(tiles, places)]
        return ranks

    def find(self, tiles: np.ndarray, hosts: np.ndarray) -> np.ndarray:
        """Which of its tile's hosts each of some hosts is (the topology's numbers); -1 where it has no replicas."""
        width = int(max(self.host_numbers.max(), hosts.max(initial=0))) + 1
        tile, place = np.nonzero(self.host_numbers >= 0)
        # Ascending by tile, and on a tile by host.
        known = tile * width + self.host_numbers[tile, place]
        at = positions(known, np.where(hosts >= 0, tiles * width + hosts, -1))
        return np.where(at >= 0, place[at], -1)


def times_before(values: np.ndarray) -> np.ndarray:
    """How often each value stands before it.

    Example:
        >>> times_before(np.array([5, 3, 5, 5])).tolist()
        [0, 0, 1, 2]
    """
    order = np.argsort(values, kind="stable")
    _, counts = np.unique(values, return_counts=True)
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - offsets_of(counts)[:-1].repeat(counts)
    return found
