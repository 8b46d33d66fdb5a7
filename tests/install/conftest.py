"""Two fresh environments, one with an editable install and one with a wheel."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path, succeeds: bool = True) -> str:
    """Standard output and errors of a command; it sees neither this checkout nor PYTHONPATH."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode == 0) == succeeds, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Installed:
    """A fresh environment with tricomm in it, and a folder outside of the checkout to run things in."""

    python: Path
    folder: Path

    @property
    def cache(self) -> Path:
        """Of what mypy has found, torch above all; both environments share it."""
        return self.folder.parents[1] / "mypy-cache"

    def mypy(self, script: Path, succeeds: bool = True) -> str:
        options = ["--strict", "--cache-dir", self.cache, "--python-executable", self.python]
        return run(sys.executable, "-m", "mypy", *options, script, cwd=self.folder, succeeds=succeeds)


def environment(folder: Path) -> Path:
    """A fresh environment that borrows the packages of this one; its Python. No network is needed."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, what: list[str | Path], folder: Path) -> Installed:
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *what, cwd=folder)
    outside = folder / "outside"
    outside.mkdir()
    return Installed(python, outside)


def copy_of_the_checkout(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder / "tricomm-source", symlinks=True, ignore=NOT_COPIED))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("editable")
    return install(environment(folder), ["--editable", copy_of_the_checkout(folder)], folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """From a wheel that is built of the source distribution, as a package index would have both."""
    folder = tmp_path_factory.mktemp("wheel")
    python = environment(folder)
    source = copy_of_the_checkout(folder)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    archive = source / run(python, "-c", build, cwd=source).splitlines()[-1]
    safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11 before 3.11.4
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder / "sdist", **safely)
    (project,) = (folder / "sdist").iterdir()
    wheels = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(python, "-m", "pip", "wheel", "--quiet", *wheels, project, cwd=folder)
    shutil.rmtree(source)
    return install(python, list(folder.glob("*.whl")), folder)


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request: pytest.FixtureRequest) -> Iterator[Installed]:
    return request.getfixturevalue(request.param)
