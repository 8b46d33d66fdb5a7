"""What bench.reshard measures: the paper's cases and our own, on hosts of an emulated cluster.

Tensors are scaled so that the NIC-bound optimum takes a stated time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cluster.network import Host, Nic
from tricomm import Mesh, Replicate, Shard, ShardingSpec
from tricomm.layout.placement import Placement

R = Replicate()
Specs = tuple[ShardingSpec, ShardingSpec]


@dataclass(frozen=True)
class Shape:
    """A cluster: hosts of so many devices, with NICs of these rates relative to the nominal one.

    Attributes:
        devices: of each host.
        rates: of each host's NICs.
        nics: of each host; device d uses NIC d modulo this.
    """

    devices: int
    rates: tuple[float, ...]
    nics: int = 1

    def hosts(self, bits_per_second: float) -> list[Host]:
        """As the emulated cluster takes them."""
        return [Host(self.devices, (Nic.symmetric(bits_per_second * rate),) * self.nics) for rate in self.rates]


EQUAL = Shape(4, (1.0,) * 5)
"""One for all cases on equal hosts, also those that leave some of them idle: it takes long to calibrate."""
UNEQUAL = Shape(2, (1.0, 0.5, 1.0, 0.5))
RAILS = Shape(4, (0.5, 0.5, 0.5), nics=4)


@dataclass(frozen=True)
class Case:
    """One reshard.

    Attributes:
        name: short.
        suite: "one-to-many", "many-to-many" (the paper's) or "ours".
        cluster: where it runs.
        make: rows of the tensor -> (source, destination); the time is in proportion to the rows.
    """

    name: str
    suite: str
    cluster: Shape
    make: Callable[[int], Specs]


def on(
    first: int, hosts: int, devices: int, per_host: int, placements: Sequence[Placement], shape: Sequence[int]
) -> ShardingSpec:
    """A spec on the first ``devices`` devices of ``hosts`` hosts from host ``first`` on."""
    grid = [[(first + host) * per_host + device for device in range(devices)] for host in range(hosts)]
    return ShardingSpec(Mesh(grid, ("host", "device")), tuple(placements), tuple(shape), "int32")


def letters(first: int, hosts: int, dims: Sequence[str], shape: Sequence[int]) -> ShardingSpec:
    """The paper's notation, on four devices a host."""
    grid = [[(first + host) * 4 + device for device in range(4)] for host in range(hosts)]
    return ShardingSpec.from_dims(Mesh(grid, ("host", "device")), tuple(dims), tuple(shape), "int32")


def _one_to(hosts: int, devices: int) -> Case:
    def make(rows: int) -> Specs:
        shape = (rows * 1024,)
        return on(0, 1, 1, 4, (R, R), shape), on(1, hosts, devices, 4, (R, R), shape)

    return Case(f"1 -> ({hosts},{devices})", "one-to-many", EQUAL, make)


def _paper(
    number: int, source: tuple[int, tuple[str, ...]], destination: tuple[int, tuple[str, ...]], first: int
) -> Case:
    def make(rows: int) -> Specs:
        shape = (rows // 8 * 8, 32, 32)
        return letters(0, *source, shape), letters(first, *destination, shape)

    return Case(f"case {number}", "many-to-many", EQUAL, make)


def _ours(name: str, cluster: Shape, make: Callable[[int], Specs]) -> Case:
    return Case(name, "ours", cluster, make)


def _deep(rows: int) -> Specs:
    """3-D meshes, two axes on one dim, the minor one first on the other side."""
    source = Mesh([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], ("a", "b", "c"))
    destination = Mesh([[[8, 9], [10, 11]], [[12, 13], [14, 15]]], ("a", "b", "c"))
    shape = (rows, 32, 32)
    return (
        ShardingSpec(source, (Shard(0), Shard(1), Shard(0)), shape, "int32"),
        ShardingSpec(destination, (Shard(1), Shard(0), Shard(1)), shape, "int32", ("c", "b", "a")),
    )


CASES: tuple[Case, ...] = (
    *(_one_to(hosts, devices) for hosts, devices in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (3, 2), (4, 2))),
    _paper(1, (2, ("S0", "R", "R")), (2, ("S0", "R", "R")), 2),
    _paper(2, (2, ("R", "R", "R")), (2, ("S0", "R", "R")), 2),
    _paper(3, (2, ("R", "S0", "R")), (2, ("S0", "R", "R")), 2),
    _paper(4, (2, ("R", "S01", "R")), (2, ("S01", "R", "R")), 2),
    _paper(5, (2, ("S1", "R", "R")), (2, ("S0", "R", "R")), 2),
    _paper(6, (2, ("S0", "R", "R")), (3, ("S0", "R", "R")), 2),
    _paper(7, (1, ("S1", "R", "R")), (2, ("R", "R", "R")), 1),
    _paper(9, (2, ("R", "S0", "R")), (2, ("R", "R", "S0")), 2),
    _ours(
        "2 hosts to 3",
        EQUAL,
        lambda rows: (on(0, 2, 1, 4, (R, R), (rows, 1024)), on(2, 3, 1, 4, (Shard(0), R), (rows, 1024))),
    ),
    _ours(
        "uneven rows",
        EQUAL,
        lambda rows: (on(0, 2, 1, 4, (Shard(0), R), (7, rows, 64)), on(2, 3, 1, 4, (Shard(0), R), (7, rows, 64))),
    ),
    _ours("3-D meshes", EQUAL, _deep),
    _ours(
        "overlap: grow 2 -> 4 hosts",
        EQUAL,
        lambda rows: (on(0, 2, 4, 4, (Shard(0), R), (rows, 1024)), on(0, 4, 4, 4, (Shard(0), R), (rows, 1024))),
    ),
    _ours(
        "overlap: rows to columns",
        EQUAL,
        lambda rows: (
            on(0, 4, 4, 4, (Shard(0), Shard(0)), (rows, 32, 32)),
            on(0, 4, 4, 4, (Shard(1), Shard(1)), (rows, 32, 32)),
        ),
    ),
    _ours(
        "all-gather over 4 hosts",
        EQUAL,
        lambda rows: (on(0, 4, 2, 4, (Shard(0), Shard(0)), (rows, 1024)), on(0, 4, 2, 4, (R, R), (rows, 1024))),
    ),
    _ours(
        "replicated tp -> dp",
        EQUAL,
        lambda rows: (
            on(0, 2, 4, 4, (R, Shard(1)), (rows, 32, 32)),
            on(2, 2, 4, 4, (Shard(0), R), (rows, 32, 32)),
        ),
    ),
    _ours(
        "fused segments",
        EQUAL,
        lambda rows: (
            on(0, 2, 4, 4, (R, Shard(0, (rows // 2, rows // 4, rows // 4))), (rows // 4 * 4, 1024)),
            on(2, 2, 3, 4, (R, Shard(0)), (rows // 4 * 4, 1024)),
        ),
    ),
    _ours(
        "unequal NICs, replicated",
        UNEQUAL,
        lambda rows: (on(0, 2, 2, 2, (R, R), (rows, 1024)), on(2, 2, 2, 2, (Shard(0), R), (rows, 1024))),
    ),
    _ours(
        "unequal NICs, sharded",
        UNEQUAL,
        lambda rows: (
            on(0, 2, 2, 2, (Shard(1), R), (rows, 32, 32)),
            on(2, 2, 2, 2, (Shard(0), R), (rows, 32, 32)),
        ),
    ),
    _ours(
        "rails, replicated",
        RAILS,
        lambda rows: (on(0, 1, 4, 4, (R, R), (rows, 1024)), on(1, 2, 4, 4, (R, R), (rows, 1024))),
    ),
    _ours(
        "rails, tp to rows",
        RAILS,
        lambda rows: (
            on(0, 1, 4, 4, (R, Shard(1)), (rows, 32, 32)),
            on(1, 2, 4, 4, (Shard(0), R), (rows, 32, 32)),
        ),
    ),
)
