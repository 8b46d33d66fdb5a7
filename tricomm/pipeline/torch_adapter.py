"""For users of torch.distributed.pipelining: stages on meshes of their own, and the schedules of the eager family.

    stage = ReshardStage(module, 0, 2, device, leaving=[EdgeTensor(source, destination)])       # on the first mesh
    stage = ReshardStage(module, 1, 2, device, arriving=[EdgeTensor(source, destination)])      # on the second
    schedule = ScheduleEager1F1B([stage], n_microbatches=8, loss_fn=loss, depth=1, split=True)
    schedule.step(x)                                                                          # as with torch

torch sends a stage's output from one rank to one rank. A ReshardStage moves it from mesh to mesh instead, and its
gradient back, each on a communicator of its own. It works with torch's own schedules too.
"""

from collections.abc import Sequence
from typing import Any

from torch.distributed.pipelining import schedules

from tricomm.errors import PlanError
from tricomm.pipeline.run.wiring import check_queues, fifo_of
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication, with_synchronous_communication
from tricomm.pipeline.schedule.generators import eager_one_f_one_b
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.pipeline.torch_checks import check_schedule
from tricomm.pipeline.torch_stage import TORCH_RUNTIME, ReshardStage, check_torch
from tricomm.transport.group import context_of, resolve_group

__all__ = ["PlannedSchedule", "ReshardStage", "ScheduleEager1F1B", "check_torch"]


class PlannedSchedule(TORCH_RUNTIME):  # type: ignore[misc]
    """A tricomm schedule, run by torch's runtime. Use it like torch's schedules: ``step``, ``eval``.

    On stages that are all ReshardStages, sends and receives stand where the schedule says; on GPUs the first step, and
    the first evaluation, hides no communication, as kernels that are loaded wait for receives. On other stages the
    runtime places them itself, because stages of torch share one communicator, on which an early receive can block a
    send.

    Args:
        stages: this rank's, in order.
        schedule: sends and receives are put in if it has none.
        loss_fn: of the last stage's output and the target; None for forward only.
        receives_ahead: see :func:`tricomm.pipeline.with_communication`.
        queues: as for :class:`tricomm.pipeline.Executor`; only ReshardStages take turns.
        options: those of torch's schedules, such as ``scale_grads`` and ``output_merge_spec``.

    Raises:
        PlanError: a schedule for other stages, with an edge that torch's runtime does not know, or that cannot run.
        SpecError: a torch that this file does not know.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from tricomm.pipeline import one_f_one_b
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> stage = ReshardStage(torch.nn.Linear(3, 3), 0, 1)
        >>> schedule = PlannedSchedule([stage], one_f_one_b(1, 2), torch.nn.functional.mse_loss)
        >>> output = schedule.step(torch.ones(4, 3), target=torch.zeros(4, 3))
        >>> stage.submod.weight.grad is not None
        True
        >>> print(schedule.schedule)
        0: 0F0 0B0 0F1 0B1
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        stages: Sequence[Any],
        schedule: Schedule,
        loss_fn: Any = None,
        *,
        receives_ahead: int = 1,
        queues: Queues = Queues.PER_CHANNEL,
        **options: Any,
    ) -> None:
        check_torch()
        stages = list(stages)
        check_schedule(schedule, stages)
        super().__init__(stages=stages, n_microbatches=schedule.microbatches, loss_fn=loss_fn, **options)
        if not schedule.has_communication:
            schedule = with_communication(schedule, receives_ahead=receives_ahead)
        check_queues(queues)
        check(schedule, queues)
        turns = fifo_of(queues)
        self._first_order: dict[int, list[Any]] = {}
        parse = schedules._Action.from_str
        self.schedule = schedule
        self.pipeline_order = {
            pipeline_rank: [parse(str(action)) for action in actions]
            for pipeline_rank, actions in enumerate(schedule.compute_only().lists)
        }
        self._prepare_schedule_with_comms(self.pipeline_order)
        if all(isinstance(stage, ReshardStage) for stage in stages):
            for stage in stages:
                stage.receives_ahead, stage.turns = 0, turns
            lowered = self.pipeline_order_with_comms
            self._first_order = {
                pipeline_rank: _in_order(with_synchronous_communication(schedule), pipeline_rank, actions, parse)
                for pipeline_rank, actions in lowered.items()
            }
            self.pipeline_order_with_comms: dict[int, list[Any]] = {
                pipeline_rank: _with_communication_of(schedule, pipeline_rank, actions, parse)
                for pipeline_rank, actions in lowered.items()
            }
        elif turns is not None:
            raise PlanError(f"queues={queues} wants stages that take turns; make them all ReshardStages")
        self._own_stages = stages
        self._had_steps: set[bool] = set()
        """Whether there was a step with backwards, and one without."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's schedules do.

        ::

            output = schedule.step(x, target=y)
        """
        usual, trains = self.pipeline_order_with_comms, bool(self._has_backward)
        is_first = bool(self._first_order) and trains not in self._had_steps and self._loads_kernels
        for stage in self._own_stages if is_first else ():
            stage.is_synchronous = True
        try:
            if is_first:
                self.pipeline_order_with_comms = self._first_order
            output = super().step(*args, **kwargs)
            self._had_steps.add(trains)
            return output
        finally:
            self.pipeline_order_with_comms = usual
            for stage in self._own_stages if is_first else ():
                stage.is_synchronous = False

    @property
    def _loads_kernels(self) -> bool:
        """Whether this rank computes on a device that loads kernels."""
        context = context_of(resolve_group(None))
        return any(context.accelerator_of(stage.device) is not None for stage in self._own_stages)


def _in_order(schedule: Schedule, pipeline_rank: int, lowered: Sequence[Any], parse: Any) -> list[Any]:
    """The same with sends and receives in exactly the schedule's order, where a rank waits for each of them."""
    before: dict[str, list[Any]] = {}
    pending: list[Any] = []
    for action in schedule.lists[pipeline_rank]:
        if action.kind.is_receive or action.kind.is_send:
            pending.append(parse(str(action)))
        else:
            before[str(action)], pending = pending, []
    found: list[Any] = []
    for action in lowered:
        text = str(action)
        if "RECV" in text or "SEND" in text:
            continue
        found += [*before.pop(text, ()), action]
        if not before:  # behind the last computation, and before what ends the step
            found, pending = [*found, *pending], []
    return found


