"""Arguments of the wrong kind: whatever a public function is given, it works or says what is wrong."""

import enum
import inspect
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Shard as TorchShard

import tricomm
import tricomm.pipeline as pl
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, Topology, TricommError

ONE = Mesh([0], ("x",))
WHOLE = ShardingSpec(ONE, (Replicate(),), (4, 4), "float32")
ROWS = ShardingSpec(ONE, (Shard(0),), (4, 4), "float32")
AWAY = ShardingSpec(Mesh([1], ("x",)), (Shard(0),), (4, 4), "float32")
PLAN = tricomm.make_plan(WHOLE, ROWS)
EDGES = ((0, 1),)
SCHEDULE = pl.gpipe(2, 2)
MOVING = pl.with_communication(SCHEDULE)
COSTS = pl.Costs.uniform(2, 1.0, 1.0, 1.0, 0.5)
CHANNEL = pl.Channel(0, 1)

WRONG: list[Any] = [
    None, True, 3, -1, 0, 2.5, float("nan"), float("inf"), 10**30, "x", "", b"x", [], (), {}, {"a": 1}, {1, 2}, [1],
    [[1, 2], [3]], ["a"], (None,), [2.5, "a"], object(), int, len, Shard, Shard(1), Replicate(), Partial("max"), ONE,
    WHOLE, PLAN, ShardingSpec(Mesh([7], ("y",)), (Shard(1),)), Topology(("a",)), SCHEDULE, COSTS, CHANNEL,
    torch.zeros(2), torch.zeros(4, 4), torch.zeros(4, 4, device="meta"), torch.float32, torch.device("meta"),
    timedelta(0), timedelta(1), nn.Linear(2, 2), pl.Action(0, pl.Kind.FORWARD, 0), pl.Queues.PER_CHANNEL, range(3),
    {0: WHOLE}, {(0, 1): {"x": 3}}, tricomm.SendRecv, "bf16",
]  # fmt: skip


def module() -> nn.Module:
    return nn.Linear(4, 4)


def call_resharder(**given: Any) -> Any:
    return tricomm.Resharder(WHOLE, ROWS)(**given)


@cache
def group_of_two() -> dist.ProcessGroup:
    """A group in which this process is rank 0, and where nobody plays rank 1."""
    return dist.ProcessGroup(dist.HashStore(), 0, 2)


def off_meshes(**options: Any) -> tricomm.Resharder:
    """A Resharder between layouts of rank 1, on rank 0."""
    return tricomm.Resharder(AWAY, AWAY, group=group_of_two(), **options)


SECRET = "a secret of the tests"


def at_an_address(function: Callable[..., Any]) -> Callable[..., None]:
    """Call it with a meeting that begins and ends with it, unless another address is given."""

    def call(**given: Any) -> None:
        with tricomm.Meeting("tcp://127.0.0.1:0", secret=SECRET) as meeting:
            address = meeting.address if given["address"] == "here" else given["address"]
            function(**{**given, "address": address}).close()

    return call


def push(**given: Any) -> None:
    def call(address: str) -> tricomm.Publisher:
        made = tricomm.Publisher(
            address, side="a", side_rank=0, side_size=1, fleets=["b"], specs={"w": ROWS}, secret=SECRET, device="cpu"
        )
        with made:
            made.push(**given)
        return made

    at_an_address(call)(address="here")


@cache
def at_a_meeting() -> tricomm.World:
    meeting = tricomm.Meeting("tcp://127.0.0.1:0", secret=SECRET)
    world = tricomm.connect(
        meeting.address, side="a", side_rank=0, side_sizes={"a": 1}, secret=SECRET, timeout_seconds=5, device="cpu"
    )
    weakref.finalize(world, meeting.close)
    return world


