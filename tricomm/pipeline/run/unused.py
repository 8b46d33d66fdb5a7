"""What had no gradient stays without one: which outputs of a stage the later stages made no use of.

A gradient that nobody computes still crosses, as zeros: the wire carries the same in every step. In one process there
would be none, and the parameters behind it would keep what they have, also None, which an optimiser leaves alone. So at
the end of the first step each stage tells those before it which of its inputs had a gradient in some microbatch, and
they take back what only zeros gave. Inputs that had none are asked for again in each step; those that had one are not,
so that an ordinary pipeline pays once. Where such an input goes without in a later step, its zeros stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from tricomm.errors import TransportError
from tricomm.pipeline.run.backward import nodes_below
from tricomm.pipeline.run.stage import LOSS, Entry, Stage
from tricomm.transport.coordination.store import awaited_note, post_note, store_errors

KEPT_CALLS = 4
"""Notes of so many calls stay in the store: by then everybody has read them."""


class Reach:
    """What of a stage hangs on which of its outputs, over the microbatches of a step.

    Args:
        module: of the stage, before the step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {id(parameter): parameter for parameter in module.parameters()}
        self._without = {key for key, parameter in self._parameters.items() if parameter.grad is None}
        self._below: dict[str, set[int]] = {}
        self._inputs: dict[str, set[str]] = {}
        self._opaque: set[str] = set()
        self.inputs_with_gradient: set[str] = set()
        """Those for which autograd gave one."""

    def record(self, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """Look at the graph of a microbatch, from outputs that get a gradient down to leaves."""
        names = {id(leaf): name for name, leaf in inputs.items()}
        for output, tensor in outputs.items():
            if not tensor.requires_grad:
                continue
            below, found = self._below.setdefault(output, set()), self._inputs.setdefault(output, set())
            for node in nodes_below([get_gradient_edge(tensor).node]):
                variable = getattr(node, "variable", None)
                if id(variable) in self._parameters:
                    below.add(id(variable))
                elif id(variable) in names:
                    found.add(names[id(variable)])
                # What such a function computes in its backward cannot be seen from here: recomputation, say.
                if isinstance(node, BackwardCFunction) and getattr(node, "_forward_cls", None) is not Entry:
                    self._opaque.add(output)

    def used_inputs(self, outputs: Iterable[str]) -> set[str]:
        """Return the inputs that have a gradient if these outputs have one."""
        reached = set().union(*(self._inputs.get(output, ()) for output in outputs))
        return reached & self.inputs_with_gradient

    def used_parameters(self, outputs: Iterable[str]) -> set[int]:
        """Return which parameters have a gradient if these outputs have one, by id."""
        outputs = set(outputs)
        if outputs & self._opaque:
            return set(self._parameters)
        return set().union(*(self._below.get(output, ()) for output in outputs))

    def take_back(self, used: set[int]) -> None:
        """Drop the gradients that only zeros gave, of parameters that had none before.

        Args:
            used: which parameters have a gradient, by id.
        """
        for key in set().union(*self._below.values()) & self._without - used:
            self._parameters[key].grad = None


class GradientUse:
    """Tell and learn which inputs had a gradient; see above.

    Args:
        store: that the ranks share.
        rank: this rank.
        name: never used before on this store.
        stages: all.
        edges: per (source, destination), the tensors with a gradient.
        timeout_seconds: how long to wait for another rank.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        name: str,
        stages: Sequence[Stage],
        edges: Mapping[tuple[int, int], Sequence[str]],
        timeout_seconds: float,
    ) -> None:
        self.store, self.rank, self.name, self.timeout_seconds = store, rank, name, timeout_seconds
        self.stages, self.edges = stages, edges
        self._asked = {edge: set(names) for edge, names in edges.items() if names}
        """Per edge, what is asked for in the next step: first all, then what had no gradient in the first."""
        self._call = 0
        self._told: set[int] = set()
        self._reaches: dict[int, Reach] = {}
        self._notes: dict[int, set[str]] = {}

    def begin(self, modules: Mapping[int, nn.Module]) -> Mapping[int, Reach]:
        """Begin a step; returns what is to record the graphs of stages of this rank that are asked for."""
        self._call += 1
        self._told.clear()
        self._notes.clear()
        self._reaches = {stage: Reach(module) for stage, module in modules.items() if self._concerns(stage)}
        return self._reaches

    def _concerns(self, stage: int) -> bool:
        return any(stage in edge for edge in self._asked)

    def settle(self) -> None:
        """Take back what only zeros gave in this step.

        Raises:
            TransportError: another rank failed, or did not come so far within the timeout.
        """
        used: set[int] = set()
        for stage in sorted(self._reaches, reverse=True):
            outputs = {name for name in self.stages[stage].outputs if self._has_gradient(stage, name)}
            reach = self._reaches[stage]
            self._tell(stage, {"used": sorted(reach.used_inputs(outputs))})
            used |= reach.used_parameters(outputs)
        for reach in self._reaches.values():
            reach.take_back(used)
        if self._call == 1:
            asked = {edge: names - self._used(edge[1]) for edge, names in self._asked.items() if self._is_here(edge)}
            self._asked = {edge: names for edge, names in asked.items() if names}
        self._reaches = {}

    def abort(self, reason: str) -> None:
        """Tell those that wait for this rank's notes that it does not go on."""
        for stage in set(self._reaches) - self._told:
            self._tell(stage, {"error": reason})

    def _is_here(self, edge: tuple[int, int]) -> bool:
        return any(self.rank in self.stages[stage].mesh for stage in edge)

    def _has_gradient(self, stage: int, output: str) -> bool:
        """Whether some stage computed a gradient of an output."""
        if output == LOSS:
            return True
        takers = [edge for edge, names in self.edges.items() if edge[0] == stage and output in names]
        return any(output not in self._asked.get(edge, ()) or output in self._used(edge[1]) for edge in takers)

    def _used(self, stage: int) -> set[str]:
        """The inputs of a stage that had a gradient on one of its ranks."""
        if stage in self._notes:
            return self._notes[stage]
        used: set[str] = set()
        for rank in self.stages[stage].mesh.ranks:
            absent = f"rank {rank} did not end the backwards of stage {stage} within the timeout"
            note = awaited_note(self.store, self._key(stage, rank, self._call), self.timeout_seconds, absent)
            if "error" in note:
                raise TransportError(note["error"])
            used |= set(note["used"])
        self._notes[stage] = used
        return used

    def _tell(self, stage: int, note: object) -> None:
        self._told.add(stage)
        post_note(self.store, self._key(stage, self.rank, self._call), note)
        if self._call > KEPT_CALLS:
            with store_errors():
                self.store.delete_key(self._key(stage, self.rank, self._call - KEPT_CALLS))

    def _key(self, stage: int, rank: int, call: int) -> str:
        return f"executor/{self.name}/used/{call}/{stage}/{rank}"
