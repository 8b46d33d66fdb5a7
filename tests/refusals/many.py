"""Refused calls about many tensors at once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.refusals.common import COLUMNS, ROWS, Refusal
from tricomm import ArgumentError, LocalTransport, PlanError, SpecError, make_plan
from tricomm.autograd import layouts as autograd
from tricomm.packing.tensor_checker import TensorChecker
from tricomm.plan.routes.joined import MAX_GROUPS, Routes, joined
from tricomm.plan.routes.strategies import SendRecv

NAMES = ("wq", "wk")
PLAN = make_plan(dict.fromkeys(NAMES, ROWS), dict.fromkeys(NAMES, COLUMNS))
SHARD = torch.zeros(4, 4)


def run(*tensors: Any) -> Any:
    """Of ranks 0 and 1."""
    return LocalTransport().run(PLAN, dict(enumerate(tensors)))


def receive(out: Any, read: Mapping[str, torch.Tensor] | None = None, rank: int = 2) -> Any:
    return TensorChecker(PLAN, rank, torch.device("cpu")).check(read, out)


def plan(source: Any, destination: Any) -> Any:
    return make_plan(source, destination)


def share_memory() -> Any:
    whole = torch.zeros(8, 3)
    return receive({"wq": whole[:, :2], "wk": whole[:, 1:]})


BOTH = dict.fromkeys(NAMES, SHARD)

# fmt: off
REFUSALS: dict[str, Refusal] = {
    "one side is a mapping": (lambda: plan({"wq": ROWS}, COLUMNS), ArgumentError,
        "destination=ShardingSpec", "is not a mapping, and the other side is", "give both as"),
    "no tensors": (lambda: plan({}, {}), SpecError,
        "source is a mapping", "without tensors", "give {name: ShardingSpec}"),
    "a name that is no text": (lambda: plan({1: ROWS}, {1: COLUMNS}), ArgumentError,
        "the name 1", "is not a text", "names are such as"),
    "a name on one side": (lambda: plan({"wq": ROWS, "wk": ROWS}, {"wq": COLUMNS, "w_k": COLUMNS}), SpecError,
        "tensor 'wk' is in the source only", "must be the same on both sides", "did you mean 'w_k'"),
    "a name on the other side": (lambda: plan({"wq": ROWS}, {"wq": COLUMNS, "embed": COLUMNS}), SpecError,
        "tensor 'embed' is in the destination only", "must be the same on both sides", "leave it out, or give both"),
    "shapes of one of many": (lambda: plan({"wq": ROWS}, {"wq": replace(COLUMNS, shape=(4, 4))}), SpecError,
        "tensor 'wq': source shape (8, 4)", "differ", "make them equal"),
    "the layout of one of many": (lambda: PLAN.source, PlanError,
        "a plan of many tensors", "has the layouts of each in plan.items", "look there"),
    "gradients of many": (lambda: autograd.check_differentiable_layouts(PLAN, None), SpecError,
        "through a mapping", "gradients do not come back", "make a Resharder of each"),
    "a tensor where many are planned": (lambda: run(SHARD, SHARD), ArgumentError,
        "tensor of rank 0 is a Tensor", "this plan is of many tensors", "pass {name: tensor}"),
    "many where one is planned": (lambda: LocalTransport().run(make_plan(ROWS, COLUMNS), {0: BOTH}), ArgumentError,
        "the tensor is a mapping", "the layouts are of one tensor", "pass a tensor"),
    "one of many is missing": (lambda: run(BOTH, {"wq": SHARD}), SpecError,
        "rank 1", "gave no tensor 'wk'", "pass its shard of shape (4, 4)"),
    "one too many": (lambda: run({**BOTH, "wqq": SHARD}, BOTH), SpecError,
        "tensor of rank 0 has 'wqq'", "none of the 2 tensors that were planned", "did you mean 'wq'"),
    "one on another rank's mesh": (lambda: LocalTransport().run(PLAN, {0: BOTH, 1: BOTH, 2: BOTH}), SpecError,
        "tensor of rank 2 has 'wq'", "not on the source mesh of that tensor", "or pass None"),
    "one of many has another shape": (lambda: run({**BOTH, "wk": SHARD[:2]}, BOTH), SpecError,
        "tensor 'wk' of rank 0 has shape (2, 4)", "its spec gives it (4, 4)", "pass the shard"),
    "one of many requires grad": (lambda: run({**BOTH, "wk": torch.zeros(4, 4, requires_grad=True)}, BOTH), SpecError,
        "tensor 'wk' of rank 0 requires grad", "gradients do not come back", "torch.no_grad()"),
    "out lacks one": (lambda: receive({"wq": torch.zeros(8, 2)}), SpecError,
        "out of rank 2", "has no tensor 'wk'", "give all of them"),
    "outs share memory": (share_memory, SpecError,
        "out['wk'] of rank 2", "shares memory with out['wq']", "pass another tensor"),
    "too many groups": (lambda: joined([Routes(SendRecv(), (), ())] * (MAX_GROUPS + 1)), PlanError,
        "4097 groups", "has at most 4096", "in several calls"),
}
# fmt: on
