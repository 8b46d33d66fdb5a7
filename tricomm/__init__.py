"""tricomm moves a sharded tensor from one device mesh to another with a different layout."""

from tricomm.errors import PlanError, SpecError, TransportError, TricommError
from tricomm.mesh import Mesh
from tricomm.packing import local_shard
from tricomm.placement import Partial, Replicate, Shard
from tricomm.plan import Auto, Broadcast, LeastLoaded, Naive, Plan, SendRecv, make_plan
from tricomm.reshard import Handle, Resharder, reshard, reshard_async
from tricomm.sharding import ShardingSpec
from tricomm.topology import Topology
from tricomm.transport import LocalTransport

__all__ = [
    "Auto",
    "Broadcast",
    "Handle",
    "LeastLoaded",
    "LocalTransport",
    "Mesh",
    "Naive",
    "Partial",
    "Plan",
    "PlanError",
    "Replicate",
    "Resharder",
    "SendRecv",
    "Shard",
    "ShardingSpec",
    "SpecError",
    "Topology",
    "TransportError",
    "TricommError",
    "local_shard",
    "make_plan",
    "reshard",
    "reshard_async",
]
