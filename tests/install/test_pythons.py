"""The versions of Python that the metadata names can read every file; a wheel says what it needs."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest

from tests.install.conftest import ROOT, Installed, run

PYTHONS = ("3.11", "3.12", "3.13")
SOURCES = sorted(path for folder in ("tricomm", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py"))
READS_ALL = "import sys\nfor path in sys.argv[1:]:\n    compile(open(path, encoding='utf-8').read(), path, 'exec')"
GONE = {"aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp"}
GONE |= {"lib2to3", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau"}
GONE |= {"telnetlib", "uu", "xdrlib"}
"""Modules that Python 3.12 or 3.13 has no more."""


def interpreter(version: str) -> str | None:
    """A Python of that version, where pyenv puts them or on the path."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


def reads(python: str, *paths: Path | str) -> subprocess.CompletedProcess[str]:
    """Let a Python compile files; what it warns of is an error. It runs none of them."""
    words = [python, "-W", "error", "-c", READS_ALL, *map(str, paths)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.processes
@pytest.mark.parametrize("version", PYTHONS)
def test_every_file_is_read_by(version: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    done = reads(python, *SOURCES)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_a_file_that_a_python_warns_of_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("pattern = '\\d'\n")
    assert "invalid escape sequence" in reads(sys.executable, tmp_path / "wrong.py").stderr


def imported(tree: ast.AST) -> set[str]:
    """The packages that a file imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_nothing_is_imported_that_later_pythons_do_not_have() -> None:
    assert imported(ast.parse("import pipes\nfrom distutils.core import setup")) & GONE == {"pipes", "distutils"}
    assert {str(path): found for path in SOURCES if (found := imported(ast.parse(path.read_text())) & GONE)} == {}


def test_the_metadata_names_the_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in project["classifiers"]]
    assert tuple(found[1] for found in named if found) == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.processes
def test_the_wheel_says_what_it_needs(wheel: Installed) -> None:
    code = "import importlib.metadata as m; print(m.distribution('tricomm').read_text('METADATA'))"
    said = Parser().parsestr(run(wheel.python, "-c", code, cwd=wheel.folder))
    assert said["Requires-Python"] == f">={PYTHONS[0]}"
    assert [one.split(" :: ")[-1] for one in said.get_all("Classifier", []) if " :: 3." in one] == list(PYTHONS)
    needs = said.get_all("Requires-Dist", [])
    assert {"torch>=2.11", "numpy>=1.26"} <= set(needs)
    assert said["License-Expression"] == "Apache-2.0"
    assert "# tricomm" in said.get_payload()
