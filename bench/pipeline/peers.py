"""Pipelines as others run them, as one rank sees it: each is made once per case and called for each step."""

from collections import deque
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from bench.pipeline.work import Work, loss_of
from bench.reshard.peers import directions, group_of
from tricomm import ShardingSpec


class TorchPipeline:
    """torch.distributed.pipelining with its own transfers, from one rank to one rank."""

    def __init__(self, rank: int, layouts: list[ShardingSpec], microbatches: int, work: Work, schedule: str) -> None:
        from torch.distributed import pipelining

        shape = layouts[rank].global_shape
        example = torch.empty(shape, requires_grad=True)
        device = torch.device("cpu")
        # With shapes given, no step is spent on finding them.
        stage = pipelining.PipelineStage(
            work, rank, len(layouts), device, input_args=example, output_args=example.clone()
        )
        takes_list = schedule not in ("ScheduleGPipe", "Schedule1F1B")
        self.schedule: Any = getattr(pipelining, schedule)(
            [stage] if takes_list else stage, n_microbatches=microbatches, loss_fn=loss_of
        )
        self.inputs = [torch.zeros(microbatches * shape[0], *shape[1:])] if rank == 0 else []
        self.target = torch.zeros(microbatches) if rank == len(layouts) - 1 else None

    def __call__(self) -> None:
        """One step."""
        self.schedule.step(*self.inputs, target=self.target, return_outputs=False)


@lru_cache
def _shape_buffer() -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int64)


class LeaderPipeline:
    """1F1B with hops in which all wait: gather on a leader, send the shape and the tensor to the leader of the next
    stage, broadcast there (as Megatron's pipeline with its bridge between meshes does). A stage keeps its own slice.
    """

    def __init__(self, rank: int, layouts: list[ShardingSpec], microbatches: int, work: Work) -> None:
        self.rank, self.layouts, self.microbatches, self.work = rank, layouts, microbatches, work
        self.ranks = [tuple(layout.mesh.ranks) for layout in layouts]
        self.groups, self.directions = self.make_groups(layouts)
        self.index = next(index for index, layout in enumerate(layouts) if rank in layout.mesh)
        local = layouts[self.index].local_shape(rank)
        self.local = tuple(local)
        self.whole = tuple(layouts[self.index].global_shape)
        self.input = torch.zeros(self.local)
        self.is_first, self.is_last = self.index == 0, self.index == len(layouts) - 1
        self.is_leader = rank == self.ranks[self.index][0]

    @staticmethod
    def make_groups(layouts: list[ShardingSpec]) -> tuple[list[Any], tuple[Any, Any]]:
        """One for each stage, and one for each direction; every rank makes all of them, in one order."""
        stages = [tuple(layout.mesh.ranks) for layout in layouts]
        return [group_of(ranks) if len(ranks) > 1 else None for ranks in stages], directions()

    # ---- hops

    def _post_send(self, tensor: torch.Tensor, step: int) -> list[Any]:
        """To the next stage (step 1) or the one before (step -1): all of it, from the leader."""
        ranks = self.ranks[self.index]
        if len(ranks) > 1:
            parts = [torch.empty_like(tensor) for _ in ranks] if self.is_leader else None
            dist.gather(tensor.contiguous(), parts, dst=ranks[0], group=self.groups[self.index])
            if parts is not None:
                tensor = torch.cat([part.reshape(-1) for part in parts])
        if not self.is_leader:
            return []
        to, group = self.ranks[self.index + step][0], self.directions[step > 0]
        return [dist.isend(_shape_buffer(), to, group=group), dist.isend(tensor, to, group=group)]

    def _post_receive(self, step: int) -> tuple[list[Any], torch.Tensor]:
        whole = torch.empty(self.whole)
        if not self.is_leader:
            return [], whole
        source, group = self.ranks[self.index - step][0], self.directions[step > 0]
        shape = torch.zeros(4, dtype=torch.int64)
        dist.recv(shape, source, group=group)
        return [dist.irecv(whole, source, group=group)], whole

    def _spread(self, whole: torch.Tensor) -> torch.Tensor:
        ranks = self.ranks[self.index]
        if len(ranks) == 1:
            return whole
        dist.broadcast(whole, ranks[0], group=self.groups[self.index])
        return whole.reshape(-1)[: self.input.numel()].reshape(self.local).clone()

    def _exchange(self, tensor: torch.Tensor | None, send_step: int, receive_step: int) -> torch.Tensor | None:
        """Send to the stage ``send_step`` on, receive what goes ``receive_step`` on, wait for both; 0 is none."""
        sends = self._post_send(tensor, send_step) if send_step and tensor is not None else []
        arrived = None
        if receive_step:
            works, whole = self._post_receive(receive_step)
            for work in works:
                work.wait()
            arrived = self._spread(whole)
        for work in sends:
            work.wait()
        return arrived

    # ---- one step, in Megatron's order

    def __call__(self) -> None:
        """One step."""
        waiting: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        forth, back = (0 if self.is_last else 1), (0 if self.is_first else -1)
        into, returning = (0 if self.is_first else 1), (0 if self.is_last else -1)
        ahead = min(self.microbatches, len(self.layouts) - self.index - 1)
        steady = self.microbatches - ahead
        for _ in range(ahead):
            x = self._exchange(None, 0, into)
            self._exchange(self._forward(x, waiting), forth, 0)
        x = self._exchange(None, 0, into) if steady else None
        for turn in range(steady):
            gradient = self._exchange(self._forward(x, waiting), forth, returning)
            more = turn < steady - 1
            x = self._exchange(self._backward(gradient, waiting), back, into if more else 0)
        for _ in range(ahead):
            gradient = self._exchange(None, 0, returning)
            self._exchange(self._backward(gradient, waiting), back, 0)

    def _forward(self, x: torch.Tensor | None, waiting: deque[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        x = self.input if x is None else x.requires_grad_()
        y: torch.Tensor = self.work(x)
        waiting.append((x, y))
        return y.detach()

    def _backward(
        self, gradient: torch.Tensor | None, waiting: deque[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor | None:
        x, y = waiting.popleft()
        if gradient is None:
            torch.autograd.backward(y.sum())
        else:
            torch.autograd.backward(y, gradient)
        return x.grad
