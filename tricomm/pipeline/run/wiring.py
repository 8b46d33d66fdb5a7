"""How the stages of a pipeline hang together: checked once, then made into the Links of one rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tricomm.errors import ArgumentError, PlanError, SpecError
from tricomm.layout.mesh import format_ranks
from tricomm.options import LinkOptions
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.directed_link import PerDirectionFifo
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.stage import LOSS, Stage
from tricomm.pipeline.schedule.actions import Channel, Edge, Kind
from tricomm.pipeline.schedule.check import Queues, receive_ring
from tricomm.pipeline.schedule.schedule import Schedule

EdgeTensors = Mapping[tuple[int, int], Mapping[str, EdgeTensor]]
"""Per (source stage, destination stage), the tensors that cross, by the name that both stages know them by."""


def gradient_names(schedule: Schedule, tensors: Mapping[str, EdgeTensor]) -> tuple[str, ...]:
    """Name the tensors of an edge that have a gradient, in the order in which gradients cross."""
    return tuple(name for name, one in tensors.items() if schedule.has_backward and one.gradient is not None)


def check_wiring(schedule: Schedule, stages: Sequence[Stage], edges: EdgeTensors) -> None:
    """Refuse stages and edges that do not fit the schedule or each other.

    Raises:
        SpecError: the first rule that is broken.
    """
    if len(stages) != schedule.stages:
        raise SpecError(f"{len(stages)} stages for a schedule of {schedule.stages}; give one Stage for each")
    if {Edge(*edge) for edge in edges} != set(schedule.edges):
        sides = ({Edge(*edge) for edge in edges}, set(schedule.edges))
        given, wanted, missing = (", ".join(map(str, sorted(one))) for one in (*sides, sides[1] - sides[0]))
        remedy = f"say what crosses {missing}, or " if missing else ""
        raise SpecError(
            f"edges are given for {given or 'none'}, and the schedule has {wanted or 'none'}; {remedy}pass "
            f"edges={sorted(edges)} to the function that makes the schedule"
        )
    _check_meshes(schedule, stages)
    for (source, destination), tensors in edges.items():
        if not tensors:
            raise SpecError(f"edge {source}-{destination} carries nothing; name its tensors or drop the edge")
        for name, tensor in tensors.items():
            _check_end(source, stages[source], name, "outputs", tensor.source.mesh.ranks)
            _check_end(destination, stages[destination], name, "inputs", tensor.destination.mesh.ranks)
    for index, stage in enumerate(stages):
        for name in stage.inputs:
            sources = [source for (source, destination), one in edges.items() if destination == index and name in one]
            if len(sources) > 1:
                raise SpecError(
                    f"input {name!r} of stage {index} comes from the stages {sorted(sources)}; an input has one "
                    "origin: give the tensors different names"
                )
        if stage.loss is None and not any(source == index for source, _ in edges):
            raise SpecError(
                f"stage {index} has no loss and no edge out of it; nothing needs it: give it one or drop it"
            )
        if LOSS in stage.outputs and any(LOSS in one for (source, _), one in edges.items() if source == index):
            raise SpecError(f"stage {index} sends its loss to another stage; give that output another name")


def check_queues(queues: Queues) -> None:
    """Refuse queues of which only the simulator knows.

    Raises:
        PlanError: if they are.
    """
    if queues.is_of_peers:
        raise PlanError(
            f"queues={queues} describes other systems; transfers of tricomm have queues PER_CHANNEL or PER_DIRECTION"
        )


def fifo_of(queues: Queues) -> PerDirectionFifo | None:
    """Make what keeps the order of queues on a rank, if they have one beside that of each channel."""
    return PerDirectionFifo() if queues is Queues.PER_DIRECTION else None


def data_names(index: int, stage: Stage, edges: EdgeTensors) -> tuple[str, ...]:
    """Name the inputs of a stage that no edge brings."""
    brought = {name for (_, destination), tensors in edges.items() if destination == index for name in tensors}
    return tuple(name for name in stage.inputs if name not in brought)


def make_links(
    schedule: Schedule,
    edges: EdgeTensors,
    rank: int,
    name: str,
    fifo: PerDirectionFifo | None,
    options: LinkOptions,
) -> dict[Edge, Link]:
    """Make the Links of the edges that a rank has a part in, in the order in which all ranks connect them.

    An edge inside of a pipeline rank has one only if its two layouts differ, and takes no turns.
    """
    links: dict[Edge, Link] = {}
    for edge in schedule.edges:
        tensors = list(edges[edge].values())
        if not schedule.has_backward:
            tensors = [replace(tensor, gradient=None) for tensor in tensors]
        is_inside = edge.forward not in schedule.channels
        involved = any(rank in spec.mesh for spec in (tensors[0].source, tensors[0].destination))
        if not involved or (is_inside and all(_passes_unchanged(tensor) for tensor in tensors)):
            continue
        links[edge] = Link(
            f"{name} {edge}",
            tensors,
            microbatches=schedule.microbatches,
            orders=(
                _order(schedule, edge.forward),
                _order(schedule, edge.backward if schedule.has_backward else edge.forward),
            ),
            slots=(None, None) if is_inside else (_slots(schedule, edge.forward), _slots(schedule, edge.backward)),
            fifo=None if is_inside else fifo,
            **options,
        )
    return links


def _slots(schedule: Schedule, channel: Channel) -> int | None:
    """How many receive buffers a channel needs; None for one that carries nothing."""
    return receive_ring(schedule, channel) or None


def _order(schedule: Schedule, channel: Channel) -> list[int]:
    """The order in which the microbatches leave a stage."""
    actions = schedule.lists[schedule.pipeline_rank_of(channel.sender)]
    return [
        action.microbatch
        for action in actions
        if action.stage == channel.sender
        and (action.kind is Kind.FORWARD if channel.is_forward else action.kind.gives_gradient)
    ]


def _passes_unchanged(tensor: EdgeTensor) -> bool:
    same_gradient = tensor.gradient in ((), None, tensor.destination.placements)
    return tensor.source == tensor.destination and not tensor.source.partial_axes and same_gradient


def _check_meshes(schedule: Schedule, stages: Sequence[Stage]) -> None:
    taken: dict[int, int] = {}
    for pipeline_rank in range(schedule.pipeline_ranks):
        first, *others = schedule.stages_of(pipeline_rank)
        ranks = set(stages[first].mesh.ranks)
        for other in others:
            if set(stages[other].mesh.ranks) != ranks:
                raise SpecError(
                    f"stages {first} and {other} are at pipeline rank {pipeline_rank} of the schedule, on "
                    f"{stages[first].mesh} and {stages[other].mesh}; the stages of a pipeline rank have the same ranks"
                )
        for rank in stages[first].mesh.ranks:
            if taken.setdefault(rank, pipeline_rank) != pipeline_rank:
                raise SpecError(
                    f"rank {rank} is on the meshes of pipeline ranks {taken[rank]} and {pipeline_rank}; a rank "
                    "follows one list "
                    "of actions: give the pipeline ranks different ranks, or put their stages at one pipeline rank"
                )


def _check_end(index: int, stage: Stage, name: str, side: str, ranks: Sequence[int]) -> None:
    names = getattr(stage, side)
    if name not in names:
        raise SpecError(f"an edge carries {name!r}, and stage {index} has {side}={names}; name it there")
    if set(ranks) != set(stage.mesh.ranks):
        raise SpecError(
            f"tensor {name!r} among the {side} of stage {index} is laid out on ranks {format_ranks(ranks)}, and the "
            f"stage is on {stage.mesh}; lay it out on the ranks of the stage"
        )


def check_data(index: int, rank: int, names: Sequence[str], data: Mapping[str, Any], microbatches: int) -> None:
    """Refuse data of a step that lack something which a stage of this rank takes.

    Raises:
        SpecError: a name is missing, or has not one tensor for each microbatch.
    """
    for name in names:
        if name not in data:
            given = ", ".join(map(repr, data)) or "nothing"
            raise SpecError(
                f"input {name!r} of stage {index} is not in the step's data on rank {rank}, which names {given}; pass "
                f"{{{name!r}: tensor.chunk({microbatches})}}"
            )
        values = data[name]
        found = len(values) if isinstance(values, Sequence | torch.Tensor) else 0
        if found != microbatches or not all(isinstance(one, torch.Tensor) for one in values):
            kinds = ", ".join(sorted({type(one).__name__ for one in values})) if found else type(values).__name__
            raise SpecError(
                f"input {name!r} of stage {index} has {found} elements ({kinds}) in the step's data on rank {rank}, "
                f"and the schedule has {microbatches} microbatches; pass one tensor for each, such as "
                f"{{{name!r}: tensor.chunk({microbatches})}}"
            )


def check_step(trains: bool, data: Mapping[str, Any], loss_weights: Sequence[float] | None, microbatches: int) -> None:
    """Refuse a step that cannot train, data without names, or weights that are not one for each microbatch.

    Raises:
        SpecError: if it is so.
    """
    if trains and not torch.is_grad_enabled():
        raise SpecError(
            "a step trains, and was called where gradients are disabled (torch.no_grad or inference_mode); call "
            "executor.evaluate(data), or leave that block"
        )
    if not isinstance(data, Mapping):
        raise ArgumentError(
            f"data of a step are a {type(data).__name__}, and inputs have names; pass {{name: tensor.chunk("
            f"{microbatches})}}, or {{}} where a rank has none"
        )
    if loss_weights is not None and len(loss_weights) != microbatches:
        raise SpecError(
            f"loss_weights={list(loss_weights)} are {len(loss_weights)}, and the schedule has {microbatches} "
            "microbatches; pass one for each"
        )
