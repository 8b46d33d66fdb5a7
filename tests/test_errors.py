"""What every refusal says: the value, the rule that it breaks and the remedy. Messages are part of the interface."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.refusals import calls, layouts, many, rules, torch_types
from tricomm import ArgumentError, PlanError, SpecError, TransportError, TricommError
from tricomm import options as option_types
from tricomm.autograd import layouts as autograd
from tricomm.layout import dtype as dtypes
from tricomm.layout import mesh, notation, placement, sides, spec_checks, topology, torch_layout
from tricomm.layout import spec as sharding
from tricomm.packing import copy_program, tensor_checker
from tricomm.plan import arguments, plan, planner, tasks
from tricomm.plan.ends import mapped
from tricomm.plan.routes import joined, strategies
from tricomm.rules.views import settle

MODULES: list[ModuleType] = [
    arguments,
    autograd,
    dtypes,
    mesh,
    notation,
    option_types,
    copy_program,
    placement,
    plan,
    planner,
    joined,
    strategies,
    sharding,
    sides,
    spec_checks,
    torch_layout,
    tasks,
    mapped,
    settle,
    tensor_checker,
    topology,
]

REFUSALS = {**layouts.REFUSALS, **calls.REFUSALS, **torch_types.REFUSALS, **many.REFUSALS, **rules.REFUSALS}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_value_the_rule_and_the_remedy(name: str) -> None:
    call, error, value, rule, remedy = REFUSALS[name]
    with pytest.raises(TricommError) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert value in text, text
    assert rule in text, text
    assert remedy in text, text


def raised_at(call: Callable[[], Any]) -> tuple[str, int]:
    """The file and line of the raise statement that ends a call."""
    with pytest.raises(TricommError) as caught:
        call()
    last = caught.traceback[-1]
    return str(last.path), last.lineno + 1


def test_every_raise_statement_has_a_case() -> None:
    reached = {raised_at(call) for call, *_ in REFUSALS.values()}
    for module in MODULES:
        path = str(Path(inspect.getfile(module)).resolve())
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:  # what is raised again has its case elsewhere
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                assert any((path, line) in reached for line in lines), f"{path}:{node.lineno} is raised by no case"


def test_errors_are_what_callers_would_catch() -> None:
    assert SpecError.__mro__[1:3] == (TricommError, ValueError)
    assert PlanError.__mro__[1:3] == (TricommError, ValueError)
    assert TransportError.__mro__[1:3] == (TricommError, RuntimeError)
    assert TricommError.__bases__ == (Exception,)
    assert ArgumentError.__bases__ == (SpecError, TypeError)
    assert len({SpecError, PlanError, TransportError, TricommError}) == 4
