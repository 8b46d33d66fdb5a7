"""Cost a plan on a topology: the time that no plan can beat, and the time that this one should take."""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from tricomm.layout.columns import numbers, offsets_of, positions, spread, starts_run
from tricomm.layout.topology import Topology
from tricomm.plan.move import Move
from tricomm.plan.network.links import ChainLinks, crossings, link_count
from tricomm.plan.network.nic_seconds import host_rates, link_seconds
from tricomm.plan.routes.chunks import Message, MessageTable
from tricomm.plan.routes.joined import JoinedMessages
from tricomm.plan.routes.rounds import Hop, hop_table
from tricomm.plan.senders.flow import Job, share
from tricomm.plan.tasks import Task


def lower_bound_seconds(tasks: Sequence[Task], topology: Topology, ranks: Sequence[int]) -> float:
    """Compute the NIC-bound optimum: the larger of two times that no plan can beat.

    Receiving: a host receives once what its ranks need and none of them holds. Sending: every such byte is sent
    once per host that receives it, the first time by a host that holds it, and after that by whoever has time (a
    min-max flow). A host has the NICs that its ``ranks`` use.

    Args:
        tasks: all of a move.
        topology: hosts and rates.
        ranks: all that take part.

    Example:
        Rank 0 sends 4 MB to two hosts; once it must leave host a, and each must receive it:

        >>> from tricomm.plan.parts import Part
        >>> task = Task((Part(0, 4, (((0, 1 << 20),),)),), holders=(0,), receivers=(1, 2))
        >>> lower_bound_seconds([task], Topology(("a", "b", "c"), nic_bytes_per_second=1e9), range(3))
        0.004194304
    """
    send_rates, receive_rates = host_rates(topology, ranks)
    incoming = dict.fromkeys(send_rates, 0)
    first: dict[tuple[int, ...], int] = {}
    again = 0
    for task in tasks:
        holding = {topology.host(rank) for rank in task.holders}
        needing = {topology.host(rank) for rank in task.remote_receivers} - holding
        nbytes = task.nbytes
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


def simulated_seconds(columns: "MessageColumns", hops: Sequence[Hop], topology: Topology) -> float:
    """Simulate hops, and find when the last chunk arrives; see :func:`hop_times`."""
    if not len(hops):
        return 0.0
    return max(_simulate(HopColumns.of(columns, hops, topology), topology)[-1])


class HopTimes(NamedTuple):
    """When each of some hops happens, in seconds from the beginning; each field (hops,).

    Attributes:
        posted: the source has posted the send, which took it ``overhead_seconds``.
        out_begin, out_end: the chunk passes the link by which it leaves.
        into_begin, into_end: it passes the link by which it enters.
        arrival: the destination has all of it, and may forward it.
    """

    posted: np.ndarray
    out_begin: np.ndarray
    out_end: np.ndarray
    into_begin: np.ndarray
    into_end: np.ndarray
    arrival: np.ndarray


def hop_times(move: Move, topology: Topology) -> HopTimes:
    """Simulate a move, and find when each of its hops happens, in the order of ``move.hops``.

    A link is a NIC in one direction or, within a host, one rank's end of a copy, or its memory. The chunks of one round
    share each link fairly: each is as large a part of its message as any, so all of them end when the link has carried
    them all, and a chunk has arrived when both its links have. A link takes up a round when it is done with the one
    before and a chunk is ready; a rank needs ``overhead_seconds`` to post each send. ``out_begin`` to ``into_end`` show
    the chunks of a round one after the other, each for as long as it alone would take.

    Example:
        Rank 0 brings two chunks of 1 MB to rank 1, at 1 GB/s:

        >>> from tricomm import Mesh, SendRecv, ShardingSpec, make_plan
        >>> here = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (500_000,), "float32")
        >>> there = ShardingSpec.from_dims(Mesh([1], ("y",)), ["R"])
        >>> topology = Topology(("a", "b"), 1e9, latency_seconds=5e-6, overhead_seconds=1e-6)
        >>> plan = make_plan(here, there, topology=topology, strategy=SendRecv(chunk_bytes=1_000_000))
        >>> times = hop_times(plan.moves[0], topology)
        >>> (times.out_begin * 1e6).round(3).tolist(), (times.arrival * 1e6).round(3).tolist()
        ([1.0, 1001.0], [1006.0, 2006.0])
    """
    if not len(move.hops):
        return HopTimes(*np.zeros((6, 0)))
    columns = MessageColumns.of(move.messages)
    rows = HopColumns.of(columns, move.hops, topology)
    posted, out_end, into_end, arrived = (np.array(column) for column in _simulate(rows, topology))
    times = (posted, out_end - rows.out_seconds, out_end, into_end - rows.into_seconds, into_end, arrived)
    place = np.argsort(_simulation_order(hop_table(move.hops)))
    return HopTimes(*(column[place] for column in times))


