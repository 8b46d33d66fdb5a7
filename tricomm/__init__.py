"""tricomm moves a sharded tensor from one device mesh to another with a different layout."""

import gc
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

# While Python makes hundreds of classes it collects garbage, and looks through all that torch has made for it: a third
# of the time of this import, for nothing, since what modules make stays.
_collects = gc.isenabled()
gc.disable()
try:
    from tricomm.autograd.tape import backward
    from tricomm.connect.feeds.feed import Feed
    from tricomm.connect.feeds.push import Latest, Push
    from tricomm.connect.meeting.join import Missing
    from tricomm.connect.meeting.server import Meeting
    from tricomm.connect.publisher import Publisher
    from tricomm.connect.subscriber import Subscriber
    from tricomm.connect.version import __version__ as __version__
    from tricomm.connect.world import World, connect
    from tricomm.errors import ArgumentError, PlanError, SpecError, TransportError, TricommError
    from tricomm.hooks import Hooks
    from tricomm.layout.mesh import Mesh
    from tricomm.layout.placement import Partial, Replicate, Shard
    from tricomm.layout.spec import ShardingSpec
    from tricomm.layout.topology import Topology
    from tricomm.options import Options
    from tricomm.packing.shards import local_shard
    from tricomm.plan import (
        Auto,
        Broadcast,
        Ensemble,
        GlobalAllGather,
        LeastLoaded,
        LocalAllGather,
        Naive,
        Plan,
        RandomizedGreedy,
        Search,
        SendRecv,
        Split,
        make_plan,
    )
    from tricomm.redistribute import redistribute
    from tricomm.reshard import reshard, reshard_async
    from tricomm.resharder import Resharder
    from tricomm.stats import Progress, Stats
    from tricomm.transport import LocalTransport
    from tricomm.transport.handle import Handle
finally:
    if _collects:
        gc.enable()

if TYPE_CHECKING:  # with "import tricomm" alone
    from tricomm import draw as draw
    from tricomm import examples as examples
    from tricomm import kernels as kernels
    from tricomm import launch as launch
    from tricomm import pipeline as pipeline
    from tricomm import rules as rules

__all__ = [
    "ArgumentError",
    "Auto",
    "Broadcast",
    "Ensemble",
    "Feed",
    "GlobalAllGather",
    "Handle",
    "Hooks",
    "Latest",
    "LeastLoaded",
    "LocalAllGather",
    "LocalTransport",
    "Meeting",
    "Mesh",
    "Missing",
    "Naive",
    "Options",
    "Partial",
    "Plan",
    "PlanError",
    "Progress",
    "Publisher",
    "Push",
    "RandomizedGreedy",
    "Replicate",
    "Resharder",
    "Search",
    "SendRecv",
    "Shard",
    "ShardingSpec",
    "SpecError",
    "Split",
    "Stats",
    "Subscriber",
    "Topology",
    "TransportError",
    "TricommError",
    "World",
    "backward",
    "connect",
    "local_shard",
    "make_plan",
    "redistribute",
    "reshard",
    "reshard_async",
]

_PUBLIC_MODULES = ("draw", "examples", "kernels", "launch", "pipeline", "rules")
"""What is reached as ``tricomm.pipeline`` without an import of its own, which happens when it is asked for."""

if not TYPE_CHECKING:  # else type checkers would take any misspelt name for something

    def __getattr__(name: str) -> ModuleType:
        if name in _PUBLIC_MODULES:
            return importlib.import_module(f"tricomm.{name}")
        raise AttributeError(f"module 'tricomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_MODULES, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
