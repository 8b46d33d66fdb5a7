"""Never another tensor's bytes: in whatever order ranks call, every result is right, or every rank is told."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.oracle import pick
from tricomm import Mesh, Replicate, Resharder, Shard, ShardingSpec, TransportError
from tricomm.launch import Ranks

SIZE = 4
CALLS = int(os.environ.get("TRICOMM_SHUFFLED_CALLS", "2000"))
TIMEOUT_SECONDS = 1.0
LATE_SECONDS = 3 * TIMEOUT_SECONDS
LEFT, RIGHT, ALL = Mesh([0, 1], ("x",)), Mesh([2, 3], ("x",)), Mesh([0, 1, 2, 3], ("x",))


class Layout(NamedTuple):
    """From where to where, in which shape."""

    source: ShardingSpec
    destination: ShardingSpec


def layout(source: Mesh, destination: Mesh, placements: tuple[object, object], shape: tuple[int, ...]) -> Layout:
    return Layout(
        ShardingSpec(source, (placements[0],), shape, "float32"),
        ShardingSpec(destination, (placements[1],), shape, "float32"),
    )


# Three of each: alike, of the same size but another layout, of another size; some confirm, two have gradients.
ALIKE = layout(LEFT, RIGHT, (Shard(0), Shard(1)), (8, 8))
LAYOUTS = [
    *([ALIKE] * 4),
    *([layout(LEFT, RIGHT, (Shard(0), Shard(0)), (4, 16))] * 2),
    *([layout(RIGHT, LEFT, (Shard(1), Replicate()), (16, 64))] * 2),
    *([layout(LEFT, RIGHT, (Shard(1), Shard(0)), (128, 32))] * 2),
    *([layout(ALL, ALL, (Shard(0), Shard(1)), (8, 8))] * 2),
]
WITH_GRADIENT = (10, 11)
CONFIRMED = (1, 3, 7)


def data(index: int, call: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What the ``call``-th call of a Resharder moves: no two calls move the same numbers."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + 10_000.0 * index + 7.0 * (call % 1000)).reshape(shape)


class Caller:
    """One rank's calls, and what became of them."""

    def __init__(self, rank: int, transport: Any) -> None:
        self.rank = rank
        options: Any = {"timeout_seconds": TIMEOUT_SECONDS, "transport": transport}
        self.movers = [Resharder(*LAYOUTS[i], confirm=i in CONFIRMED, **options) for i in range(len(LAYOUTS))]
        self.calls = [0] * len(LAYOUTS)
        self.found: Counter[str] = Counter()
        self.texts: list[str] = []
        self.slowest = 0.0

    def judge(self, index: int, call: int, output: torch.Tensor | None, spec: ShardingSpec) -> None:
        shape = LAYOUTS[index].source.global_shape
        if self.rank in spec.mesh:
            right = output is not None and torch.equal(output, pick(data(index, call, shape), spec, self.rank))
            self.found["right" if right else "WRONG"] += 1
        else:
            self.found["right" if output is None else "WRONG"] += 1

    def attempt(self, make: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            make()
        except TransportError as error:
            self.found["refused"] += 1
            self.texts.append(str(error))
        self.slowest = max(self.slowest, time.monotonic() - began)

    def call(self, index: int, kind: str) -> Iterator[None]:
        """Call, or start and wait after the next yield, or go forward and backward after the next yield."""
        self.calls[index] += 1
        call, mover, (source, destination) = self.calls[index], self.movers[index], LAYOUTS[index]
        full = data(index, call, source.global_shape)
        tensor = pick(full, source, self.rank) if self.rank in source.mesh else None
        if index in WITH_GRADIENT:
            yield from self.differentiate(index, call, tensor)
        elif kind == "start":
            handle = mover.start(tensor)
            yield
            self.attempt(lambda: self.judge(index, call, handle.wait(), destination))
        else:
            self.attempt(lambda: self.judge(index, call, mover(tensor), destination))
            yield

    def differentiate(self, index: int, call: int, tensor: torch.Tensor | None) -> Iterator[None]:
        source, destination = LAYOUTS[index]
        assert tensor is not None
        leaf, outputs = tensor.clone().requires_grad_(), []

        def forward() -> None:
            outputs.append(self.movers[index](leaf))
            self.judge(index, call, outputs[0].detach(), destination)

        def backward() -> None:
            weight = pick(data(index, call, source.global_shape) + 0.5, destination, self.rank)
            (outputs[0] * weight).sum().backward()
            expected = pick(data(index, call, source.global_shape) + 0.5, source, self.rank)
            self.found["right" if torch.equal(leaf.grad, expected) else "WRONG"] += 1

        self.attempt(forward)
        yield
        if outputs:
            self.attempt(backward)


def shuffled_calls(rank: int, seed: int, count: int, transport: str) -> tuple[Counter[str], list[str], float]:
    """Rounds of a few calls: mostly in one order, sometimes one rank has another."""
    if rank >= SIZE:
        return Counter(), [], 0.0
    caller, choose = Caller(rank, transport), random.Random(seed)
    for index in range(len(LAYOUTS)):
        list(caller.call(index, "call"))
    while sum(caller.calls) < count:
        ours = [
            (choose.randrange(len(LAYOUTS)), choose.choice(["call", "start"])) for _ in range(choose.randint(4, 12))
        ]
        odd, is_odd, salt = choose.randrange(SIZE), choose.random() < 0.05, choose.random()
        if is_odd and rank == odd:
            random.Random(salt).shuffle(ours)
        pending = [caller.call(index, kind) for index, kind in ours]
        for one in pending:
            next(one)
        if is_odd and rank == odd:
            pending.reverse()
        for one in pending:
            list(one)
        dist.barrier()
    return caller.found, caller.texts, caller.slowest


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["network", "auto"])
def test_shuffled_calls_are_right_or_refused(transport: str) -> None:
    with Ranks(SIZE, timeout_seconds=600) as four:
        results = four.run(shuffled_calls, 7, CALLS, transport)
    total = sum((found for found, _, _ in results), Counter())
    print(total, [slowest for _, _, slowest in results])
    assert total["WRONG"] == 0, total
    assert total["right"] > total["refused"] > 0, total
    assert max(slowest for _, _, slowest in results) < LATE_SECONDS


