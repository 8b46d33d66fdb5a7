"""Two jobs on an emulated cluster: how near a push between them comes to the bound of the NICs.

    python -m bench.cluster.jobs [--loopback]

Three hosts are a trainer and three a server, with a NIC of 400 Mbit/s each; they meet as separate jobs do, over the
unshaped interfaces. What is printed is the median of the pushes, from the call to published everywhere, over the bound:
the bytes that the busiest NIC must send or receive, over its rate less the headers of TCP, IP and Ethernet, which are
4.4 % of it. The same push within one job, by a Resharder with ``confirm``, takes turns with it.

With ``--loopback`` four processes of this machine are the trainer, three the server, and what training loses by a push
is measured too: steps of a fixed compute, alone and with a push beside each, fenced. Needs no root.
"""

import argparse
import statistics
import time
from typing import Any

import torch

import tricomm
from bench.cluster.calibrate import payload_bytes_per_second
from bench.cluster.cluster import Cluster
from tricomm import Feed, Meeting, Mesh, Resharder, Shard, ShardingSpec, Topology, World
from tricomm.launch import Ranks

HOSTS, TRAINERS, PUSHES, ROUNDS = 6, 3, 6, 3
NIC_BITS_PER_SECOND = 400e6
SHAPE = (12288, 2048)
SECRET = "a secret of this benchmark"
SIDES = {"trainer": 4, "server": 3}
LOOPBACK_SHAPE = (4096, 4096)
PRODUCTS = 4
"""Of matrices of 1024 rows and columns, in a step."""
LOOPBACK_PUSHES = 12

KEPT: dict[str, Any] = {}
"""Of this process, between calls: the meeting that rank 0 holds."""


def listen(rank: int, address: str) -> str:
    """Rank 0 listens on its unshaped interface; returns where."""
    if rank != 0:
        return ""
    KEPT["meeting"] = meeting = Meeting(f"tcp://{address}:0", secret=SECRET)
    return meeting.address


def connected(
    rank: int, address: str, sizes: dict[str, int], host: str, shape: tuple[int, int]
) -> tuple[World, str, int, ShardingSpec]:
    """A rank of the trainer, which are the first, or of the server: (world, side, rank of it, its layout: the trainer
    has rows and the server columns).
    """
    torch.set_num_threads(1)
    side = "trainer" if rank < sizes["trainer"] else "server"
    side_rank = rank if side == "trainer" else rank - sizes["trainer"]
    world = tricomm.connect(
        address, side=side, side_rank=side_rank, side_sizes=sizes, secret=SECRET, host=host, device="cpu"
    )
    spec = ShardingSpec(Mesh(range(sizes[side]), ("x",)), (Shard(int(side == "server")),), shape, "float32")
    return world, side, side_rank, spec


def push(rank: int, address: str, bytes_per_second: float) -> tuple[float, float]:
    """(median seconds of a push, seconds that the NICs need) of the trainer; zeros of the server.

    Args:
        rank: of all hosts.
        address: of the meeting.
        bytes_per_second: of payload, that a NIC sends or receives.
    """
    sizes = {"trainer": TRAINERS, "server": HOSTS - TRAINERS}
    world, side, side_rank, spec = connected(rank, address, sizes, f"host{rank}", SHAPE)
    specs = world.exchange({"w": spec})
    topology = world.topology(nic_bytes_per_second=bytes_per_second)
    feed = Feed(world, specs, source="trainer", destination="server", topology=topology, timeout_seconds=60)
    shard = torch.zeros(spec.local_shape(side_rank))
    seconds = []
    for version in range(PUSHES):
        if side == "server":
            feed.pull({"w": shard}, 60)
            continue
        began = time.monotonic()
        feed.push({"w": shard}, version, wait_seconds=60).wait()
        seconds.append(time.monotonic() - began)
    plan = tricomm.make_plan(specs["trainer"]["w"], specs["server"]["w"], topology=topology)
    world.close()
    return (statistics.median(seconds), plan.lower_bound_seconds()) if seconds else (0.0, 0.0)


