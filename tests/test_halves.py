"""``make test`` starts no process but the fixed ranks and one rehearsal; what does is marked ``processes``."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import UnmarkedProcess
from tricomm.launch import Ranks


def nothing() -> None:
    pass


def process_of(rank: int) -> int:
    return os.getpid()


def test_a_test_without_the_marker_may_not_start_a_process() -> None:
    with pytest.raises(UnmarkedProcess, match=r"add @pytest\.mark\.processes"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(UnmarkedProcess, match="on the fixture `ranks`"):
        multiprocessing.get_context("spawn").Process(target=nothing).start()
    with pytest.raises(UnmarkedProcess):
        os.fork()


def test_the_fixed_ranks_are_there_for_every_test(ranks: Ranks) -> None:
    assert len(set(ranks.run(process_of))) == ranks.size


@pytest.mark.processes
def test_a_marked_test_may() -> None:
    assert (
        subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True, check=True).stdout == "1\n"
    )


def test_ci_runs_lint_and_both_halves() -> None:
    root = Path(__file__).resolve().parents[1]
    makefile = (root / "Makefile").read_text()
    assert re.search(r'^test:.*\n\t.* -m "not processes or rehearsal" ', makefile, re.M)
    assert re.search(r'^test-processes:.*\n\t.* -m "processes and not rehearsal" ', makefile, re.M)
    commands = [line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test", "make test-processes"]
