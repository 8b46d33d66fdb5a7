"""Bytes between the ranks of an emulated cluster, timed: what a calibration is measured with."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from tricomm.launch import Ranks

FLOW_CHUNK_BYTES = 1 << 20
PINGS = 200
POSTS = 1000


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that one rank sends to another."""

    source: int
    destination: int
    nbytes: int

    @property
    def ranks(self) -> tuple[int, int]:
        """Who sends, and who receives."""
        return self.source, self.destination


def run_flows(ranks: Ranks, flows: Sequence[Flow]) -> float:
    """Some transfers at once; the seconds from when the last rank was ready to when the last one was done."""
    return elapsed_seconds(ranks.run(move, flows), {rank for flow in flows for rank in flow.ranks})


def elapsed_seconds(spans: Sequence[tuple[float, float]], taking_part: Iterable[int]) -> float:
    """From when the last of some ranks was ready to when the last one was done."""
    # All processes are on one machine, and read one clock.
    spans = [spans[rank] for rank in taking_part]
    return max(end for _, end in spans) - max(begin for begin, _ in spans)


# ---- what runs on the ranks


@lru_cache
def _groups() -> tuple[Any, Any]:
    """One group for each direction: between two ranks a gloo group sends in one direction at a time."""
    everyone = list(range(dist.get_world_size()))
    return dist.new_group(everyone), dist.new_group(everyone)


@lru_cache
def _buffer(purpose: str, nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def move(rank: int, flows: Sequence[Flow]) -> tuple[float, float]:
    """Send and receive this rank's part of some flows; when it began and ended."""
    groups = _groups()
    works = []
    dist.barrier()
    begin = time.monotonic()
    for number, flow in enumerate(flows):
        if rank in flow.ranks:
            sends = rank == flow.source
            operation, peer = (dist.isend, flow.destination) if sends else (dist.irecv, flow.source)
            group = groups[flow.source < flow.destination]
            for chunk in torch.split(_buffer(f"flow {number}", flow.nbytes), FLOW_CHUNK_BYTES):
                works.append(operation(chunk, peer, group=group))
    _wait(works)
    return begin, time.monotonic()


def relay(rank: int, chain: Sequence[int], nbytes: int, chunks: int) -> tuple[float, float]:
    """Pass bytes along a chain of ranks, each chunk as soon as it has come; when this rank began and ended."""
    parts = _buffer("chain", nbytes).chunk(chunks)
    place = chain.index(rank) if rank in chain else None
    works = []
    dist.barrier()
    begin = time.monotonic()
    if place is not None:
        following = chain[place + 1] if place + 1 < len(chain) else None
        arrivals = [dist.irecv(part, chain[place - 1]) for part in parts] if place else [None] * len(parts)
        for part, arrival in zip(parts, arrivals, strict=True):
            _wait([arrival])
            if following is not None:
                works.append(dist.isend(part, following))
        _wait(works)
    return begin, time.monotonic()


def ping(rank: int, first: int, second: int) -> float:
    """Half of the median round trip of 4 bytes between two ranks, in seconds; 0 on the others."""
    message = torch.zeros(1)
    round_trips = []
    dist.barrier()
    for _ in range(PINGS if rank in (first, second) else 0):
        began = time.monotonic()
        if rank == first:
            dist.send(message, second)
            dist.recv(message, second)
        else:
            dist.recv(message, first)
            dist.send(message, first)
        round_trips.append(time.monotonic() - began)
    return statistics.median(round_trips) / 2 if round_trips else 0.0


def post(rank: int, first: int, second: int) -> float:
    """What a message costs the rank that sends many of 4 bytes one after the other, in seconds; 0 on the others."""
    messages = torch.zeros(POSTS, 1)
    seconds = 0.0
    dist.barrier()
    if rank in (first, second):
        operation, peer = (dist.isend, second) if rank == first else (dist.irecv, first)
        began = time.monotonic()
        _wait([operation(message, peer) for message in messages])
        seconds = time.monotonic() - began if rank == first else 0.0
    return seconds / POSTS


def _wait(works: Iterable[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
