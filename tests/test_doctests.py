"""Every public name has a docstring with an example, and every example of the library does what it says."""

import doctest
import importlib

import pytest

import tricomm
import tricomm.draw
import tricomm.pipeline
import tricomm.pipeline.torch_adapter
import tricomm.rules
from tests.test_house import MODULES

PACKAGES = (tricomm, tricomm.draw, tricomm.pipeline, tricomm.pipeline.torch_adapter, tricomm.rules)
PUBLIC = [(module, name) for module in PACKAGES for name in module.__all__]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def has_example(text: str | None) -> bool:
    return text is not None and bool(doctest.DocTestParser().get_examples(text))


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
