"""Methods that take turns on all ranks, so that whatever else the machine does hits them alike; and their samples."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

WARM_UP_CALLS = 2

Methods = Mapping[str, Callable[[], object]]
Samples = dict[str, list[float]]


def take_turns(
    methods: Methods, repeats: int, most: Mapping[str, int] | None = None, begin: Callable[[], None] | None = None
) -> Samples:
    """The seconds of each call of each method on this rank; runs on all ranks at once.

    Args:
        methods: by name, the same on all ranks.
        repeats: how often each is called, after some calls to warm up.
        most: of those that are called less often, and without these.
        begin: called on all ranks between the barrier and each call.
    """
    most = most or {}
    for name, method in methods.items():
        for _ in range(0 if name in most else WARM_UP_CALLS):
            method()
    seconds: Samples = {name: [] for name in methods}
    for repeat in range(repeats):
        names = [name for name in methods if repeat < most.get(name, repeats)]
        # Another order in each round, the same on all ranks: what a method leaves in the caches is not always
        # inherited by the same one.
        random.Random(repeat).shuffle(names)
        for name in names:
            method = methods[name]
            dist.barrier()
            if begin is not None:
                begin()
            began = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def slowest(of_ranks: Sequence[Samples]) -> Samples:
    """The seconds of the slowest rank in each call."""
    return {name: [max(calls) for calls in zip(*(one[name] for one in of_ranks), strict=True)] for name in of_ranks[0]}


def p10(samples: Sequence[float]) -> float:
    """The 10 % quantile, interpolated."""
    return statistics.quantiles(samples, n=10, method="inclusive")[0] if len(samples) > 1 else samples[0]
