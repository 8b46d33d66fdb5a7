"""What bench.pipeline runs on the ranks: each method made once per case, then stepped in turns with the others."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bench.pipeline.peers import LeaderPipeline, TorchPipeline
from bench.pipeline.work import Seconds, Summed, Work, loss_of
from tricomm import Mesh, Replicate, Shard, ShardingSpec, Topology
from tricomm.pipeline import Queues, Schedule
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.run.stage import Stage


@dataclass(frozen=True, slots=True)
class Method:
    """One way to run a pipeline.

    Attributes:
        name: for tables.
        kind: "executor" and "adapter" are ours; "torch" and "leader" are peers.
        numel: of the tensor that crosses an edge for each microbatch.
        schedule, queues: ours.
        torch_schedule: the name of a class of torch.distributed.pipelining.
    """

    name: str
    kind: str
    numel: int
    schedule: Schedule | None = None
    queues: Queues = Queues.PER_CHANNEL
    torch_schedule: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all methods of a case have in common."""

    stages: int
    devices: int
    microbatches: int
    seconds: Seconds
    topology: Topology
    has_links: bool = False

    def layouts(self, numel: int) -> list[ShardingSpec]:
        """Per stage, where its inputs lie, and its outputs too: by rows and by columns in turn, if it has devices."""
        layouts = []
        for stage in range(self.stages):
            mesh = Mesh(list(range(stage * self.devices, (stage + 1) * self.devices)), ("device",))
            placement = Replicate() if self.devices == 1 else Shard(stage % 2)
            rows = self.devices
            layouts.append(ShardingSpec(mesh, (placement,), (rows, numel // rows), "float32"))
        return layouts


@dataclass(frozen=True, slots=True)
class Sample:
    """One step of one rank: when it began and ended, the most microbatches it held, and its compute."""

    begin: float
    end: float
    peak: int
    spans: tuple[tuple[str, float, float], ...]


_METHODS: dict[str, tuple[Any, Work]] = {}
_NOTHING: tuple[Any, Work] = (lambda: None, Work(Seconds(0.0, 0.0, 0.0), is_first=False))


def prepare(rank: int, setting: Setting, methods: list[Method]) -> None:
    """Make the methods of a case."""
    _METHODS.clear()
    if rank >= setting.stages * setting.devices:
        LeaderPipeline.make_groups(setting.layouts(setting.devices**2))
        return
    for method in methods:
        work = Work(setting.seconds, rank < setting.devices)
        _METHODS[method.name] = MAKERS[method.kind](rank, setting, method, work), work


def sample(rank: int, name: str) -> Sample:
    """One step."""
    step, work = _METHODS.get(name, _NOTHING)
    work.counter.reset()
    dist.barrier()
    begin = time.monotonic()
    step()
    end = time.monotonic()
    return Sample(begin, end, work.counter.peak, tuple(work.counter.spans))


def slept(rank: int, seconds: Seconds, repeats: int = 5) -> Seconds:
    """How long the sleeps last here: the median of some, with the autograd around them."""
    times: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for _ in range(repeats):
        work = Work(seconds, is_first=False)
        work(torch.zeros(2, 2, requires_grad=True)).sum().backward()
        for kind, begin, end in work.counter.spans:
            times[kind].append(end - begin)
    return Seconds(*(sorted(times[kind])[repeats // 2] for kind in "FIW"))


def hop(rank: int, setting: Setting, numel: int, repeats: int = 5) -> list[tuple[float, float]]:
    """One hop at a time from the first stage to the second, through a Link: when it was sent and when it was there."""
    layouts = setting.layouts(numel)[:2]
    link = Link("hop", [_edge_tensor(*layouts)], microbatches=1, topology=setting.topology)
    taking_part = rank in layouts[0].mesh or rank in layouts[1].mesh
    if taking_part:
        link.connect()
    times = []
    for _ in range(repeats + 1):
        handle = link.recv(0) if rank in layouts[1].mesh else None
        dist.barrier()
        begin = time.monotonic()
        if rank in layouts[0].mesh:
            link.send(torch.zeros(layouts[0].local_shape(rank)), 0)
        if handle is not None:
            handle.wait()
        times.append((begin, time.monotonic()))
        link.flush()
    return times[1:]


def _edge_tensor(source: ShardingSpec, destination: ShardingSpec) -> EdgeTensor:
    return EdgeTensor(source, destination)


def _executor(rank: int, setting: Setting, method: Method, work: Work) -> Any:
    layouts = setting.layouts(method.numel)
    assert method.schedule is not None
    last = setting.stages - 1
    stages = []
    for index, layout in enumerate(layouts):
        is_mine = rank in layout.mesh
        if index < last:
            module: Any = work
            stages.append(Stage(layout.mesh, (f"x{index}",), (f"x{index + 1}",), module if is_mine else None))
        else:
            module = Summed(work)
            loss = (Replicate(),)
            stages.append(Stage(layout.mesh, (f"x{index}",), ("loss",), module if is_mine else None, loss))
    edges = {
        (index, index + 1): {f"x{index + 1}": _edge_tensor(layouts[index], layouts[index + 1])} for index in range(last)
    }
    executor = Executor(
        method.schedule, stages, edges, queues=method.queues, name=method.name, topology=setting.topology
    )
    first = layouts[0]
    data = {}
    if rank in first.mesh:
        data = {"x0": [torch.zeros(first.local_shape(rank))] * setting.microbatches}
    return lambda: executor.step(data)


def _adapter(rank: int, setting: Setting, method: Method, work: Work) -> Any:
    from tricomm.pipeline.torch_adapter import PlannedSchedule, ReshardStage

    layouts = setting.layouts(method.numel)
    assert method.schedule is not None
    index = rank // setting.devices
    stage = ReshardStage(
        work,
        index,
        setting.stages,
        arriving=[_edge_tensor(layouts[index - 1], layouts[index])] if index else (),
        leaving=[_edge_tensor(layouts[index], layouts[index + 1])] if index < setting.stages - 1 else (),
        topology=setting.topology,
    )
    schedule = PlannedSchedule([stage], method.schedule, loss_of, queues=method.queues)
    rows, *others = layouts[0].local_shape(rank) if index == 0 else (0,)
    inputs = [torch.zeros(rows * setting.microbatches, *others)] if index == 0 else []
    target = torch.zeros(setting.microbatches) if index == setting.stages - 1 else None
    return lambda: schedule.step(*inputs, target=target, return_outputs=False)


def _torch(rank: int, setting: Setting, method: Method, work: Work) -> Any:
    return TorchPipeline(rank, setting.layouts(method.numel), setting.microbatches, work, method.torch_schedule)


def _leader(rank: int, setting: Setting, method: Method, work: Work) -> Any:
    return LeaderPipeline(rank, setting.layouts(method.numel), setting.microbatches, work)


MAKERS: dict[str, Any] = {"executor": _executor, "adapter": _adapter, "torch": _torch, "leader": _leader}