def _simulate(rows: "HopColumns", topology: Topology) -> tuple[list[float], list[float], list[float], list[float]]:
    """Find when each row is posted, leaves, enters and arrives."""
    rounds, before, source, out, into, out_seconds, into_seconds, later = rows
    overhead, latency = topology.overhead_seconds, topology.latency_seconds
    rank_free = [0.0] * len(topology.hosts)
    link_free = [0.0] * link_count(topology)
    posted, left, entered = ([0.0] * len(before) for _ in range(3))
    arrived = [0.0] * (len(before) + 1)  # the last one is that of what a sender has from the start
    for first, last in pairwise(rounds):
        ready = sorted(zip([arrived[row] for row in before[first:last]], range(first, last), strict=True))
        for since, row in ready:
            rank = source[row]
            begin = rank_free[rank]
            posted[row] = rank_free[rank] = (since if since > begin else begin) + overhead
        # A link that ranks share carries first what was posted first.
        for begin, row in sorted(zip(posted[first:last], range(first, last), strict=True)):
            leaves, enters = out[row], into[row]
            busy = link_free[leaves]
            left[row] = link_free[leaves] = (begin if begin > busy else busy) + out_seconds[row]
            busy = link_free[enters]
            entered[row] = link_free[enters] = (begin if begin > busy else busy) + into_seconds[row]
        for row in range(first, last):
            out_done, into_done = link_free[out[row]], link_free[into[row]]
            arrived[row] = (out_done if out_done > into_done else into_done) + latency + later[row]
    return posted, left, entered, arrived[:-1]


class HopColumns(NamedTuple):
    """Hops in the order of rounds, as lists of numbers, which Python reads faster one by one than arrays.

    Attributes:
        rounds: where each round begins, and where the last one ends.
        before: the row that brings a hop's chunk to its source; -1 where the source is its message's sender.
        source: rank.
        out, into: the links.
        out_seconds, into_seconds: for which it keeps them busy.
        later: seconds after which it arrives beside the latency: what a broadcast takes along its ring.
    """

    rounds: list[int]
    before: list[int]
    source: list[int]
    out: list[int]
    into: list[int]
    out_seconds: list[float]
    into_seconds: list[float]
    later: list[float]

    @classmethod
    def of(cls, columns: "MessageColumns", hops: Sequence[Hop], topology: Topology) -> "HopColumns":
        """List hops in the order of rounds; ``columns`` has their messages."""
        table = hop_table(hops)
        rounds, source, destination, message, chunk = table[_simulation_order(table)].T
        nbytes = columns.nbytes_of(message, chunk)
        carrier, place = carriers(columns, table[_simulation_order(table)], topology)
        links = crossings(carrier, destination, topology)
        # A rank receives a chunk of a message once.
        ranks, chunks = len(topology.hosts), int(chunk.max()) + 1
        brings, gives = ((message * ranks + rank) * chunks + chunk for rank in (destination, source))
        order = np.argsort(brings)
        at = positions(brings[order], gives)
        before = np.where(at >= 0, order[at], -1)
        begins = np.append(np.flatnonzero(starts_run(rounds)), len(rounds))
        later = place * (topology.multicast_hop_seconds or 0.0)
        lists = (begins, before, carrier, links.out, links.into, *links.seconds(nbytes), later)
        return cls(*(column.tolist() for column in lists))


