"""From few ranks to many that need everything: how far the simulated time is from what NICs and latency allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

import numpy as np

from bench.planner.cases import WHOLE, mesh
from tricomm import Shard, ShardingSpec, Topology, make_plan


@dataclass(frozen=True)
class FanOut:
    """A tensor of float32 on ``sources`` ranks, cut into rows, that each of ``receivers`` others needs whole.

    Attributes:
        sources, receivers: ranks.
        devices: ranks and NICs of a host.
        megabytes: of the tensor, 2**20 bytes each.
        gigabytes_per_second: of a NIC, 1e9 bytes each.
    """

    sources: int
    receivers: int
    devices: int
    megabytes: int
    gigabytes_per_second: float

    @property
    def topology(self) -> Topology:
        """Of both sides, on hosts of their own."""
        ranks = -(-self.sources // self.devices) * self.devices + self.receivers
        hosts = tuple(f"host{rank // self.devices}" for rank in range(ranks))
        return Topology(hosts, self.gigabytes_per_second * 1e9, self.devices)

    @property
    def specs(self) -> tuple[ShardingSpec, ShardingSpec]:
        """The two sides."""
        first = -(-self.sources // self.devices) * self.devices
        source = ShardingSpec(mesh(0, x=self.sources), (Shard(0),), (self.megabytes << 8, 1024), "float32")
        return source, ShardingSpec(mesh(first, y=self.receivers), (WHOLE,))

    @property
    def bound_seconds(self) -> float:
        """Bytes of the busiest NIC over its rate, and a latency for each doubling of the hosts that have them."""
        nics = min(self.sources, self.devices)
        hosts = self.receivers / self.devices
        nbytes = (self.megabytes << 20) / nics
        return nbytes / (self.gigabytes_per_second * 1e9) + ceil(log2(hosts + 1)) * self.topology.latency_seconds

    def row(self) -> str:
        """Markdown."""
        topology = self.topology
        plan = make_plan(*self.specs, topology=topology)
        move = plan.moves[0]
        seconds = plan.simulated_seconds()
        children = getattr(move.messages, "children", np.zeros(1))
        way = {0: "directly", 1: "chains", 2: "trees", -1: "to every host"}[int(children.max())]
        return (
            f"| {self.sources} -> {self.receivers} | {self.devices} | {self.megabytes} MB | "
            f"{self.gigabytes_per_second:g} GB/s | {way}, {len(move.messages)} messages | {seconds * 1e3:.2f} ms | "
            f"{self.bound_seconds * 1e3:.2f} ms | {seconds / self.bound_seconds:.2f} |"
        )


CASES = (
    *(FanOut(1, 64, 1, megabytes, 12.5) for megabytes in (1, 16, 64, 256, 1024)),
    *(FanOut(1, 4096, 1, megabytes, 12.5) for megabytes in (16, 256)),
    FanOut(8, 64, 8, 256, 12.5),
    FanOut(8, 4096, 8, 256, 12.5),
)


def table(cases: Sequence[FanOut] = CASES) -> str:
    """Markdown."""
    head = (
        "| ranks | devices a host | tensor | NIC | goes | simulated | bound | ratio |",
        "|---|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *(case.row() for case in cases)])
