"""A type checker sees tricomm where it is installed: a user's script passes, and a misspelt option does not."""

from pathlib import Path

import pytest

from tests.install.conftest import Installed

pytestmark = pytest.mark.processes
SCRIPT = Path(__file__).with_name("user_script.py")


def test_a_users_script_passes_mypy_strict(installed: Installed, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # outside of the checkout, in which mypy would find tricomm without an install
    script.write_text(SCRIPT.read_text())
    assert "Success: no issues found in 1 source file" in installed.mypy(script)


def test_without_an_install_the_check_would_fail(installed: Installed, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import tricomm.no_such_module\nreveal_type(tricomm.__version__)\n")
    told = installed.mypy(script, succeeds=False)
    assert "no_such_module" in told
    assert 'Revealed type is "str"' in told


def test_a_misspelt_option_is_an_error(installed: Installed, tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    for option, misspelt in [("confirm=True", "confrim=True"), ("timeout_seconds=60.0", "timout_seconds=60.0")]:
        assert option in text
        script = tmp_path / "misspelt.py"
        script.write_text(text.replace(option, misspelt))
        assert f'Unexpected keyword argument "{misspelt.split("=")[0]}"' in installed.mypy(script, succeeds=False)


def test_a_misspelt_name_of_tricomm_is_an_error(installed: Installed, tmp_path: Path) -> None:
    """Although public modules are imported only when they are asked for."""
    script = tmp_path / "misspelt.py"
    script.write_text("import tricomm\ntricomm.pipelines.gpipe(2, 4)\n")
    assert 'Module has no attribute "pipelines"' in installed.mypy(script, succeeds=False)
