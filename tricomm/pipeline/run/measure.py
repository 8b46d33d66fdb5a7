"""Measurement: what the stages of a pipeline cost, recorded while it trains."""

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tricomm.errors import SpecError, TransportError
from tricomm.kinds import checks_kinds, explains_fields
from tricomm.layout.topology import Topology
from tricomm.pipeline.costs.costs import Costs, StageCost, TransferCost
from tricomm.pipeline.costs.simulate import simulate
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.schedule.actions import Channel, Kind
from tricomm.plan import make_plan
from tricomm.transport.coordination.store import awaited_note, post_note


class StageMeter:
    """Records how long the actions of one stage compute on this rank, and what its forward keeps.

    On a GPU, events on the current stream tell the times, so that nothing waits for the device before the costs are
    asked for.

    Args:
        module: of the stage; its parameters are not counted as kept.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._own = [*module.parameters(), *module.buffers()]
        self._spans: dict[Kind, list[tuple[Any, Any]]] = {}
        self._kept_nbytes: int | None = None

    @contextmanager
    def recorded(self, kind: Kind, inputs: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around the computation of one action, without what it waits for.

        Args:
            kind: of the action.
            inputs: of a forward; they are not counted as kept.
        """
        # Counting takes time. The first time of each kind is left out of the costs, as it also warms up.
        counting: AbstractContextManager[None] = nullcontext()
        if kind is Kind.FORWARD and self._kept_nbytes is None:
            counting = self._counting([*self._own, *inputs])
        begin = self._now()
        with counting:
            yield
        self._spans.setdefault(kind, []).append((begin, self._now()))

    def cost(self) -> StageCost:
        """Medians over the microbatches after the first.

        Raises:
            SpecError: fewer than two microbatches ran.
        """
        seconds = {kind: self._median_seconds(spans) for kind, spans in self._spans.items()}
        if Kind.FORWARD not in seconds or self._kept_nbytes is None:
            raise SpecError("no step ran inside of the Measurement; run some there, then ask for costs")
        # A whole backward leaves nothing to delay: all of it is I.
        inputs = seconds.get(Kind.INPUT_GRADIENT, seconds.get(Kind.BACKWARD, 0.0))
        weights = seconds.get(Kind.WEIGHT_GRADIENT, 0.0)
        return StageCost(seconds[Kind.FORWARD], inputs, weights, self._kept_nbytes)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _median_seconds(self, spans: list[tuple[Any, Any]]) -> float:
        if len(spans) < 2:
            raise SpecError(
                "one microbatch ran inside of the Measurement, and the first is left out because it warms up; run two "
                "steps, or more microbatches"
            )
        if self._is_cuda:
            spans[-1][1].synchronize()
        return statistics.median(
            float(begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin) for begin, end in spans[1:]
        )

    @contextmanager
    def _counting(self, known: list[torch.Tensor]) -> Iterator[None]:
        """Count the memory that autograd keeps, but for that of known tensors."""
        ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
        kept: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ignored:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself, kept by the node that made it, would keep that node for ever

        with saved_tensors_hooks(record, lambda tensor: tensor):
            yield
        self._kept_nbytes = sum(kept.values())


@dataclass(frozen=True, slots=True)
class StepComparison:
    """A step as it was predicted from measured costs, beside how long it took.

    >>> print(StepComparison(0.90, 0.99, ((0.70, 0.20, 0.29),)))
    step: predicted 0.9 s, measured 0.99 s (+10%)
      pipeline rank 0: computes 0.7 s, else waits: predicted 0.2 s, measured 0.29 s

    Attributes:
        predicted_seconds: by simulation of the executor's schedule with the costs.
        measured_seconds: the median over the steps but the first, of the slowest rank.
        pipeline_ranks: for each, the seconds that it computes, and those that it does not: predicted and measured.
    """

    predicted_seconds: float
    measured_seconds: float
    pipeline_ranks: tuple[tuple[float, float, float], ...]

    def __str__(self) -> str:
        error = self.measured_seconds / self.predicted_seconds - 1
        lines = [
            f"step: predicted {self.predicted_seconds:.4g} s, measured {self.measured_seconds:.4g} s ({error:+.0%})"
        ]
        lines += [
            f"  pipeline rank {index}: computes {busy:.4g} s, else waits: predicted {predicted:.4g} s, measured "
            f"{measured:.4g} s"
            for index, (busy, predicted, measured) in enumerate(self.pipeline_ranks)
        ]
        return "\n".join(lines)


