"""What the adapter for torch.distributed.pipelining refuses: stages and schedules that do not fit together; and what
torch would do for a stage that the adapter does itself.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tricomm.errors import PlanError, SpecError
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.schedule.actions import Kind
from tricomm.pipeline.schedule.schedule import Schedule


def unknown_of(owner: type, used: Mapping[str, Sequence[str]]) -> list[str]:
    """What a class of torch lacks of the methods, and their arguments, that the adapter uses; in words."""
    found = []
    for name, arguments in used.items():
        method = getattr(owner, name, None)
        if method is None:
            found.append(f"{owner.__name__}.{name} is missing")
            continue
        missing = [argument for argument in arguments if argument not in inspect.signature(method).parameters]
        found += [f"{owner.__name__}.{name} takes no {argument}" for argument in missing]
    return found


@contextmanager
def without_new_groups(made: Any, job: Any) -> Iterator[None]:
    """Let torch make a stage of the whole job without a communicator for either direction.

    From 2.14 on it makes two if its option ``pipeline_per_direction_p2p`` is on, in a call that all ranks of the job
    have to make. It looks first whether it has made them before, and is told so here.

    Args:
        made: where torch keeps such pairs, by group; None before 2.14.
        job: the group of all ranks.
    """
    if made is None or job in made:
        yield
        return
    made[job] = (job, job)
    try:
        yield
    finally:
        del made[job]


def check_place(
    rank: int, index: int, stages: int, arriving: Sequence[EdgeTensor], leaving: Sequence[EdgeTensor]
) -> None:
    """Whether a stage has the edges that its place asks for, and this rank a part in them.

    Raises:
        SpecError: if not.
    """
    if not 0 <= index < stages:
        raise SpecError(f"stage_index={index} is not one of {stages} stages; count from 0")
    for name, crossings, wanted in (("arriving", arriving, index > 0), ("leaving", leaving, index < stages - 1)):
        if bool(crossings) != wanted:
            rule = "needs at least one tensor" if wanted else "must be empty"
            raise SpecError(
                f"{name} of stage {index} of {stages} has {len(crossings)} tensors and {rule}; the first stage has "
                "none arriving, the last none leaving, and all others both"
            )
    for side, meshes in (
        ("arrives at", [one.destination.mesh for one in arriving]),
        ("leaves", [one.source.mesh for one in leaving]),
    ):
        outside = next((mesh for mesh in meshes if rank not in mesh), None)
        if outside is not None:
            raise SpecError(
                f"rank {rank} makes stage {index}, but a tensor {side} {outside}, which has not this rank; only the "
                "ranks of a stage's mesh make it"
            )
    for tensor in (*arriving, *leaving):
        both = sorted(set(tensor.source.mesh.ranks) & set(tensor.destination.mesh.ranks))
        if both:
            raise SpecError(
                f"rank {both[0]} is on {tensor.source.mesh} and on {tensor.destination.mesh}, and torch hands tensors "
                "between stages of one rank over without a transfer; give neighbouring stages ranks of their own"
            )


def check_schedule(schedule: Schedule, stages: Sequence[Any]) -> None:
    """Whether a schedule is for these stages of torch, and one that torch's runtime can run.

    Raises:
        PlanError: if not.
    """
    count = stages[0].num_stages
    if schedule.stages != count:
        raise PlanError(f"the schedule has {schedule.stages} stages and the pipeline {count}; make it for {count}")
    pipeline_rank = stages[0].group_rank
    ours = tuple(stage.stage_index for stage in stages)
    if schedule.stages_of(pipeline_rank) != ours:
        raise PlanError(
            f"the schedule has stages {schedule.stages_of(pipeline_rank)} at pipeline rank {pipeline_rank}, and this "
            f"rank has {ours}; give it those, in order"
        )
    skips = [edge for edge in schedule.edges if edge.destination != edge.source + 1]
    if skips:
        raise PlanError(
            f"edge {skips[0]} joins stages that are no neighbours, which torch's runtime cannot run; pass the tensor "
            "through the stages between, or use tricomm.pipeline's own executor"
        )
    _check_order(schedule)


def _check_order(schedule: Schedule) -> None:
    last: dict[tuple[int, bool], int] = {}
    for action in schedule.actions():
        is_forward = action.kind is Kind.FORWARD
        if is_forward or action.kind.gives_gradient:
            before = last.get((action.stage, is_forward), -1)
            if action.microbatch != before + 1:
                raise PlanError(
                    f"{action} comes where microbatch {before + 1} is due, and torch's runtime counts losses and "
                    "outputs in the order 0, 1, 2 ...; keep this order, or use tricomm.pipeline's own executor"
                )
            last[action.stage, is_forward] = action.microbatch
