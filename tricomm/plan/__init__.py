"""The planner: two specs in, one immutable Plan out.

Imports ``errors`` and ``layout``, never torch and nothing that communicates. Read ``planner`` first, then down:
``tasks`` (what has to move), ``senders`` (who sends it), ``routes`` (along which chains, and when), ``program`` (what
one rank does); ``network`` and ``cost`` say how long it takes, ``verify`` proves it, ``describe`` prints it.
"""

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
