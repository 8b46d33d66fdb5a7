"""Every public callable of tricomm.pipeline and tricomm.draw, with arguments that it takes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

import tricomm
import tricomm.draw
import tricomm.pipeline as pl
from tests.kinds.calls import Calls, group_of_two
from tests.kinds.values import AWAY, CHANNEL, COSTS, EDGES, MOVING, ONE, PLAN, ROWS, SCHEDULE, WHOLE
from tricomm import Replicate, Shard, ShardingSpec, Topology

OPEN = ShardingSpec(ONE, (Shard(0),), dtype="float32")
LAYER = pl.EdgeTensor(WHOLE, ROWS)


def module() -> nn.Module:
    return nn.Linear(4, 4)


@cache
def running(group: Any = None) -> pl.Executor:
    """Of two stages: of this rank, or in a group of two of the rank that nobody plays."""
    schedule = pl.Schedule.parse(["0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"])
    mesh, spec = (ONE, WHOLE) if group is None else (AWAY.mesh, AWAY)
    modules = (None, None) if group is not None else (module(), pl.WithLoss(module(), nn.functional.mse_loss))
    stages = [
        pl.Stage(mesh, ("x",), ("hidden",), modules[0]),
        pl.Stage(mesh, ("hidden", "y"), ("loss",), modules[1], loss=(Replicate(),)),
    ]
    edges = {(0, 1): {"hidden": pl.EdgeTensor(spec, spec)}}
    return pl.Executor(schedule, stages, edges, group=group, name="running", timeout_seconds=3)


def ready() -> pl.Executor:
    """The running one, in which no step has failed since."""
    running().evaluate(DATA)
    return running()


def of_running(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call it with the running executor, unless another one is given."""

    def call(**given: Any) -> Any:
        executor = ready() if given["executor"] == "running" else given["executor"]
        return function(**{**given, "executor": executor})

    return call


@cache
def measured() -> pl.Measurement:
    with pl.Measurement(running()) as measurement:
        running().step(DATA)
    return measurement


def of_link(method: str) -> Callable[..., None]:
    """Call a method of a Link of one rank."""

    def call(**given: Any) -> None:
        with pl.Link("of one rank", [pl.EdgeTensor(WHOLE, WHOLE)], microbatches=2, timeout_seconds=3) as link:
            if method != "bind":
                link.connect()
            getattr(link, method)(**given)

    return call


DATA = {"x": torch.zeros(2, 4, 4), "y": torch.zeros(2, 4, 4)}
STEP = {"data": DATA, "sizes": None, "loss_weights": None}
TIMELINE = pl.simulate(MOVING, COSTS)

