"""What `import tricomm` does to a process."""

import subprocess
import sys

import pytest

import tricomm

CODE = """
import gc, torch
{before}
passes = []
gc.callbacks.append(lambda phase, about: passes.append(about["generation"]))
import tricomm
assert 2 not in passes, "a collection looked at all that torch has made, and found nothing"
assert gc.isenabled() == {collects}
"""


@pytest.mark.processes
@pytest.mark.parametrize(("before", "collects"), [("", True), ("gc.disable()", False)])
def test_the_import_looks_for_no_garbage_and_leaves_the_collector_as_it_was(before: str, collects: bool) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(before=before, collects=collects)], check=True)


REACHED = """
import sys, tricomm
for name in ("torch._dynamo", "torch.distributed.tensor", "tricomm.pipeline", "tricomm.draw"):
    assert name not in sys.modules, f"import tricomm imports {name}"
assert tricomm.pipeline.gpipe and tricomm.draw.plan_svg and tricomm.rules.Rules
assert tricomm.launch.Ranks and tricomm.kernels and tricomm.examples
assert tricomm.pipeline is sys.modules["tricomm.pipeline"]
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.processes
def test_public_modules_are_reached_without_an_import_of_their_own_and_imported_only_then() -> None:
    subprocess.run([sys.executable, "-c", REACHED], check=True)


def test_a_name_that_tricomm_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tricomm' has no attribute 'pipelines'"):
        _ = tricomm.pipelines


def test_dir_shows_public_names_and_modules_alone() -> None:
    shown = {name for name in dir(tricomm) if not name.startswith("__")}
    assert shown == {*tricomm.__all__, "draw", "examples", "kernels", "launch", "pipeline", "rules"}
    assert [name for name in dir(tricomm) if not hasattr(tricomm, name)] == []
