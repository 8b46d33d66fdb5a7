"""Processes of two jobs that die, stop, come twice or never: what each side sees, and within what time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connect import workers
from tests.connect.workers import SECRET, SIZES, TIMEOUT_SECONDS
from tricomm import Meeting
from tricomm.connect.meeting.host import SILENT_SECONDS

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
PLACES = [(side, rank) for side, size in SIZES.items() for rank in range(size)]
LONG_SECONDS = 90.0
"""For a process to start and answer on a busy machine; what is measured is measured by the process itself."""


class Process:
    """A rank, and what it says."""

    def __init__(self, context: Any, target: Any, address: str, side: str, rank: int, *rest: Any) -> None:
        self.name = f"rank {rank} of {side}"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(address, side, rank, theirs, *rest), daemon=True)
        self.process.start()
        theirs.close()

    def said(self) -> Any:
        assert self.pipe.poll(LONG_SECONDS), f"{self.name} says nothing"
        try:
            return self.pipe.recv()
        except EOFError:
            return None

    def wait_ended(self) -> None:
        self.process.join(LONG_SECONDS)
        assert self.process.exitcode is not None, f"{self.name} goes on"


class Start:
    """Starts processes, from one that has imported everything, and ends them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.connect.workers"])
        self.processes: list[Process] = []

    def __call__(self, target: Any, side: str, rank: int, *rest: Any) -> Process:
        found = Process(self.context, target, self.address, side, rank, *rest)
        self.processes.append(found)
        return found


@pytest.fixture
def start() -> Iterator[Start]:
    with Meeting("tcp://127.0.0.1:0", secret=SECRET) as meeting:
        found = Start(meeting.address)
        yield found
        for one in found.processes:
            one.process.kill()
            one.process.join()


