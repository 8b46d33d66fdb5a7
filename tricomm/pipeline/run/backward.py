"""A backward in two steps: first the gradient of a stage's inputs, which the stage before waits for, then its weights'.

The first step stops where the graph turns off to parameters, and keeps the gradients that arrive there. Autograd does
not compute what nobody asks for, so the products that give weight gradients are left for the second step, and no
product is computed twice. The idea is from zero-bubble pipelines (Qi et al. 2023); torch.distributed.pipelining has it
too, for graphs in which no parameter is used twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Slot = tuple[Node, int]
"""Where a gradient arrives: a node of the graph, and which of its inputs."""


@dataclass(slots=True)
class Departure:
    """A node of the trunk that branches leave, or None for the outputs themselves.

    Attributes:
        arrivals: where gradients come to the node.
        branches: where it sends gradients that lead to parameters only.
        gradients: what came in the first step, one for each arrival.
    """

    arrivals: list[Slot]
    branches: list[Slot]
    gradients: list[torch.Tensor | None]


class StageBackward:
    """The backward of one microbatch of a stage: at once, or in two steps.

    The nodes of the graph from which an input can be reached form its *trunk*; the others are its *branches*, which
    lead from the trunk to parameters. The second step runs the branches, and of the trunk only the nodes that they
    leave, and of those only what gives the branches.

    Some parameters get their gradient in the first step already, which delays less but is as right:

    - those of a branch that leaves the trunk in more than one place (one parameter used directly by two layers), as
      the second step could not tell the two apart;
    - those whose branch leaves a node that is a ``torch.autograd.Function`` (or a graph that torch.compile made),
      which always computes everything and may do things that must not be done twice.

    A stage without inputs that need a gradient does nothing in the first step. Hooks on the trunk's tensors run again
    in the second step where a branch leaves. Under activation checkpointing each node of the second step computes
    its block again: give such stages a whole backward.

    It keeps the graph and not the outputs, so their memory is free as soon as nobody else holds them.

    Args:
        inputs: leaves that require grad.
        outputs: what was computed from them; those that do not require grad are ignored.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._inputs = tuple(inputs)
        self._roots = [get_gradient_edge(out) if out.requires_grad else None for out in outputs]
        self._departures: list[Departure] = []

    def run(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Both steps at once: adds to the ``grad`` of the parameters.

        Args:
            gradients: of the outputs, one for each.

        Returns:
            The gradient of each input; None where no output depends on it.
        """
        roots, given = self._started(gradients)
        if roots:
            torch.autograd.backward(roots, given)
        return tuple(tensor.grad for tensor in self._inputs)

    def input_gradients(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """The first step; arguments and result as for run."""
        edges, given = self._started(gradients)
        roots = [_slot(edge) for edge in edges]
        inputs = [_slot(get_gradient_edge(tensor)) for tensor in self._inputs]
        if not inputs or not roots:
            self._departures = [Departure([], roots, list(given))]
            return (None,) * len(inputs)
        early, departures = _cut(roots, {node for node, _ in inputs})
        arrivals = [slot for departure in departures for slot in departure.arrivals]
        wanted = _edges([*inputs, *early, *arrivals])
        found = list(torch.autograd.grad(edges, wanted, given, retain_graph=True, allow_unused=True))
        for departure in departures:
            if departure.arrivals:
                departure.gradients = [found.pop(len(inputs) + len(early)) for _ in departure.arrivals]
            else:
                ends = set(departure.branches)
                departure.branches = [slot for slot in roots if slot in ends]
                departure.gradients = [one for slot, one in zip(roots, given, strict=True) if slot in ends]
        self._departures = departures
        _run(early, found[len(inputs) :])
        return tuple(found[: len(inputs)])

    def weight_gradients(self) -> None:
        """The second step: adds to the ``grad`` of the parameters, and frees the graph."""
        slots: list[Slot] = []
        gradients: list[torch.Tensor | None] = []
        for departure in self._departures:
            slots += departure.branches
            gradients += _leave(departure)
        _run(slots, gradients)
        self._departures, self._roots = [], []

    def _started(self, gradients: Sequence[torch.Tensor]) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        pairs = [(root, one) for root, one in zip(self._roots, gradients, strict=True) if root is not None]
        return [root for root, _ in pairs], [one for _, one in pairs]


def _leave(departure: Departure) -> Sequence[torch.Tensor | None]:
    """The gradients that go into the branches."""
    if not departure.arrivals:
        return departure.gradients
    pairs = [(slot, one) for slot, one in zip(departure.arrivals, departure.gradients, strict=True) if one is not None]
    if not pairs:
        return [None] * len(departure.branches)
    return torch.autograd.grad(
        _edges(slot for slot, _ in pairs),
        _edges(departure.branches),
        [gradient for _, gradient in pairs],
        retain_graph=True,
        allow_unused=True,
    )


def _run(slots: Iterable[Slot], gradients: Iterable[torch.Tensor | None]) -> None:
    """Run the graph from some places on, down to the parameters."""
    pairs = [(slot, gradient) for slot, gradient in zip(slots, gradients, strict=True) if gradient is not None]
    if pairs:
        torch.autograd.backward(_edges(slot for slot, _ in pairs), [gradient for _, gradient in pairs])


def _cut(roots: Sequence[Slot], inputs: set[Node]) -> tuple[list[Slot], list[Departure]]:
    """(leaves whose gradient is computed in the first step, where the branches of the second step leave)."""
    order = _children_first(node for node, _ in roots)
    trunk: set[Node] = set()
    for node in order:
        if node in inputs or any(child in trunk for child, _ in node.next_functions):
            trunk.add(node)
    arrivals: dict[Node, dict[int, None]] = {}
    origins: dict[Slot, dict[Node | None, None]] = {}
    tree = _Components()
    inner: set[Node] = set()
    entries: list[tuple[Node | None, Slot]] = [(None, root) for root in roots]
    entries += [(node, (child, number)) for node in order for child, number in node.next_functions if child is not None]
    for origin, slot in entries:
        arrivals.setdefault(slot[0], {})[slot[1]] = None
        if origin is not None and origin not in trunk:
            tree.join(origin, slot[0])
            inner.add(slot[0])
        elif slot[0] not in trunk:
            origins.setdefault(slot, {})[origin] = None
    left_from: dict[Node, set[Node | None]] = {}
    for (node, _), places in origins.items():
        left_from.setdefault(node, set()).update(places)
    early = {
        tree.find(node)
        for node, places in left_from.items()
        if len(places) > 1 or node in inner or any(isinstance(place, BackwardCFunction) for place in places)
    }
    leaves = [(node, 0) for node in order if node not in trunk and not node.next_functions and tree.find(node) in early]
    departures: dict[Node | None, Departure] = {}
    for slot, (origin, *_) in origins.items():
        if tree.find(slot[0]) not in early:
            here = [] if origin is None else [(origin, number) for number in arrivals[origin]]
            departures.setdefault(origin, Departure(here, [], [])).branches.append(slot)
    return leaves, list(departures.values())


def _children_first(roots: Iterable[Node]) -> list[Node]:
    """All nodes below the roots, each after those that it leads to."""
    order: dict[Node, None] = {}
    saved: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = None
        elif node not in saved:
            saved.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return list(order)


class _Components:
    """Which nodes hang together."""

    def __init__(self) -> None:
        self._above: dict[Node, Node] = {}

    def find(self, node: Node) -> Node:
        while node in self._above:
            node = self._above[node]
        return node

    def join(self, first: Node, second: Node) -> None:
        first, second = self.find(first), self.find(second)
        if first is not second:
            self._above[first] = second


def _slot(edge: GradientEdge) -> Slot:
    return edge.node, edge.output_nr


def _edges(slots: Iterable[Slot]) -> list[GradientEdge]:
    return [GradientEdge(*slot) for slot in slots]
