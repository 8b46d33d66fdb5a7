"""Samples of the methods of a case, in turns, and of no more of the tensor than a figure needs.

What takes many times the bound moves a part of the tensor, as it takes long with that already. What is near the bound
moves all of it, until its samples agree.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bench.reshard.peers import COMPLETE, PEERS
from tricomm import Resharder, ShardingSpec, local_shard

NEAR = 1.5
"""A peer that takes more than so many times the bound is sampled once."""

PARTS = (64, 16, 4, 1)
"""A peer moves the first of these parts of the rows with which it takes LONG, with a bound of its own."""

IN_TURN = "blocking loop"
"""The peer that waits for each message, so that few rows would make it slow: it begins with a quarter."""

LONG = 0.25
"""Of the time that the bound of the whole takes."""

AGREEMENT = 0.01
"""Between all samples of a method, as a share of their median: more would not change the figure."""

LEAST_SAMPLES, LEAST_OF_OTHERS = 3, 2

Specs = tuple[ShardingSpec, ShardingSpec]


# ---- what runs on the ranks


@dataclass(frozen=True, slots=True)
class Method:
    """How a rank takes part.

    Attributes:
        call: moves the tensor once.
        out, expected: where it comes to lie, and what that has to be then; None where nothing does.
    """

    call: Callable[[], object]
    out: torch.Tensor | None = None
    expected: torch.Tensor | None = None


_METHODS: dict[str, Method] = {}


def _held(rank: int, specs: Specs) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(shard, out, expected) of a rank, of a tensor in which each element is its place; None off the meshes."""
    source, destination = specs
    full = torch.arange(torch.Size(source.global_shape).numel(), dtype=torch.int32).reshape(source.global_shape)
    shard = local_shard(full, source, rank) if rank in source.mesh else None
    expected = local_shard(full, destination, rank) if rank in destination.mesh else None
    return shard, None if expected is None else torch.empty_like(expected), expected


def prepare(rank: int, specs: Specs, part: Specs, ours: Mapping[str, dict[str, Any]]) -> None:
    """Make the methods that are tricomm's, by the options of their Resharders, and move a part of the tensor by each:
    what connects the ranks then is kept.
    """
    _METHODS.clear()
    if not any(rank in spec.mesh for spec in specs):
        return
    for moved in (part, specs):
        shard, out, expected = _held(rank, moved)
        for name, options in ours.items():
            mover = partial(Resharder(*moved, **options), shard, out=out)
            _METHODS[name] = Method(mover, out, expected)
            if moved is part:
                mover()


def prepare_peer(rank: int, name: str, specs: Specs) -> None:
    """Make a peer, on every rank since groups are made by all; specs are of as much as it moves."""
    _METHODS.pop(name, None)
    takes_part = any(rank in spec.mesh for spec in specs)
    shard, out, expected = _held(rank, specs) if takes_part and name == COMPLETE else (None, None, None)
    peer = PEERS[name](rank, *specs, shard, out)
    if takes_part:
        _METHODS[name] = Method(peer, out, expected)


def sample(rank: int, name: str, checks: bool) -> tuple[float, float] | None:
    """Run a method once, and compare what it delivers if asked to.

    Returns:
        When it began and when it ended here; None of a rank that takes no part.

    Raises:
        ValueError: an element is wrong.
    """
    method = _METHODS.get(name)
    if checks and method is not None and method.out is not None:
        method.out.fill_(-1)
    dist.barrier()
    if method is None:
        return None
    begin = time.monotonic()
    method.call()
    end = time.monotonic()
    is_compared = checks and method.out is not None and method.expected is not None
    if is_compared and not torch.equal(method.out, method.expected):  # type: ignore[arg-type]
        raise ValueError(f"{name}: rank {rank} has wrong elements")
    return begin, end


# ---- what runs here


@dataclass(slots=True)
class Samples:
    """Of one method.

    Attributes:
        bound_seconds: of what it moves.
        seconds: of the slowest rank, from when the first began. What the first sample moved was compared, element by
            element.
        is_slow: a peer that needs no more samples.
    """

    bound_seconds: float
    seconds: list[float]
    is_slow: bool = False

    def agree(self) -> bool:
        """Whether more would not change the median."""
        return max(self.seconds) - min(self.seconds) <= AGREEMENT * statistics.median(self.seconds)

    def suffice(self, least: int, most: int) -> bool:
        """Whether there are enough: at least and at most so many, of which the least will do if they agree."""
        count = len(self.seconds)
        return self.is_slow or count >= most or (count >= least and self.agree())


def seconds_of(ranks: Any, name: str, checks: bool = False) -> float:
    """Run a method once on all ranks."""
    spans = [span for span in ranks.run(sample, name, checks) if span is not None]
    return float(max(end for _, end in spans) - min(begin for begin, _ in spans))


def first_of_peer(ranks: Any, name: str, parts: Sequence[tuple[Specs, float]]) -> Samples:
    """Find as much of the tensor as a peer needs to take long.

    Args:
        ranks: all of them.
        name: of the peer.
        parts: layouts of a part of the tensor and its bound in seconds, the whole last.
    """
    whole_seconds = parts[-1][1]
    for specs, bound in parts[2 if name == IN_TURN else 0 :]:
        ranks.run(prepare_peer, name, specs)
        seconds = seconds_of(ranks, name, checks=True)
        if seconds > NEAR * bound and seconds > LONG * whole_seconds:
            return Samples(bound, [seconds], is_slow=True)
    return Samples(bound, [seconds])


def sample_in_turns(ranks: Any, samples: Mapping[str, Samples], limits: Mapping[str, tuple[int, int]]) -> None:
    """Add samples, one of each method after the other, until those of each suffice; limits: how many, at least and at
    most.
    """
    while waiting := [name for name, found in samples.items() if not found.suffice(*limits[name])]:
        for name in waiting:
            found = samples[name]
            found.seconds.append(seconds_of(ranks, name, checks=not found.seconds))
