"""What the public functions are given: layouts of a job of one rank, and values of the wrong kind."""

from datetime import timedelta
from typing import Any

import torch
from torch import nn

import tricomm
import tricomm.pipeline as pl
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, Topology

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


WRONG: dict[str, Any] = {
    "None": None, "True": True, "3": 3, "-1": -1, "0": 0, "2.5": 2.5, "nan": float("nan"), "inf": float("inf"),
    "10**30": 10**30, "'x'": "x", "''": "", "b'x'": b"x", "[]": [], "()": (), "{}": {}, "{'a':1}": {"a": 1},
    "{1,2}": {1, 2}, "[1]": [1], "[[1,2],[3]]": [[1, 2], [3]], "['a']": ["a"], "(None,)": (None,),
    "[2.5,'a']": [2.5, "a"], "object()": object(), "int": int, "len": len, "Shard": Shard, "Shard(1)": Shard(1),
    "Replicate()": Replicate(), "Partial('max')": Partial("max"), "ONE": ONE, "WHOLE": WHOLE, "PLAN": PLAN,
    "OTHER": ShardingSpec(Mesh([7], ("y",)), (Shard(1),)), "Topology": Topology(("a",)), "SCHEDULE": SCHEDULE,
    "COSTS": COSTS, "CHANNEL": CHANNEL, "zeros(2)": torch.zeros(2), "zeros(4,4)": torch.zeros(4, 4),
    "meta(4,4)": torch.zeros(4, 4, device="meta"), "float32": torch.float32, "device": torch.device("meta"),
    "0s": timedelta(0), "1d": timedelta(1), "module": nn.Linear(2, 2), "Action": pl.Action(0, pl.Kind.FORWARD, 0),
    "Queues": pl.Queues.PER_CHANNEL, "range(3)": range(3), "{0:WHOLE}": {0: WHOLE},
    "{(0,1):{'x':3}}": {(0, 1): {"x": 3}},
    "SendRecv": tricomm.SendRecv, "'bf16'": "bf16",
}  # fmt: skip
"""By a word without spaces."""
