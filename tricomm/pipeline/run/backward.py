"""A backward in two steps: first the gradient of a stage's inputs, which the stage before waits for, then its weights'.

The first step stops where edges of the graph lead to parameters only, and keeps the gradients that arrive there.
Autograd does not compute what nobody asks for, so the products that give weight gradients are left for the second step,
and no product is computed twice. The idea is from zero-bubble pipelines (Qi et al. 2023); torch.distributed.pipelining
has it too, for graphs in which no parameter is used twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

NodeInput = tuple[Node, int]
"""Where a gradient arrives: a node of the graph, and which of its inputs."""


@dataclass(slots=True)
class ParameterGroup:
    """Parameters whose gradients flow through one node of the inputs closure, or directly from the outputs.

    Attributes:
        intermediates: inputs of that node, where the first step stops; empty for the outputs themselves.
        parameter_edges: where the node sends gradients that lead to parameters only.
        gradients: what the first step captured, one for each of the intermediates.
    """

    intermediates: list[NodeInput]
    parameter_edges: list[NodeInput]
    gradients: list[torch.Tensor | None]


class StageBackward:
    """Run the backward of one microbatch of a stage: at once, or in two steps.

    The nodes of the graph from which an input can be reached are its *inputs closure* (torch's word). Edges out of it
    lead to parameters only. The first step computes the gradients of the inputs and captures those that arrive at the
    *intermediates*, the nodes that such edges leave; the second runs from there down to the parameters.

    Some parameters get their gradient in the first step already, which delays less but is as right:

    - those that the closure reaches through more than one edge (one parameter used directly by two layers), as the
      second step could not tell the two apart;
    - those that hang on a ``torch.autograd.Function`` (or a graph that torch.compile made), which always computes
      everything and may do things that must not be done twice.

    A stage without inputs that need a gradient does nothing in the first step. Hooks on tensors of the inputs closure
    run again in the second step where parameters hang on them. Under activation checkpointing each node of the second
    step computes its block again: give such stages a whole backward.

    It keeps the graph and not the outputs, so their memory is free as soon as nobody else holds them.

    Args:
        inputs: leaves that require grad.
        outputs: what was computed from them; those that do not require grad are ignored.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._inputs = tuple(inputs)
        self._roots = [get_gradient_edge(out) if out.requires_grad else None for out in outputs]
        self._groups: list[ParameterGroup] = []

    def run(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Both steps at once: adds to the ``grad`` of the parameters.

        Args:
            gradients: of the outputs, one for each.

        Returns:
            The gradient of each input; None where no output depends on it.
        """
        roots, given = self._pairs(gradients)
        if roots:
            torch.autograd.backward(roots, given)
        return tuple(tensor.grad for tensor in self._inputs)

    def input_gradients(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """The first step; arguments and result as for run."""
        edges, given = self._pairs(gradients)
        roots = [_node_input(edge) for edge in edges]
        inputs = [_node_input(get_gradient_edge(tensor)) for tensor in self._inputs]
        if not inputs or not roots:
            self._groups = [ParameterGroup([], roots, list(given))]
            return (None,) * len(inputs)
        at_once, groups = _parameter_groups(roots, {node for node, _ in inputs})
        intermediates = [node_input for group in groups for node_input in group.intermediates]
        wanted = _edges([*inputs, *at_once, *intermediates])
        found = list(torch.autograd.grad(edges, wanted, given, retain_graph=True, allow_unused=True))
        for group in groups:
            if group.intermediates:
                group.gradients = [found.pop(len(inputs) + len(at_once)) for _ in group.intermediates]
            else:
                ends = set(group.parameter_edges)
                group.parameter_edges = [node_input for node_input in roots if node_input in ends]
                group.gradients = [one for node_input, one in zip(roots, given, strict=True) if node_input in ends]
        self._groups = groups
        _run(at_once, found[len(inputs) :])
        return tuple(found[: len(inputs)])

    def weight_gradients(self) -> None:
        """The second step: adds to the ``grad`` of the parameters, and frees the graph."""
        node_inputs: list[NodeInput] = []
        gradients: list[torch.Tensor | None] = []
        for group in self._groups:
            node_inputs += group.parameter_edges
            gradients += _gradients_into(group)
        _run(node_inputs, gradients)
        self._groups, self._roots = [], []

    def _pairs(self, gradients: Sequence[torch.Tensor]) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        pairs = [(root, one) for root, one in zip(self._roots, gradients, strict=True) if root is not None]
        return [root for root, _ in pairs], [one for _, one in pairs]


def _gradients_into(group: ParameterGroup) -> Sequence[torch.Tensor | None]:
    """The gradients that flow from an intermediate into its parameter edges."""
    if not group.intermediates:
        return group.gradients
    pairs = [
        (node_input, one)
        for node_input, one in zip(group.intermediates, group.gradients, strict=True)
        if one is not None
    ]
    if not pairs:
        return [None] * len(group.parameter_edges)
    return torch.autograd.grad(
        _edges(node_input for node_input, _ in pairs),
        _edges(group.parameter_edges),
        [gradient for _, gradient in pairs],
        retain_graph=True,
        allow_unused=True,
    )


def _run(node_inputs: Iterable[NodeInput], gradients: Iterable[torch.Tensor | None]) -> None:
    """Run the graph from some places on, down to the parameters."""
    pairs = [
        (node_input, gradient)
        for node_input, gradient in zip(node_inputs, gradients, strict=True)
        if gradient is not None
    ]
    if pairs:
        torch.autograd.backward(_edges(node_input for node_input, _ in pairs), [gradient for _, gradient in pairs])


def _parameter_groups(roots: Sequence[NodeInput], inputs: set[Node]) -> tuple[list[NodeInput], list[ParameterGroup]]:
    """(parameters whose gradient is computed in the first step, groups of those left to the second)."""
    order = nodes_below(node for node, _ in roots)
    inputs_closure: set[Node] = set()
    for node in order:
        if node in inputs or any(child in inputs_closure for child, _ in node.next_functions):
            inputs_closure.add(node)
    intermediates: dict[Node, dict[int, None]] = {}
    origins: dict[NodeInput, dict[Node | None, None]] = {}
    tree = _UnionFind()
    inner: set[Node] = set()
    entries: list[tuple[Node | None, NodeInput]] = [(None, root) for root in roots]
    entries += [(node, (child, number)) for node in order for child, number in node.next_functions if child is not None]
    for origin, node_input in entries:
        intermediates.setdefault(node_input[0], {})[node_input[1]] = None
        if origin is not None and origin not in inputs_closure:
            tree.join(origin, node_input[0])
            inner.add(node_input[0])
        elif node_input[0] not in inputs_closure:
            origins.setdefault(node_input, {})[origin] = None
    left_from: dict[Node, set[Node | None]] = {}
    for (node, _), places in origins.items():
        left_from.setdefault(node, set()).update(places)
    at_once = {
        tree.find(node)
        for node, places in left_from.items()
        if len(places) > 1 or node in inner or any(isinstance(place, BackwardCFunction) for place in places)
    }
    leaves = [
        (node, 0)
        for node in order
        if node not in inputs_closure and not node.next_functions and tree.find(node) in at_once
    ]
    groups: dict[Node | None, ParameterGroup] = {}
    for node_input, (origin, *_) in origins.items():
        if tree.find(node_input[0]) not in at_once:
            here = [] if origin is None else [(origin, number) for number in intermediates[origin]]
            groups.setdefault(origin, ParameterGroup(here, [], [])).parameter_edges.append(node_input)
    return leaves, list(groups.values())


def nodes_below(roots: Iterable[Node]) -> list[Node]:
    """All nodes below the roots, each after those that it leads to."""
    order: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = None
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return list(order)


class _UnionFind:
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


def _node_input(edge: GradientEdge) -> NodeInput:
    return edge.node, edge.output_nr


def _edges(node_inputs: Iterable[NodeInput]) -> list[GradientEdge]:
    return [GradientEdge(*node_input) for node_input in node_inputs]
