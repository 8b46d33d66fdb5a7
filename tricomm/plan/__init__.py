"""The planner: two layouts in, one immutable Plan out. No torch, no process group."""

from tricomm.plan.plan import DEFAULT_STAGING_BYTES, Move, Plan, make_plan
from tricomm.plan.program import RankProgram
from tricomm.plan.routes import Auto, Broadcast, GlobalAllGather, LocalAllGather, SendRecv, Strategy
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
