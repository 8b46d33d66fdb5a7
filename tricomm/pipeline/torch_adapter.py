"""For users of torch.distributed.pipelining: stages on meshes of their own, and the schedules of the eager family.

    stage = ReshardStage(module, 0, 2, device, leaving=[EdgeTensor(source, destination)])       # on the first mesh
    stage = ReshardStage(module, 1, 2, device, arriving=[EdgeTensor(source, destination)])      # on the second
    schedule = ScheduleEager1F1B([stage], n_microbatches=8, loss_fn=loss, depth=1, split=True)
    schedule.step(x)                                                                          # as with torch

torch sends a stage's output from one rank to one rank. A ReshardStage moves it from mesh to mesh instead, and its
gradient back, each on a communicator of its own. It works with torch's own schedules too.

torch has no supported place to put another transfer in, so this file uses names of it that are private. All of them
stand here, ``check_torch`` looks for each of them, and a test runs every schedule on them: where torch changes, both
say so.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from tricomm.errors import PlanError, SpecError
from tricomm.options import LinkOptions, Options, StageOptions
from tricomm.pipeline.run.directed_link import PerDirectionFifo, ReceiveHandle
from tricomm.pipeline.run.edge import EdgeTensor, Link
from tricomm.pipeline.run.wiring import check_queues, fifo_of
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.generators import eager_one_f_one_b
from tricomm.pipeline.schedule.schedule import Schedule
from tricomm.pipeline.torch_checks import check_place, check_schedule, unknown_of
from tricomm.pipeline.torch_dtensors import check_stage_mesh, gradient_to_send, shard_to_send, wrapped
from tricomm.transport.accelerator import device_here

# Bases without types: signatures of private methods differ between versions of torch.
_Stage: Any = PipelineStage
_Runtime: Any = getattr(schedules, "_PipelineScheduleRuntime", object)

USED_OF_STAGE = {
    "forward_one_chunk": ("fwd_chunk_id", "args", "kwargs"),
    "get_fwd_recv_ops": ("fwd_chunk_id",),
    "get_fwd_send_ops": ("fwd_chunk_id",),
    "get_bwd_recv_ops": ("bwd_chunk_id",),
    "get_bwd_send_ops": ("bwd_chunk_id",),
    "_retrieve_recv_activations": ("fwd_chunk_id",),
    "_retrieve_recv_grads": ("bwd_chunk_id",),
    "_prepare_forward_infra": ("num_microbatches", "args", "kwargs"),
    "_prepare_backward_infra": ("num_microbatches",),
    "clear_runtime_states": (),
    "perform_reduce_grad": ("grad_scale_factor",),
    "set_local_fwd_input": ("prev_stage_outputs", "mb_index"),
}
"""Methods of torch's stage that are replaced or extended here, with the arguments that they must have."""

USED_OF_RUNTIME = {
    "_prepare_schedule_with_comms": ("actions",),
    "_step_microbatches": (),
}
"""Of the runtime of its schedules."""


def check_torch() -> None:
    """Whether this torch has the private names that this file builds on.

    Raises:
        SpecError: one is missing or takes other arguments; the message lists them.
    """
    problems = unknown_of(_Stage, USED_OF_STAGE)
    problems += (
        ["schedules._PipelineScheduleRuntime is missing"]
        if _Runtime is object
        else unknown_of(_Runtime, USED_OF_RUNTIME)
    )
    if not hasattr(getattr(schedules, "_Action", None), "from_str"):
        problems.append("schedules._Action.from_str is missing")
    if problems:
        raise SpecError(
            f"torch {torch.__version__} is not one that tricomm.pipeline.torch_adapter knows: {'; '.join(problems)}; "
            "use torch 2.11 to 2.15, or run the pipeline with tricomm.pipeline's own executor, which needs none of this"
        )