def plain(rank: int, bytes_per_second: float) -> float:
    """Median seconds of the same move in one job, by a Resharder of the default group."""
    specs = [
        ShardingSpec(Mesh(range(first, first + TRAINERS), ("x",)), (Shard(dim),), SHAPE, "float32")
        for first, dim in ((0, 0), (TRAINERS, 1))
    ]
    topology = Topology([f"host{host}" for host in range(HOSTS)], bytes_per_second)
    seconds = []
    with Resharder(specs[0], specs[1], topology=topology, confirm=True) as mover:
        shard = torch.zeros(specs[rank >= TRAINERS].local_shape(rank))
        for _ in range(PUSHES):
            began = time.monotonic()
            mover(shard if rank < TRAINERS else None, out=None if rank < TRAINERS else shard)
            seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def beside(rank: int, address: str) -> dict[str, list[float]]:
    """Seconds of pushes alone, of steps alone, and of steps with a push beside each, of a trainer's rank; nothing of a
    server's.

    Args:
        rank: the trainer's first.
        address: of the meeting.
    """
    world, side, side_rank, spec = connected(rank, address, SIDES, "here", LOOPBACK_SHAPE)
    feed = Feed(world, world.exchange({"w": spec}), source="trainer", destination="server", timeout_seconds=60)
    shard = torch.zeros(spec.local_shape(side_rank))
    found: dict[str, list[float]] = {}
    for version in range(1, 2 * LOOPBACK_PUSHES + 2):
        if side == "server":
            feed.pull({"w": shard}, 60)
        elif version <= LOOPBACK_PUSHES + 1:  # the first connects
            began = time.monotonic()
            feed.push({"w": shard}, version, wait_seconds=60).wait()
            found.setdefault("push", []).append(time.monotonic() - began)
            began = time.monotonic()
            step()
            found.setdefault("step", []).append(time.monotonic() - began)
        else:
            began = time.monotonic()
            push = feed.push({"w": shard}, version, wait_seconds=60)
            step()
            push.wait_source()  # before the weights change
            found.setdefault("step beside a push", []).append(time.monotonic() - began)
            push.wait()
    world.close()
    return found


def step() -> None:
    """The compute of a training step."""
    matrix = torch.ones(1024, 1024)
    for _ in range(PRODUCTS):
        matrix = matrix @ matrix / 1024


def loopback() -> None:
    """Print seconds of a push between processes of this machine, and of training beside it."""
    with Meeting("tcp://127.0.0.1:0", secret=SECRET) as meeting, Ranks(sum(SIDES.values())) as ranks:
        found = ranks.run(beside, meeting.address)[: SIDES["trainer"]]
    medians = {
        what: statistics.median(max(times) for times in list(zip(*(one[what] for one in found), strict=True))[1:])
        for what in found[0]
    }
    print(f"{LOOPBACK_SHAPE} float32 by rows on 4 ranks to columns on 3, {LOOPBACK_PUSHES} pushes, the slowest rank")
    for what, seconds in medians.items():
        print(f"{what}: {seconds * 1e3:.0f} ms")
    lost = medians["step beside a push"] - medians["step"]
    print(f"training loses {lost * 1e3:.0f} ms by a push, {lost / medians['push']:.2f} of what it takes alone")


def main() -> None:
    """Print seconds, bound and ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.jobs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loopback", action="store_true", help="on this machine, and beside training")
    if parser.parse_args().loopback:
        loopback()
        return
    with Cluster.uniform(HOSTS, 1, NIC_BITS_PER_SECOND) as cluster, cluster.ranks() as ranks:
        address = ranks.run(listen, cluster.seats[0].port.back_address)[0]
        rate = payload_bytes_per_second(cluster.ports[0], cluster.ports[-1])
        found, within = [], []
        for _ in range(ROUNDS):
            found.append(max(ranks.run(push, address, rate)[:TRAINERS]))
            within.append(max(ranks.run(plain, rate)[:TRAINERS]))
    (seconds, bound), plainly = statistics.median_low(found), statistics.median_low(within)
    print(f"a push of {SHAPE} float32, {TRAINERS} to {HOSTS - TRAINERS} hosts, median of {ROUNDS} times {PUSHES}")
    nominal = NIC_BITS_PER_SECOND / 1e6
    print(f"{seconds:.3f} s; the NICs need {bound:.3f} s, of {nominal:.0f} Mbit/s less the headers")
    print(f"{seconds / bound:.3f} x the NIC bound; {seconds / plainly:.3f} x the same move within one job")


if __name__ == "__main__":
    main()
