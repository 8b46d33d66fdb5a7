"""Whether an emulated cluster behaves as it should: measured before anything is reported from it.

All rates are of payload, in bytes per second: what gloo moves, without the headers of TCP, IP and Ethernet.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.cluster.cluster import Cluster
from bench.cluster.flows import Flow, elapsed_seconds, ping, post, relay, run_flows
from bench.cluster.network import ClusterError, Port
from bench.cluster.shaping import ETHERNET_BYTES, HEADER_BYTES, MTU_BYTES
from tricomm.launch import Ranks

HOP_TOLERANCE = 0.05
SPREAD_TOLERANCE = 0.05
TOGETHER_TOLERANCE = 0.10
CHAIN_TOLERANCE = 0.12
CHAIN_CHUNKS = 64
INTRA_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate as measured and as it should be.

    Attributes:
        name: what was measured.
        bytes_per_second: the median of the samples.
        expected_bytes_per_second: from the rates that the NICs were given.
        spread: between the samples, without the fastest and the slowest, as a share of the median.
    """

    name: str
    bytes_per_second: float
    expected_bytes_per_second: float
    spread: float

    @property
    def ratio(self) -> float:
        """Measured over expected."""
        return self.bytes_per_second / self.expected_bytes_per_second

    def __str__(self) -> str:
        return (
            f"{self.name:<28}{self.bytes_per_second / 1e6:>9.3f} MB/s, {self.ratio:.3f} of expected, "
            f"spread {self.spread:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a cluster can do.

    Attributes:
        hops: every NIC alone, to the same NIC of the next host.
        together: all of these hops at once, so that every host sends and receives with all its NICs: what the
            slowest of them had.
        duplex: two ranks that send to each other at once, over a process group for each direction.
        chain: from host to host through all of them, relayed in chunks.
        latency_seconds: from when a message of 4 bytes is sent to when it is there, between two hosts.
        overhead_seconds: for which a message keeps the rank that sends it busy.
        intra_bytes_per_second: between two ranks of one host; None where no host has two.
    """

    hops: tuple[Rate, ...]
    together: Rate
    duplex: Rate
    chain: Rate
    latency_seconds: float
    overhead_seconds: float
    intra_bytes_per_second: float | None

    @property
    def hop_bytes_per_second(self) -> float:
        """The slowest hop: what bounds and ratios are computed from where all NICs are equal."""
        return min(hop.bytes_per_second for hop in self.hops)

    def __str__(self) -> str:
        lines = [*map(str, self.hops), str(self.together), str(self.duplex), str(self.chain)]
        lines.append(f"{'latency':<28}{self.latency_seconds * 1e6:>9.0f} us")
        lines.append(f"{'overhead':<28}{self.overhead_seconds * 1e6:>9.0f} us")
        if self.intra_bytes_per_second is not None:
            lines.append(f"{'inside of a host':<28}{self.intra_bytes_per_second / 1e6:>9.0f} MB/s")
        return "\n".join(lines)


def calibrate(
    cluster: Cluster, ranks: Ranks, *, seconds: float = 0.3, repeats: int = 5, attempts: int = 3
) -> Calibration:
    """Measure a cluster, and refuse it where it does not do what its NICs promise.

    Args:
        cluster: with two hosts or more.
        ranks: those of the cluster.
        seconds: that each transfer should take.
        repeats: samples of each figure, at least 3.
        attempts: how often a figure is measured before it is refused; another program may have disturbed it.

    Raises:
        ClusterError: a rate is not the expected one, or differs from sample to sample.
    """
    if len(cluster.hosts) < 2:
        raise ClusterError("calibration needs a hop between hosts, and the cluster has 1 host; give 2 or more")
    if repeats < 3:
        raise ValueError(f"repeats={repeats} must be at least 3; the spread leaves out the fastest and the slowest")
    sampler = Sampler(repeats, attempts)
    hops = ring(cluster, seconds)
    # The first transfer finds small windows, and buffers without memory.
    run_flows(ranks, [hop.flow for hop in hops])
    alone = tuple(_measure_together(sampler, ranks, hop.name, [hop], HOP_TOLERANCE) for hop in hops)
    there = hops[0].flow
    both_ways = [hop_between(cluster, *pair, seconds) for pair in (there.ranks, there.ranks[::-1])]
    overhead_seconds = statistics.median(ranks.run(post, *there.ranks)[there.source] for _ in range(repeats))
    half_round_trip_seconds = ranks.run(ping, *there.ranks)[there.source]
    return Calibration(
        hops=alone,
        together=_measure_together(sampler, ranks, f"all {len(hops)} hops at once", hops, TOGETHER_TOLERANCE),
        duplex=_measure_together(sampler, ranks, "two ranks to each other", both_ways, TOGETHER_TOLERANCE),
        chain=_measure_chain(sampler, ranks, cluster, seconds),
        latency_seconds=max(half_round_trip_seconds - overhead_seconds, 0.0),
        overhead_seconds=overhead_seconds,
        intra_bytes_per_second=_intra_rate(cluster, ranks, repeats),
    )


@dataclass(frozen=True, slots=True)
class Hop:
    """From one NIC to another, with the rate that they allow and the bytes to send."""

    name: str
    flow: Flow
    bytes_per_second: float


def hop_between(cluster: Cluster, source: int, destination: int, seconds: float) -> Hop:
    """The hop from rank to rank, with the bytes that pass in some seconds."""
    ports = cluster.seats[source].port, cluster.seats[destination].port
    rate = payload_bytes_per_second(*ports)
    name = f"host {ports[0].host} -> host {ports[1].host}, NIC {ports[0].index}"
    return Hop(name, Flow(source, destination, round(rate * seconds)), rate)


def ring(cluster: Cluster, seconds: float) -> list[Hop]:
    """From every host to the next, NIC by NIC; NICs that the next host does not have are left out."""
    first_rank = {(seat.host, seat.port.index): seat.rank for seat in reversed(cluster.seats)}
    return [
        hop_between(cluster, rank, first_rank[following, index], seconds)
        for (host, index), rank in sorted(first_rank.items())
        if (following := (host + 1) % len(cluster.hosts), index) in first_rank
    ]


def payload_bytes_per_second(source: Port, destination: Port) -> float:
    """What two NICs allow, less the headers."""
    bits_per_second = min(source.nic.send_bits_per_second, destination.nic.receive_bits_per_second)
    return bits_per_second / 8 * (MTU_BYTES - HEADER_BYTES) / (MTU_BYTES + ETHERNET_BYTES)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Takes samples until they are good; see :func:`calibrate`."""

    repeats: int
    attempts: int

    def measure(self, name: str, tolerance: float, expected: float, sample: Callable[[], float]) -> Rate:
        """A rate.

        Raises:
            ClusterError: no attempt gave one within the tolerance.
        """
        for _ in range(self.attempts):
            samples = sorted(sample() for _ in range(self.repeats))
            median = statistics.median(samples)
            rate = Rate(name, median, expected, (samples[-2] - samples[1]) / median)
            if abs(rate.ratio - 1) <= tolerance and rate.spread <= SPREAD_TOLERANCE:
                return rate
        raise ClusterError(
            f"the emulated network is not as fast as it should be: {rate}; within {tolerance:.0%} and a spread up to "
            f"{SPREAD_TOLERANCE:.0%} would do. Stop other programs on this machine, or give the NICs a lower rate"
        )


def _measure_together(sampler: Sampler, ranks: Ranks, name: str, hops: Sequence[Hop], tolerance: float) -> Rate:
    """The rate of the slowest of some hops at once; each has the bytes for the same time, so that it ends last."""
    slowest = min(hops, key=lambda hop: hop.bytes_per_second)
    flows = [hop.flow for hop in hops]
    return sampler.measure(
        name, tolerance, slowest.bytes_per_second, lambda: slowest.flow.nbytes / run_flows(ranks, flows)
    )


def _measure_chain(sampler: Sampler, ranks: Ranks, cluster: Cluster, seconds: float) -> Rate:
    chain = [cluster.rank_of(port) for port in cluster.ports if port.index == 0]
    slowest = min(hop_between(cluster, *pair, seconds).bytes_per_second for pair in pairwise(chain))
    nbytes = round(slowest * seconds)
    # The last of n chunks sets out after the n - 1 before it, and then passes every hop.
    expected = slowest * CHAIN_CHUNKS / (CHAIN_CHUNKS + len(chain) - 2)
    return sampler.measure(
        f"chain over {len(chain)} hosts",
        CHAIN_TOLERANCE,
        expected,
        lambda: nbytes / elapsed_seconds(ranks.run(relay, chain, nbytes, CHAIN_CHUNKS), chain),
    )


def _intra_rate(cluster: Cluster, ranks: Ranks, repeats: int) -> float | None:
    for seat, following in pairwise(cluster.seats):
        if seat.host == following.host:
            flow = Flow(seat.rank, following.rank, INTRA_BYTES)
            return INTRA_BYTES / statistics.median(run_flows(ranks, [flow]) for _ in range(repeats))
    return None
