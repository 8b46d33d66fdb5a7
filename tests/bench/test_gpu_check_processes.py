"""gpu-check as it will be run: on a stand-in for the machine, where every part reports, whatever happens to another."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import sanitizer
from bench.gpu_check.parts import PARTS, Setting
from tests.test_house import ROOT

pytestmark = pytest.mark.processes
FIRST_PASS = [part.name for part in PARTS if not part.is_long]


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(a checkout, an environment): python3 is a virtual environment that was made from one and has torch, and there
    is no network: whoever tries to install something fails.
    """
    python = tmp_path / "machine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True, timeout=60)
    (packages,) = python.glob("lib/python3*/site-packages")
    (packages / "torch.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "bench", "kernels", "tricomm"):
        # Links travel as links: tricomm/kernels is one.
        subprocess.run(["cp", "-a", ROOT / name, checkout / name], check=True, timeout=60)
    environment = {
        "PATH": f"{python}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OUT": str(tmp_path / "out"),
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",  # as in all tests: two threads of one small product wait for each other
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    return checkout, environment


def make(machine: tuple[Path, dict[str, str]], *arguments: str) -> "subprocess.CompletedProcess[str]":
    checkout, environment = machine
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def lines_of(machine: tuple[Path, dict[str, str]]) -> list[dict[str, Any]]:
    out = Path(machine[1]["OUT"])
    return [json.loads(line) for line in (out / "gpu_check.jsonl").read_text().splitlines()]


@pytest.mark.rehearsal
def test_a_rehearsal_in_which_a_part_crashes_and_another_hangs(machine: tuple[Path, dict[str, str]]) -> None:
    done = make(machine, "gpu-check", "DEVICE=cpu", "FAULTS=local=crash graphs=hang")
    assert done.returncode != 0
    lines = lines_of(machine)
    assert [line["part"] for line in lines] == FIRST_PASS, done.stdout + done.stderr
    status = {line["part"]: line["status"] for line in lines}
    expected = dict.fromkeys(FIRST_PASS, "passed") | {"local": "crashed", "graphs": "killed at its limit"}
    assert status == expected, done.stdout
    found = {line["part"]: line for line in lines}
    assert all(line["rehearsal"] for line in lines)
    assert len(found["local"]["outcomes"]) == 1, "what was known before the crash"
    assert "Fatal Python error: Aborted" in found["local"]["error"]
    assert "most recent call first" in found["graphs"]["error"], "where it hung"
    assert found["versions"]["outcomes"][0]["figures"]["torch"] == torch.__version__
    log = (Path(machine[1]["OUT"]) / "gpu_check.log").read_text()
    assert [name for name in FIRST_PASS if f"==== {name}:" in log] == FIRST_PASS
    assert "REHEARSAL on the CPU" in done.stdout
    assert "NOT all parts passed" in done.stdout
    table = done.stdout.partition("NOT all parts passed")[2]
    assert all(f" {name}" in table for name in FIRST_PASS), "every part has its lines in the last table"


def test_nothing_is_installed(machine: tuple[Path, dict[str, str]]) -> None:
    for target, arguments in (("gpu-check", ""), ("gpu-check-full", " --long")):
        done = make(machine, "-n", target, "PART=casts")
        assert " ".join(done.stdout.split()) == f"python3 -m bench.gpu_check{arguments} --part casts"


def test_a_part_that_passes_and_a_checkout_without_its_link(machine: tuple[Path, dict[str, str]]) -> None:
    checkout = machine[0]
    (checkout / "tricomm" / "kernels").unlink()
    done = make(machine, "gpu-check", "DEVICE=cpu", "PART=boxes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["part"] for line in lines_of(machine)] == ["versions", "boxes"]
    assert str(checkout / "build" / "gpu-check" / "tricomm" / "kernels") in done.stdout
    assert not (checkout / "bench" / "results" / "gpu_check.jsonl").exists(), "OUT is where results go"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_checked_and_that_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: NOTHING was checked: torch ")
    assert "finds no CUDA device. Run it where torch sees a CUDA device" in done.stderr
    (line,) = (tmp_path / "gpu_check.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "no device"


# ---- the second pass


def test_a_rehearsal_of_what_takes_longer(machine: tuple[Path, dict[str, str]]) -> None:
    done = make(machine, "gpu-check-full", "DEVICE=cpu", "PART=overlap")
    assert done.returncode == 0, done.stdout + done.stderr
    (overlap,) = (line for line in lines_of(machine) if line["part"] == "overlap")
    assert [outcome["name"] for outcome in overlap["outcomes"]] == ["one process", "two ranks"]
    assert "slowed down by a receiver that spins" in overlap["outcomes"][1]["text"]


def test_a_rehearsal_of_two_jobs(machine: tuple[Path, dict[str, str]]) -> None:
    done = make(machine, "gpu-check-full", "DEVICE=cpu", "PART=jobs")
    assert done.returncode == 0, done.stdout + done.stderr
    (jobs,) = (line for line in lines_of(machine) if line["part"] == "jobs")
    passed = {outcome["name"]: outcome["passed"] for outcome in jobs["outcomes"]}
    assert passed == {
        "one GPU of one host": None, "versions over NCCL": True, "both sides come anew, and share memory": True,
        "a rank that dies": True,
    }  # fmt: skip


def fake_sanitizer(directory: Path, exit_code: int, says: str) -> None:
    """A program that notes its arguments, says something and says how it ended."""
    program = directory / "compute-sanitizer"
    seen = directory / "seen"
    program.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {seen}\necho "{says}"\nexit {exit_code}\n'
    )
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("exit_code", "says", "passed", "text"),
    [
        (0, "", True, f"nothing out of bounds in {sanitizer.SCENES} random scenes"),
        (9, "Invalid __global__ read", False, "Invalid __global__ read\nexit code 9, 9 being"),
        (1, "Error: Device not supported", None, "compute-sanitizer does not work on this machine"),
    ],
)
def test_what_the_sanitizer_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, says: str, passed: bool | None, text: str
) -> None:
    fake_sanitizer(tmp_path, exit_code, says)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (outcome,) = sanitizer.memcheck(Setting("cuda:0", 60.0))
    assert outcome.passed is passed
    assert outcome.text.startswith(text)
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("1 --tool memcheck --report-api-errors no --target-processes application-only ")
    assert f"--error-exitcode {sanitizer.ERROR_EXIT_CODE} " in seen
    assert seen.endswith("-m bench.gpu_check.sanitizer cuda:0\n")


def test_a_missing_sanitizer_is_no_failure_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (outcome,) = sanitizer.memcheck(Setting("cuda:0", 60.0))
    assert outcome.passed is None
    assert "there is no compute-sanitizer" in outcome.text


def test_what_runs_under_the_sanitizer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    sanitizer.main(["cpu"])
    assert f"{sanitizer.SCENES} random scenes" in capsys.readouterr().out
