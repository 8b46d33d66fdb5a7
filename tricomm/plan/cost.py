"""What a plan costs on a topology: the bound that no plan can beat, and the time that this one should take."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from operator import attrgetter

from tricomm.plan.chunks import Message
from tricomm.plan.flow import Job, share
from tricomm.plan.rounds import Hop
from tricomm.plan.tasks import Task
from tricomm.topology import Topology


def lower_bound_seconds(tasks: Sequence[Task], itemsize: int, topology: Topology, ranks: Sequence[int]) -> float:
    """The NIC-bound optimum: the larger of two times that no plan can beat.

    Receiving: a host receives once what its ranks need and none of them holds. Sending: every such byte is sent
    once per host that receives it, the first time by a host that holds it, and after that by whoever has time (a
    min-max flow). A host has the NICs that its ``ranks`` use.

    Args:
        tasks: all of a move.
        itemsize: bytes of an element on the wire.
        topology: hosts and rates.
        ranks: all that take part.
    """
    send_rates, receive_rates = _host_rates(topology, ranks)
    incoming = dict.fromkeys(send_rates, 0)
    first: dict[tuple[int, ...], int] = {}
    again = 0
    for task in tasks:
        holding = {topology.host(rank) for rank in task.holders}
        needing = {topology.host(rank) for rank in task.receivers} - holding
        nbytes = task.numel * itemsize
        for host in needing:
            incoming[host] += nbytes
        if needing:
            key = tuple(sorted(holding))
            first[key] = first.get(key, 0) + nbytes
            again += (len(needing) - 1) * nbytes
    receiving = max(nbytes / receive_rates[host] for host, nbytes in incoming.items())
    jobs = [Job(nbytes, dict.fromkeys(hosts)) for hosts, nbytes in sorted(first.items()) if nbytes]
    if again:
        jobs.append(Job(again, dict.fromkeys(send_rates)))
    return float(share(jobs, send_rates, {}, receiving).factor)


def _host_rates(topology: Topology, ranks: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Per host, bytes per second that the NICs of its ranks send and receive together."""
    sending: dict[int, float] = {}
    receiving: dict[int, float] = {}
    host_of = {topology.nic(rank): topology.host(rank) for rank in ranks}
    for nic in sorted(host_of):
        host, rate = host_of[nic], topology.nic_rate(nic)
        sending[host] = sending.get(host, 0.0) + rate.send_bytes_per_second
        receiving[host] = receiving.get(host, 0.0) + rate.receive_bytes_per_second
    return sending, receiving


def simulated_seconds(messages: Sequence[Message], hops: Sequence[Hop], itemsize: int, topology: Topology) -> float:
    """The time at which the last chunk arrives.

    A link is a NIC in one direction or, within a host, one rank's side of a copy. The chunks of one round share each
    link fairly: each is as large a part of its message as any, so all of them end when the link has carried them
    all, and a chunk has arrived when both its links have. A link takes up a round when it is done with the one
    before and a chunk is ready; a rank needs ``overhead_seconds`` to post each send.
    """
    network = _Network(topology)
    links_of, posted, free = network.links_of, network.posted, network.free
    overhead, latency = topology.overhead_seconds, topology.latency_seconds
    arrived: dict[tuple[int, int, int], float] = {}
    sizes = [[message.chunk_numel(chunk) * itemsize for chunk in range(len(message.chunks))] for message in messages]
    end = 0.0
    for _, together in groupby(hops, key=attrgetter("round")):
        ready = sorted([(arrived.get((hop.message, hop.chunk, hop.source), 0.0), hop) for hop in together])
        for since, (_, source, destination, message, chunk) in ready:
            (out, out_rate), (into, in_rate) = links_of(source, destination)
            posted[source] = begin = max(since, posted.get(source, 0.0)) + overhead
            nbytes = sizes[message][chunk]
            free[out] = max(begin, free[out]) + nbytes / out_rate
            free[into] = max(begin, free[into]) + nbytes / in_rate
        for _, (_, source, destination, message, chunk) in ready:
            (out, _), (into, _) = links_of(source, destination)
            done = max(free[out], free[into]) + latency
            arrived[message, chunk, destination] = done
            end = max(end, done)
    return end


def busiest_seconds(messages: Sequence[Message], itemsize: int, topology: Topology) -> float:
    """A time that :func:`simulated_seconds` is not below (but for rounding), whatever the rounds: the busiest link's,
    the busiest rank's, or that of the last chunk on the longest chain.
    """
    network = _Network(topology)
    each = topology.overhead_seconds + topology.latency_seconds
    longest = 0.0
    for message in messages:
        nbytes, chunks = message.numel * itemsize, len(message.chunks)
        for source, destination in pairwise(message.chain):
            network.posted[source] = network.posted.get(source, 0.0) + chunks * topology.overhead_seconds
            for link, rate in network.links_of(source, destination):
                network.free[link] += nbytes / rate
        _, rate = network.links_of(*message.chain[:2])[0]
        longest = max(longest, nbytes / rate + (len(message.chain) - 1) * each)
    busiest = max(network.free, default=0.0) + each
    return (
        max(busiest, max(network.posted.values(), default=0.0) + topology.latency_seconds, longest) if messages else 0.0
    )


_Link = tuple[int, float]
"""(number of what is shared, bytes per second)."""


class _Network:
    """The links between ranks, numbered as they are met.

    Attributes:
        free: per link, when it is done with what it has.
        posted: per rank, when it has posted its last send.
    """

    def __init__(self, topology: Topology) -> None:
        self.free: list[float] = []
        self.posted: dict[int, float] = {}
        self._topology = topology
        self._numbers: dict[tuple[str, int], int] = {}
        self.links_of = cache(self._links_of)

    def _links_of(self, source: int, destination: int) -> tuple[_Link, _Link]:
        """What a hop occupies: where it leaves, and where it enters."""
        topology = self._topology
        if topology.host(source) == topology.host(destination):
            rate = topology.intra_bytes_per_second
            return (self._number("rank out", source), rate), (self._number("rank in", destination), rate)
        here, there = topology.nic(source), topology.nic(destination)
        return (
            (self._number("NIC out", here), topology.nic_rate(here).send_bytes_per_second),
            (self._number("NIC in", there), topology.nic_rate(there).receive_bytes_per_second),
        )

    def _number(self, kind: str, index: int) -> int:
        number = self._numbers.setdefault((kind, index), len(self.free))
        if number == len(self.free):
            self.free.append(0.0)
        return number