def carriers(columns: "MessageColumns", table: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Find which rank puts each hop's bytes on its link, and how far along a ring: in a broadcast in one call each
    rank hands on to the next, where the topology says that there are such calls. (hops,) each.
    """
    _, source, destination, message, _ = table.T
    place = np.zeros(len(table), np.int64)
    if topology.multicast_hop_seconds is None or not columns.in_one_call[message].any():
        return source, place
    links, ranks = columns.links, len(topology.hosts)
    along = np.arange(len(links.chain)) - links.firsts[links.chain] + 1
    behind = np.where(along == 1, links.sources, np.roll(links.destinations, 1))
    keys = links.chain * ranks + links.destinations
    order = np.argsort(keys)
    at = order[positions(keys[order], message * ranks + destination)]
    is_ring = columns.in_one_call[message]
    return np.where(is_ring, behind[at], source), np.where(is_ring, along[at], place)


def _simulation_order(table: np.ndarray) -> np.ndarray:
    """Sort hops by round, and within a round by rank: the rows of a table in the order of the simulation."""
    order: np.ndarray = np.lexsort(table.T[::-1])
    return order


def busiest_seconds(columns: "MessageColumns", topology: Topology) -> float:
    """Bound :func:`simulated_seconds` from below (but for rounding), whatever the rounds: by the time of the busiest
    link, of the busiest rank, or of the last chunk on the longest chain.
    """
    links, counts = columns.links, columns.chunk_counts
    if not len(counts):
        return 0.0
    each = topology.overhead_seconds + topology.latency_seconds
    crossed = crossings(links.sources, links.destinations, topology)
    longest = (columns.nbytes / crossed.out_rates[links.firsts] + links.lengths * each).max()
    return max(busiest_end_seconds(columns, topology), float(longest))


def busiest_end_seconds(columns: "MessageColumns", topology: Topology) -> float:
    """The same where messages may follow trees: by the time of the busiest link or rank."""
    links, counts = columns.links, columns.chunk_counts
    if not len(counts):
        return 0.0
    each = topology.overhead_seconds + topology.latency_seconds
    crossed = crossings(links.sources, links.destinations, topology)
    busiest = max(seconds.max() for seconds in link_seconds(crossed, columns.nbytes[links.chain], topology))
    posting = np.bincount(links.sources, counts[links.chain] * topology.overhead_seconds).max()
    return float(max(busiest + each, posting + topology.latency_seconds))


def busiest_nic_seconds(columns: "MessageColumns", topology: Topology) -> tuple[float, float]:
    """For how long the NIC that sends longest does so, and the one that receives longest."""
    links, nics = columns.links, len(topology.nic_send_rates)
    crossed = crossings(links.sources, links.destinations, topology)
    out, into = link_seconds(crossed, columns.nbytes[links.chain], topology)
    return float(out[:nics].max()), float(into[:nics].max())


def nic_seconds(moves: Sequence[Move], topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Sum for how long each NIC sends and receives in all moves, (NICs,) each, by the topology's numbers."""
    tables = [hop_table(move.hops) for move in moves]
    nbytes = [
        MessageColumns.of(move.messages).nbytes_of(table[:, 3], table[:, 4])
        for move, table in zip(moves, tables, strict=True)
    ]
    of_moves = zip(moves, tables, strict=True)
    sources = np.concatenate([carriers(MessageColumns.of(one.messages), rows, topology)[0] for one, rows in of_moves])
    destinations = np.concatenate(tables)[:, 2]
    sending, receiving = link_seconds(crossings(sources, destinations, topology), np.concatenate(nbytes), topology)
    nics = len(topology.nic_send_rates)
    return sending[:nics], receiving[:nics]


class MessageColumns(NamedTuple):
    """Messages as columns.

    Attributes:
        links: of their chains.
        chunk_counts: (messages,).
        chunk_nbytes: (chunks,), bytes of every chunk, message after message.
        in_one_call: (messages,), see Message.
    """

    links: ChainLinks
    chunk_counts: np.ndarray
    chunk_nbytes: np.ndarray
    in_one_call: np.ndarray

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "MessageColumns":
        """Tabulate any messages."""
        if isinstance(messages, JoinedMessages):
            return cls._joined([cls.of(group) for group in messages.groups])
        if isinstance(messages, MessageTable):
            counts, nbytes = messages.chunk_counts, np.repeat(messages.nbytes, messages.chunk_counts)
            several = np.flatnonzero(counts > 1)
            if len(several):
                cuts, of_each = messages.cuts(), counts[several]
                ahead = np.arange(of_each.sum()) - offsets_of(of_each)[:-1].repeat(of_each)
                nbytes[spread(offsets_of(counts), several)] = cuts.nbytes[cuts.first[several].repeat(of_each) + ahead]
            return cls(messages.links, counts, nbytes, np.zeros(len(counts), bool))
        sizes = [_nbytes_of(message) for message in messages]
        links = ChainLinks.of([message.chain for message in messages], [message.parents for message in messages])
        in_one_call = np.array([message.in_one_call for message in messages], bool)
        return cls(links, numbers(map(len, sizes), len(sizes)), numbers(chain.from_iterable(sizes)), in_one_call)

    @classmethod
    def _joined(cls, groups: Sequence["MessageColumns"]) -> "MessageColumns":
        messages = offsets_of(numbers((len(group.chunk_counts) for group in groups), len(groups)))[:-1].tolist()
        rows = offsets_of(numbers((len(group.links.chain) for group in groups), len(groups)))[:-1].tolist()
        links = ChainLinks(
            np.concatenate([group.links.chain + first for group, first in zip(groups, messages, strict=True)]),
            np.concatenate([group.links.sources for group in groups]),
            np.concatenate([group.links.destinations for group in groups]),
            np.concatenate([group.links.firsts + first for group, first in zip(groups, rows, strict=True)]),
        )
        counts, nbytes, in_one_call = (np.concatenate([group[field] for group in groups]) for field in (1, 2, 3))
        return cls(links, counts, nbytes, in_one_call)

    @property
    def hops(self) -> int:
        """Count the hops of all chunks."""
        return int(self.chunk_counts[self.links.chain].sum())

    def nbytes_of(self, messages: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Look up the bytes of chunks, each given by its message and its number in it."""
        nbytes: np.ndarray = self.chunk_nbytes[offsets_of(self.chunk_counts)[messages] + chunks]
        return nbytes

    @property
    def nbytes(self) -> np.ndarray:
        """Sum the bytes of each message, (messages,)."""
        total = offsets_of(self.chunk_nbytes)
        ends = offsets_of(self.chunk_counts)
        nbytes: np.ndarray = total[ends[1:]] - total[ends[:-1]]
        return nbytes


def _nbytes_of(message: Message) -> tuple[int, ...]:
    return tuple(message.chunk_nbytes(index) for index in range(len(message.chunks)))
