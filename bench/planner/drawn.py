"""Random product layouts small enough to be planned both ways: by formulas and by search."""

import random
from dataclasses import dataclass

import numpy as np

from tricomm import Mesh, Replicate, Shard, ShardingSpec, Topology
from tricomm.layout.placement import Placement
from tricomm.plan.product.move import ProductMove
from tricomm.plan.routes.chunks import RouteContext

PLACES = ("apart", "apart", "shared hosts", "overlapping", "same ranks")
"""Where the second mesh is: on other hosts, from the middle of the first one's last host on, on some of its ranks, or
on all of them."""


@dataclass(frozen=True)
class Drawn:
    """A move.

    Attributes:
        seed: it was drawn with.
        source, destination: resolved specs.
        topology: of all ranks.
        place: one of ``PLACES``.
        ragged: whether hosts have unequal numbers of replicas of a tile.
    """

    seed: int
    source: ShardingSpec
    destination: ShardingSpec
    topology: Topology
    place: str
    ragged: bool

    @property
    def kind(self) -> str:
        """In words."""
        return f"{self.place}, ragged" if self.ragged else self.place


def factors(dice: random.Random, count: int) -> list[int]:
    """Extents of one to three mesh axes whose product is ``count``."""
    found: list[int] = []
    while count > 1 and len(found) < 2 and dice.random() < 0.8:
        found.append(dice.choice([factor for factor in range(2, count + 1) if count % factor == 0]))
        count //= found[-1]
    found += [count] if count > 1 or not found else []
    dice.shuffle(found)
    return found


def drawn(seed: int, most_hosts: int = 4) -> Drawn:
    """Uneven and nested product layouts with replicas on a side at least. With an even seed the destination has three
    replicas or more, on two hosts or more.
    """
    dice = random.Random(seed)
    while True:
        found = _drawn(dice, seed, most_hosts)
        if found is not None:
            return found


def _drawn(dice: random.Random, seed: int, most_hosts: int) -> Drawn | None:
    devices = dice.choice((1, 2, 4))
    place = dice.choice(PLACES)
    shape = (dice.choice((10, 64, 257, 4096)), dice.choice((6, 96, 129, 2048)))
    counts = [devices * dice.randint(1, most_hosts) for _ in range(2)]
    is_ragged = dice.random() < 0.2
    if is_ragged:
        counts = [max(count + dice.randint(-2, 2), 1) for count in counts]
    if place == "same ranks":
        counts[1] = counts[0]
    begin = {"apart": -(-counts[0] // devices) * devices, "same ranks": 0}.get(place, counts[0])
    if place == "overlapping":
        begin = dice.randint(0, counts[0] - 1)
    specs: list[ShardingSpec] = []
    for first, count in zip((0, begin), counts, strict=True):
        extents = factors(dice, count)
        names = tuple(f"axis{index}" for index in range(len(extents)))
        mesh = Mesh(np.arange(first, first + count).reshape(extents).tolist(), names)
        segments = Shard(0, segments=(shape[0] - 4, 4))
        placements: list[Placement] = [
            dice.choice((Replicate(), Replicate(), Shard(0), Shard(1), segments)) for _ in extents
        ]
        specs.append(ShardingSpec(mesh, tuple(placements), shape, "int32", tuple(dice.sample(names, len(names)))))
    last = max(max(spec.mesh.ranks) for spec in specs) + 1
    nics, rate = dice.choice((1, devices)), dice.choice((12.5e9, 25e6))
    hosts = tuple(f"host{rank // devices}" for rank in range(last))
    topology = Topology(hosts, nics_per_host=nics, nic_bytes_per_second=rate)
    source, destination = specs
    participants = sorted({*source.mesh.ranks, *destination.mesh.ranks})
    move = ProductMove.of(source, destination, 0, RouteContext(topology, 1, 1 << 28), participants)
    if move is None or (seed % 2 == 0 and (move.rings.replicas < 3 or move.rings.most_hosts < 2)):
        return None
    counts_of_hosts = np.diff(move.rings.firsts, axis=1)
    return Drawn(seed, source, destination, topology, place, bool((counts_of_hosts != counts_of_hosts[0, 0]).any()))
