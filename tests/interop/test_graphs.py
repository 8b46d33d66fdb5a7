"""Gradients across meshes: random graphs of moves give every leaf the gradient that one process gives it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tricomm
from tests.oracle import pick
from tricomm import Mesh, Partial, Replicate, Resharder, Shard, ShardingSpec
from tricomm.launch import Ranks

GRAPHS, AT_ONCE = 200, 50
SHAPE = (5, 6)
TOLERANCE = 1e-12
SPECS = [
    ShardingSpec(mesh, placements, SHAPE, "float64")
    for mesh, choices in (
        (Mesh([0, 1], ("a",)), ((Shard(0),), (Replicate(),))),
        (Mesh([2, 3, 4], ("b",)), ((Shard(1),), (Replicate(),))),
        (Mesh([[4, 5], [6, 7]], ("c", "d")), ((Replicate(), Shard(0)), (Shard(0), Shard(0)))),
        (Mesh([1, 2], ("e",)), ((Shard(0),),)),
        (Mesh([7], ("f",)), ((Replicate(),),)),
    )
    for placements in choices
]
SUMS = [ShardingSpec(Mesh([0, 1], ("a",)), (Partial(),), SHAPE, "float64")]
"""Layouts of leaves of which each rank holds a contribution."""
LAYOUTS = SPECS + SUMS
LEAST = {"disjoint meshes": 40, "several losses": 30, "unused output": 30, "frozen input": 10, "contributions": 10}
"""Of AT_ONCE graphs at least so many have this."""


@dataclass(frozen=True)
class Step:
    """One value of a graph.

    Attributes:
        kind: "leaf", "frozen", "move", "sine" or "sum".
        of: the values that it is made of.
        layout: index in LAYOUTS.
    """

    kind: str
    of: tuple[int, ...]
    layout: int


@dataclass(frozen=True)
class Graph:
    """Values, each made of earlier ones, and those that are losses; the others may go unused."""

    steps: tuple[Step, ...]
    losses: tuple[int, ...]
    seed: int

    def tensor(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    def moves(self) -> Iterator[tuple[int, Step, Step]]:
        """(number, the move, what it moves)"""
        for number, step in enumerate(self.steps):
            if step.kind == "move":
                yield number, step, self.steps[step.of[0]]

    @property
    def traits(self) -> set[str]:
        """What is in it that could go wrong."""
        used = {number for step in self.steps for number in step.of} | set(self.losses)
        ranks = [set(spec.mesh.ranks) for spec in LAYOUTS]
        found = {"several losses"} if len(self.losses) > 1 else set()
        for number, step, moved in self.moves():
            found |= {"disjoint meshes"} if not ranks[step.layout] & ranks[moved.layout] else set()
            found |= {"unused output"} if number not in used else set()
            found |= {"frozen input"} if moved.kind == "frozen" else set()
            found |= {"contributions"} if moved.layout >= len(SPECS) else set()
        return found


def draw_graph(seed: int) -> Graph:
    """One in which some leaf has a gradient."""
    choose = random.Random(seed)
    while True:
        graph = draw_steps(choose, seed)
        if any(gradient is not None for gradient in in_one_process(graph).values()):
            return graph


def draw_steps(choose: random.Random, seed: int) -> Graph:
    steps = [Step(choose.choice(("leaf", "frozen")), (), choose.randrange(len(SPECS))) for _ in range(2)]
    if choose.random() < 0.3:
        steps.append(Step("leaf", (), len(SPECS)))
    steps.append(Step("move", (len(steps) - 1,), choose.randrange(len(SPECS))))
    for _ in range(choose.randint(3, 8)):
        kind = choose.choice(("move", "move", "sine", "sum"))
        first = choose.randrange(len(steps))
        alike = [n for n, step in enumerate(steps) if step.layout == steps[first].layout]
        of = (first, choose.choice(alike)) if kind == "sum" else (first,)
        if kind != "move" and steps[first].layout >= len(SPECS):
            kind, of = "move", (first,)  # of contributions nothing but a sum is known
        layout = choose.randrange(len(SPECS)) if kind == "move" else steps[first].layout
        steps.append(Step(kind, of, layout))
    whole = [number for number, step in enumerate(steps) if step.layout < len(SPECS)]
    losses = choose.sample(whole, choose.randint(1, min(3, len(whole))))
    return Graph(tuple(steps), tuple(losses), seed)


def compute(step: Step, values: list[Any]) -> Any:
    """What is alike on a whole tensor and on each of its shards."""
    if step.kind == "sum":
        return values[step.of[0]] * 2 + values[step.of[1]]
    return torch.sin(values[step.of[0]])


def in_one_process(graph: Graph) -> dict[int, torch.Tensor | None]:
    """THE DEFINITION: the gradient of every leaf, a move being nothing."""
    values: list[torch.Tensor] = []
    leaves = {}
    for number, step in enumerate(graph.steps):
        if step.kind in ("leaf", "frozen"):
            values.append(graph.tensor(number).requires_grad_(step.kind == "leaf"))
            leaves[number] = values[-1]
        else:
            values.append(values[step.of[0]] if step.kind == "move" else compute(step, values))
    losses = [(values[n] * graph.tensor(100 + n)).sum() for n in graph.losses]
    torch.autograd.backward([loss for loss in losses if loss.requires_grad] or [torch.zeros((), requires_grad=True)])
    return {number: leaf.grad for number, leaf in leaves.items() if leaf.requires_grad}


def check_on_rank(rank: int, graph: Graph, mover_of: Any) -> None:
    values: list[torch.Tensor | None] = []
    leaves: dict[int, torch.Tensor] = {}
    for number, step in enumerate(graph.steps):
        spec = LAYOUTS[step.layout]
        if step.kind == "move":
            values.append(mover_of(LAYOUTS[graph.steps[step.of[0]].layout], spec)(values[step.of[0]]))
        elif rank not in spec.mesh:
            values.append(None)
        elif step.of:
            values.append(compute(step, values))
        else:
            full = graph.tensor(number) / (2 if spec in SUMS else 1)
            values.append(pick(full, spec, rank).requires_grad_(step.kind == "leaf"))
            leaves[number] = values[-1]
    losses = []
    for number in graph.losses:
        value = values[number]
        if value is not None and value.requires_grad:
            losses.append((value * pick(graph.tensor(100 + number), LAYOUTS[graph.steps[number].layout], rank)).sum())
    tricomm.backward(*losses)
    expected = in_one_process(graph)
    for number, leaf in leaves.items():
        whole = expected.get(number)
        if whole is None:
            assert leaf.grad is None or not leaf.grad.any()
            continue
        spec = LAYOUTS[graph.steps[number].layout]
        spec = SPECS[1] if spec in SUMS else spec  # the gradient of each contribution is that of the sum
        torch.testing.assert_close(leaf.grad, pick(whole, spec, rank), rtol=TOLERANCE, atol=TOLERANCE)


def run_graphs(rank: int, graphs: list[Graph]) -> None:
    movers: dict[Any, Resharder] = {}

    def mover_of(source: ShardingSpec, destination: ShardingSpec) -> Resharder:
        key = (source, destination)
        if key not in movers:
            movers[key] = Resharder(source, destination, differentiable=True, timeout_seconds=30)
        return movers[key]

    for graph in graphs:
        try:
            check_on_rank(rank, graph, mover_of)
        except BaseException as error:
            error.add_note(str(graph))
            raise


@pytest.mark.parametrize("first", range(0, GRAPHS, AT_ONCE))
def test_random_graphs_of_moves_have_the_gradients_of_one_process(ranks: Ranks, first: int) -> None:
    graphs = [draw_graph(seed) for seed in range(first, first + AT_ONCE)]
    assert sum(len(list(graph.moves())) for graph in graphs) > 2 * AT_ONCE
    for trait, least in LEAST.items():
        assert sum(trait in graph.traits for graph in graphs) >= least, f"few graphs have: {trait}"
    ranks.run(run_graphs, graphs)
