"""What memory is worth between ranks of one host: a broadcast to three replicas, and each way by the length of runs.

Called by ``bench.overhead``, on the same processes. Ranks that may read each other's memory take a lesser way for once
where a call to the system is refused while they connect.
"""

import errno
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from bench.turns import Methods, Samples, p10, slowest, take_turns
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.options import TransportName
from tricomm.packing import runs
from tricomm.transport.memory import meeting
from tricomm.transport.memory.reading import UnreadableError

HAND = "by hand"
NETWORK = "network"
ARENA = "arena"
PIECES = "in pieces"
PACKED = "packed, then read"
IN_PLACE = "read in place"
MEMORY = "memory"
BROADCAST = "broadcast"

TRANSPORTS: tuple[TransportName, ...] = ("network", "memory")

SIDE = 4096
REPLICA_RANKS = (1, 2, 3)
RUN_NBYTES = (64, 256, 1024, 2048, 4096, 16384, 65536)
RUNS_NBYTES = 16 << 20
"""Of the tensor that is cut into such runs."""


class Hand:
    """isend and irecv: columns of the shard, packed where they are not in one piece, to each receiver into place."""

    def __init__(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        self._sends = [(peer, rows, None if rows.is_contiguous() else rows.clone()) for peer, rows in sends.items()]
        self._receives = list(receives.items())

    def __call__(self) -> None:
        """Send and receive."""
        works = [dist.irecv(rows, peer) for peer, rows in self._receives]
        for peer, rows, packed in self._sends:
            works.append(dist.isend(rows if packed is None else packed.copy_(rows), peer))
        for work in works:
            assert work is not None
            work.wait()


def require(out: torch.Tensor | None, expected: torch.Tensor, methods: Methods) -> None:
    """Run each method once and compare what it wrote.

    Raises:
        ValueError: an element is wrong or was not written.
    """
    for name, method in methods.items():
        if out is not None:
            out.zero_()
        method()
        if out is not None and not torch.equal(out, expected):
            raise ValueError(f"{name}: {int((out != expected).sum())} elements are wrong")


def fan_out(rank: int, repeats: int) -> Samples:
    """From rank 0 to replicas on three others, 64 MiB of float32."""
    full = 1 + torch.arange(SIDE * SIDE, dtype=torch.float32).reshape(SIDE, SIDE)
    source = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (SIDE, SIDE), "float32")
    destination = ShardingSpec(Mesh(REPLICA_RANKS, ("x",)), (Replicate(),))
    shard, out = (full, None) if rank == 0 else (None, torch.empty_like(full))
    movers = {name: Resharder(source, destination, transport=name) for name in TRANSPORTS}
    of_all = full.clone() if out is None else out
    methods: dict[str, Callable[[], object]] = {
        HAND: Hand({} if shard is None else dict.fromkeys(REPLICA_RANKS, shard), {} if out is None else {0: out}),
        BROADCAST: lambda: dist.broadcast(of_all, 0),
        **{name: partial(mover, shard, out=out) for name, mover in movers.items()},
    }
    require(out, full, methods)
    return take_turns(methods, repeats)


@contextmanager
def taking(way: str) -> Iterator[None]:
    """While ranks connect and bind: as if no memory could be read, or whatever the length of runs.

    4 MiB go from each rank to each, in pieces if they can.
    """

    def refuse(*_: object) -> None:
        raise UnreadableError(errno.EPERM, "not for this measurement")

    if way == ARENA:
        with patch.object(meeting, "read_run", refuse):
            yield
    else:
        least = {PACKED: RUNS_NBYTES + 1, IN_PLACE: 1}.get(way)
        with patch.object(runs, "MIN_RUN_NBYTES", least) if least else patch.dict({}):
            yield


def whole(call: Callable[[], object]) -> None:
    """Call as if nothing went in pieces, which is how all went before there were any."""
    before, runs.PIECE_NBYTES = runs.PIECE_NBYTES, RUNS_NBYTES
    try:
        call()
    finally:
        runs.PIECE_NBYTES = before


def by_runs(rank: int, run_nbytes: int, repeats: int) -> Samples:
    """From rows on ranks 0, 1 to columns on ranks 2, 3, each as wide as a run."""
    shape = (RUNS_NBYTES // (2 * run_nbytes), 2 * run_nbytes)
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), shape, "uint8")
    destination = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(1),))
    full = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, columns = full.chunk(2), full.chunk(2, dim=1)
    shard, out = (rows[rank].clone(), None) if rank < 2 else (None, torch.empty_like(columns[rank - 2]).contiguous())
    sends = {} if shard is None else dict(zip((2, 3), shard.chunk(2, dim=1), strict=True))
    receives = {} if out is None else dict(zip((0, 1), out.chunk(2), strict=True))
    methods: dict[str, Callable[[], object]] = {HAND: Hand(sends, receives)}
    for way in (NETWORK, ARENA, PIECES, PACKED, IN_PLACE):
        transport: Any = NETWORK if way == NETWORK else MEMORY
        mover = Resharder(source, destination, transport=transport, channel=way)
        methods[way] = partial(mover, shard, out=out)
        if way in (PACKED, IN_PLACE):
            methods[way] = partial(whole, methods[way])
        with taking(way):
            methods[way]()
    require(out, columns[max(rank - 2, 0)], methods)
    return take_turns(methods, repeats)


def measure(ranks: Ranks, repeats: int) -> dict[str, Samples]:
    """All cases of this file by name, on four running processes."""
    found = {"1 -> 3 replicas, 64 MiB": slowest(ranks.run(fan_out, repeats))}
    for run_nbytes in RUN_NBYTES:
        found[f"runs of {run_nbytes} B"] = slowest(ranks.run(by_runs, run_nbytes, repeats))
    return found


def format_all(cases: Mapping[str, Samples]) -> str:
    """Two tables: medians in ms, and in brackets to those by hand; by the 10 % quantiles too for the broadcast."""
    lines = []
    for name, samples in cases.items():
        medians = {method: statistics.median(one) for method, one in samples.items()}
        row = [f"{method} {1e3 * one:.1f} ms ({one / medians[HAND]:.2f})" for method, one in medians.items()]
        lines.append(f"{name + ':':<25}{', '.join(row)}")
        if MEMORY in samples:
            ratio = p10(samples[MEMORY]) / p10(samples[HAND])
            lines.append(f"  target: memory at most 0.45 x {HAND}; {ratio:.2f} x by the 10 % quantiles")
    return "\n".join(lines)
