"""What a plan costs on a topology: the bound that no plan can beat, and the time that this one should take."""

from collections.abc import Sequence

from tricomm.plan.rounds import Hop
from tricomm.plan.routes import Message
from tricomm.plan.tasks import Task
from tricomm.topology import Topology


def lower_bound_seconds(tasks: Sequence[Task], itemsize: int, topology: Topology) -> float:
    """The NIC-bound optimum: every host must receive once what its ranks need and none of them holds, and for
    every set of hosts, what only they hold and others need must leave through their NICs once.
    """
    incoming: dict[str, int] = {}
    outgoing: dict[frozenset[str], int] = {}
    for task in tasks:
        holding = frozenset(topology.host(rank) for rank in task.holders)
        needing = {topology.host(rank) for rank in task.receivers} - holding
        nbytes = task.numel * itemsize
        for host in needing:
            incoming[host] = incoming.get(host, 0) + nbytes
        if needing:
            outgoing[holding] = outgoing.get(holding, 0) + nbytes
    busiest = max(incoming.values(), default=0)
    sets = set(outgoing) | {frozenset[str]().union(*outgoing)}
    joint = max(
        (sum(nbytes for held, nbytes in outgoing.items() if held <= hosts) / len(hosts) for hosts in sets if hosts),
        default=0.0,
    )
    return max(busiest, joint) / topology.host_bytes_per_second


def simulated_seconds(messages: Sequence[Message], hops: Sequence[Hop], itemsize: int, topology: Topology) -> float:
    """The time at which the last chunk arrives if hops start in the order of their rounds as soon as the chunk
    is there and both links are free.

    A link is a NIC in one direction, or one rank's side of an intra-host copy. Chunks do not share a link.
    """
    free: dict[tuple[str, int | str], list[float]] = {}
    arrived: dict[tuple[int, int, int], float] = {}
    end = 0.0
    for hop in hops:
        here, there = topology.host(hop.source), topology.host(hop.destination)
        if here == there:
            out = free.setdefault(("rank out", hop.source), [0.0])
            into = free.setdefault(("rank in", hop.destination), [0.0])
            rate = topology.intra_bytes_per_second
        else:
            out = free.setdefault(("NIC out", here), [0.0] * topology.nics_per_host)
            into = free.setdefault(("NIC in", there), [0.0] * topology.nics_per_host)
            rate = topology.nic_bytes_per_second
        sender, receiver = out.index(min(out)), into.index(min(into))
        start = max(arrived.get((hop.message, hop.chunk, hop.source), 0.0), out[sender], into[receiver])
        done = start + messages[hop.message].chunk_numel(hop.chunk) * itemsize / rate
        out[sender] = into[receiver] = done
        arrived[hop.message, hop.chunk, hop.destination] = done + topology.latency_seconds
        end = max(end, done + topology.latency_seconds)
    return end
