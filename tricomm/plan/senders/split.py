"""Split: several holders share a task so that the most loaded NIC sends as little as possible."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import NamedTuple

from tricomm.layout.intervals import cut_regions, region_numel
from tricomm.layout.topology import Topology
from tricomm.plan.senders.flow import Job, share
from tricomm.plan.senders.policy import Assignment, Errand, FanOut, Loads, choose_senders, greedy
from tricomm.plan.tasks import Task

SLACK = 256
"""A cut may miss its point by this fraction of the smaller part, so that it falls between rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """The optimum of the fractional problem: holders may share a task, receivers forward, no NIC does too much.

    Every NIC sends at most the larger of two times: the least that sending can take (a min-max flow over all
    NICs, those of forwarding receivers too), and what the most loaded receiving NIC takes anyway. Where whole
    tasks do as well, nothing is divided. Cuts fall between rows where that costs less than 1/256 of a part.

    Beyond the paper, which gives each task one sender.
    """

    def assign(self, tasks: Sequence[Task], itemsize: int, topology: Topology, fan_out: FanOut) -> Sequence[Assignment]:
        """See Balance."""

        def choose(errands: Sequence[Errand], loads: Loads) -> tuple[Assignment, ...]:
            goal = receiving_seconds(tasks, itemsize, topology)
            before = dict(loads.nic_seconds)
            whole = greedy(errands, loads)
            if loads.bottleneck_seconds <= goal * (1 + 1e-9):
                return whole
            return _divided(errands, topology, fan_out, before, goal)

        return choose_senders(tasks, itemsize, topology, fan_out, choose)


def receiving_seconds(tasks: Sequence[Task], itemsize: int, topology: Topology) -> float:
    """What the most loaded NIC must receive, if the receivers of a host share what all of them need."""
    seconds: dict[int, float] = {}
    for task in tasks:
        holding = {topology.host(rank) for rank in task.holders}
        hosts: dict[int, dict[int, None]] = {}
        for rank in task.receivers:
            hosts.setdefault(topology.host(rank), {})[topology.nic(rank)] = None
        nbytes = task.numel * itemsize
        for host, nics in hosts.items():
            if host not in holding:
                for nic in nics:
                    part = nbytes / len(nics) / topology.nic_rate(nic).receive_bytes_per_second
                    seconds[nic] = seconds.get(nic, 0.0) + part
    return max(seconds.values(), default=0.0)


class Kind(NamedTuple):
    """What errands have in common that are alike for the network, by NICs."""

    senders: tuple[int, ...]
    hosts: tuple[tuple[int, ...], ...]
    copies: int


def _kind(errand: Errand, topology: Topology, fan_out: FanOut) -> Kind:
    return Kind(
        _nics(errand.holders, topology),
        tuple(sorted(_nics(ranks, topology) for ranks in errand.hosts)),
        errand.crossings(fan_out),
    )


def _nics(ranks: Sequence[int], topology: Topology) -> tuple[int, ...]:
    return tuple(sorted({topology.nic(rank) for rank in ranks}))


def _divided(
    errands: Sequence[Errand], topology: Topology, fan_out: FanOut, before: Mapping[int, float], goal: float
) -> tuple[Assignment, ...]:
    """Assignments that follow the min-max flow."""
    kinds: dict[Kind, list[Errand]] = {}
    for errand in errands:
        kinds.setdefault(_kind(errand, topology, fan_out), []).append(errand)
    jobs = {kind: _jobs(kind, sum(errand.nbytes for errand in members), fan_out) for kind, members in kinds.items()}
    every = [job for of_kind in jobs.values() for job in of_kind]
    machines = {machine for job in every for machine in job.limits} | set(before)
    speeds = {machine: topology.nic_rate(machine).send_bytes_per_second for machine in sorted(machines)}
    amounts = iter(share(every, speeds, before, goal).amounts)
    sent: dict[int, int] = {}
    result: list[Assignment] = []
    for kind, members in kinds.items():
        done: dict[int, Fraction] = {}
        for of_job in islice(amounts, len(jobs[kind])):
            for machine, amount in of_job.items():
                done[machine] = done.get(machine, Fraction(0)) + amount
        for piece, errand in _pieces(kind, members, done, fan_out):
            result += _assignments(piece, errand, topology, sent)
    return tuple(result)


