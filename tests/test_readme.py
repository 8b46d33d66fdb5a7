"""What the README says is what happens."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tricomm import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


def test_the_first_example_runs_and_prints_the_plan_that_is_shown() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert printed.getvalue() == blocks("text")[0]


def test_the_tuning_example_chooses_a_schedule() -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[3], "README.md", "exec"), names)
    assert printed.getvalue().startswith("chosen: ")
    assert names["schedule"].stages == 3


def test_the_plan_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"`python -m tricomm (plan [^`]*)`", README)
    assert command is not None
    cli.main(shlex.split(command[1]))
    assert capsys.readouterr().out.startswith("reshard\n  from  float32[4096, 1024] S1 R on")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["plan", "--shape", "8", "--source", "2", "X", "--destination", "2", "R"], "entry 'X'"),
        (["plan", "--shape", "8,a", "--source", "2", "R", "--destination", "2", "R"], "--shape '8,a' is not a list"),
        (["simulate", "--schedule", "eager", "--activations", "2"], "--activations limits tuned schedules"),
        (["simulate", "--schedule", "gpipe", "--depth", "2"], "--depth is of eager and zero-bubble, and this is gpipe"),
        (["simulate", "--svg", "/nowhere/out.svg"], "cannot be written (No such file or directory)"),
        (["simulate", "--svg", "out.png"], "write it to out.svg and convert that"),
        (["demo", "--checkpoint", "/nowhere"], "/nowhere is not a file"),
        (["demo", "--checkpoint", __file__], "is not a .safetensors file"),
    ],
)
def test_a_wrong_command_says_why(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.processes
def test_the_module_is_the_command() -> None:
    words = ["plan", "--shape", "8", "--source", "2", "S0", "--destination", "2", "R"]
    shown = subprocess.check_output([sys.executable, "-m", "tricomm", *words], text=True, cwd=ROOT)
    assert shown.startswith("reshard\n")
    words[-1] = "X"
    done = subprocess.run(
        [sys.executable, "-m", "tricomm", *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tricomm: ")
    assert "Traceback" not in done.stderr


def test_the_targets_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_public_name_has_a_docstring() -> None:
    import tricomm

    for name in tricomm.__all__:
        assert getattr(tricomm, name).__doc__, name


@pytest.mark.processes
def test_the_pipeline_script_trains(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    training, measuring = blocks("python")[2], blocks("python")[4]
    last_line = "dist.destroy_process_group()\n"
    script.write_text(training.replace(last_line, measuring + last_line))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    losses = {
        (int(step), int(rank)): float(loss)
        for step, rank, loss in re.findall(r"step (\d+), rank (\d): loss of its part ([\d.]+)", done.stdout)
    }
    assert {rank for _, rank in losses} == {1, 2}
    assert all(losses[19, rank] < losses[0, rank] for rank in (1, 2))
    assert re.search(r"^\(StageCost\(forward_seconds=.*\nchosen: ", done.stdout, re.M)
