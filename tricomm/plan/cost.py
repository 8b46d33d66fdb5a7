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

    A link is a NIC in one direction or, within a host, one rank's side of a copy. The chunks of one round share each
    link fairly: each is as large a part of its message as any, so all of them end when the link has carried them
    all, and a chunk has arrived when both its links have. A link takes up a round when it is done with the one
    before and a chunk is ready; a rank needs ``overhead_seconds`` to post each send.
    """
    free: dict[tuple[str, int], float] = {}
    arrived: dict[tuple[int, int, int], float] = {}
    sizes = [[message.chunk_numel(chunk) * itemsize for chunk in range(len(message.chunks))] for message in messages]
    links: dict[tuple[int, int], tuple[_Link, _Link]] = {}
    end = 0.0
    for _, together in groupby(hops, key=attrgetter("round")):
        ready = sorted((arrived.get((hop.message, hop.chunk, hop.source), 0.0), hop) for hop in together)
        for since, hop in ready:
            pair = hop.source, hop.destination
            if pair not in links:
                links[pair] = _links(*pair, topology)
            posted = max(since, free.get(("processor", hop.source), 0.0)) + topology.overhead_seconds
            free["processor", hop.source] = posted
            for name, rate in links[pair]:
                free[name] = max(posted, free.get(name, 0.0)) + sizes[hop.message][hop.chunk] / rate
        for _, hop in ready:
            done = max(free[name] for name, _ in links[hop.source, hop.destination]) + topology.latency_seconds
            arrived[hop.message, hop.chunk, hop.destination] = done
            end = max(end, done)
    return end


_Link = tuple[tuple[str, int], float]
"""(what is shared, bytes per second)."""


def _links(source: int, destination: int, topology: Topology) -> tuple[_Link, _Link]:
    """What a hop occupies: where it leaves, and where it enters."""
    if topology.host(source) == topology.host(destination):
        rate = topology.intra_bytes_per_second
        return (("rank out", source), rate), (("rank in", destination), rate)
    here, there = topology.nic(source), topology.nic(destination)
    return (
        (("NIC out", here), topology.nic_rate(here).send_bytes_per_second),
        (("NIC in", there), topology.nic_rate(there).receive_bytes_per_second),
    )
