"""What is done outside of a graph where one is made; torch._dynamo is imported only then."""

from collections.abc import Callable
from typing import Any

import torch


def eagerly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function, outside of the graph where one is made."""
    if torch.compiler.is_compiling():
        from tricomm.compiled.graph import run_eagerly

        return run_eagerly(function, *arguments, **options)
    return function(*arguments, **options)