@cache
def two_sides() -> dict[str, tricomm.World]:
    """Two jobs of one rank each."""
    meeting = tricomm.Meeting("tcp://127.0.0.1:0", secret=SECRET)
    sizes = {"a": 1, "b": 1}

    def come(side: str) -> tricomm.World:
        return tricomm.connect(
            meeting.address, side=side, side_rank=0, side_sizes=sizes, secret=SECRET, timeout_seconds=20, device="cpu"
        )

    with ThreadPoolExecutor() as jobs:
        first, second = jobs.map(come, sizes)
    weakref.finalize(first, meeting.close)
    return {"a": first, "b": second}


def make_feed(side: str = "a", **given: Any) -> tricomm.Feed:
    there = replace(ROWS, mesh=Mesh([1], ("x",)))
    chosen = {"specs": {"a": {"w": ROWS}, "b": {"w": there}}, "source": "a", "destination": "b", "name": f"of {side}"}
    return tricomm.Feed(two_sides()[side], **{**chosen, **given})


def wait_newer(**given: Any) -> None:
    with suppress(tricomm.TransportError):
        make_feed("a").wait_newer(**given, timeout_seconds=0.01)


OPEN = ShardingSpec(ONE, (Shard(0),), dtype="float32")
LAYER = pl.EdgeTensor(WHOLE, ROWS)
TOPOLOGY = Topology(("a",))

DEVICE_MESH = DeviceMesh("cpu", [0], mesh_dim_names=("x",), _init_backend=False, _rank=0)
DTENSOR = DTensor.from_local(torch.zeros(4, 4), DEVICE_MESH, [TorchShard(0)], run_check=False)

