"""The two example jobs, each of its own torchrun, with nothing in common but an address and a secret."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.connect.jobs import SECRET
from tricomm import Meeting

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "TRICOMM_SECRET": SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
JOBS = {"job_trainer": ("4", "--pushes"), "job_server": ("3", "--versions")}
LONG_SECONDS = 240.0


def children(pid: int) -> list[int]:
    """The processes that a torchrun has started, which are no group of its own."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


class Job:
    """A torchrun and its processes, which write into a file."""

    def __init__(self, example: str, meeting: Meeting, count: int, log: Path) -> None:
        size, option = JOBS[example]
        self.log = log
        with log.open("w") as written:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size,
                    "-m", f"tricomm.examples.{example}", "--meeting", meeting.address, option, str(count),
                ],
                stdout=written, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def outputs(self) -> dict[int, float]:
        """What the model gives at each version, as the job says."""
        found = re.findall(r"^version (\d+): output (-?[\d.]+)$", self.log.read_text(), re.M)
        return {int(version): float(output) for version, output in found}

    def wait_outputs(self, count: int) -> None:
        deadline = time.monotonic() + LONG_SECONDS
        while len(self.outputs()) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def wait_ended(self) -> None:
        assert self.process.wait(LONG_SECONDS) == 0, self.log.read_text()

    def kill(self) -> None:
        """All at once, as when the machine is taken away."""
        for pid in [self.process.pid, *children(self.process.pid)] if self.process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def require_equal(trained: dict[int, float], served: dict[int, float]) -> None:
    """The server's outputs are the trainer's at each version that it has taken, but for the order of sums."""
    for version, output in served.items():
        assert trained[version] == pytest.approx(output, abs=2e-6), f"version {version}"


def test_twenty_pushes_while_the_trainer_trains(meeting: Meeting, tmp_path: Path) -> None:
    jobs = [Job(name, meeting, 20, tmp_path / name) for name in JOBS]
    try:
        for job in jobs:
            job.wait_ended()
    finally:
        for job in jobs:
            job.kill()
    trained, served = (job.outputs() for job in jobs)
    assert len(trained) == len(served) == 20
    assert trained.keys() == served.keys()
    require_equal(trained, served)


def test_a_server_that_comes_late_is_killed_and_starts_again_and_a_trainer_likewise(
    meeting: Meeting, tmp_path: Path
) -> None:
    trainer = Job("job_trainer", meeting, 10**6, tmp_path / "trainer")
    jobs = [trainer]
    try:
        time.sleep(5.0)  # it trains, or is about to, and nobody is there
        first = Job("job_server", meeting, 10**6, tmp_path / "first")
        jobs.append(first)
        first.wait_outputs(3)
        first.kill()
        second = Job("job_server", meeting, 10**6, tmp_path / "second")
        jobs.append(second)
        second.wait_outputs(3)
        trainer.kill()
        before = second.outputs()
        require_equal(trainer.outputs(), {version: output for version, output in before.items() if version > 3})
        again = Job("job_trainer", meeting, 5, tmp_path / "again")
        jobs.append(again)
        again.wait_ended()
        deadline = time.monotonic() + 10
        while not again.outputs().items() <= {**before, **second.outputs()}.items() and time.monotonic() < deadline:
            time.sleep(0.1)
        require_equal(again.outputs(), {v: second.outputs()[v] for v in again.outputs()})
    finally:
        for job in jobs:
            job.kill()
