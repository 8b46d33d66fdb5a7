"""The planner: two layouts in, one immutable Plan out. No torch, no process group."""

from tricomm.plan.plan import DEFAULT_STAGING_BYTES, Move, Plan, make_plan
from tricomm.plan.program import RankProgram
from tricomm.plan.routes import Auto, Broadcast, SendRecv, Strategy
from tricomm.plan.senders import Balance, LeastLoaded, Naive

__all__ = [
    "DEFAULT_STAGING_BYTES",
    "Auto",
    "Balance",
    "Broadcast",
    "LeastLoaded",
    "Move",
    "Naive",
    "Plan",
    "RankProgram",
    "SendRecv",
    "Strategy",
    "make_plan",
]
