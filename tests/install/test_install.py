"""What the README's install gives: tricomm with its kernels, the command, and nothing else of the checkout."""

import pytest

from tests.install.conftest import Installed, run

pytestmark = pytest.mark.processes

IMPORTS = """
import importlib.metadata, importlib.util
import tricomm, tricomm.kernels.pack
assert tricomm.__version__ == importlib.metadata.version("tricomm"), tricomm.__version__
print([name for name in ("kernels", "bench", "tests") if importlib.util.find_spec(name) is not None])
"""


def test_only_tricomm_can_be_imported(installed: Installed) -> None:
    assert run(installed.python, "-c", IMPORTS, cwd=installed.folder) == "[]\n"


def test_the_command_is_installed(installed: Installed) -> None:
    tricomm = installed.python.with_name("tricomm")
    words = ["plan", "--shape", "8", "--source", "2", "S0", "--destination", "2", "R"]
    assert run(tricomm, *words, cwd=installed.folder).startswith("reshard\n")


def test_the_demo_runs_from_a_wheel(wheel: Installed) -> None:
    told = run(wheel.python.with_name("tricomm"), "demo", cwd=wheel.folder)
    assert "104 tensors" in told
