"""Measurement: what stages cost, on a clock that only their computation and their waiting move on."""

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.pipeline.chain import BATCH, CHAIN, MICROBATCHES, TIMEOUT_SECONDS, WIDTH, attempt, chain, data, expected
from tricomm import Mesh, Shard, ShardingSpec, Topology
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Channel,
    Costs,
    EdgeTensor,
    Executor,
    Measurement,
    StageCost,
    StepComparison,
    Workload,
    one_f_one_b,
    simulate,
    tune,
    zero_bubble,
)
from tricomm.pipeline.run import measure
from tricomm.pipeline.run.edges.directed_link import ReceiveHandle

SLOW_RANKS = (Mesh([0], ("x",)), Mesh([1, 2], ("x",)), Mesh([3], ("x",)))
WAIT_SECONDS = 1000.0
NIC = Topology(("a", "b", "b", "c"), nic_bytes_per_second=1e3, latency_seconds=0.0, overhead_seconds=0.0)


class Clock:
    """Stands in for the module ``time`` where steps are measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Takes(torch.autograd.Function):
    """Changes nothing and takes some seconds, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, forward: float, backward: float) -> torch.Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.clock.now += ctx.seconds
        return gradients[0].clone(), None, None, None


class Timed(nn.Module):
    """A linear layer that takes F, I and W seconds, and 100 more in its first forward, as a kernel that compiles."""

    def __init__(self, seed: int, clock: Clock, seconds: tuple[float, float, float]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        self.clock, self.seconds, self.warm_up_seconds = clock, seconds, 100.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forward, inputs, weights = self.seconds
        self.clock.now, self.warm_up_seconds = self.clock.now + self.warm_up_seconds, 0.0
        x = Takes.apply(x, self.clock, forward, inputs)
        weight = Takes.apply(self.linear.weight, self.clock, 0.0, weights)
        return nn.functional.linear(x, weight, self.linear.bias)


def measured(rank: int, split: bool) -> tuple[Costs, list[torch.Tensor]] | None:
    """(costs, gradients) of a rank; every receive makes its rank wait for long, and rank 2 computes 5 s more."""
    if rank > 3:
        return None
    clock = Clock()
    wait_all = ReceiveHandle.wait_all

    def slowly(handle: ReceiveHandle) -> tuple[torch.Tensor, ...]:
        clock.now += WAIT_SECONDS
        return wait_all(handle)

    def make(index: int) -> nn.Module:
        forward = 1.0 + index + (5.0 if rank == 2 else 0.0)
        return Timed(index, clock, (forward, 10.0 + index, 20.0 + index))

    stages, edges = chain(rank, make, SLOW_RANKS)
    schedule = zero_bubble(3, MICROBATCHES) if split else one_f_one_b(3, MICROBATCHES)
    executor = Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    with mock.patch.object(measure, "time", clock), mock.patch.object(ReceiveHandle, "wait_all", slowly):
        with Measurement(executor) as measurement:
            executor.step(data())
        executor.step(data())  # not measured, and as long as it likes
        costs = measurement.costs(NIC)
    found = [parameter.grad for stage in stages if stage.module for parameter in stage.module.parameters()]
    executor.close()
    return costs, found


@pytest.mark.parametrize("split", [True, False])
def test_stages_cost_what_they_compute_and_nothing_of_what_they_wait(ranks: Ranks, split: bool) -> None:
    results = ranks.run(measured, split)[:4]
    costs = results[0][0]
    assert all(other == costs for other, _ in results), "ranks would tune different schedules"
    halves = [(0.0, 20.0), (11.0, 21.0), (12.0, 22.0)]  # the first stage's inputs need no gradient
    for index, (stage, (inputs, weights)) in enumerate(zip(costs.stages, halves, strict=True)):
        assert stage.forward_seconds == 1.0 + index + (5.0 if index == 1 else 0.0), "its slowest rank"
        both = (inputs, weights) if split else (inputs + weights, 0.0)
        assert (stage.input_gradient_seconds, stage.weight_gradient_seconds) == both
    for (_, gradients), layer in zip(results, [expected(count=3)[i] for i in (0, 1, 1, 2)], strict=True):
        for found, parameter in zip(gradients, layer.parameters(), strict=True):
            torch.testing.assert_close(found, 2 * parameter.grad, rtol=1e-12, atol=1e-14)


def test_hops_cost_what_their_plans_do_and_share_the_nics_of_the_topology(ranks: Ranks) -> None:
    costs = ranks.run(measured, True)[0][0]
    assert costs.channels == (Channel(0, 1), Channel(1, 0), Channel(1, 2), Channel(2, 1))
    nbytes = BATCH * WIDTH * 8
    for channel in costs.channels:
        # To two ranks of one host, or from either of them: one copy passes the NIC.
        assert costs.transfer(channel).busy_seconds == pytest.approx(nbytes / 1e3, rel=0.01)
    assert {name for name, _ in costs.transfer(Channel(1, 2)).loads} == {"NIC 1 out", "NIC 2 in"}


def test_the_costs_are_what_the_tuner_takes(ranks: Ranks) -> None:
    costs = ranks.run(measured, True)[0][0]
    batch = Workload.measured(costs, MICROBATCHES)
    again = batch.costs(MICROBATCHES)
    assert again.channels == costs.channels
    assert again.stages[2].forward_seconds == pytest.approx(costs.stages[2].forward_seconds)
    tuned = tune(batch.costs, [2, MICROBATCHES])
    assert tuned.timeline.makespan_seconds <= simulate(zero_bubble(3, MICROBATCHES), costs).makespan_seconds


def predicted_and_measured(rank: int) -> StepComparison | None:
    """Three steps, each of which takes 500 s by the clock of the rank, and of rank 2 100 s more."""
    if rank > 3:
        return None
    clock = Clock()
    stages, edges = chain(rank, lambda index: Timed(index, clock, (1.0, 2.0, 3.0)), SLOW_RANKS)
    with Executor(one_f_one_b(3, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        with mock.patch.object(measure, "time", clock), Measurement(executor) as measurement:
            for _ in range(3):
                executor.step(data())
        measurement._steps[:] = [9999.0, 500.0 + 100.0 * (rank == 2), 500.0 + 100.0 * (rank == 2)]
        return measurement.compare(NIC)


def test_what_was_predicted_stands_beside_what_was_measured(ranks: Ranks) -> None:
    found = ranks.run(predicted_and_measured)[:4]
    assert all(one == found[0] for one in found)
    costs = Costs((StageCost(1.0, 3.0, 0.0), StageCost(1.0, 5.0, 0.0), StageCost(1.0, 5.0, 0.0)))
    assert found[0].measured_seconds == 600.0, "without the first step, and of the slowest rank"
    assert found[0].predicted_seconds > simulate(one_f_one_b(3, MICROBATCHES), costs).makespan_seconds
    assert [busy for busy, _, _ in found[0].pipeline_ranks] == [16.0, 24.0, 24.0], "the first stage has no I"
    busy, predicted, waited = found[0].pipeline_ranks[0]
    assert (predicted, waited) == (found[0].predicted_seconds - busy, 600.0 - busy)
    assert str(found[0]).startswith("step: predicted ")


# ---- what autograd keeps


class Keeps(nn.Module):
    """Keeps its exponential (once, though twice used) and its product's other side, which is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = (x * self.weight).exp()
        return (kept * kept).sum(dim=1)


def test_kept_bytes_are_counted_once_and_without_inputs_and_parameters() -> None:
    module, x = Keeps(), torch.ones(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    meter = measure.StageMeter(module, torch.device("cpu"))
    for _ in range(3):
        with meter.recorded(measure.Kind.FORWARD, [x]):
            y = module(x)
    assert meter.cost().activation_nbytes == BATCH * WIDTH * 8
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 * torch.tensor(2.0).exp().item()))


def test_counting_leaves_no_graph_behind() -> None:
    meter = measure.StageMeter(nn.Identity(), torch.device("cpu"))
    with meter.recorded(measure.Kind.FORWARD, []):
        y = torch.ones(BATCH, requires_grad=True).exp()  # whose node keeps what it gives
    mark = Clock()
    y.grad_fn.metadata["mark"] = mark
    alive = weakref.ref(mark)
    del mark, y
    assert alive() is None, "a cycle holds the activations"


# ---- sizes that change, several tensors


def resized(rank: int) -> Costs | None:
    """One edge whose batch has another size in the second step."""
    if rank > 1:
        return None
    source = ShardingSpec(CHAIN[0], (Shard(0),), None, "float64")
    tensor = EdgeTensor(source, ShardingSpec(CHAIN[1], (Shard(0),)), shape=("batch", WIDTH))
    stages, _ = chain(rank, meshes=CHAIN[:2])
    executor = Executor(one_f_one_b(2, MICROBATCHES), stages, {(0, 1): {"x1": tensor}}, timeout_seconds=TIMEOUT_SECONDS)
    with Measurement(executor) as measurement:
        for size in (3, 5):
            batch = {name: [x[:1].expand(size, WIDTH) for x in values] for name, values in data().items()}
            executor.step(batch, sizes={"batch": size})
    with executor:
        return measurement.costs(NIC)


def test_hops_have_the_sizes_of_the_last_step(ranks: Ranks) -> None:
    first, second = ranks.run(resized)[:2]
    assert first == second
    assert first.transfer(Channel(0, 1)).nbytes == 5 * WIDTH * 8


# ---- what is refused


def refused(rank: int) -> list[tuple[str, str]]:
    stages, edges = chain(rank)
    options = {"timeout_seconds": 2.0}
    with Executor(one_f_one_b(4, MICROBATCHES), stages, edges, **options) as executor:
        if rank not in executor.ranks:
            return [attempt(lambda: Measurement(executor).costs(NIC))]
        outcomes = [attempt(lambda: Measurement(executor).costs())]
        outcomes.append(attempt(lambda: Measurement(executor).costs(NIC)))
        with Measurement(executor):
            outcomes.append(attempt(Measurement(executor).__enter__))
        with Measurement(executor) as measurement:
            executor.step(data())
        outcomes.append(("", "") if rank == 3 else attempt(lambda: measurement.costs(NIC)))
        return outcomes


def test_what_cannot_be_measured_is_refused(ranks: Ranks) -> None:
    results = ranks.run(refused)
    for rank in range(4):
        (no_topology, no_steps, twice, absent) = results[rank]
        assert no_topology[0] == twice[0] == "SpecError"
        assert "Topology.detect" in no_topology[1]
        assert "no step ran" in no_steps[1]
        assert "measured already" in twice[1]
        if rank < 3:
            assert absent == ("TransportError", "rank 3 did not ask for the costs of its stage within the timeout")
    assert results[4] == [("SpecError", "rank 4 is on the mesh of no stage; ask for costs on those that are")]


def test_one_microbatch_is_too_few() -> None:
    meter = measure.StageMeter(nn.Identity(), torch.device("cpu"))
    with meter.recorded(measure.Kind.FORWARD, []):
        pass
    assert "run two steps" in attempt(meter.cost)[1]


def test_on_a_gpu_events_tell_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 100.0, 200.0, 203.0, 300.0, 305.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.ready = False

        def record(self) -> None:
            self.milliseconds = next(now)

        def synchronize(self) -> None:
            self.ready = True

        def elapsed_time(self, end: "Event") -> float:
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(measure, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event), Tensor=torch.Tensor))
    meter = measure.StageMeter(nn.Identity(), torch.device("cuda", 0))
    for _ in range(3):
        with meter.recorded(measure.Kind.FORWARD, []):
            pass
    assert meter.cost() == StageCost(0.004, 0.0, 0.0)