# Every public callable with arguments that it takes.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Auto": (tricomm.Auto, {"search_up_to": 32}),
    "Broadcast": (tricomm.Broadcast, {"chunk_bytes": 64}),
    "Ensemble": (tricomm.Ensemble, {}),
    "Feed": (make_feed, {
        "specs": {"a": {"w": ROWS}, "b": {"w": ROWS}}, "source": "a", "destination": "b", "before": None, "name": "f",
        "timeout_seconds": 3}),
    "Feed.pull": (lambda **given: make_feed("b").pull(**given, timeout_seconds=0.01), {
        "out": {"w": torch.zeros(4, 4)}}),
    "Feed.push": (lambda **given: make_feed("a").push(**given), {
        "tensors": {"w": torch.zeros(4, 4)}, "version": 1, "base_version": None, "beside": "fence"}),
    "Feed.wait_newer": (wait_newer, {"than": None}),
    "GlobalAllGather": (tricomm.GlobalAllGather, {"chunk_bytes": 64}),
    "LeastLoaded": (tricomm.LeastLoaded, {}),
    "LocalAllGather": (tricomm.LocalAllGather, {"chunk_bytes": 64}),
    "LocalTransport": (tricomm.LocalTransport, {"grouped": True, "receives_ahead": 0, "rounds_open": 2}),
    "LocalTransport.run": (tricomm.LocalTransport().run, {"plan": PLAN, "tensors": {0: torch.zeros(4, 4)}}),
    "LocalTransport.run_counted": (
        tricomm.LocalTransport().run_counted, {"plan": PLAN, "tensors": {0: torch.zeros(4, 4)}}),
    "LocalTransport.run_observed": (
        tricomm.LocalTransport().run_observed, {"plan": PLAN, "tensors": {0: torch.zeros(4, 4)}}),
    "Meeting": (lambda **given: tricomm.Meeting(**given).close(), {
        "address": "tcp://127.0.0.1:0", "secret": SECRET}),
    "Mesh": (Mesh, {"ranks": [[0, 1]], "axis_names": ("a", "b")}),
    "Mesh.of": (Mesh.of, {"device_mesh": DEVICE_MESH, "group": None, "x": 0}),
    "Mesh.position": (ONE.position, {"rank": 0}),
    "Mesh.coordinate": (ONE.coordinate, {"rank": 0}),
    "Mesh.axis": (ONE.axis, {"key": "x"}),
    "Naive": (tricomm.Naive, {}),
    "Options, timeout": (tricomm.Options, {"timeout": timedelta(3)}),
    "make_plan, rank": (tricomm.make_plan, {"source": WHOLE, "destination": ROWS, "rank": 0}),
    "Resharder, timeout": (tricomm.Resharder, {"source": WHOLE, "destination": ROWS, "timeout": timedelta(3)}),
    "Options": (tricomm.Options, {
        "strategy": tricomm.Auto(), "balance": tricomm.Split(), "topology": TOPOLOGY, "staging_bytes": 64,
        "device": "cpu", "timeout_seconds": 3, "confirm": True, "channel": "a", "name": "b", "differentiable": True,
        "grad_placements": (Replicate(),)}),
    "Partial": (Partial, {"op": "sum"}),
    "Plan.lower_bound_seconds": (PLAN.lower_bound_seconds, {"topology": None}),
    "Plan.simulated_seconds": (PLAN.simulated_seconds, {"topology": None}),
    "Plan.nic_seconds": (PLAN.nic_seconds, {"topology": None}),
    "Plan.for_rank": (PLAN.for_rank, {"rank": 0}),
    "Publisher": (at_an_address(tricomm.Publisher), {
        "address": "here", "side": "a", "side_rank": 0, "side_size": 1, "fleets": ["b"], "specs": {"w": ROWS},
        "secret": SECRET, "host": None, "timeout_seconds": 3, "device": "cpu", "name": "b"}),
    "Publisher.push": (push, {
        "tensors": {"w": torch.zeros(4, 4)}, "version": 1, "base_version": None, "beside": "fence",
        "wait_seconds": 0.0}),
    "RandomizedGreedy": (tricomm.RandomizedGreedy, {"trials": 3, "seed": 0}),
    "Replicate": (Replicate, {}),
    "Resharder": (tricomm.Resharder, {
        "source": WHOLE, "destination": ROWS, "strategy": tricomm.Auto(), "balance": tricomm.Split(),
        "topology": TOPOLOGY, "staging_bytes": 1 << 20, "device": "cpu", "timeout_seconds": 3, "confirm": False,
        "channel": "a", "name": "b", "group": None}),
    "Resharder.__call__": (call_resharder, {
        "tensor": torch.zeros(4, 4), "out": None}),
    "Resharder.abort": (lambda **given: tricomm.Resharder(WHOLE, ROWS).abort(**given), {"reason": "a test"}),
    "Resharder.start": (lambda **given: tricomm.Resharder(WHOLE, ROWS).start(**given).wait(), {
        "tensor": torch.zeros(4, 4), "out": None, "after": None, "depends_on": ()}),
    "Search": (tricomm.Search, {"nodes": 10}),
    "SendRecv": (tricomm.SendRecv, {"chunk_bytes": 64}),
    "Shard": (Shard, {"dim": 0, "segments": (2, 2)}),
    "ShardingSpec": (ShardingSpec, {
        "mesh": ONE, "placements": (Shard(0),), "shape": (4,), "dtype": "int8", "axis_order": ("x",),
        "holdings": None}),
    "ShardingSpec.from_dtensor": (ShardingSpec.from_dtensor, {
        "dtensor": DTENSOR, "group": None, "strided_as_order": True}),
    "ShardingSpec.from_placements": (ShardingSpec.from_placements, {
        "mesh": DEVICE_MESH, "placements": (TorchShard(0),), "shape": (4, 4), "dtype": "float32", "group": None,
        "strided_as_order": True}),
    "ShardingSpec.from_dims": (ShardingSpec.from_dims, {
        "mesh": ONE, "dims": ("S0",), "shape": (4,), "dtype": "int8"}),
    "ShardingSpec.explicit": (ShardingSpec.explicit, {
        "holdings": {0: (((0, 4),),)}, "shape": (4,), "dtype": "int8"}),
    "ShardingSpec.resolved": (WHOLE.resolved, {"source": ROWS}),
    "ShardingSpec.cutting_axes": (WHOLE.cutting_axes, {"dim": 0}),
    "ShardingSpec.holding": (ROWS.holding, {"rank": 0}),
    "ShardingSpec.local_shape": (ROWS.local_shape, {"rank": 0}),
    "Split": (tricomm.Split, {}),
    "Subscriber": (at_an_address(tricomm.Subscriber), {
        "address": "here", "side": "a", "side_rank": 0, "side_size": 1, "source": "b", "specs": {"w": ROWS},
        "out": {"w": torch.zeros(4, 4)}, "secret": SECRET, "host": None, "timeout_seconds": 3, "device": "cpu"}),
    "Topology": (Topology, {
        "hosts": ("a",), "nic_bytes_per_second": 1e9, "nics_per_host": 1, "intra_bytes_per_second": 1e9,
        "latency_seconds": 0.0, "overhead_seconds": 0.0}),
    "Topology.flat": (Topology.flat, {"ranks": 2}),
    "Topology.detect": (Topology.detect, {
        "group": None, "nic_bytes_per_second": 1e9, "nics_per_host": 1, "intra_bytes_per_second": 1e9,
        "latency_seconds": 0.0, "overhead_seconds": 0.0}),
    "Topology.host": (TOPOLOGY.host, {"rank": 0}),
    "Topology.nic": (TOPOLOGY.nic, {"rank": 0}),
    "Topology.nic_rate": (TOPOLOGY.nic_rate, {"nic": 0}),
    "Topology.check_covers": (TOPOLOGY.check_covers, {"ranks": [0]}),
    "World.exchange": (lambda **given: at_a_meeting().exchange(**given), {"specs": {"w": WHOLE}, "timeout_seconds": 3}),
    "World.peek": (lambda **given: at_a_meeting().peek(**given), {"side_sizes": {"a": 1, "b": None}, "name": "c"}),
    "World.ranks_of": (lambda **given: at_a_meeting().ranks_of(**given), {"side": "a"}),
    "World.renew": (lambda **given: at_a_meeting().renew(**given).close(), {
        "timeout_seconds": 3, "side_sizes": {"a": 1}}),
    "World.topology": (lambda **given: at_a_meeting().topology(**given), {"nics_per_host": 1}),
    "connect": (at_an_address(tricomm.connect), {
        "address": "here", "side": "a", "side_rank": 0, "side_sizes": {"a": 1}, "secret": SECRET, "timeout_seconds": 3,
        "device": "cpu", "name": "b", "host": None, "on_waiting": None}),
    "backward": (tricomm.backward, {
        "group": None, "channels": ("a",), "retain_graph": False, "create_graph": False}),
    "local_shard": (tricomm.local_shard, {"tensor": torch.zeros(4, 4), "spec": ROWS, "rank": 0}),
    "make_plan": (tricomm.make_plan, {
        "source": WHOLE, "destination": ROWS, "topology": None, "strategy": tricomm.Auto(),
        "balance": tricomm.Split(), "staging_bytes": 1 << 20, "rank": None}),
    "redistribute": (tricomm.redistribute, {
        "dtensor": DTENSOR, "device_mesh": DEVICE_MESH, "placements": (TorchShard(1),), "source": None, "dtype": None,
        "timeout_seconds": 3}),
    **{name: (function, {
        "tensor": torch.zeros(4, 4), "source": WHOLE, "destination": ROWS, "out": None, "group": None,
        "strategy": tricomm.Auto(), "balance": tricomm.Split(), "topology": TOPOLOGY, "staging_bytes": 1 << 20,
        "device": "cpu", "timeout_seconds": 3, "confirm": None, "channel": "a", "name": "b"})
        for name, function in (("reshard", tricomm.reshard), ("reshard_async", tricomm.reshard_async))},
}  # fmt: skip

