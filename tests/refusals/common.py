"""What the refused calls have in common."""

from collections.abc import Callable
from typing import Any

import torch

from tricomm import (
    LocalTransport,
    Mesh,
    Plan,
    Shard,
    ShardingSpec,
    TricommError,
    make_plan,
)

Refusal = tuple[Callable[[], Any], type[TricommError], str, str, str]
"""(the call, the error, then what its text must hold: the value, the rule, the remedy)."""

GRID = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
PAIR = Mesh([0, 1], ("x",))
OTHERS = Mesh([2, 3], ("x",))
ROWS = ShardingSpec(PAIR, (Shard(0),), (8, 4), "float32")
COLUMNS = ShardingSpec(OTHERS, (Shard(1),))


def move(*, source: ShardingSpec = ROWS, destination: ShardingSpec = COLUMNS, **options: Any) -> Plan:
    return make_plan(source, destination, **options)


def run(replaced: dict[int, torch.Tensor | None], **options: Any) -> dict[int, torch.Tensor]:
    """Move shards of which some are replaced; None takes one away."""
    shards = {0: torch.zeros(4, 4), 1: torch.zeros(4, 4), **replaced}
    return LocalTransport().run(move(**options), {r: t for r, t in shards.items() if t is not None})
