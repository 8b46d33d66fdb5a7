"""Split: divide tasks among their holders so that the busiest NIC sends as little as possible."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from math import gcd
from typing import NamedTuple

from tricomm.kinds import explains_missing
from tricomm.layout.topology import Topology
from tricomm.plan.network.fan_out import FanOut
from tricomm.plan.network.hosts import HostsOf
from tricomm.plan.network.nic_seconds import NicSeconds
from tricomm.plan.parts import cut_parts
from tricomm.plan.senders.flow import Job, share
from tricomm.plan.senders.policy import Assignment, SendLoads, TransferDemand, choose_senders, greedy
from tricomm.plan.tasks import Task

SLACK = 256
"""A cut may miss its point by this fraction of the smaller part, so that it falls between rows."""


@explains_missing
@dataclass(frozen=True, slots=True)
class Split:
    """Divide tasks among their holders: the optimum of the fractional problem. The default.

    Every NIC sends at most the larger of two times: the least that sending can take (a min-max flow over all
    NICs, those of forwarding receivers too), and what the most loaded receiving NIC takes anyway. Where whole
    tasks do as well, nothing is divided. Cuts fall between rows where that costs less than 1/256 of a part.

    Beyond the paper, which gives each task one sender.

    Example:
        >>> from tricomm import Mesh, ShardingSpec, Split, make_plan
        >>> two = ShardingSpec.from_dims(Mesh([0, 1], ("x",)), ["R", "R"], (6, 1024), "float32")
        >>> three = ShardingSpec.from_dims(Mesh([2, 3, 4], ("y",)), ["S0", "R"])
        >>> move = make_plan(two, three, balance=Split()).moves[0]
        >>> [(message.chain, message.numel) for message in move.messages]
        [((0, 2), 2048), ((0, 3), 1024), ((1, 3), 1024), ((1, 4), 2048)]
    """

    def assign(self, tasks: Sequence[Task], topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See SenderPolicy.

        >>> from tricomm.plan.parts import Part
        >>> task = Task((Part(0, 4, (((0, 6),),)),), holders=(0, 1), receivers=(2,))
        >>> [(one.sender, one.nbytes) for one in Split().assign((task, task, task), Topology.flat(4), FanOut.ONCE)]
        [(0, 24), (1, 24), (0, 24)]
        """

        def choose(demands: Sequence[TransferDemand], loads: SendLoads) -> tuple[Assignment, ...]:
            goal = receiving_seconds(tasks, topology)
            before = dict(loads.nics.seconds)
            whole = greedy(demands, loads)
            if loads.nics.busiest <= goal * (1 + 1e-9):
                return whole
            return _divided(demands, topology, fan_out, before, goal)

        return choose_senders(tasks, topology, fan_out, choose)


def receiving_seconds(tasks: Sequence[Task], topology: Topology) -> float:
    """For how long the busiest NIC must receive, if the receivers of a host share what all of them need."""
    receiving, hosts_of = NicSeconds(topology, receiving=True), HostsOf(topology)
    for task in tasks:
        holding = {topology.host(rank) for rank in task.holders}
        for ranks in hosts_of[task.remote_receivers]:
            if topology.host(ranks[0]) not in holding:
                receiving.add_evenly(ranks, task.nbytes)
    return receiving.busiest


class DemandClass(NamedTuple):
    """Demands that are alike for the network.

    Attributes:
        senders: NICs that may send them.
        hosts: NICs of the receivers, by host.
        copies: how often each enters a NIC.
    """

    senders: tuple[int, ...]
    hosts: tuple[tuple[int, ...], ...]
    copies: int


def _class_of(demand: TransferDemand, topology: Topology, fan_out: FanOut) -> DemandClass:
    return DemandClass(
        _nics(demand.holders, topology),
        tuple(sorted(_nics(ranks, topology) for ranks in demand.hosts)),
        fan_out.crossings(demand.hosts),
    )


def _nics(ranks: Sequence[int], topology: Topology) -> tuple[int, ...]:
    return tuple(sorted({topology.nic(rank) for rank in ranks}))


def _divided(
    demands: Sequence[TransferDemand], topology: Topology, fan_out: FanOut, before: Mapping[int, float], goal: float
) -> tuple[Assignment, ...]:
    """Make the assignments that follow the min-max flow."""
    classes: dict[DemandClass, list[TransferDemand]] = {}
    for demand in demands:
        classes.setdefault(_class_of(demand, topology, fan_out), []).append(demand)
    jobs = {
        demand_class: _jobs(demand_class, sum(demand.nbytes for demand in members), fan_out)
        for demand_class, members in classes.items()
    }
    every = [job for of_class in jobs.values() for job in of_class]
    machines = {machine for job in every for machine in job.limits} | set(before)
    speeds = {machine: topology.nic_rate(machine).send_bytes_per_second for machine in sorted(machines)}
    amounts = iter(share(every, speeds, before, goal).amounts)
    sent: dict[int, int] = {}
    result: list[Assignment] = []
    for demand_class, members in classes.items():
        done: dict[int, Fraction] = {}
        for of_job in islice(amounts, len(jobs[demand_class])):
            for machine, amount in of_job.items():
                done[machine] = done.get(machine, Fraction(0)) + amount
        for span, demand in _pieces(demand_class, members, done, fan_out):
            result += _assignments(span, demand, topology, sent)
    return tuple(result)