PIPELINE_CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Action": (pl.Action, {"stage": 0, "kind": pl.Kind.FORWARD, "microbatch": 0, "peer": None}),
    "Action.parse": (pl.Action.parse, {"text": "0F0"}),
    "Costs": (pl.Costs, {
        "stages": COSTS.stages, "transfers": {CHANNEL: pl.TransferCost(1.0)}, "other": pl.TransferCost()}),
    "Costs.uniform": (pl.Costs.uniform, {
        "stages": 2, "forward_seconds": 1.0, "input_gradient_seconds": 1.0, "weight_gradient_seconds": 1.0,
        "hop": 0.0}),
    "Costs.seconds": (COSTS.seconds, {"action": pl.Action(0, pl.Kind.FORWARD, 0)}),
    "Costs.transfer": (COSTS.transfer, {"channel": CHANNEL}),
    "Costs.with_transfers": (COSTS.with_transfers, {"channels": [CHANNEL], "cost": pl.TransferCost(1.0)}),
    "EdgeTensor": (pl.EdgeTensor, {"source": OPEN, "destination": OPEN, "gradient": (), "shape": ("batch", 4)}),
    "EdgeTensor.bound": (pl.EdgeTensor(OPEN, OPEN, shape=("n", 4)).bound, {"sizes": {"n": 4}}),
    "EdgeTensor.local_shape": (LAYER.local_shape, {"rank": 0, "at_source": True}),
    "Executor": (pl.Executor, {
        "schedule": pl.gpipe(1, 2), "stages": [pl.Stage(ONE, ("x",), ("loss",), module(), (Replicate(),))], "edges": {},
        "queues": pl.Queues.PER_CHANNEL, "tied": (), "loss_scale": None, "name": "p", "group": None, "device": "cpu",
        "timeout_seconds": 3, "strategy": tricomm.Auto(), "balance": tricomm.Split(), "topology": None}),
    "Limits": (pl.Limits, {"activations": 2, "nbytes": 2}),
    "Limits.allow": (pl.Limits(2, 2).allow, {"activations": 1, "nbytes": 1}),
    "Limits.most_held": (pl.Limits(2, 2).most_held, {"activation_nbytes": 1, "microbatches": 1}),
    "Link": (pl.Link, {
        "name": "a", "tensors": [LAYER], "microbatches": 2, "orders": ((0, 1), (0, 1)), "slots": (1, 1), "fifo": None,
        "group": None, "device": "cpu", "timeout_seconds": 3, "topology": None}),
    "Measurement": (pl.Measurement, {"executor": None}),
    "Queues.key": (pl.Queues.PER_CHANNEL.key, {"schedule": MOVING, "channel": CHANNEL, "stage": 0}),
    "Schedule": (pl.Schedule, {"lists": SCHEDULE.lists, "edges": SCHEDULE.edges}),
    "Schedule.with_lists": (SCHEDULE.with_lists, {"lists": SCHEDULE.lists}),
    "Schedule.parse": (pl.Schedule.parse, {"lists": ["0F0", "1F0"], "edges": EDGES}),
    "Schedule.pipeline_rank_of": (SCHEDULE.pipeline_rank_of, {"stage": 0}),
    "Schedule.position_of": (SCHEDULE.position_of, {"stage": 0}),
    "Schedule.stages_of": (SCHEDULE.stages_of, {"pipeline_rank": 0}),
    "Schedule.gradient_of": (SCHEDULE.gradient_of, {"stage": 0, "microbatch": 0}),
    "Schedule.producer": (SCHEDULE.producer, {"channel": CHANNEL, "microbatch": 0}),
    "Schedule.ends_microbatch": (SCHEDULE.ends_microbatch, {"action": SCHEDULE.lists[0][0]}),
    "Schedule.inputs": (SCHEDULE.inputs, {"action": SCHEDULE.lists[0][0]}),
    "Schedule.outputs": (SCHEDULE.outputs, {"action": SCHEDULE.lists[0][0]}),
    "Stage": (pl.Stage, {
        "mesh": ONE, "inputs": ("x",), "outputs": ("y",), "module": module(), "loss": None, "after_backward": None}),
    "StageCost": (pl.StageCost, {
        "forward_seconds": 1.0, "input_gradient_seconds": 1.0, "weight_gradient_seconds": 1.0, "activation_nbytes": 0}),
    "StageCost.seconds": (COSTS.stages[0].seconds, {"action": pl.Action(0, pl.Kind.FORWARD, 0)}),
    "Tied": (pl.Tied, {"parts": {0: ("weight", WHOLE), 1: ("weight", ROWS)}}),
    "TransferCost": (pl.TransferCost, {
        "busy_seconds": 1.0, "latency_seconds": 0.0, "nbytes": 4, "loads": (("nic", 1.0),)}),
    "TransferCost.of_bytes": (pl.TransferCost.of_bytes, {
        "nbytes": 4, "bytes_per_second": 1.0, "latency_seconds": 0.0}),
    "TransferCost.of_plan": (pl.TransferCost.of_plan, {"plan": PLAN, "topology": None}),
    "TransferCost.in_turn": (pl.TransferCost.in_turn, {"costs": [pl.TransferCost(1.0)]}),
    "TransferCost.sharing": (pl.TransferCost(1.0).sharing, {"sender": "a", "receiver": "b", "full_duplex": True}),
    "WithLoss": (pl.WithLoss, {"module": module(), "loss": nn.functional.mse_loss}),
    "Workload": (pl.Workload, {
        "stages": COSTS.stages, "transfers": {CHANNEL: pl.TransferCost(1.0)}, "overhead_seconds": 0.0,
        "overheads": ()}),
    "Workload.fitted": (pl.Workload.fitted, {"measured": {1: COSTS, 2: COSTS}}),
    "Workload.measured": (pl.Workload.measured, {"costs": COSTS, "microbatches": 2, "channels": None}),
    "Workload.costs": (pl.Workload(COSTS.stages).costs, {"microbatches": 2}),
    "chain": (pl.chain, {"stages": 2}),
    "check": (pl.check, {"schedule": MOVING, "queues": pl.Queues.PER_CHANNEL}),
    "clip_gradients": (pl.clip_gradients, {"executor": None, "max_norm": 1.0, "layout_of": None}),
    "eager_one_f_one_b": (pl.eager_one_f_one_b, {
        "stages": 2, "microbatches": 2, "depth": 1, "split": False, "weight_delay": 0, "edges": EDGES}),
    "gpipe": (pl.gpipe, {"stages": 2, "microbatches": 2, "split": True, "weight_delay": 0, "edges": EDGES}),
    "in_turn": (pl.in_turn, {"schedule": SCHEDULE, "costs": COSTS, "trials": 0}),
    "interleaved_one_f_one_b": (pl.interleaved_one_f_one_b, {
        "pipeline_ranks": 2, "microbatches": 2, "stages_per_rank": 2, "edges": ()}),
    "one_f_one_b": (pl.one_f_one_b, {
        "stages": 2, "microbatches": 2, "split": True, "weight_delay": 0, "edges": EDGES}),
    "read_csv": (pl.read_csv, {"text": "0F0\n1F0\n", "edges": EDGES}),
    "receive_ring": (pl.receive_ring, {"schedule": MOVING, "channel": CHANNEL}),
    "simulate": (pl.simulate, {"schedule": MOVING, "costs": COSTS, "queues": pl.Queues.PER_CHANNEL}),
    "tune": (pl.tune, {
        "costs_of": lambda _: COSTS, "microbatches": [2], "limits": pl.Limits(), "edges": EDGES, "allow_split": True,
        "trials": 0, "progress": lambda *_: None}),
    "warmed_up": (pl.warmed_up, {
        "microbatches": 2, "warm_up": (2, 1), "split": True, "weight_delay": 0, "edges": EDGES}),
    "with_communication": (pl.with_communication, {"schedule": SCHEDULE, "receives_ahead": 1}),
    "write_csv": (pl.write_csv, {"schedule": SCHEDULE}),
    "zero_bubble": (pl.zero_bubble, {"stages": 2, "microbatches": 2, "depth": 0, "edges": EDGES}),
}  # fmt: skip

