"""The NICs of a mesh."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tricomm.layout.mesh import Mesh
from tricomm.layout.topology import Topology
from tricomm.plan.product.grid import Grid, ranks_of

UNITS = 840
"""Of what a NIC sends: up to eight ranks have equal parts of it."""


class Nics(NamedTuple):
    """The NICs of a mesh, all equally fast.

    Attributes:
        number: how many they are.
        ranks: the most that share one.
        send, receive: bytes per second.
    """

    number: int
    ranks: int
    send: float
    receive: float


@lru_cache(maxsize=64)
def nics_of(mesh: Mesh, topology: Topology) -> Nics | None:
    """The NICs of a mesh; None if they are not all equally fast."""
    nics, of_nic = np.unique(topology.nic_numbers[ranks_of(mesh)], return_counts=True)
    send, receive = topology.nic_send_rates[nics], topology.nic_receive_rates[nics]
    if (send != send[0]).any() or (receive != receive[0]).any():
        return None
    return Nics(len(nics), int(of_nic.max()), float(send[0]), float(receive[0]))


@lru_cache(maxsize=64)
def share_hosts(first: Mesh, second: Mesh, topology: Topology) -> bool:
    """Whether a host has ranks of both meshes."""
    here, there = (topology.host_numbers[ranks_of(mesh)] for mesh in (first, second))
    return bool(np.isin(here, there).any())


def units_of(grid: Grid, topology: Topology) -> np.ndarray | None:
    """How many units each holder of a tile sends if NICs are level, (tiles, holders); None if all are the same.

    Args:
        grid: of a source.
        topology: of all ranks.
    """
    nics = topology.nic_numbers[grid.ranks]
    ranks = np.bincount(nics.reshape(-1))[nics]
    if (ranks == ranks[0, 0]).all():
        return None
    units: np.ndarray = np.maximum(UNITS // ranks, 1)
    units //= np.gcd.reduce(units, axis=None)
    return units
