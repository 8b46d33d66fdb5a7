"""What `import tricomm` does to a process."""

import subprocess
import sys

import pytest

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