def _with_communication_of(schedule: Schedule, pipeline_rank: int, lowered: Sequence[Any], parse: Any) -> list[Any]:
    """What torch made of a list, steps for FSDP and gradients in it, with sends and receives where the schedule has
    them: receives right before the next computation, sends right after the one before.
    """
    before: dict[str, list[Any]] = {}
    after: dict[str, list[Any]] = {}
    receives: list[Any] = []
    last = ""
    for action in schedule.lists[pipeline_rank]:
        if action.kind.is_receive:
            receives.append(parse(str(action)))
        elif action.kind.is_send:
            after.setdefault(last, []).append(parse(str(action)))
        else:
            last = str(action)
            before[last], receives = receives, []
    found: list[Any] = []
    for action in lowered:
        text = str(action)
        if "RECV" not in text and "SEND" not in text:
            found += [*before.pop(text, ()), action, *after.pop(text, ())]
    return found


class ScheduleEager1F1B(PlannedSchedule):
    """1F1B with more forwards ahead of the first backward, so that transfers hide behind compute.

    Args:
        stages: this rank's stage, in a list.
        n_microbatches: how many a step is cut into.
        loss_fn, receives_ahead, options: see PlannedSchedule.
        depth: 0 is 1F1B; 1 is the eager 1F1B of the paper, and hides hops up to (F + B) / 2.
        split: backwards in two steps, the gradient of the inputs first: hides W / 2 more.
        weight_delay: see :func:`tricomm.pipeline.eager_one_f_one_b`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> stage = ReshardStage(torch.nn.Linear(3, 3), 0, 1)
        >>> schedule = ScheduleEager1F1B([stage], 2, torch.nn.functional.mse_loss, split=True)
        >>> output = schedule.step(torch.ones(4, 3), target=torch.zeros(4, 3))
        >>> print(schedule.schedule)  # I: the gradient of the input, W: that of the weights
        0: 0F0 0I0 0W0 0F1 0I1 0W1
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        stages: Sequence[Any],
        n_microbatches: int,
        loss_fn: Any = None,
        *,
        depth: int = 1,
        split: bool = False,
        weight_delay: int | Sequence[int] = 0,
        receives_ahead: int = 1,
        **options: Any,
    ) -> None:
        schedule = eager_one_f_one_b(
            stages[0].num_stages, n_microbatches, depth=depth, split=split, weight_delay=weight_delay
        )
        super().__init__(stages, schedule, loss_fn, receives_ahead=receives_ahead, **options)
