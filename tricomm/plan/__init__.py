"""The planner: two layouts in, one immutable Plan out. No torch, no process group."""

from tricomm.plan.move import Move
from tricomm.plan.plan import Plan
from tricomm.plan.planner import DEFAULT_STAGING_BYTES, make_plan
from tricomm.plan.program import RankProgram
from tricomm.plan.routes.strategies import Auto, Broadcast, GlobalAllGather, LocalAllGather, SendRecv, Strategy
from tricomm.plan.senders.policy import Balance, LeastLoaded, Naive
from tricomm.plan.senders.search import Ensemble, RandomizedGreedy, Search
from tricomm.plan.senders.split import Split

__all__ = [
    "DEFAULT_STAGING_BYTES",
    "Auto",
    "Balance",
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
    "Split",
    "Strategy",
    "make_plan",
]