PIPELINE_CALLS: Calls = {
    "Action": (pl.Action, {"stage": 0, "kind": pl.Kind.FORWARD, "microbatch": 0, "peer": None}),
    "Action.parse": (pl.Action.parse, {"text": "0F0"}),
    "Channel": (pl.Channel, {"sender": 0, "receiver": 1}),
    "Costs": (pl.Costs, {
        "stages": COSTS.stages, "transfers": {CHANNEL: pl.TransferCost(1.0)}, "other": pl.TransferCost()}),
    "Costs.uniform": (pl.Costs.uniform, {
        "stages": 2, "forward_seconds": 1.0, "input_gradient_seconds": 1.0, "weight_gradient_seconds": 1.0,
        "hop": 0.0}),
    "Costs.seconds": (COSTS.seconds, {"action": pl.Action(0, pl.Kind.FORWARD, 0)}),
    "Costs.transfer": (COSTS.transfer, {"channel": CHANNEL}),
    "Costs.with_transfers": (COSTS.with_transfers, {"channels": [CHANNEL], "cost": pl.TransferCost(1.0)}),
    "Edge": (pl.Edge, {"source": 0, "destination": 1}),
    "EdgeTensor": (pl.EdgeTensor, {"source": OPEN, "destination": OPEN, "gradient": (), "shape": ("batch", 4)}),
    "EdgeTensor.bound": (pl.EdgeTensor(OPEN, OPEN, shape=("n", 4)).bound, {"sizes": {"n": 4}}),
    "EdgeTensor.local_shape": (LAYER.local_shape, {"rank": 0, "at_source": True}),
    "Executor": (pl.Executor, {
        "schedule": pl.gpipe(1, 2), "stages": [pl.Stage(ONE, ("x",), ("loss",), module(), (Replicate(),))], "edges": {},
        "queues": pl.Queues.PER_CHANNEL, "tied": (), "loss_scale": None, "name": "p", "group": None, "device": "cpu",
        "timeout_seconds": 3, "strategy": tricomm.Auto(), "balance": tricomm.Split(), "topology": None}),
    "Executor, off the meshes": (lambda **given: pl.Executor(**given, group=group_of_two()), {
        "schedule": pl.gpipe(1, 2), "stages": [pl.Stage(AWAY.mesh, ("x",), ("loss",), None, (Replicate(),))],
        "edges": {}, "queues": pl.Queues.PER_CHANNEL, "tied": (), "loss_scale": None, "name": "p", "device": "cpu",
        "timeout_seconds": 3, "topology": None}),
    "Executor.evaluate": (lambda **given: running().evaluate(**given), STEP),
    "Executor.evaluate, off the meshes": (lambda **given: running(group_of_two()).evaluate(**given), STEP),
    "Executor.gather": (lambda **given: ready().gather(**given), {"row": torch.zeros(2, dtype=torch.float64)}),
    "Executor.step": (lambda **given: running().step(**given), STEP),
    "Executor.step, off the meshes": (lambda **given: running(group_of_two()).step(**given), STEP),
    "Limits": (pl.Limits, {"activations": 2, "nbytes": 2}),
    "Limits.allow": (pl.Limits(2, 2).allow, {"activations": 1, "nbytes": 1}),
    "Limits.most_held": (pl.Limits(2, 2).most_held, {"activation_nbytes": 1, "microbatches": 1}),
    "Link": (pl.Link, {
        "name": "a", "tensors": [LAYER], "microbatches": 2, "orders": ((0, 1), (0, 1)), "slots": (1, 1), "fifo": None,
        "group": None, "device": "cpu", "timeout_seconds": 3, "topology": None}),
    "Link.abort": (of_link("abort"), {"reason": "a test"}),
    "Link.bind": (of_link("bind"), {"sizes": [()]}),
    "Link.recv": (of_link("recv"), {"microbatch": 0}),
    "Link.recv_gradient": (of_link("recv_gradient"), {"microbatch": 0}),
    "Link.send": (of_link("send"), {"x": torch.zeros(4, 4), "microbatch": 0}),
    "Link.send_gradient": (of_link("send_gradient"), {"gradient": torch.zeros(4, 4), "microbatch": 0}),
    "Measurement": (of_running(pl.Measurement), {"executor": "running"}),
    "Measurement.compare": (lambda **given: measured().compare(**given), {"topology": Topology(("a",))}),
    "Measurement.costs": (lambda **given: measured().costs(**given), {"topology": Topology(("a",))}),
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
    "Timeline.busy_seconds": (TIMELINE.busy_seconds, {"pipeline_rank": 0}),
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
    "clip_gradients, off the meshes": (
        lambda **given: pl.clip_gradients(running(group_of_two()), **given), {
        "max_norm": 1.0, "layout_of": lambda _stage, _name: (Replicate(),)}),
    "clip_gradients": (of_running(pl.clip_gradients), {
        "executor": "running", "max_norm": 1.0, "layout_of": lambda _stage, _name: (Replicate(),)}),
    "eager_one_f_one_b": (pl.eager_one_f_one_b, {
        "stages": 2, "microbatches": 2, "depth": 1, "split": False, "weight_delay": 0, "edges": EDGES}),
    "gpipe": (pl.gpipe, {"stages": 2, "microbatches": 2, "split": True, "weight_delay": 0, "edges": EDGES}),
    "in_turn": (pl.in_turn, {"schedule": SCHEDULE, "costs": COSTS, "trials": 0}),
    "interleaved_one_f_one_b": (pl.interleaved_one_f_one_b, {
        "pipeline_ranks": 2, "microbatches": 2, "stages_per_rank": 2, "edges": ()}),
    "one_f_one_b": (pl.one_f_one_b, {
        "stages": 2, "microbatches": 2, "split": True, "weight_delay": 0, "edges": EDGES}),
    "plan_svg": (tricomm.draw.plan_svg, {"plan": PLAN, "title": "", "width": 1400, "topology": None}),
    "read_csv": (pl.read_csv, {"text": "0F0\n1F0\n", "edges": EDGES}),
    "receive_ring": (pl.receive_ring, {"schedule": MOVING, "channel": CHANNEL}),
    "simulate": (pl.simulate, {"schedule": MOVING, "costs": COSTS, "queues": pl.Queues.PER_CHANNEL}),
    "timeline_perfetto": (tricomm.draw.timeline_perfetto, {"timeline": TIMELINE}),
    "timeline_svg": (tricomm.draw.timeline_svg, {
        "timeline": TIMELINE, "title": "", "width": 1400, "until_seconds": None}),
    "tune": (pl.tune, {
        "costs_of": lambda _: COSTS, "microbatches": [2], "limits": pl.Limits(), "edges": EDGES, "allow_split": True,
        "trials": 0, "progress": lambda *_: None}),
    "warmed_up": (pl.warmed_up, {
        "microbatches": 2, "warm_up": (2, 1), "split": True, "weight_delay": 0, "edges": EDGES}),
    "with_communication": (pl.with_communication, {"schedule": SCHEDULE, "receives_ahead": 1}),
    "write_csv": (pl.write_csv, {"schedule": SCHEDULE}),
    "zero_bubble": (pl.zero_bubble, {"stages": 2, "microbatches": 2, "depth": 0, "edges": EDGES}),
}  # fmt: skip