# Values and results, which the library makes; and what torch or Python calls.
NOT_CALLED = {
    "Candidate", "Channel", "Edge", "Evaluation", "Handle", "Latest", "Missing", "Plan", "Progress", "Push",
    "Stats",
    "StepComparison", "World", "Subscriber.wait", "Timeline", "Timeline.busy_seconds",
    "Tuned", "Resharder.made", "Resharder.forward",
    "Kind", "Queues", "PerDirectionFifo", "Turns", "WithLoss.forward", "Options.of",
}  # fmt: skip
# Strategies call these with each other's values; Link's and Executor's need a step of several ranks (tests/pipeline).
SEAMS = {"assign", "route", "before", "append", "share_host", "rates_between"}


@contextmanager
def limit_seconds(seconds: int) -> Iterator[None]:
    """End what goes on for ever."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*CALLS, *PIPELINE_CALLS])
def test_what_a_public_callable_is_given_works_or_is_refused(name: str) -> None:
    function, arguments = {**CALLS, **PIPELINE_CALLS}[name]
    if None not in arguments.values() or "executor" not in arguments:
        function(**arguments)
    found = []
    for parameter in arguments:
        for value in WRONG:
            if callable(arguments[parameter]) and callable(value):
                continue  # of the right kind; what it raises is its own
            try:
                with limit_seconds(10):
                    function(**{**arguments, parameter: value})
            except TricommError:
                continue
            except BaseException as error:
                found.append(f"{parameter}={str(value)[:60]}: {type(error).__name__}: {str(error)[:80]}")
    assert not found, f"{len(found)} bare errors:\n" + "\n".join(found)


@pytest.mark.parametrize("after", [3, True, "x", torch.zeros(2), ()], ids=str)
def test_what_is_no_event_is_refused_by_start(after: Any) -> None:
    """In host memory nothing waits for the event, so nothing else would say so."""
    with tricomm.Resharder(WHOLE, ROWS) as mover:
        with pytest.raises(tricomm.ArgumentError, match=r"^after=.* is no event; pass what record_event\(\) returned"):
            mover.start(torch.zeros(4, 4), after=after)
        assert mover.start(torch.ones(4, 4), after=mover.record_event()).wait().sum() == 16


@pytest.mark.parametrize("after", [3, True, "x", torch.zeros(2), ()], ids=str)
def test_what_is_no_event_is_refused_off_the_meshes(after: Any) -> None:
    with pytest.raises(tricomm.ArgumentError, match=r"^after=.* is no event; pass what record_event\(\) returned"):
        off_meshes().start(after=after)


@pytest.mark.parametrize("depends_on", [3, None, "x", [1], torch.zeros(2), {}], ids=str)
def test_what_are_no_handles_is_refused_off_the_meshes(depends_on: Any) -> None:
    with pytest.raises(tricomm.ArgumentError, match=r"^depends_on=.* are not Handles; pass what start\(\) returned"):
        off_meshes().start(depends_on=depends_on)
    assert off_meshes().start(depends_on=[off_meshes().start()]).wait() is None


def public(owner: Any) -> Iterator[str]:
    for name in owner.__all__:
        one = getattr(owner, name)
        if not callable(one) or (inspect.isclass(one) and issubclass(one, BaseException)):
            continue
        yield name
        if inspect.isclass(one) and not issubclass(one, enum.Enum):
            for method, value in vars(one).items():
                is_called = inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)
                if not method.startswith("_") and is_called and inspect.signature(getattr(one, method)).parameters:
                    takes = [p for p in inspect.signature(getattr(one, method)).parameters if p != "self"]
                    if takes and method not in SEAMS:
                        yield f"{name}.{method}"


def test_every_public_callable_is_there() -> None:
    stepping = {name for name in public(pl) if name.startswith(("Executor.", "Link.", "Measurement."))}
    assert set(public(tricomm)) - NOT_CALLED <= set(CALLS)
    assert set(public(pl)) - NOT_CALLED - stepping <= set(PIPELINE_CALLS)