MOMENTS = ["before it comes", "when it is started", "in the move", "before its vote", "after it is published"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", [("trainer", 1), ("server", 1)], ids=["trainer", "server"])
def test_a_rank_that_is_killed_is_named_and_starts_again(start: Start, victim: tuple[str, int], moment: str) -> None:
    ranks = {place: start(workers.work, *place, moment if place == victim else "") for place in PLACES}
    ranks[victim].wait_ended()
    again = start(workers.work, *victim, "restarted")
    number = PLACES.index(victim)
    for place, rank in ranks.items():
        if place == victim:
            continue
        what, text, seconds, dirty = rank.said()
        assert what == "failed", f"{rank.name}: {text}"
        assert f"rank {number}" in text, f"{rank.name}: {text}"
        assert seconds < TIMEOUT_SECONDS, f"{rank.name} took {seconds} s"
        began = moment in ("in the move", "before its vote")
        if began:
            assert bool(dirty) == (place[0] == "server"), f"{rank.name}: {dirty}"
        what, text, _, dirty = rank.said()
        assert what == "done", f"{rank.name}: at most one call is lost, and this is another: {text}"
        assert text == "Latest(version=23, dirty='')"
        assert dirty == ""
    assert again.said()[0] == "done"


@pytest.mark.parametrize("moment", ["in the move", "before its vote"])
@pytest.mark.parametrize("victim", [("trainer", 1), ("server", 1)], ids=["trainer", "server"])
def test_a_rank_that_is_stopped_is_named_within_the_timeout(start: Start, victim: tuple[str, int], moment: str) -> None:
    ranks = {place: start(workers.work, *place, moment if place == victim else "", signal.SIGSTOP) for place in PLACES}
    for place, rank in ranks.items():
        if place != victim:
            what, text, seconds, _ = rank.said()
            assert what == "failed", text
            assert f"rank {PLACES.index(victim)}" in text, f"{rank.name}: {text}"
            assert seconds < 2 * TIMEOUT_SECONDS + 1.0


def test_a_meeting_that_is_killed_is_told_at_once(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    command = [sys.executable, "-m", "tricomm", "meet", "--secret-file", str(secret)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as meeting:
        assert meeting.stdout is not None
        start = Start(meeting.stdout.readline().strip())
        try:
            ranks = [start(workers.work, *place, "") for place in PLACES]
            time.sleep(1.0)
            meeting.kill()
            for rank in ranks:
                # Where it is just then is up to chance, but it is told, and cannot go on.
                said = rank.said()
                assert said is None or "the meeting at" in said[1], said
                rank.wait_ended()
        finally:
            for rank in ranks:
                rank.process.kill()


def test_the_command_ends_well_when_it_is_asked_to(tmp_path: Path) -> None:
    environment = {**os.environ, "TRICOMM_SECRET": SECRET}
    command = [sys.executable, "-m", "tricomm", "meet"]
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as meeting:
            assert meeting.stdout is not None
            assert meeting.stdout.readline().startswith("tcp://127.0.0.1:")
            meeting.send_signal(number)
            assert meeting.wait(LONG_SECONDS) == 0
    environment.pop("TRICOMM_SECRET")
    for extra, word in (([], "there is no secret"), (["--secret-file", str(tmp_path)], "cannot be read")):
        done = subprocess.run(
            [*command, *extra], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        assert done.returncode == 2
        assert word in done.stderr


def test_a_side_that_never_comes_is_named_in_time(start: Start) -> None:
    ranks = [start(workers.come, "trainer", rank, {"timeout_seconds": 3.0}) for rank in range(2)]
    for rank in ranks:
        text, seconds = rank.said()
        assert "ranks 0, 1, 2 of side 'server' since" in text
        assert seconds < 4.0


def test_a_rank_with_a_wrong_secret_is_told_at_once_and_the_others_in_time(start: Start) -> None:
    wrong = start(workers.come, "server", 0, {"secret": "another secret ..."})
    text, seconds = wrong.said()
    assert "it refused the secret" in text
    assert seconds < 2.0
    text, seconds = start(workers.come, "trainer", 0, {"timeout_seconds": 2.0}).said()
    assert "1 connection(s) had a wrong secret" in text
    assert seconds < 3.0


def test_a_rank_that_comes_twice_is_told_and_the_group_goes_on(start: Start) -> None:
    ranks = [start(workers.come, *place, {}) for place in PLACES]
    for rank in ranks:
        assert rank.said()[0] == ""
    text, seconds = start(workers.come, "server", 2, {}).said()
    assert "is here already; start every rank once" in text
    assert f"process {ranks[4].process.pid})" in text
    assert seconds < 6.0
    assert all(rank.process.is_alive() for rank in ranks)


def told(start: Start, victim: tuple[str, int], what: str) -> dict[tuple[str, int], tuple[str, float]]:
    """What each rank says that one of them does, and after how many seconds; of one that is stopped, nothing."""
    ranks = {place: start(workers.abide, *place, what if place == victim else "") for place in PLACES}
    return {place: rank.said() for place, rank in ranks.items() if place != victim or what != "is silent"}


def test_a_job_that_leaves_in_peace_is_named(start: Start) -> None:
    found = told(start, ("trainer", 1), "leaves")
    for place in PLACES[2:]:
        text, seconds = found[place]
        assert "rank 1, which is rank 1 of side 'trainer'" in text
        assert "has left epoch 1" in text
        assert seconds < 3.0


def test_a_host_that_says_nothing_any_more_is_named_after_twenty_seconds(start: Start) -> None:
    for text, seconds in told(start, ("server", 1), "is silent").values():
        assert "rank 3, which is rank 1 of side 'server'" in text
        assert "gave no sign of life for 20 s" in text
        assert SILENT_SECONDS - 2.0 < seconds < SILENT_SECONDS + 5.0


def test_a_rank_that_passes_a_wrong_tensor_is_named(start: Start) -> None:
    found = told(start, ("server", 1), "passes a wrong tensor")
    own, _ = found.pop(("server", 1))
    assert own.startswith("SpecError: ")
    for text, seconds in found.values():
        text = text.replace("rank 3 refused the call", "rank 3")
        assert "the push of version 1 failed: rank 3: SpecError: " in text or "rank 3 failed" in text, text
        assert seconds < TIMEOUT_SECONDS


@pytest.mark.parametrize("what", ["sizes", "order", "versions"])
def test_what_the_sides_do_not_agree_about_is_told_to_both_at_once(start: Start, what: str) -> None:
    other: dict[str, Any] = {
        "sizes": {"side_sizes": {"trainer": 2, "server": 4}},
        "order": {"side_sizes": {"server": 3, "trainer": 2}},
    }
    ranks = [start(workers.come, "trainer", 0, {})]
    if what == "versions":
        ranks.append(start(workers.come_with, "server", 0, "9.9.9"))
    else:
        ranks.append(start(workers.come, "server", 0, other[what]))
    texts, seconds = zip(*(rank.said() for rank in ranks), strict=True)
    assert len(set(texts)) == 1, texts
    for rank in ranks:
        assert f"process {rank.process.pid})" in texts[0]
    words = {"sizes": ["server", " 3", " 4"], "order": ["in the same order"], "versions": ["torch 9.9.9"]}[what]
    assert all(word in texts[0] for word in words), "whoever came first"
    assert min(seconds) < 2.0, "whoever came last"