def _jobs(demand_class: DemandClass, nbytes: int, fan_out: FanOut) -> list[Job]:
    """State what holders must send, and what receivers may do as well: forward it, each host at most once."""
    senders: dict[int, int | None] = dict.fromkeys(demand_class.senders)
    if not fan_out.hosts_forward:
        return [Job(demand_class.copies * nbytes, senders)]
    if len(demand_class.hosts) == 1:
        return [Job(nbytes, senders)]
    relays = {nic: nbytes // len(nics) for nics in demand_class.hosts for nic in nics}
    return [Job(nbytes, senders), Job((len(demand_class.hosts) - 1) * nbytes, {**relays, **senders})]


class ByteRange(NamedTuple):
    """A range of the bytes of all demands of one class.

    Attributes:
        start, stop: the first byte, and the first behind it.
        senders: the NICs that send it.
        last: for chains, at which of the class's hosts each chain ends.
    """

    start: Fraction
    stop: Fraction
    senders: tuple[int, ...]
    last: tuple[int, ...]


def _pieces(
    demand_class: DemandClass, members: Sequence[TransferDemand], done: Mapping[int, Fraction], fan_out: FanOut
) -> Iterator[tuple[ByteRange, TransferDemand]]:
    """Cut every demand where the flow passes from one NIC to the next.

    Senders are laid along a line, each as long as what it sends, and hosts along another, each as long as what it
    need not forward. Both lines are equally long and are wrapped around the demands; so every byte has as many
    senders as chains that end, and no byte ends twice at one host.
    """
    nbytes = sum(demand.nbytes for demand in members)
    copies = 1 if fan_out.hosts_forward else demand_class.copies
    senders = _wrapped([(nic, done.get(nic, Fraction(0)) / copies) for nic in demand_class.senders], nbytes)
    ends: list[tuple[Fraction, Fraction, int]] = []
    if fan_out.hosts_forward:
        unsent = [
            nbytes - sum((done.get(nic, Fraction(0)) for nic in nics), Fraction(0)) for nics in demand_class.hosts
        ]
        ends = _wrapped(list(enumerate(unsent)), nbytes)
    begin = Fraction(0)
    for demand in members:
        end = begin + demand.nbytes
        points = sorted({min(max(edge, begin), end) for start, stop, _ in senders + ends for edge in (start, stop)})
        unit = gcd(*(part.itemsize for part in demand.parts))
        inner = [round((point - begin) / unit) for point in points[1:-1]]
        gaps = [after - before for before, after in pairwise([0, *inner, demand.nbytes // unit])]
        parts = cut_parts(demand.parts, unit, inner, min(gaps) // SLACK)
        for part, (start, stop) in zip(parts, pairwise(points), strict=True):
            if part:
                span = ByteRange(start, stop, _at(senders, start), _at(ends, start))
                yield span, demand._replace(parts=part)
        begin = end


def _wrapped(lengths: Sequence[tuple[int, Fraction]], around: int) -> list[tuple[Fraction, Fraction, int]]:
    """Lay items end to end along a line that is wrapped around [0, around): (start, stop, item) of each stretch.

    Example:
        >>> _wrapped([(7, Fraction(6)), (8, Fraction(4))], around=8)
        [(Fraction(0, 1), Fraction(6, 1), 7), (Fraction(6, 1), Fraction(8, 1), 8), (Fraction(0, 1), Fraction(2, 1), 8)]
    """
    result: list[tuple[Fraction, Fraction, int]] = []
    position = Fraction(0)
    for item, length in lengths:
        end = position + length
        while position < end:
            lap = Fraction(position // around * around)
            stop = min(end, lap + around)
            result.append((position - lap, stop - lap, item))
            position = stop
    return result


def _at(line: Sequence[tuple[Fraction, Fraction, int]], point: Fraction) -> tuple[int, ...]:
    return tuple(item for start, stop, item in line if start <= point < stop)


def _assignments(
    span: ByteRange, demand: TransferDemand, topology: Topology, sent: dict[int, int]
) -> Iterator[Assignment]:
    """Make one assignment per chain; without chains, one for all receivers."""
    hosts = sorted(demand.hosts, key=lambda ranks: _nics(ranks, topology))
    chains = len(span.last) or 1
    between = [ranks for index, ranks in enumerate(hosts) if index not in span.last]
    for chain in range(chains):
        nic = span.senders[chain]
        holders = [rank for rank in demand.holders if topology.nic(rank) == nic]
        sender = min(holders, key=lambda rank: sent.get(rank, 0))
        sent[sender] = sent.get(sender, 0) + int(span.stop - span.start)
        path = between[chain::chains] + [hosts[index] for index in span.last[chain : chain + 1]]
        yield Assignment(sender, tuple(rank for ranks in path for rank in ranks), demand.parts)
