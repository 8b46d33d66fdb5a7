"""A stage of torch.distributed.pipelining whose boundaries are reshards, and what of torch it is made of.

torch has no supported place to put another transfer in, so this file uses names of it that are private. All of them
stand here, ``check_torch`` looks for each of them, and a test runs every schedule on them: where torch changes, both
say so.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining import stage as stages

from tricomm.errors import SpecError
from tricomm.options import LinkOptions, Options, StageOptions
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.directed_link import PerDirectionFifo, ReceiveHandle, SendHandle
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.torch_checks import check_place, unknown_of, without_new_groups
from tricomm.pipeline.torch_dtensors import check_stage_mesh, gradient_to_send, shard_to_send, wrapped
from tricomm.transport.accelerator import device_here

# Bases without types: signatures of private methods differ between versions of torch.
_Stage: Any = PipelineStage
_PAIRS_OF_GROUPS: Any = getattr(stages, "_PP_DIRECTION_GROUP_CACHE", None)
TORCH_RUNTIME: Any = getattr(schedules, "_PipelineScheduleRuntime", object)

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

    Example:
        >>> check_torch()  # says nothing: this torch is known
    """
    problems = unknown_of(_Stage, USED_OF_STAGE)
    problems += (
        ["schedules._PipelineScheduleRuntime is missing"]
        if TORCH_RUNTIME is object
        else unknown_of(TORCH_RUNTIME, USED_OF_RUNTIME)
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

    Example:
        >>> from torch.distributed.pipelining import Schedule1F1B
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> stage = ReshardStage(torch.nn.Linear(3, 3), 0, 1)  # with a neighbour: leaving=[EdgeTensor(here, there)]
        >>> losses = []
        >>> schedule = Schedule1F1B(stage, 2, torch.nn.functional.mse_loss)
        >>> outputs = schedule.step(torch.ones(4, 3), target=torch.zeros(4, 3), losses=losses)
        >>> len(losses), stage.submod.weight.grad is not None
        (2, True)
        >>> stage.close()
        >>> dist.destroy_process_group()
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
        # torch wants a stage for each rank of its group, which here is the whole job. A group of this rank alone would
        # do too, but from torch 2.14 on each one that a rank makes shifts the names of those that all make after it.
        with without_new_groups(_PAIRS_OF_GROUPS, dist.group.WORLD):
            super().__init__(module, stage_index, max(num_stages, dist.get_world_size()), device, dw_builder=dw_builder)
        self.num_stages = num_stages
        self.group_size = num_stages if pipeline_ranks is None else pipeline_ranks
        self.group_rank = stage_index % self.group_size
        self.receives_ahead = receives_ahead
        self._arriving, self._leaving = tuple(arriving), tuple(leaving)
        self._options: LinkOptions = {"device": device, **options}
        self.turns: PerDirectionFifo | None = None
        self.is_synchronous = False
        """Whether what is sent or received has crossed before anything else is done."""
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
        """For torch all stages are on this rank, so that it sets up no transfer of its own.

        ::

            stage.stage_index_to_group_rank  # {0: 0, 1: 0} of two stages
        """
        return dict.fromkeys(range(self.num_stages), 0)

    @stage_index_to_group_rank.setter
    def stage_index_to_group_rank(self, mapping: dict[int, int]) -> None:
        pass

    # ---- setting up, where torch would exchange shapes and allocate a buffer per microbatch

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32, device="cpu")

    def _warmup_backward_result(self, received_result: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32, device="cpu")

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
        """Give back the connections; later steps raise a SpecError.

        ::

            schedule.step(x)
            stage.close()
        """
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
        """Begin a step.

        ::

            stage.clear_runtime_states()  # after a step that failed; torch's schedules call it first of all
        """
        super().clear_runtime_states()
        self._forget()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Post the receive of an activation.

        ::

            stage.get_fwd_recv_ops(0)  # []: it comes in the background, while the stage computes
            output = stage.forward_one_chunk(0, ())
        """
        if self._before is not None:
            self._post(self._activations, self._before.recv, fwd_chunk_id)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Post the receive of a gradient.

        ::

            stage.get_bwd_recv_ops(0)  # []
            stage.backward_one_chunk(0)
        """
        if self.has_backward and self._after is not None and self._after.differentiable:
            self._post(self._gradients, self._after.recv_gradient, bwd_chunk_id)
        return []

    def _post(
        self, posted: dict[int, ReceiveHandle | None], receive: Callable[[int], ReceiveHandle], microbatch: int
    ) -> None:
        assert self.chunks is not None
        for following in range(microbatch, min(self.chunks, microbatch + 1 + self.receives_ahead)):
            if following not in posted:
                posted[following] = handle = receive(following)
                self._settle(handle)

    def _settle(self, handle: SendHandle | ReceiveHandle) -> None:
        if self.is_synchronous:
            handle.join()

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
        """Compute, and keep the output until it is sent.

        ::

            output = stage.forward_one_chunk(0, (x,))  # of the first stage; others take what has come
            stage.get_fwd_send_ops(0)
        """
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self._after is not None:
            tensors = output if isinstance(output, list | tuple) else (output,)
            self._outputs[fwd_chunk_id] = tuple(
                shard_to_send(tensor, one.source, dist.get_rank())
                for tensor, one in zip(tensors, self._leaving, strict=True)
            )
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Start to send an activation.

        ::

            stage.forward_one_chunk(0, (x,))
            stage.get_fwd_send_ops(0)  # []: it goes in the background
        """
        if self._after is not None:
            self._settle(self._after.send(self._outputs.pop(fwd_chunk_id), fwd_chunk_id))
            self._forwards_sent += 1
            if not self.has_backward and self._forwards_sent == self.chunks:
                self._flush()
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Start to send a gradient; one that is not there is zero.

        ::

            stage.backward_one_chunk(0)
            stage.get_bwd_send_ops(0)  # []
        """
        if self.has_backward and self._before is not None and self._before.differentiable:
            found = self.bwd_cache.pop(bwd_chunk_id)
            gradients = [
                gradient_to_send(found[index], self._arriving[index].gradient_specs()[0], dist.get_rank(), self.device)
                for index in self._before.differentiable
            ]
            self._settle(self._before.send_gradient(tuple(gradients), bwd_chunk_id))
        return []

    def _flush(self) -> None:
        """Nothing may still be on its way when a step returns: the process might end."""
        for link in (self._before, self._after):
            if link is not None:
                link.flush()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """The last thing of a step with backwards.

        ::

            stage.perform_reduce_grad(microbatches)  # divides gradients by it, and waits for what was sent
        """
        super().perform_reduce_grad(grad_scale_factor)
        self._flush()

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """What torch does between two stages of one rank.

        ::

            stage.set_local_fwd_input(output, 0)  # a SpecError

        Raises:
            SpecError: always; neighbouring stages are on different meshes here.
        """
        raise SpecError(
            f"stages {self.stage_index - 1} and {self.stage_index} are on one rank, as in V-shaped schedules; a "
            "ReshardStage has its neighbours on other ranks: use a schedule that places stages in turn"
        )
