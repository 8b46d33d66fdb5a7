"""The planner: two layouts in, one immutable Plan out. No torch, no process group."""

from tricomm.plan.move import Move
from tricomm.plan.plan import Plan
from tricomm.plan.planner import DEFAULT_STAGING_BYTES, make_plan
from tricomm.plan.program import RankProgram
from tricomm.plan.routes.strategies import Auto, Broadcast, GlobalAllGather, LocalAllGather, SendRecv, Strategy
from tricomm.plan.senders.policy import LeastLoaded, Naive, SenderPolicy
from tricomm.plan.senders.search import Ensemble, RandomizedGreedy, Search
from tricomm.plan.senders.split import Split

Balance = SenderPolicy
"""The name of SenderPolicy up to version 0.1; goes with the next one."""

__all__ = [
    "DEFAULT_STAGING_BYTES",
    "Auto",
    "Broadcast",
    "Ensemble",
    "GlobalAllGather",
    "LeastLoaded",
    "LocalAllGather",
    "Move",
    "Naive",
    "Plan",
    "RandomizedGreedy",
    "RankProgram",
    "Search",
    "SendRecv",
    "SenderPolicy",
    "Split",
    "Strategy",
    "make_plan",
]