@explains_fields
@dataclass
class Measurement:
    """Record what the stages cost in the steps that run inside of its ``with``, on every rank of the pipeline.

    ::

        with Measurement(executor) as measurement:
            for data in some_batches:
                executor.step(data)
        costs = measurement.costs(Topology.detect(nic_bytes_per_second=12.5e9))
        tuned = tune(Workload.measured(costs, executor.schedule.microbatches).costs, [4, 8, 16])

    The steps train as any others. Times are those of the computation alone: what an action waits for is not in them.

    Args:
        executor: whose steps they are.

    Raises:
        SpecError: another Measurement of this executor has not ended.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from tricomm import Mesh, Replicate
        >>> from tricomm.pipeline import Schedule, Stage, WithLoss
        >>> module = WithLoss(torch.nn.Linear(8, 8), torch.nn.functional.mse_loss)
        >>> stage = Stage(Mesh([0], ("x",)), ("x", "target"), ("loss",), module, loss=(Replicate(),))
        >>> with Executor(Schedule.parse(["0F0 0B0 0F1 0B1"]), [stage], {}) as executor:
        ...     with Measurement(executor) as measurement:
        ...         _ = executor.step({"x": torch.ones(2, 4, 8), "target": torch.zeros(2, 4, 8)})
        ...     costs = measurement.costs(Topology.detect(nic_bytes_per_second=12.5e9))
        >>> costs.stages[0].activation_nbytes, costs.stages[0].forward_seconds > 0
        (128, True)
        >>> dist.destroy_process_group()
    """

    executor: Executor

    def __post_init__(self) -> None:
        self._number = self.executor.measurements
        self.executor.measurements += 1
        runs, device = self.executor.runs, self.executor.device
        self._meters = {index: StageMeter(run.module, device) for index, run in runs.items()}
        self._stages: tuple[StageCost, ...] = ()
        self._step_seconds = 0.0
        self._steps: list[float] = []

    def __enter__(self) -> Self:
        if any(run.meter is not None for run in self.executor.runs.values()):
            raise SpecError("this executor is being measured already; end that Measurement first")
        for index, run in self.executor.runs.items():
            run.meter = self._meters[index]
        self.executor.on_step = self._steps.append
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.executor.runs.values():
            run.meter = None
        self.executor.on_step = None

    @checks_kinds
    def compare(self, topology: Topology | None = None) -> StepComparison:
        """Predict a step from the measured costs, beside how long the steps took; the same on every rank.

        What is waited for more than predicted is overhead between actions, or a network that is slower than the
        topology says. On a GPU the host's clock tells, so measure several steps.

        ::

            print(measurement.compare(Topology.detect(nic_bytes_per_second=12.5e9)))

        Args:
            topology: as for ``costs``.

        Raises:
            SpecError, TransportError: as for ``costs``.
        """
        costs, executor = self.costs(topology), self.executor
        timeline = simulate(executor.schedule, costs, queues=executor.queues)
        predicted = timeline.makespan_seconds
        ranks = []
        for pipeline_rank in range(executor.schedule.pipeline_ranks):
            busy = timeline.busy_seconds(pipeline_rank)
            ranks.append((busy, predicted - busy, max(0.0, self._step_seconds - busy)))
        return StepComparison(predicted, self._step_seconds, tuple(ranks))

    @checks_kinds
    def costs(self, topology: Topology | None = None) -> Costs:
        """What one microbatch costs: the same on every rank of the pipeline, all of which call it.

        Each stage costs what it does on its slowest rank: medians over all microbatches but the first, of F, I and W,
        or if it ran whole backwards, these as I and nothing as W. ``activation_nbytes`` is what autograd saved in the
        first forward, without parameters and inputs. (Checkpointing without reentry saves its inputs unseen.) Hops
        cost what their plans do on the topology, with the sizes of the last step; those that share a NIC there share
        it in the costs.

        ::

            costs = measurement.costs(Topology.detect(nic_bytes_per_second=12.5e9))
            print(simulate(schedule, costs).makespan_seconds)

        Args:
            topology: hosts and the rates of their NICs; None is that of the executor.

        Raises:
            SpecError: no topology, no steps or one microbatch only, or a rank without a stage.
            TransportError: another rank has no costs, or did not come within the timeout.
        """
        topology = topology or self.executor.options.topology
        if topology is None:
            raise SpecError(
                "no topology, and hops take as long as NICs say; pass costs(Topology.detect(nic_bytes_per_second=...))"
            )
        if not self.executor.runs:
            raise SpecError(f"rank {self.executor.rank} is on the mesh of no stage; ask for costs on those that are")
        if not self._stages:
            self._stages = self._slowest()
        return Costs(self._stages, self._transfers(topology))

    def _slowest(self) -> tuple[StageCost, ...]:
        """The costs of all stages, told by all ranks over the store."""
        executor, store = self.executor, self.executor.context.store
        keys = {rank: f"measured/{executor.unique}/{self._number}/{rank}" for rank in executor.ranks}
        try:
            mine: dict[str, Any] = {str(index): asdict(meter.cost()) for index, meter in self._meters.items()}
            mine["step"] = statistics.median(self._steps[1:] or self._steps)
        except SpecError as error:
            post_note(store, keys[executor.rank], {"error": str(error)})
            raise
        post_note(store, keys[executor.rank], mine)
        told = []
        for rank, key in keys.items():
            absent = f"rank {rank} did not ask for the costs of its stage within the timeout"
            told.append(awaited_note(store, key, executor.timeout_seconds, absent))
            if "error" in told[-1]:
                raise TransportError(f"rank {rank} has no costs of its stage: {told[-1]['error']}")
        self._step_seconds = max(one["step"] for one in told)
        names = [field.name for field in fields(StageCost)]
        by_stage = ([one[str(index)] for one in told if str(index) in one] for index in range(len(executor.stages)))
        return tuple(StageCost(*(max(one[name] for one in costs) for name in names)) for costs in by_stage)

    def _transfers(self, topology: Topology) -> dict[Channel, TransferCost]:
        executor = self.executor
        options = executor.options
        transfers = {}
        for edge, tensors in executor.bound_edges().items():
            directed_links = {
                edge.forward: [(tensor.source, tensor.destination) for tensor in tensors],
                edge.backward: [tensor.gradient_specs() for tensor in tensors if tensor.gradient is not None],
            }
            for channel, pairs in directed_links.items():
                if channel in executor.schedule.channels:
                    plans = [
                        make_plan(*pair, topology=topology, strategy=options.strategy, balance=options.balance)
                        for pair in pairs
                    ]
                    transfers[channel] = TransferCost.in_turn([TransferCost.of_plan(plan) for plan in plans])
        return transfers
