"""Every public callable of tricomm, with arguments that it takes."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Shard as TorchShard

import tricomm
from tests.kinds.values import AWAY, ONE, PLAN, ROWS, WHOLE
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, Topology

Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


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


def wait_newer(**given: Any) -> None:
    def call(address: str) -> tricomm.Subscriber:
        made = tricomm.Subscriber(
            address,
            side="a",
            side_rank=0,
            side_size=1,
            source="b",
            specs={"w": ROWS},
            out={"w": torch.zeros(4, 4)},
            secret=SECRET,
            device="cpu",
        )
        made.poll = lambda: 7  # type: ignore[method-assign]  # a version has come
        with made:
            made.wait(**given)
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


def of_many(**given: Any) -> Any:
    return tricomm.Resharder({"a": WHOLE, "b": WHOLE}, {"a": ROWS, "b": ROWS})(**given)


TOPOLOGY = Topology(("a",))

DEVICE_MESH = DeviceMesh("cpu", [0], mesh_dim_names=("x",), _init_backend=False, _rank=0)
DTENSOR = DTensor.from_local(torch.zeros(4, 4), DEVICE_MESH, [TorchShard(0)], run_check=False)

CALLS: Calls = {
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
    "Feed.wait_newer": (lambda **given: make_feed("a").wait_newer(**given, timeout_seconds=0.01), {"than": None}),
    "GlobalAllGather": (tricomm.GlobalAllGather, {"chunk_bytes": 64}),
    "Hooks": (tricomm.Hooks, {
        "before": {"l.{l}": lambda _module, tensors: tensors}, "after": {"l.{l}": lambda _module, _tensors: None},
        "blocks": {"l.{l}.w": (128, 128)}, "l": [0, 1]}),
    "Hooks.check_blocks": (tricomm.Hooks(blocks={"w": (1, 1)}).check_blocks, {"specs": [("w", ROWS)], "rank": 0}),
    "Hooks.bind": (tricomm.Hooks(after={"w": lambda _module, _tensors: None}).bind, {
        "sources": ["w"], "destinations": ["w"], "sent": ["w"], "needed": {"w"}}),
    "LeastLoaded": (tricomm.LeastLoaded, {}),
    "LocalAllGather": (tricomm.LocalAllGather, {"chunk_bytes": 64}),
    "LocalTransport": (tricomm.LocalTransport, {"grouped": True, "receives_ahead": 0, "rounds_open": 2,
        "reads": False}),
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
    "Resharder.__call__, of many": (of_many, {
        "tensor": {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}, "out": None, "only": None}),
    "Resharder.__call__, off the meshes": (
        lambda tensor, out: off_meshes()(tensor, out=out), {"tensor": None, "out": None}),
    "Resharder.abort, off the meshes": (lambda **given: off_meshes().abort(**given), {"reason": "a test"}),
    "Resharder.only": (
        lambda **given: tricomm.Resharder({"a": WHOLE, "b": WHOLE}, {"a": ROWS, "b": ROWS}).only(**given),
        {"names": ["a"]}),
    "Resharder.start, off the meshes": (lambda **given: off_meshes().start(**given).wait(), {
        "tensor": None, "out": None, "after": None, "depends_on": ()}),
    "Resharder, off the meshes": (off_meshes, {
        "strategy": tricomm.Auto(), "balance": tricomm.Split(), "topology": None, "staging_bytes": 1 << 20,
        "device": "cpu", "timeout_seconds": 3, "confirm": False, "channel": "a", "name": "b", "rules": None,
        "hooks": None, "differentiable": False, "progress": None, "checksum": False, "transport": "network"}),
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
    "ShardingSpec.trimmed": (ROWS.trimmed, {"shape": (2, 2)}),
    "ShardingSpec.on_blocks": (ROWS.on_blocks, {"blocks": (2, 2)}),
    "ShardingSpec.resolved": (WHOLE.resolved, {"source": ROWS}),
    "ShardingSpec.cutting_axes": (WHOLE.cutting_axes, {"dim": 0}),
    "ShardingSpec.holding": (ROWS.holding, {"rank": 0}),
    "ShardingSpec.local_shape": (ROWS.local_shape, {"rank": 0}),
    "Split": (tricomm.Split, {}),
    "Subscriber": (at_an_address(tricomm.Subscriber), {
        "address": "here", "side": "a", "side_rank": 0, "side_size": 1, "source": "b", "specs": {"w": ROWS},
        "out": {"w": torch.zeros(4, 4)}, "secret": SECRET, "host": None, "timeout_seconds": 3, "device": "cpu"}),
    "Subscriber.wait": (wait_newer, {"timeout_seconds": 3}),
    "Topology": (Topology, {
        "hosts": ("a",), "nic_bytes_per_second": 1e9, "nics_per_host": 1, "intra_bytes_per_second": 1e9,
        "latency_seconds": 0.0, "overhead_seconds": 0.0, "memory_bytes_per_second": 1e9,
        "multicast_hop_seconds": 0.0}),
    "Topology.flat": (Topology.flat, {"ranks": 2}),
    "Topology.detect": (Topology.detect, {
        "group": None, "nic_bytes_per_second": 1e9, "nics_per_host": 1, "intra_bytes_per_second": 1e9,
        "latency_seconds": 0.0, "overhead_seconds": 0.0, "memory_bytes_per_second": 1e9,
        "multicast_hop_seconds": 0.0}),
    "Topology.host": (TOPOLOGY.host, {"rank": 0}),
    "Topology.nic": (TOPOLOGY.nic, {"rank": 0}),
    "Topology.nic_rate": (TOPOLOGY.nic_rate, {"nic": 0}),
    "Topology.check_covers": (TOPOLOGY.check_covers, {"ranks": [0]}),
    "World.exchange": (lambda **given: at_a_meeting().exchange(**given), {
        "specs": {"w": WHOLE}, "timeout_seconds": 3, "rules": None}),
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
    **{f"{name}, off the meshes": (partial(function, group=group_of_two()), {
        "tensor": None, "source": AWAY, "destination": AWAY, "out": None, "timeout_seconds": 3, "confirm": None})
        for name, function in (("reshard", tricomm.reshard), ("reshard_async", tricomm.reshard_async))},
}  # fmt: skip
