"""What a plan costs on a topology: the bound that no plan can beat, and the time that this one should take."""

from collections.abc import Sequence
from itertools import groupby
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

    A chunk leaves through its sender's link and enters through its receiver's, at the rate of the slower one, each
    link serving its chunks one after the other: round by round, and within a round in the order in which they are
    ready. As each round carries the same part of every message, that shares a link among messages as fairly as
    equal turns of a chunk do. A link is a NIC in one direction or, within a host, one rank's side of a copy.
    """
    free: dict[tuple[str, int], float] = {}
    arrived: dict[tuple[int, int, int], float] = {}
    sizes = [[message.chunk_numel(chunk) * itemsize for chunk in range(len(message.chunks))] for message in messages]
    latency, overhead = topology.latency_seconds, topology.overhead_seconds
    end = 0.0
    for _, together in groupby(hops, key=attrgetter("round")):
        ready = [(arrived.get((hop.message, hop.chunk, hop.source), 0.0), hop) for hop in together]
        for since, hop in sorted(ready):
            source, destination = hop.source, hop.destination
            if topology.host(source) == topology.host(destination):
                out, into = ("rank out", source), ("rank in", destination)
                out_rate = in_rate = topology.intra_bytes_per_second
            else:
                here, there = topology.nic(source), topology.nic(destination)
                out, into = ("NIC out", here), ("NIC in", there)
                out_rate = topology.nic_rate(here).send_bytes_per_second
                in_rate = topology.nic_rate(there).receive_bytes_per_second
            posted = max(since, free.get(("processor", source), 0.0)) + overhead
            free["processor", source] = posted
            start = max(posted, free.get(out, 0.0))
            nbytes = sizes[hop.message][hop.chunk]
            left = free[out] = start + nbytes / out_rate
            done = free[into] = max(left, max(start, free.get(into, 0.0)) + nbytes / in_rate)
            arrived[hop.message, hop.chunk, destination] = done + latency
            end = max(end, done + latency)
    return end