def meet(key: str, size: int = SIZE) -> None:
    """The four, or so many, meet, without a group of their own."""
    store = dist.distributed_c10d._get_default_store()
    store.add(key, 1)
    while store.add(key, 0) < size:
        time.sleep(0.02)


def in_steps(rank: int, steps: list[list[Resharder]], key: str) -> list[tuple[str, float]]:
    """Call in steps; (what a rank is told, "" if its call was right, and after how many seconds). A rank that is told
    leaves the step. Afterwards all connect anew, as calls are counted.
    """
    found: list[tuple[str, float]] = []
    for step, movers in enumerate(steps):
        for mover in movers:
            full, began = data(int(mover.name[-1:] == "b"), step, (8, 8)), time.monotonic()
            try:
                output = mover(pick(full, ALIKE.source, rank) if rank in LEFT else None)
                if rank in RIGHT:
                    assert torch.equal(output, pick(full, ALIKE.destination, rank)), f"rank {rank} got another's bytes"
                found.append(("", time.monotonic() - began))
            except TransportError as error:
                found.append((str(error), time.monotonic() - began))
                break
        meet(f"{key}/{step}")
        if step == 1:
            for mover in steps[-1]:
                mover.connect()
    return found


def alike(names: tuple[str, str], transport: Any) -> list[Resharder]:
    """Two of the same layout."""
    return [Resharder(*ALIKE, name=name, timeout_seconds=30.0, confirm=True, transport=transport) for name in names]


def warm_in_another_order(rank: int, names: tuple[str, str], odd: int, transport: Any) -> list[tuple[str, float]]:
    """The odd rank calls the second one first, once."""
    if rank >= SIZE:
        return []
    first, second = alike(names, transport)
    other = [second, first] if rank == odd else [first, second]
    return in_steps(rank, [[first, second], other, [first, second]], f"warm {names} {odd}")


def new_while_others_are_warm(rank: int, names: tuple[str, str], odd: int, transport: Any) -> list[tuple[str, float]]:
    """The odd rank calls one that is warm first, and the others one that is new."""
    if rank >= SIZE:
        return []
    warm, new = alike(names, transport)
    other = [warm, new] if rank == odd else [new, warm]
    return in_steps(rank, [[warm], other, [warm, new]], f"new {names} {odd}")


TOLD_SECONDS = 8.0
"""At once: a few heartbeats, of a second each where the timeout is long; and what a busy machine needs."""


@pytest.mark.parametrize(("odd", "transport"), [(0, "network"), (3, "auto")])
@pytest.mark.parametrize("names", [("a", "b"), ("", "")], ids=["named", "unnamed"])
@pytest.mark.parametrize("how", [warm_in_another_order, new_while_others_are_warm])
def test_the_error_names_both_calls_at_once(
    ranks: Ranks, how: Callable[..., object], names: tuple[str, str], odd: int, transport: str
) -> None:
    results = ranks.run(how, names, odd, transport)
    calls = [f"Resharder {name!r}" for name in names] if names[0] else ["Resharder number "] * 2
    for rank in range(SIZE):
        told = [text for text, _ in results[rank] if text]
        assert told, f"rank {rank} was not told: {results[rank]}"
        for text in told:
            assert all(text.count(call) >= calls.count(call) for call in calls), text
            assert "same calls in the same order" in text
            assert ('name="queries"' in text) is not bool(names[0]), "a name is suggested to those who gave none"
        assert max(seconds for _, seconds in results[rank]) < TOLD_SECONDS, (rank, results[rank])
        assert [text for text, _ in results[rank][-2:]] == ["", ""], f"the next calls of all work: {results[rank]}"