class ReshardStage(_Stage):  # type: ignore[misc]
    """A stage whose boundaries are reshards. Every rank of the stage's mesh makes one, with equal arguments.

    Shapes are those of one microbatch. The module gets what arrives and returns what leaves: one tensor, or a tuple.
    A transfer has its own thread and communicator, so it runs while the stage computes; receives are posted ahead.

    Args:
        module, stage_index, num_stages, device, dw_builder: as for torch's PipelineStage.
        arriving: what comes from the stage before, in the order of the module's arguments; empty for the first stage.
        leaving: what goes to the stage after; empty for the last.
        pipeline_ranks: how many groups of ranks there are; None means one stage each. With fewer, stage s is at
            pipeline rank s % pipeline_ranks, as in torch's interleaved schedules.
        receives_ahead: how many receives are posted before torch asks for them. Each costs a buffer of one microbatch.
            Schedules of this file place receives themselves, and set it to 0.
        device_mesh: the stage's, if its module takes and returns DTensors; plain shards otherwise.
        options: those of :class:`tricomm.Options` but ``channel`` and ``name``, which the stage chooses.

    Raises:
        SpecError: boundaries that do not fit the stage's place, or a torch that this file does not know.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device | str = "cpu",
        *,
        arriving: Sequence[EdgeTensor] = (),
        leaving: Sequence[EdgeTensor] = (),
        pipeline_ranks: int | None = None,
        receives_ahead: int = 1,
        dw_builder: Any = None,
        device_mesh: Any = None,
        **options: Unpack[StageOptions],
    ) -> None:
        check_torch()
        Options.of(options, "ReshardStage", StageOptions)
        device = device_here(torch.device(device))
        check_place(dist.get_rank(), stage_index, num_stages, arriving, leaving)
        specs = [*(one.destination for one in arriving), *(one.source for one in leaving)]
        check_stage_mesh(device_mesh, specs)
        self._device_mesh = device_mesh
        # A group of this rank alone: torch is to find nobody to talk to.
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        super().__init__(module, stage_index, num_stages, device, group=alone, dw_builder=dw_builder)
        self.group_size = num_stages if pipeline_ranks is None else pipeline_ranks
        self.group_rank = stage_index % self.group_size
        self.receives_ahead = receives_ahead
        self._arriving, self._leaving = tuple(arriving), tuple(leaving)
        self._options: LinkOptions = {"device": device, **options}
        self.turns: PerDirectionFifo | None = None
        self._before: Link | None = None
        self._after: Link | None = None
        # In debug mode torch would check shapes that it does not know here; the Links check them always.
        self._runtime_validate = False
        self._forget()

    def _forget(self) -> None:
        self._outputs: dict[int, tuple[torch.Tensor, ...]] = {}
        self._activations: dict[int, ReceiveHandle | None] = {}
        self._gradients: dict[int, ReceiveHandle | None] = {}
        self._forwards_sent = 0

    @property
    def stage_index_to_group_rank(self) -> dict[int, int]:
        """For torch all stages are on this rank, so that it sets up no transfer of its own."""
        return dict.fromkeys(range(self.num_stages), 0)

    @stage_index_to_group_rank.setter
    def stage_index_to_group_rank(self, mapping: dict[int, int]) -> None:
        pass

    # ---- setting up, where torch would exchange shapes and allocate a buffer per microbatch

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        self.chunks = num_microbatches
        self.args_recv_info = dict.fromkeys(range(num_microbatches), ())
        self.act_send_info: dict[int, list[int]] = {}
        if hasattr(self, "_stage_meta"):
            arguments = args[0] if self.is_first and args and isinstance(args[0], tuple) else self._arriving
            self._stage_meta.inputs = (None,) * len(arguments)
        # In the order of the edges, so that no two stages wait for each other.
        if self._arriving and self._before is None:
            self._before = self._connected(self.stage_index - 1, self._arriving)
        if self._leaving and self._after is None:
            self._after = self._connected(self.stage_index, self._leaving)
        return ()

    def _connected(self, source: int, tensors: Sequence[EdgeTensor]) -> Link:
        assert self.chunks is not None
        name = f"{source}-{source + 1}"
        link = Link(name, tensors, microbatches=self.chunks, turns=self.turns, **self._options)
        link.connect()
        return link

    def close(self) -> None:
        """Give back the connections; later steps raise a SpecError."""
        for link in (self._before, self._after):
            if link is not None:
                link.close()

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> None:
        return None

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        pass

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        pass

    # ---- one step

    def clear_runtime_states(self) -> None:
        """Begin a step."""
        super().clear_runtime_states()
        self._forget()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Post the receive of an activation."""
        if self._before is not None:
            self._post(self._activations, self._before.recv, fwd_chunk_id)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Post the receive of a gradient."""
        if self.has_backward and self._after is not None and self._after.differentiable:
            self._post(self._gradients, self._after.recv_gradient, bwd_chunk_id)
        return []

    def _post(
        self, posted: dict[int, ReceiveHandle | None], receive: Callable[[int], ReceiveHandle], microbatch: int
    ) -> None:
        assert self.chunks is not None
        for following in range(microbatch, min(self.chunks, microbatch + 1 + self.receives_ahead)):
            if following not in posted:
                posted[following] = receive(following)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        handle, self._activations[fwd_chunk_id] = self._activations[fwd_chunk_id], None
        assert handle is not None
        assert self._before is not None
        wanted = self.has_backward and torch.is_grad_enabled()
        found = [
            wrapped(tensor, one.destination, self._device_mesh)
            for tensor, one in zip(handle.wait_all(), self._arriving, strict=True)
        ]
        return tuple(
            one.requires_grad_(wanted and index in self._before.differentiable) for index, one in enumerate(found)
        )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor | None, ...]:
        found: list[torch.Tensor | None] = [None] * len(self._leaving)
        handle, self._gradients[bwd_chunk_id] = self._gradients.get(bwd_chunk_id), None
        if handle is not None and self._after is not None:
            for index, gradient in zip(self._after.differentiable, handle.wait_all(), strict=True):
                found[index] = wrapped(gradient, self._leaving[index].gradient_specs()[1], self._device_mesh)
        return tuple(found)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute, and keep the output until it is sent."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self._after is not None:
            tensors = output if isinstance(output, list | tuple) else (output,)
            self._outputs[fwd_chunk_id] = tuple(
                shard_to_send(tensor, one.source, dist.get_rank())
                for tensor, one in zip(tensors, self._leaving, strict=True)
            )
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Start to send an activation."""
        if self._after is not None:
            self._after.send(self._outputs.pop(fwd_chunk_id), fwd_chunk_id)
            self._forwards_sent += 1
            if not self.has_backward and self._forwards_sent == self.chunks:
                self._flush()
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Start to send a gradient; one that is not there is zero."""
        if self.has_backward and self._before is not None and self._before.differentiable:
            found = self.bwd_cache.pop(bwd_chunk_id)
            gradients = [
                gradient_to_send(found[index], self._arriving[index].gradient_specs()[0], dist.get_rank(), self.device)
                for index in self._before.differentiable
            ]
            self._before.send_gradient(tuple(gradients), bwd_chunk_id)
        return []

    def _flush(self) -> None:
        """Nothing may still be on its way when a step returns: the process might end."""
        for link in (self._before, self._after):
            if link is not None:
                link.flush()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """The last thing of a step with backwards."""
        super().perform_reduce_grad(grad_scale_factor)
        self._flush()

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """What torch does between two stages of one rank.

        Raises:
            SpecError: always; neighbouring stages are on different meshes here.
        """
        raise SpecError(
            f"stages {self.stage_index - 1} and {self.stage_index} are on one rank, as in V-shaped schedules; a "
            "ReshardStage has its neighbours on other ranks: use a schedule that places stages in turn"
        )


# ---- schedules


class PlannedSchedule(_Runtime):  # type: ignore[misc]
    """A tricomm schedule, run by torch's runtime. Use it like torch's schedules: ``step``, ``eval``.

    On stages that are all ReshardStages, sends and receives stand where the schedule says. On others the runtime places
    them itself, because stages of torch share one communicator, on which an early receive can block a send.

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
            self.pipeline_order_with_comms: dict[int, list[Any]] = {
                pipeline_rank: _with_communication_of(schedule, pipeline_rank, actions, parse)
                for pipeline_rank, actions in lowered.items()
            }
        elif turns is not None:
            raise PlanError(f"queues={queues} wants stages that take turns; make them all ReshardStages")


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
