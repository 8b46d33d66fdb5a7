"""The parts of gpu-check that also run without a GPU do here what they are to do there."""

from pathlib import Path

import pytest
import torch

from bench.gpu_sanitizer import ERROR_EXIT_CODE, SCENES, main, sanitizer_part
from bench.gpu_transport import CASES, transport_part


@pytest.mark.processes
def test_the_transport_part_on_gloo() -> None:
    outcomes = list(transport_part(torch.device("cpu"), overlap_nbytes=1 << 20, matrix=64))
    assert [outcome.name for outcome in outcomes] == [*(f"transport: {name}" for name in CASES), "transport: overlap"]
    assert all(outcome.passed for outcome in outcomes), outcomes


def fake_sanitizer(directory: Path, exit_code: int) -> None:
    """A program that notes its arguments and says how it ended."""
    program = directory / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {directory}/seen\nexit {exit_code}\n')
    program.chmod(0o755)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("exit_code", "text"), [(0, f"memcheck of {SCENES} random scenes"), (9, "exit code 9, 9 being")]
)
def test_what_the_sanitizer_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, text: str
) -> None:
    fake_sanitizer(tmp_path, exit_code)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (outcome,) = sanitizer_part(torch.device("cuda", 0))
    assert outcome.passed == (exit_code == 0)
    assert outcome.text.startswith(text)
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith(f"1 --tool memcheck --error-exitcode {ERROR_EXIT_CODE} ")
    assert seen.endswith("-m bench.gpu_sanitizer cuda:0\n")


def test_a_missing_sanitizer_is_no_failure_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (outcome,) = sanitizer_part(torch.device("cuda", 0))
    assert outcome.passed
    assert "NOT RUN: there is no compute-sanitizer" in outcome.text


def test_what_runs_under_the_sanitizer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cpu"])
    assert f"{SCENES} random scenes" in capsys.readouterr().out