def _jobs(kind: Kind, nbytes: int, fan_out: FanOut) -> list[Job]:
    """What holders must send, and what receivers may do as well: forward it, each host at most once."""
    senders: dict[int, int | None] = dict.fromkeys(kind.senders)
    if fan_out is not FanOut.ONCE:
        return [Job(kind.copies * nbytes, senders)]
    if len(kind.hosts) == 1:
        return [Job(nbytes, senders)]
    relays = {nic: nbytes // len(nics) for nics in kind.hosts for nic in nics}
    return [Job(nbytes, senders), Job((len(kind.hosts) - 1) * nbytes, {**relays, **senders})]


class Piece(NamedTuple):
    """Bytes [start, stop) of all errands of one kind: by which NICs they are sent and, for chains, at which of the
    kind's hosts each chain ends.
    """

    start: Fraction
    stop: Fraction
    senders: tuple[int, ...]
    last: tuple[int, ...]


def _pieces(
    kind: Kind, members: Sequence[Errand], done: Mapping[int, Fraction], fan_out: FanOut
) -> Iterator[tuple[Piece, Errand]]:
    """The pieces of every errand, which is cut where the flow passes from one NIC to the next.

    Senders are laid along a line, each as long as what it sends, and hosts along another, each as long as what it
    need not forward. Both lines are equally long and are wound around the errands; so every byte has as many
    senders as chains that end, and no byte ends twice at one host.
    """
    nbytes = sum(errand.nbytes for errand in members)
    copies = 1 if fan_out is FanOut.ONCE else kind.copies
    senders = _wound([(nic, done.get(nic, Fraction(0)) / copies) for nic in kind.senders], nbytes)
    ends: list[tuple[Fraction, Fraction, int]] = []
    if fan_out is FanOut.ONCE:
        unsent = [nbytes - sum((done.get(nic, Fraction(0)) for nic in nics), Fraction(0)) for nics in kind.hosts]
        ends = _wound(list(enumerate(unsent)), nbytes)
    begin = Fraction(0)
    for errand in members:
        end = begin + errand.nbytes
        points = sorted({min(max(edge, begin), end) for start, stop, _ in senders + ends for edge in (start, stop)})
        numel = sum(map(region_numel, errand.regions))
        scale = Fraction(numel, errand.nbytes)
        inner = [round((point - begin) * scale) for point in points[1:-1]]
        gaps = [after - before for before, after in pairwise([0, *inner, numel])]
        parts = cut_regions(errand.regions, inner, min(gaps) // SLACK)
        for part, (start, stop) in zip(parts, pairwise(points), strict=True):
            if part:
                piece = Piece(start, stop, _at(senders, start), _at(ends, start))
                yield piece, errand._replace(regions=part)
        begin = end


def _wound(lengths: Sequence[tuple[int, Fraction]], around: int) -> list[tuple[Fraction, Fraction, int]]:
    """(start, stop, item) of items laid end to end along a line that is wound around [0, around)."""
    result: list[tuple[Fraction, Fraction, int]] = []
    position = Fraction(0)
    for item, length in lengths:
        end = position + length
        while position < end:
            turn = Fraction(position // around * around)
            stop = min(end, turn + around)
            result.append((position - turn, stop - turn, item))
            position = stop
    return result


def _at(line: Sequence[tuple[Fraction, Fraction, int]], point: Fraction) -> tuple[int, ...]:
    return tuple(item for start, stop, item in line if start <= point < stop)


def _assignments(piece: Piece, errand: Errand, topology: Topology, sent: dict[int, int]) -> Iterator[Assignment]:
    """One assignment per chain; without chains, one for all receivers."""
    hosts = sorted(errand.hosts, key=lambda ranks: _nics(ranks, topology))
    chains = len(piece.last) or 1
    between = [ranks for index, ranks in enumerate(hosts) if index not in piece.last]
    for chain in range(chains):
        nic = piece.senders[chain]
        holders = [rank for rank in errand.holders if topology.nic(rank) == nic]
        sender = min(holders, key=lambda rank: sent.get(rank, 0))
        sent[sender] = sent.get(sender, 0) + int(piece.stop - piece.start)
        path = between[chain::chains] + [hosts[index] for index in piece.last[chain : chain + 1]]
        yield Assignment(sender, tuple(rank for ranks in path for rank in ranks), errand.regions)
