"""What torch.compile does with tricomm: one explained graph break at a call, which then runs as it is.

Imported only while something is being compiled, as the decorator below imports torch._dynamo.
"""

from collections.abc import Callable
from typing import Any

import torch


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


run_eagerly: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _run,
    reason="tricomm talks to other ranks, which no graph can hold; the graph breaks around the call, and with "
    "fullgraph=True the call is to stand outside of the compiled function",
)
"""``run_eagerly(function, *arguments, **options)``: call a function outside of the graph."""
