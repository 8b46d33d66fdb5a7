"""Public names, methods and properties have docstrings with examples, and every example does what it says."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from typing import get_type_hints

import pytest

import tricomm
import tricomm.draw
import tricomm.pipeline
import tricomm.pipeline.torch_adapter
import tricomm.rules
import tricomm.rules.models
from tests.test_house import MODULES
from tricomm.options import ReshardOptions

PACKAGES = (
    tricomm,
    tricomm.draw,
    tricomm.pipeline,
    tricomm.pipeline.torch_adapter,
    tricomm.rules,
    tricomm.rules.models,
)
PUBLIC = [(module, name) for module in PACKAGES for name in module.__all__]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def has_example(text: str | None) -> bool:
    return text is not None and bool(doctest.DocTestParser().get_examples(text))


def has_block(text: str | None) -> bool:
    """Whether there is code after a line that ends in two colons, for what needs other ranks."""
    lines = inspect.cleandoc(text or "").splitlines()
    return any(
        first.endswith("::") and not between and code.startswith("    ")
        for first, between, code in zip(lines, lines[1:], lines[2:], strict=False)
    )


def methods_of(kind: type) -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of the methods and properties that help() shows, inherited ones of the library too."""
    for base in kind.__mro__:
        for name, value in vars(base).items() if base.__module__.startswith("tricomm.") else ():
            written = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
            is_code = inspect.isfunction(written) or isinstance(value, property | cached_property)
            if is_code and not name.startswith("_"):
                yield f"{base.__module__}.{base.__qualname__}.{name}", written.__doc__


def methods() -> dict[str, str | None]:
    classes = [value for module, name in PUBLIC if inspect.isclass(value := getattr(module, name))]
    return {name: text for one in classes for name, text in methods_of(one)}


def examples() -> list[doctest.DocTest]:
    found: list[doctest.DocTest] = []
    for name in sorted(MODULES.keys() - {"__main__"}):
        module = importlib.import_module(f"tricomm.{name}".rstrip("."))
        found += doctest.DocTestFinder(exclude_empty=True).find(module)
    return [test for test in found if test.examples]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_a_public_name_has_an_example(module: object, name: str) -> None:
    text = getattr(module, name).__doc__
    assert text, f"{name} has no docstring"
    assert has_example(text), f"the docstring of {name} has no example that starts with >>>"


def test_a_method_of_a_public_class_has_an_example() -> None:
    found = methods()
    assert len(found) > 200
    assert [name for name, text in found.items() if not has_example(text) and not has_block(text)] == []


MADE_BY_TRICOMM = {"Push", "World"}
"""Nobody else calls these classes."""


def undescribed() -> dict[str, list[str]]:
    """The parameters, by public function, method and class, that a section of its docstring leaves out."""
    found = {}
    for module, name in PUBLIC:
        value = getattr(module, name)
        calls = {name: value}
        if inspect.isclass(value):
            calls |= {
                f"{name}.{key}": getattr(one, "__func__", one) for key, one in vars(value).items() if key[0] != "_"
            }
        for called, function in calls.items():
            text = inspect.getdoc(function) or ""
            section = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\w|\Z)", text, re.M | re.S)
            if section is None or not callable(function) or called in MADE_BY_TRICOMM or is_enum(function):
                continue
            named = re.findall(r"\w+", " ".join(re.findall(r"^ {4}([^:]+):", section[1], re.M)))
            parameters = [one for one in inspect.signature(function).parameters if one not in ("self", "cls")]
            missing = [one for one in parameters if one not in named and not one.startswith("_")]
            found |= {called: missing} if missing else {}
    return found


def is_enum(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Enum)


def test_every_parameter_is_described_where_some_are() -> None:
    assert undescribed() == {}


def test_every_option_of_a_reshard_is_described() -> None:
    text = inspect.getdoc(tricomm.Options) or ""
    assert [
        name for name in get_type_hints(ReshardOptions) if not re.search(rf"^    {name}: |``{name}`` takes", text, re.M)
    ] == []


def test_a_method_without_an_example_is_told() -> None:
    class Wanting:
        @property
        def size(self) -> int:
            """How many::"""
            return 0

        @classmethod
        def of(cls) -> "Wanting":
            """
            >>> Wanting.of()
            """
            return cls()

        def close(self) -> None:
            """Close.

            ::

                one.close()
            """

    Wanting.__module__ = "tricomm.wanting"
    found = {name.rpartition(".")[2]: has_example(text) or has_block(text) for name, text in methods_of(Wanting)}
    assert found == {"size": False, "of": True, "close": True}


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_an_example_does_what_it_says(test: doctest.DocTest) -> None:
    skipped = [example for example in test.examples if example.options.get(doctest.SKIP)]
    assert not skipped, "an example that is skipped shows nothing"
    told: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=told.append)
    assert not told, "".join(told)


def test_a_wrong_example_is_told() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        test_an_example_does_what_it_says(test)
