"""Steps of a pipeline on the stand-in: its real links and steps, with stages whose computation is only queued."""

import time
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.standin.ranks import Threads
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.pipeline import EdgeTensor, Queues, Schedule
from tricomm.pipeline.run.step import Programs, Step
from tricomm.pipeline.run.wiring import fifo_of, make_links
from tricomm.pipeline.schedule.actions import Kind

SHAPE = (6,)


def name_of(edge: Sequence[int]) -> str:
    """The tensor that crosses an edge."""
    return f"{edge[0]} to {edge[1]}"


def edges_of(schedule: Schedule) -> dict[tuple[int, int], dict[str, EdgeTensor]]:
    """One tensor for each edge, between meshes of one rank."""
    specs = [
        ShardingSpec(Mesh([schedule.pipeline_rank_of(stage)], ("x",)), (Replicate(),), SHAPE, "float32")
        for stage in range(schedule.stages)
    ]
    return {tuple(edge): {name_of(edge): EdgeTensor(specs[edge[0]], specs[edge[1]])} for edge in schedule.edges}


class QueuedStage:
    """A StageRun whose kernels look at what came, when the device comes to them.

    Args:
        index: of the stage.
        schedule: of the pipeline.
        threads: all ranks.
        rank: this one.
        seconds: that a forward or backward takes on the device.
    """

    def __init__(self, index: int, schedule: Schedule, threads: Threads, rank: int, seconds: float) -> None:
        self.index, self.seconds = index, seconds
        self.device = threads.standins[rank].device
        self.incoming = [edge for edge in schedule.edges if edge[1] == index]
        self.outgoing = [edge for edge in schedule.edges if edge[0] == index]
        self.stage = SimpleNamespace(inputs=[name_of(edge) for edge in self.incoming], outputs=())
        self.done = 0
        self._begun: Counter[str] = Counter()
        self.version = 0
        """Of its kernels: those of another version are to be loaded."""
        self.wrong: list[str] = []

    def forward(self, microbatch: int, inputs: dict[str, torch.Tensor], check_trains: bool) -> dict[str, torch.Tensor]:
        expected = [(inputs[name_of(edge)], value_of(edge[0], microbatch, 1)) for edge in self.incoming]
        return self._compute(expected, [name_of(edge) for edge in self.outgoing], microbatch, "forward")

    def backward(
        self, kind: Kind, microbatch: int, gradients: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        expected = [(gradients[name_of(edge)][0], value_of(edge[1], microbatch, -1)) for edge in self.outgoing]
        return self._compute(expected, [name_of(edge) for edge in self.incoming], microbatch, "backward")

    def weight_gradients(self, microbatch: int) -> None:
        self._compute([], [], microbatch, "weight gradients")

    def _compute(
        self, expected: list[tuple[torch.Tensor, float]], names: list[str], microbatch: int, kind: str
    ) -> dict[str, torch.Tensor]:
        sign = -1 if kind == "backward" else 1
        results = {name: torch.zeros(SHAPE) for name in names}
        value = value_of(self.index, microbatch, sign)

        def kernel() -> None:
            self.done += 1
            for tensor, wanted in expected:
                if not bool((tensor == wanted).all()):
                    self.wrong.append(f"stage {self.index}, microbatch {microbatch}: {tensor.tolist()}, not {wanted}")
            for result in results.values():
                result.fill_(value)

        self.device.current.launch(kernel, seconds=self.seconds, name=self._kernel(kind))
        return results

    def _kernel(self, kind: str) -> str:
        """A name of its own for each kind, and for a second backward, which adds to the gradients of the first."""
        name = f"stage {self.index} {kind} {self.version}"
        self._begun[name] += 1
        return f"{name}, adding" if kind == "backward" and self._begun[name] > 1 else name


def value_of(stage: int, microbatch: int, sign: int) -> float:
    """What a stage makes of a microbatch."""
    return float(sign * (1 + stage + 100 * microbatch))


def steps(
    rank: int,
    threads: Threads,
    schedule: Schedule,
    name: str,
    queues: Queues = Queues.PER_CHANNEL,
    versions: Sequence[int] = (0, 0),
    seconds: float = 0.0,
    timeout_seconds: float = 10.0,
    loads_kernels: bool = False,
) -> float:
    """Queue a step with each version of the kernels, one right after the other; seconds until the device has done them.

    Raises:
        AssertionError: something came that is wrong, or the device does not come to its end.
        TransportError: a transfer took longer than its timeout.
    """
    if rank >= len(schedule.lists):
        return 0.0
    mine = [stage for stage in range(schedule.stages) if schedule.pipeline_rank_of(stage) == rank]
    runs: dict[int, Any] = {stage: QueuedStage(stage, schedule, threads, rank, seconds) for stage in mine}
    options: Any = {"timeout_seconds": timeout_seconds, **threads.options(rank)}
    edges = edges_of(schedule)
    links = make_links(schedule, edges, rank, name, fifo_of(queues), options)
    programs = Programs(schedule, edges, runs, loads_kernels)
    for link in links.values():
        link.connect()
    began = time.monotonic()
    try:
        for version in versions:
            for run in runs.values():
                run.version = version
            Step(programs.next(True, ()), links, {}).run()
        threads.finish(rank, began + 2 * timeout_seconds - time.monotonic())
        for one in (one for link in links.values() for way in link.directed_links for one in way.resharders):
            last = one._session.last_run
            assert last is None or last.failure is None, f"TransportError, found out late: {last.failure}"
    finally:
        for link in links.values():
            link.close()
    computed = len(versions) * sum(action.is_compute for action in schedule.lists[rank])
    found = [text for run in runs.values() for text in run.wrong]
    assert not found, "; ".join(found)
    assert sum(run.done for run in runs.values()) == computed
    return time.monotonic() - began
